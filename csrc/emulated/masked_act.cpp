// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The device bodies of masked_act on host threads, block after block.
#include "fastprune/masked_act.h"

#include <vector>

#include "../cuda/masked_act_body.cuh"
#include "block.h"

namespace fastprune::emulated {

template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int num_threads, int warp_size) {
    const auto tasks = device::ChannelTasks::of(args.layout, device::vector_for(args), num_threads, warp_size);
    device::dispatch_vector<Storage>(tasks, [&]<int vector, bool rows>() {
        const auto run = [&]<bool adds>() {
            for (int64_t task = 0; task < tasks.count; ++task) {
                run_block(num_threads, warp_size, [&](const Block& block) {
                    device::masked_act<Storage, vector, rows, adds>(block, args, tasks, task);
                });
            }
        };
        args.residual.data != nullptr ? run.template operator()<true>() : run.template operator()<false>();
    });
    return {};
}

template <class Storage>
Status masked_act_backward(const MaskedActBackwardArgs<Storage>& args, int num_threads, int warp_size) {
    const auto tasks = device::ChannelTasks::of(args.layout, device::vector_for(args), num_threads, warp_size);
    const int64_t each = tasks.chunks.count * args.layout.channels;
    std::vector<double> memory(3 * each);
    const auto partials = device::partials_of(args, memory.data(), each);
    device::dispatch_vector<Storage>(tasks, [&]<int vector, bool rows>() {
        std::vector<Real<Storage>> scratch(num_threads * vector);
        const auto run = [&]<device::Sums sums>() {
            for (int64_t task = 0; task < tasks.count; ++task) {
                run_block(num_threads, warp_size, [&](const Block& block) {
                    device::masked_act_backward<Storage, vector, rows, sums>(block, args, tasks, task, partials,
                                                                             scratch.data());
                });
            }
        };
        switch (device::sums_of(args)) {
            case device::Sums::none: run.template operator()<device::Sums::none>(); break;
            case device::Sums::mask: run.template operator()<device::Sums::mask>(); break;
            case device::Sums::all: run.template operator()<device::Sums::all>(); break;
        }
        return Status{};
    });
    constexpr int combining_threads = 2 * device::combined_channels;
    std::vector<double> scratch(combining_threads);
    for (int64_t task = 0; task * device::combined_channels < args.layout.channels; ++task) {
        run_block(combining_threads, device::combined_channels, [&](const Block& block) {
            device::combine_sums(block, args, partials, tasks.chunks.count, task, scratch.data());
        });
    }
    return {};
}

template Status masked_act(const MaskedActArgs<float>&, int, int);
template Status masked_act(const MaskedActArgs<double>&, int, int);
template Status masked_act(const MaskedActArgs<float16>&, int, int);
template Status masked_act(const MaskedActArgs<bfloat16>&, int, int);
template Status masked_act_backward(const MaskedActBackwardArgs<float>&, int, int);
template Status masked_act_backward(const MaskedActBackwardArgs<double>&, int, int);
template Status masked_act_backward(const MaskedActBackwardArgs<float16>&, int, int);
template Status masked_act_backward(const MaskedActBackwardArgs<bfloat16>&, int, int);

}  // namespace fastprune::emulated
