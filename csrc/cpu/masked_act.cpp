// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The forward pass of masked_act on the CPU. It is bound by memory as long as every variant of the loop is vectorised,
// half precision and exponentials included.
#include "fastprune/masked_act.h"

#include "channel_lines.h"
#include "with_activation.h"

namespace fastprune::cpu {
namespace {

template <class Storage>
struct ForwardTile {
    const Storage* x;
    Storage* y;
    Storage* saved;
    int64_t x_pitch, y_pitch, saved_pitch;
    alignas(64) Real<Storage> scale[tile_width];
    alignas(64) Real<Storage> shift[tile_width];
    alignas(64) Real<Storage> mask[tile_width];
};

template <class Storage, Activation activation, bool wants_y, bool wants_saved>
FASTPRUNE_INLINE void forward_line(const ForwardTile<Storage>& tile, int64_t row, int64_t at, int64_t width) {
    const Storage* const x = tile.x + row * tile.x_pitch;
    Storage *const y = tile.y + row * tile.y_pitch, *const saved = tile.saved + row * tile.saved_pitch;
    const Real<Storage>*scale = tile.scale + at, *shift = tile.shift + at, *mask = tile.mask + at;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        const Real<Storage> z = widen(x[i]) * scale[i] + shift[i];
        const Real<Storage> r = activate(activation, z);
        if constexpr (wants_saved) saved[i] = narrow<Storage>(saves_input(activation) ? z : r);
        if constexpr (wants_y) y[i] = narrow<Storage>(r * mask[i]);
    }
}

/// All lines of a tile: the part that is compiled for every activation and instruction set.
template <class Storage>
using ForwardLines = void (*)(const LineTile& lines, const ForwardTile<Storage>& tile);

template <class Storage, Activation activation, bool wants_y, bool wants_saved>
void forward_lines(const LineTile& lines, const ForwardTile<Storage>& tile) {
    run_vectorised([&]() __attribute__((always_inline)) {
        for_each_stretch(lines, 0, lines.all_lines(),
                         [&](int64_t row, int64_t at, int64_t width) __attribute__((always_inline)) {
                             forward_line<Storage, activation, wants_y, wants_saved>(tile, row, at, width);
                         });
    });
}

template <class Storage>
ForwardLines<Storage> forward_lines_for(const MaskedActArgs<Storage>& args) {
    return with_activation(args.activation, [&]<Activation activation>() -> ForwardLines<Storage> {
        if (args.saved.data == nullptr) return &forward_lines<Storage, activation, true, false>;
        if (args.y.data == nullptr) return &forward_lines<Storage, activation, false, true>;
        return &forward_lines<Storage, activation, true, true>;
    });
}

}  // namespace

template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int num_threads) {
    const ChannelLayout& layout = args.layout;
    const ForwardLines<Storage> process = forward_lines_for(args);
    const bool gapless = are_gapless(layout, args.x, args.y, args.saved);
    for_each_tile(layout, gapless ? rows_of_line(layout) : 1, gapless, num_threads, [&](const LineTile& lines) {
        ForwardTile<Storage> tile;
        tile.x = first_of(args.x, lines, layout);
        tile.y = first_of(args.y, lines, layout);
        tile.saved = first_of(args.saved, lines, layout);
        tile.x_pitch = lines.pitch(args.x.outer_stride);
        tile.y_pitch = lines.pitch(args.y.outer_stride);
        tile.saved_pitch = lines.pitch(args.saved.outer_stride);
        fill_line(tile.scale, args.scale, Real<Storage>{1}, lines);
        fill_line(tile.shift, args.shift, -Real<Storage>{0}, lines);  // x + -0 is x, signed zeros included
        fill_line(tile.mask, args.mask, Real<Storage>{1}, lines);
        process(lines, tile);
    });
    return {};
}

template Status masked_act(const MaskedActArgs<float>&, int);
template Status masked_act(const MaskedActArgs<double>&, int);
template Status masked_act(const MaskedActArgs<float16>&, int);
template Status masked_act(const MaskedActArgs<bfloat16>&, int);

}  // namespace fastprune::cpu
