// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_act on CUDA: one launch forward; backward a second one where partial sums are to be combined.
#include <cuda_runtime_api.h>

#include "block.cuh"
#include "device_guard.h"
#include "fastprune/masked_act.h"
#include "masked_act_body.cuh"

namespace fastprune::cuda {
namespace {

constexpr int block_threads = 256, warp_threads = 32;
constexpr int64_t most_blocks = 2147483647;

template <class Storage, int vector, bool rows>
__global__ void __launch_bounds__(block_threads)
    forward_kernel(MaskedActArgs<Storage> args, device::ChannelTasks tasks) {
    device::masked_act<Storage, vector, rows>(Block{}, args, tasks, blockIdx.x);
}

template <class Storage, int vector, bool rows, device::Sums wanted>
__global__ void __launch_bounds__(block_threads)
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

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), int64_t blocks, void* stream, Arguments... arguments) {
    if (blocks > most_blocks) return Status::failed("a tensor of more than 2^31 blocks");
    void* parameters[] = {&arguments...};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(block_threads), parameters, 0, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? Status{} : Status::failed(cudaGetErrorString(error));
}

/// Calls body.template operator()<vector, rows>().
template <class Storage, class Body>
Status dispatch_vector(const ChannelLayout& layout, int vector, const Body& body) {
    constexpr int wide = device::widest_vector<Storage>;
    if (layout.inner == 1) {
        return vector == wide ? body.template operator()<wide, true>() : body.template operator()<1, true>();
    }
    return vector == wide ? body.template operator()<wide, false>() : body.template operator()<1, false>();
}

}  // namespace

template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int device, void* stream) {
    if (args.layout.numel() == 0) return {};
    const DeviceGuard guard(device);
    if (!guard.status().ok()) return guard.status();
    const auto tasks = device::ChannelTasks::of(args.layout, device::vector_for(args), block_threads, warp_threads);
    return dispatch_vector<Storage>(args.layout, tasks.vector, [&]<int vector, bool rows>() {
        return launch(&forward_kernel<Storage, vector, rows>, tasks.count, stream, args, tasks);
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
        const Status status = dispatch_vector<Storage>(args.layout, tasks.vector, [&]<int vector, bool rows>() {
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
