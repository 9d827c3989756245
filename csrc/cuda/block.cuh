// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The interface between a device body and the thread block that runs it. A body is a template over this interface and
// uses no CUDA built-in, so that emulated/block.h can run the same code on host threads, in tests without a GPU.
#pragma once

#include <cstdint>

namespace fastprune::cuda {

class Block {
   public:
    __device__ __forceinline__ static constexpr int warp_size() { return 32; }
    __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
    __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }

    /// All threads of the block see each other's writes to shared and global memory.
    __device__ __forceinline__ void sync() const { __syncthreads(); }
    /// The same among `warp_size()` neighbouring ranks.
    __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
    /// What this thread wrote to global memory before is seen by other blocks before what it writes after.
    __device__ __forceinline__ void fence() const { __threadfence(); }
    /// Whether `condition` holds for any thread of the block. Synchronises like sync().
    __device__ __forceinline__ bool any(bool condition) const { return __syncthreads_or(condition) != 0; }
    /// Integers only: their sum does not depend on the order of the threads.
    __device__ __forceinline__ uint32_t fetch_add(uint32_t* counter, uint32_t value) const {
        return atomicAdd(counter, value);
    }
    /// `value` of the thread whose rank differs in the bits `lanes`, a power of two below warp_size(). All threads of
    /// the warp take part.
    template <class T>
    __device__ __forceinline__ T shuffle_xor(T value, int lanes) const {
        return __shfl_xor_sync(0xffffffffu, value, lanes);
    }
};

}  // namespace fastprune::cuda
