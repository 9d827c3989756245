// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The forward pass of masked_act on the CPU. It is bound by memory as long as every variant of the loop is vectorised,
// half precision and exponentials included.
#include "fastprune/masked_act.h"

#include "channel_lines.h"
#include "with_activation.h"

namespace fastprune::cpu {
namespace {

/// What a loop reads and writes. Loops that add a residual write both results: fewer loops to compile.
enum class Streams { y, saved, both, with_residual };

template <class Storage>
struct ForwardTile {
    const Storage *x, *residual;
    Storage* y;
    Storage* saved;
    int64_t x_pitch, residual_pitch, y_pitch, saved_pitch;
    alignas(64) Real<Storage> scale[tile_width];
    alignas(64) Real<Storage> shift[tile_width];
    alignas(64) Real<Storage> mask[tile_width];
};

template <class Storage, Activation activation, Streams streams>
FASTPRUNE_INLINE void forward_line(const ForwardTile<Storage>& tile, int64_t row, int64_t at, int64_t width) {
    const Storage *const x = tile.x + row * tile.x_pitch, *const residual = tile.residual + row * tile.residual_pitch;
    Storage *const y = tile.y + row * tile.y_pitch, *const saved = tile.saved + row * tile.saved_pitch;
    const Real<Storage>*scale = tile.scale + at, *shift = tile.shift + at, *mask = tile.mask + at;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        const Real<Storage> scaled = widen(x[i]) * scale[i] + shift[i];
        const Real<Storage> z = streams == Streams::with_residual ? scaled + widen(residual[i]) : scaled;
        const Real<Storage> r = activate(activation, z);
        if constexpr (streams != Streams::y) saved[i] = narrow<Storage>(saves_input(activation) ? z : r);
        if constexpr (streams != Streams::saved) y[i] = narrow<Storage>(r * mask[i]);
    }
}

/// All lines of a tile: the part that is compiled for every activation and instruction set.
template <class Storage>
using ForwardLines = void (*)(const LineTile& lines, const ForwardTile<Storage>& tile);

template <class Storage, Activation activation, Streams streams>
void forward_lines(const LineTile& lines, const ForwardTile<Storage>& tile) {
    run_vectorised([&]() __attribute__((always_inline)) {
        for_each_stretch(lines, 0, lines.all_lines(),
                         [&](int64_t row, int64_t at, int64_t width) __attribute__((always_inline)) {
                             forward_line<Storage, activation, streams>(tile, row, at, width);
                         });
    });
}

template <class Storage>
ForwardLines<Storage> forward_lines_for(const MaskedActArgs<Storage>& args) {
    return with_activation(args.activation, [&]<Activation activation>() -> ForwardLines<Storage> {
        if (args.residual.data != nullptr) return &forward_lines<Storage, activation, Streams::with_residual>;
        if (args.saved.data == nullptr) return &forward_lines<Storage, activation, Streams::y>;
        if (args.y.data == nullptr) return &forward_lines<Storage, activation, Streams::saved>;
        return &forward_lines<Storage, activation, Streams::both>;
    });
}

}  // namespace

template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int num_threads) {
    const ChannelLayout& layout = args.layout;
    const ForwardLines<Storage> process = forward_lines_for(args);
    const bool adds = args.residual.data != nullptr;
    const bool gapless = are_gapless(layout, args.x, args.residual, args.y, args.saved);
    for_each_tile(layout, gapless ? rows_of_line(layout) : 1, gapless, num_threads, [&](const LineTile& lines) {
        Storage unwanted[tile_width];  // the line of a result that the caller does not want
        ForwardTile<Storage> tile;
        tile.x = first_of(args.x, lines, layout);
        const auto& residual = adds ? args.residual : args.x;  // not read unless there is one
        tile.residual = first_of(residual, lines, layout);
        tile.y = args.y.data != nullptr ? first_of(args.y, lines, layout) : unwanted;
        tile.saved = args.saved.data != nullptr ? first_of(args.saved, lines, layout) : unwanted;
        tile.x_pitch = lines.pitch(args.x.outer_stride);
        tile.residual_pitch = lines.pitch(residual.outer_stride);
        tile.y_pitch = args.y.data != nullptr ? lines.pitch(args.y.outer_stride) : 0;
        tile.saved_pitch = args.saved.data != nullptr ? lines.pitch(args.saved.outer_stride) : 0;
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
