// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// channel_moments for one thread block: what the GPU runs, and what emulated/channel_moments.cpp runs on the host.
#pragma once

#include <cstdint>

#include "channel_runs.cuh"
#include "fastprune/channel_moments.h"

namespace fastprune::device {

/// The value that the sums of a channel are taken relative to.
template <class Storage>
FASTPRUNE_DEVICE double first_value(const ChannelMomentsArgs<Storage>& args, int64_t channel) {
    return static_cast<double>(widen(args.x.data[channel * args.layout.inner]));
}

/// Partial sums [2, chunks, channels]. `scratch`: shared memory, for rows a double for each element of every vector.
template <class Storage, int vector, bool rows, class Block>
FASTPRUNE_DEVICE void add_moments(const Block& block, const ChannelMomentsArgs<Storage>& args,
                                  const ChannelTasks& tasks, int64_t task, double* partials, double* scratch) {
    constexpr int in_flight = 4;
    constexpr int channels = rows ? vector : 1;
    const Run run = rows ? row_run(block, tasks, task) : plane_run(block, tasks, task);
    double first[channels], sums[channels] = {}, square_sums[channels] = {};
    FASTPRUNE_UNROLL
    for (int v = 0; v < channels; ++v) first[v] = run.count > 0 ? first_value(args, run.channel + v) : 0;
    const Storage* x = run.first(args.x, args.layout);
    const int64_t step = run.step(args.x);
    for (int64_t k = 0; k < run.count; k += in_flight) {
        Vector<Storage, vector> loaded[in_flight] = {};
        FASTPRUNE_UNROLL
        for (int j = 0; j < in_flight; ++j) {
            if (k + j < run.count) loaded[j] = load<Storage, vector>(x + (k + j) * step);
        }
        FASTPRUNE_UNROLL
        for (int j = 0; j < in_flight; ++j) {
            if (k + j >= run.count) continue;
            FASTPRUNE_UNROLL
            for (int v = 0; v < vector; ++v) {
                const int c = rows ? v : 0;
                const double d = static_cast<double>(widen(loaded[j].values[v])) - first[c];
                sums[c] += d;
                square_sums[c] += d * d;
            }
        }
    }
    double* const square_partials = partials + tasks.chunks.count * args.layout.channels;
    if constexpr (rows) {
        store_row_sums<vector>(block, tasks, task, sums, scratch, partials);
        store_row_sums<vector>(block, tasks, task, square_sums, scratch, square_partials);
    } else {
        store_plane_sum(block, tasks, run, sums[0], partials);
        store_plane_sum(block, tasks, run, square_sums[0], square_partials);
    }
}

/// The moments of combined_channels channels. `scratch`: shared memory, a double for every thread.
template <class Storage, class Block>
FASTPRUNE_DEVICE void combine_moments(const Block& block, const ChannelMomentsArgs<Storage>& args,
                                      const double* partials, int64_t num_chunks, int64_t task, double* scratch) {
    const int64_t channels = args.layout.channels, channel = task * combined_channels + block.rank();
    const double sum = combined_partials(block, partials, num_chunks, channels, task, scratch);
    const double square_sum =
        combined_partials(block, partials + num_chunks * channels, num_chunks, channels, task, scratch);
    if (block.rank() >= combined_channels || channel >= channels) return;
    const auto values = static_cast<double>(args.layout.outer * args.layout.inner);
    const Moments moments = Moments::of(first_value(args, channel), sum, square_sum, values);
    args.mean[channel] = static_cast<Real<Storage>>(moments.mean);
    args.variance[channel] = static_cast<Real<Storage>>(moments.variance);
}

template <class Storage>
int vector_for(const ChannelMomentsArgs<Storage>& args) {
    constexpr int wide = widest_vector<Storage>;
    return divides(args.layout, wide) && can_load(args.x, wide) ? wide : 1;
}

}  // namespace fastprune::device
