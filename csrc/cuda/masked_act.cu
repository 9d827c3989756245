// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_act on CUDA: one launch forward; backward a second one where partial sums are to be combined.
#include "block.cuh"
#include "device_guard.h"
#include "fastprune/masked_act.h"
#include "launch.h"
#include "masked_act_body.cuh"

namespace fastprune::cuda {
namespace {

/// Forward blocks that a multiprocessor shall hold: three of them keep 48 KiB of reads in flight. Backward two keep 64;
/// three would spill, and so would three forward blocks of double.
template <class Storage>
constexpr int blocks_for = sizeof(Storage) == 8 ? 2 : 3;

template <class Storage, int vector, bool rows, bool adds>
__global__ void __launch_bounds__(block_threads, blocks_for<Storage>)
    forward_kernel(MaskedActArgs<Storage> args, device::ChannelTasks tasks) {
    device::masked_act<Storage, vector, rows, adds>(Block{}, args, tasks, blockIdx.x);
}

template <class Storage, int vector, bool rows, device::Sums wanted>
__global__ void __launch_bounds__(block_threads, wanted == device::Sums::all ? 1 : 2)
    backward_kernel(MaskedActBackwardArgs<Storage> args, device::ChannelTasks tasks, device::SumPartials partials) {
    __shared__ Real<Storage> scratch[rows && wanted != device::Sums::none ? block_threads * vector : 1];
    device::masked_act_backward<Storage, vector, rows, wanted>(Block{}, args, tasks, blockIdx.x, partials, scratch);
}

template <class Storage>
__global__ void __launch_bounds__(block_threads)
    combine_kernel(MaskedActBackwardArgs<Storage> args, device::SumPartials partials, int64_t num_chunks) {
    __shared__ double scratch[block_threads];
    device::combine_sums(Block{}, args, partials, num_chunks, blockIdx.x, scratch);
}

}  // namespace

template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int device, void* stream) {
    if (args.layout.numel() == 0) return {};
    const DeviceGuard guard(device);
    if (!guard.status().ok()) return guard.status();
    const auto tasks = device::ChannelTasks::of(args.layout, device::vector_for(args), block_threads, warp_threads);
    return device::dispatch_vector<Storage>(tasks, [&]<int vector, bool rows>() {
        const bool adds = args.residual.data != nullptr;
        return launch(
            adds ? &forward_kernel<Storage, vector, rows, true> : &forward_kernel<Storage, vector, rows, false>,
            tasks.count, stream, args, tasks);
    });
}

int64_t masked_act_partials(const ChannelLayout& layout) { return device::chunks_of(layout).count * layout.channels; }

template <class Storage>
Status masked_act_backward(const MaskedActBackwardArgs<Storage>& args, double* memory, int device, void* stream) {
    const DeviceGuard guard(device);
    if (!guard.status().ok()) return guard.status();
    const auto tasks = device::ChannelTasks::of(args.layout, device::vector_for(args), block_threads, warp_threads);
    const auto partials = device::partials_of(args, memory, masked_act_partials(args.layout));
    const device::Sums wanted = device::sums_of(args);
    if (tasks.count > 0) {
        const Status status = device::dispatch_vector<Storage>(tasks, [&]<int vector, bool rows>() {
            const auto run = [&]<device::Sums sums>() {
                return launch(&backward_kernel<Storage, vector, rows, sums>, tasks.count, stream, args, tasks,
                              partials);
            };
            if (wanted == device::Sums::all) return run.template operator()<device::Sums::all>();
            if (wanted == device::Sums::mask) return run.template operator()<device::Sums::mask>();
            return run.template operator()<device::Sums::none>();
        });
        if (!status.ok()) return status;
    }
    const bool sums = args.dmask != nullptr || args.dshift != nullptr || args.dscale != nullptr;
    if (!sums || args.layout.channels == 0) return {};
    const int64_t blocks = device::ceil_divide(args.layout.channels, device::combined_channels);
    return launch(&combine_kernel<Storage>, blocks, stream, args, partials, tasks.chunks.count);
}

template Status masked_act(const MaskedActArgs<float>&, int, void*);
template Status masked_act(const MaskedActArgs<double>&, int, void*);
template Status masked_act(const MaskedActArgs<float16>&, int, void*);
template Status masked_act(const MaskedActArgs<bfloat16>&, int, void*);
template Status masked_act_backward(const MaskedActBackwardArgs<float>&, double*, int, void*);
template Status masked_act_backward(const MaskedActBackwardArgs<double>&, double*, int, void*);
template Status masked_act_backward(const MaskedActBackwardArgs<float16>&, double*, int, void*);
template Status masked_act_backward(const MaskedActBackwardArgs<bfloat16>&, double*, int, void*);

}  // namespace fastprune::cuda
