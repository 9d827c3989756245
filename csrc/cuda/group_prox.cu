// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// group_prox on CUDA: one launch over the items of the plan, a second one over its tiles.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "block.cuh"
#include "device_guard.h"
#include "fastprune/group_prox.h"
#include "group_prox_body.cuh"

namespace fastprune::cuda {
namespace {

constexpr int block_threads = 256;

template <class T>
__global__ void __launch_bounds__(block_threads) group_prox_items_kernel(GroupProxArgs<T> args) {
    __shared__ double sums[max_tile_width];
    __shared__ uint32_t last[max_tile_width];
    device::group_prox_items(Block{}, args, blockIdx.x, gridDim.x, device::ProxScratch{sums, last});
}

template <class T>
__global__ void __launch_bounds__(block_threads) group_prox_tiles_kernel(GroupProxArgs<T> args) {
    device::group_prox_tile(Block{}, args, blockIdx.x);
}

template <class T>
Status launch(void (*kernel)(GroupProxArgs<T>), int64_t num_blocks, const GroupProxArgs<T>& args, void* stream) {
    GroupProxArgs<T> arguments = args;
    void* parameters[] = {&arguments};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_blocks)),
                         dim3(block_threads), parameters, 0, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? Status{} : Status::failed(cudaGetErrorString(error));
}

}  // namespace

template <class T>
Status group_prox(const GroupProxArgs<T>& args, int device, void* stream) {
    if (args.plan.num_units == 0) return {};
    const DeviceGuard guard(device);
    if (!guard.status().ok()) return guard.status();
    // At least one block: units without elements have norms to be written, too.
    const Status status = launch(&group_prox_items_kernel<T>, std::max<int64_t>(args.plan.num_items, 1), args, stream);
    if (!status.ok() || args.plan.num_tiles == 0 || args.threshold == nullptr) return status;
    return launch(&group_prox_tiles_kernel<T>, args.plan.num_tiles, args, stream);
}

template Status group_prox(const GroupProxArgs<float>&, int, void*);
template Status group_prox(const GroupProxArgs<double>&, int, void*);

}  // namespace fastprune::cuda
