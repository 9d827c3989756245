// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// channel_moments on CUDA: partial sums, then their combination.
#include "block.cuh"
#include "channel_moments_body.cuh"
#include "device_guard.h"
#include "fastprune/channel_moments.h"
#include "launch.h"

namespace fastprune::cuda {
namespace {

template <class Storage, int vector, bool rows>
__global__ void __launch_bounds__(block_threads)
    moments_kernel(ChannelMomentsArgs<Storage> args, device::ChannelTasks tasks, double* partials) {
    __shared__ double scratch[rows ? block_threads * vector : 1];
    device::add_moments<Storage, vector, rows>(Block{}, args, tasks, blockIdx.x, partials, scratch);
}

template <class Storage>
__global__ void __launch_bounds__(block_threads)
    combine_kernel(ChannelMomentsArgs<Storage> args, const double* partials, int64_t num_chunks) {
    __shared__ double scratch[block_threads];
    device::combine_moments(Block{}, args, partials, num_chunks, blockIdx.x, scratch);
}

}  // namespace

int64_t channel_moments_partials(const ChannelLayout& layout) {
    return 2 * device::chunks_of(layout).count * layout.channels;
}

template <class Storage>
Status channel_moments(const ChannelMomentsArgs<Storage>& args, double* partials, int device, void* stream) {
    if (args.layout.numel() == 0) return {};
    const DeviceGuard guard(device);
    if (!guard.status().ok()) return guard.status();
    const auto tasks = device::ChannelTasks::of(args.layout, device::vector_for(args), block_threads, warp_threads);
    const Status status = device::dispatch_vector<Storage>(tasks, [&]<int vector, bool rows>() {
        return launch(&moments_kernel<Storage, vector, rows>, tasks.count, stream, args, tasks, partials);
    });
    if (!status.ok()) return status;
    const int64_t blocks = device::ceil_divide(args.layout.channels, device::combined_channels);
    const double* read = partials;
    return launch(&combine_kernel<Storage>, blocks, stream, args, read, tasks.chunks.count);
}

template Status channel_moments(const ChannelMomentsArgs<float>&, double*, int, void*);
template Status channel_moments(const ChannelMomentsArgs<double>&, double*, int, void*);
template Status channel_moments(const ChannelMomentsArgs<float16>&, double*, int, void*);
template Status channel_moments(const ChannelMomentsArgs<bfloat16>&, double*, int, void*);

}  // namespace fastprune::cuda
