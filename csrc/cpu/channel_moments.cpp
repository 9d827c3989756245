// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// channel_moments on the CPU: one pass, with sums in double for every element of a line.
#include "fastprune/channel_moments.h"

#include <vector>

#include "channel_lines.h"

namespace fastprune::cpu {
namespace {

template <class Storage>
FASTPRUNE_INLINE void add_line(const Storage* x, const double* first, double* sums, double* square_sums,
                               int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        const double d = static_cast<double>(widen(x[i])) - first[i];
        sums[i] += d;
        square_sums[i] += d * d;
    }
}

}  // namespace

template <class Storage>
Status channel_moments(const ChannelMomentsArgs<Storage>& args, int num_threads) {
    const ChannelLayout& layout = args.layout;
    const int64_t count = chunks_of(layout).count;
    std::vector<double> first(layout.channels), sum_partials(count * layout.channels),
        square_partials(count * layout.channels);
    for (int64_t c = 0; c < layout.channels; ++c) first[c] = static_cast<double>(widen(args.x.data[c * layout.inner]));

    for_each_tile(layout, rows_of_line(layout), are_gapless(layout, args.x), num_threads, [&](const LineTile& tile) {
        alignas(64) double firsts[tile_width], sums[tile_width], square_sums[tile_width];
        fill_line(firsts, first.data(), 0.0, tile);
        std::fill_n(sums, tile.width(), 0.0);
        std::fill_n(square_sums, tile.width(), 0.0);
        const Storage* x = first_of(args.x, tile, layout);
        const int64_t pitch = tile.pitch(args.x.outer_stride);
        run_vectorised([&]() __attribute__((always_inline)) {
            for_each_stretch(tile, 0, tile.all_lines(),
                             [&](int64_t row, int64_t at, int64_t width) __attribute__((always_inline)) {
                                 add_line(x + row * pitch, firsts + at, sums + at, square_sums + at, width);
                             });
        });
        flush_line(sums, tile, layout, sum_partials.data());
        flush_line(square_sums, tile, layout, square_partials.data());
    });

    std::vector<double> sums(layout.channels), square_sums(layout.channels);
    combine_chunks(sum_partials.data(), layout, count, sums.data());
    combine_chunks(square_partials.data(), layout, count, square_sums.data());
    const auto values = static_cast<double>(layout.outer * layout.inner);
    for (int64_t c = 0; c < layout.channels; ++c) {
        const Moments moments = Moments::of(first[c], sums[c], square_sums[c], values);
        args.mean[c] = static_cast<Real<Storage>>(moments.mean);
        args.variance[c] = static_cast<Real<Storage>>(moments.variance);
    }
    return {};
}

template Status channel_moments(const ChannelMomentsArgs<float>&, int);
template Status channel_moments(const ChannelMomentsArgs<double>&, int);
template Status channel_moments(const ChannelMomentsArgs<float16>&, int);
template Status channel_moments(const ChannelMomentsArgs<bfloat16>&, int);

}  // namespace fastprune::cpu
