// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// topk_mask on CUDA: one launch, one block per group.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "block.cuh"
#include "device_guard.h"
#include "fastprune/topk_mask.h"
#include "topk_mask_body.cuh"

namespace fastprune::cuda {
namespace {

constexpr int block_threads = 512;
constexpr int64_t largest_capacity = 8192;  // 64 KiB of float items, 128 KiB of double ones

template <class Score>
__global__ void __launch_bounds__(block_threads) topk_mask_kernel(TopkMaskArgs<Score> args, int64_t capacity) {
    extern __shared__ __align__(16) unsigned char memory[];
    const auto scratch = device::TopkScratch<Score>::of(memory, capacity);
    device::topk_mask(Block{}, args, blockIdx.x, scratch);
}

/// The most items that a group of `num_units` can use and this device can hold.
template <class Score>
int64_t capacity_for(int64_t num_units, int64_t shared_bytes) {
    int64_t capacity = largest_capacity;
    while (capacity / 2 >= num_units || device::TopkScratch<Score>::bytes(capacity) > shared_bytes) capacity /= 2;
    return capacity;
}

}  // namespace

template <class Score>
Status topk_mask(const TopkMaskArgs<Score>& args, int device, void* stream) {
    if (args.num_units == 0) return {};
    const DeviceGuard guard(device);
    if (!guard.status().ok()) return guard.status();

    int shared_limit = 0;
    cudaError_t error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return Status::failed(cudaGetErrorString(error));
    TopkMaskArgs<Score> arguments = args;
    int64_t capacity = capacity_for<Score>(args.num_units, shared_limit);
    const auto shared_bytes = static_cast<size_t>(device::TopkScratch<Score>::bytes(capacity));
    const auto* kernel = reinterpret_cast<const void*>(&topk_mask_kernel<Score>);
    if (shared_bytes > 48 * 1024) {  // above it CUDA wants to be asked
        error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return Status::failed(cudaGetErrorString(error));
    }
    void* parameters[] = {&arguments, &capacity};
    error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(args.num_groups)), dim3(block_threads), parameters,
                             shared_bytes, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? Status{} : Status::failed(cudaGetErrorString(error));
}

template Status topk_mask(const TopkMaskArgs<float>&, int, void*);
template Status topk_mask(const TopkMaskArgs<double>&, int, void*);

}  // namespace fastprune::cuda
