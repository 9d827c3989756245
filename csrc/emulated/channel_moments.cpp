// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The device bodies of channel_moments on host threads, block after block.
#include "fastprune/channel_moments.h"

#include <vector>

#include "../cuda/channel_moments_body.cuh"
#include "block.h"

namespace fastprune::emulated {

template <class Storage>
Status channel_moments(const ChannelMomentsArgs<Storage>& args, int num_threads, int warp_size) {
    const auto tasks = device::ChannelTasks::of(args.layout, device::vector_for(args), num_threads, warp_size);
    std::vector<double> partials(2 * tasks.chunks.count * args.layout.channels);
    device::dispatch_vector<Storage>(tasks, [&]<int vector, bool rows>() {
        std::vector<double> scratch(num_threads * vector);
        for (int64_t task = 0; task < tasks.count; ++task) {
            run_block(num_threads, warp_size, [&](const Block& block) {
                device::add_moments<Storage, vector, rows>(block, args, tasks, task, partials.data(), scratch.data());
            });
        }
        return Status{};
    });
    constexpr int combining_threads = 2 * device::combined_channels;
    std::vector<double> scratch(combining_threads);
    for (int64_t task = 0; task * device::combined_channels < args.layout.channels; ++task) {
        run_block(combining_threads, device::combined_channels, [&](const Block& block) {
            device::combine_moments(block, args, partials.data(), tasks.chunks.count, task, scratch.data());
        });
    }
    return {};
}

template Status channel_moments(const ChannelMomentsArgs<float>&, int, int);
template Status channel_moments(const ChannelMomentsArgs<double>&, int, int);
template Status channel_moments(const ChannelMomentsArgs<float16>&, int, int);
template Status channel_moments(const ChannelMomentsArgs<bfloat16>&, int, int);

}  // namespace fastprune::emulated
