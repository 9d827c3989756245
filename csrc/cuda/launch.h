// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Launches of per-channel kernels: blocks of one size, one task each.
#pragma once

#include <cuda_runtime_api.h>

#include "channel_runs.cuh"
#include "fastprune/status.h"

namespace fastprune::cuda {

inline constexpr int block_threads = 256, warp_threads = 32;

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), int64_t blocks, void* stream, Arguments... arguments) {
    if (blocks > 2147483647) return Status::failed("a tensor of more than 2^31 blocks");
    void* parameters[] = {&arguments...};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(block_threads), parameters, 0, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? Status{} : Status::failed(cudaGetErrorString(error));
}

}  // namespace fastprune::cuda
