// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The forward pass of masked_act on the CPU. Bound by memory: what counts is that every variant of the loop is
// vectorised, half precision and exponentials included.
#include "fastprune/masked_act.h"

#include "channel_lines.h"
#include "dispatch_activation.h"

namespace fastprune::cpu {
namespace {

template <class Storage>
struct ForwardTile {
    const Storage* x;
    Storage* y;
    Storage* saved;
    alignas(64) Real<Storage> scale[tile_width];
    alignas(64) Real<Storage> shift[tile_width];
    alignas(64) Real<Storage> mask[tile_width];
};

template <class Storage, Activation activation, bool wants_y, bool wants_saved>
FASTPRUNE_INLINE void forward_line(const ForwardTile<Storage>& tile, int64_t at, const Storage* x, Storage* y,
                                   Storage* saved, int64_t width) {
    const Real<Storage>*scale = tile.scale + at, *shift = tile.shift + at, *mask = tile.mask + at;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        const Real<Storage> z = widen(x[i]) * scale[i] + shift[i];
        const Real<Storage> r = activate(activation, z);
        if constexpr (wants_saved) saved[i] = narrow<Storage>(saves_input(activation) ? z : r);
        if constexpr (wants_y) y[i] = narrow<Storage>(r * mask[i]);
    }
}

template <class Storage, Activation activation, bool wants_y, bool wants_saved>
void forward(const MaskedActArgs<Storage>& args, int num_threads) {
    const bool gapless = are_gapless(args.layout, args.x, args.y, args.saved);
    for_each_tile(
        args.layout, gapless ? rows_of_line(args.layout) : 1, gapless, num_threads, [&](const LineTile& lines) {
            ForwardTile<Storage> tile;
            tile.x = first_of(args.x, lines, args.layout);
            tile.y = first_of(args.y, lines, args.layout);
            tile.saved = first_of(args.saved, lines, args.layout);
            fill_line(tile.scale, args.scale, Real<Storage>{1}, lines);
            fill_line(tile.shift, args.shift, -Real<Storage>{0}, lines);  // x + -0 is x, signed zeros included
            fill_line(tile.mask, args.mask, Real<Storage>{1}, lines);
            const int64_t x_pitch = lines.pitch(args.x.outer_stride), y_pitch = lines.pitch(args.y.outer_stride),
                          saved_pitch = lines.pitch(args.saved.outer_stride);
            with_widest_vectors([&]() __attribute__((always_inline)) {
                for_each_stretch(lines, 0, lines.all_lines(),
                                 [&](int64_t row, int64_t at, int64_t width) __attribute__((always_inline)) {
                                     forward_line<Storage, activation, wants_y, wants_saved>(
                                         tile, at, tile.x + row * x_pitch, tile.y + row * y_pitch,
                                         tile.saved + row * saved_pitch, width);
                                 });
            });
        });
}

}  // namespace

template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int num_threads) {
    dispatch_activation(args.activation, [&]<Activation activation>() {
        if (args.saved.data == nullptr) {
            forward<Storage, activation, true, false>(args, num_threads);
        } else if (args.y.data == nullptr) {
            forward<Storage, activation, false, true>(args, num_threads);
        } else {
            forward<Storage, activation, true, true>(args, num_threads);
        }
    });
    return {};
}

template Status masked_act(const MaskedActArgs<float>&, int);
template Status masked_act(const MaskedActArgs<double>&, int);
template Status masked_act(const MaskedActArgs<float16>&, int);
template Status masked_act(const MaskedActArgs<bfloat16>&, int);

}  // namespace fastprune::cpu
