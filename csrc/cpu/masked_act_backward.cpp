// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The backward pass of masked_act on the CPU: one pass over dy and saved that adds to sums kept for every element of a
// line, in the L1 cache. Beside what main memory takes to deliver an element, their loads and stores are nothing.
#include <memory>
#include <vector>

#include "channel_lines.h"
#include "fastprune/masked_act.h"
#include "with_activation.h"

namespace fastprune::cpu {
namespace {

/// How many terms are added in float before their sum is added to a double; half as many for lines of several rows.
constexpr int64_t lines_per_stretch = 32;

/// Which sums a loop computes. Loops with `all` also read x, and with `of_several` add the gradients of other readers:
/// these always write dx.
enum class Sums { none, mask, of_several, all };

template <class Real>
struct Coefficients {
    alignas(64) Real mask[tile_width];
    alignas(64) Real scale[tile_width];
    alignas(64) Real centre[tile_width];
    alignas(64) Real slope[tile_width];
    alignas(64) Real offset[tile_width];
};

template <class Real>
struct LineSums {
    alignas(64) Real mask[tile_width];
    alignas(64) Real shift[tile_width];
    alignas(64) Real scale[tile_width];
};

template <class Storage>
struct Lines {
    const Storage *dy, *saved, *x, *others;
    Storage* dx;
    int64_t dy_pitch, saved_pitch, x_pitch, others_pitch, dx_pitch;
};

template <class Storage, Activation activation, bool wants_dx, Sums wanted>
FASTPRUNE_INLINE void backward_line(const Lines<Storage>& lines, int64_t row, int64_t at, int64_t width,
                                    const Coefficients<Real<Storage>>& coefficients,
                                    LineSums<Real<Storage>>& line_sums) {
    using Value = Real<Storage>;
    const Storage* const dy_line = lines.dy + row * lines.dy_pitch;
    const Storage* const saved_line = lines.saved + row * lines.saved_pitch;
    const Storage* const x_line = lines.x + row * lines.x_pitch;
    const Storage* const others_line = lines.others + row * lines.others_pitch;
    Storage* const dx_line = lines.dx + row * lines.dx_pitch;
    const Value *mask = coefficients.mask + at, *scale = coefficients.scale + at, *centre = coefficients.centre + at,
                *slope = coefficients.slope + at, *offset = coefficients.offset + at;
    Value *mask_sums = line_sums.mask + at, *shift_sums = line_sums.shift + at, *scale_sums = line_sums.scale + at;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        Value dy = widen(dy_line[i]);
        if constexpr (wanted == Sums::of_several) dy += widen(others_line[i]);
        const Activated<Value> r = reactivate(activation, widen(saved_line[i]));
        const Value dz = masked_gradient(dy, mask[i], r.derivative);
        Value dx = dz * scale[i];
        if constexpr (wanted >= Sums::mask) mask_sums[i] += dy * r.value;
        if constexpr (wanted == Sums::all) {
            const Value x = widen(x_line[i]) - centre[i];
            shift_sums[i] += dz;
            scale_sums[i] += dz * x;
            dx = dx + (x * slope[i] + offset[i]);
        }
        if constexpr (wants_dx) dx_line[i] = narrow<Storage>(dx);
    }
}

/// Some lines of a tile: the part that is compiled for every activation and instruction set.
template <class Storage>
using BackwardLines = void (*)(const LineTile& tile, int64_t begin, int64_t end, const Lines<Storage>& lines,
                               const Coefficients<Real<Storage>>& coefficients, LineSums<Real<Storage>>& sums);

template <class Storage, Activation activation, bool wants_dx, Sums wanted>
void backward_lines(const LineTile& tile, int64_t begin, int64_t end, const Lines<Storage>& lines,
                    const Coefficients<Real<Storage>>& coefficients, LineSums<Real<Storage>>& sums) {
    run_vectorised([&]() __attribute__((always_inline)) {
        for_each_stretch(tile, begin, end, [&](int64_t row, int64_t at, int64_t width) __attribute__((always_inline)) {
            backward_line<Storage, activation, wants_dx, wanted>(lines, row, at, width, coefficients, sums);
        });
    });
}

template <class Storage>
BackwardLines<Storage> backward_lines_for(const MaskedActBackwardArgs<Storage>& args, Sums wanted) {
    const bool wants_dx = args.dx.data != nullptr;
    return with_activation(args.activation, [&]<Activation activation>() -> BackwardLines<Storage> {
        switch (wanted) {
            case Sums::none: break;
            case Sums::of_several: return &backward_lines<Storage, activation, true, Sums::of_several>;
            case Sums::mask:
                return wants_dx ? &backward_lines<Storage, activation, true, Sums::mask>
                                : &backward_lines<Storage, activation, false, Sums::mask>;
            case Sums::all:
                return wants_dx ? &backward_lines<Storage, activation, true, Sums::all>
                                : &backward_lines<Storage, activation, false, Sums::all>;
        }
        return &backward_lines<Storage, activation, true, Sums::none>;
    });
}

template <class Storage>
Sums wanted_sums(const MaskedActBackwardArgs<Storage>& args) {
    if (args.dshift != nullptr || args.dscale != nullptr || args.slope != nullptr) return Sums::all;
    if (args.others.data != nullptr) return Sums::of_several;
    return args.dmask != nullptr ? Sums::mask : Sums::none;
}

/// Partial sums [chunks, channels] of those that the caller wants, else null.
struct Partials {
    double *mask, *shift, *scale;
};

template <class Real>
void flush_sums(LineSums<Real>& sums, const LineTile& tile, const ChannelLayout& layout, const Partials& partials) {
    run_vectorised([&]() __attribute__((always_inline)) {
        flush_line(sums.mask, tile, layout, partials.mask);
        flush_line(sums.shift, tile, layout, partials.shift);
        flush_line(sums.scale, tile, layout, partials.scale);
    });
}

template <class Storage>
void run_backward(const MaskedActBackwardArgs<Storage>& args, const Partials& partials, int num_threads) {
    using Value = Real<Storage>;
    const Sums wanted = wanted_sums(args);
    const BackwardLines<Storage> process = backward_lines_for(args, wanted);
    const auto& x = args.x.data != nullptr
                        ? args.x
                        : args.saved;  // null where dshift is the only sum; the loop then reads `saved` in vain
    const auto& others = args.others.data != nullptr ? args.others : args.dy;  // not read unless there are any
    const bool gapless = are_gapless(args.layout, args.dy, args.saved, x, args.others, args.dx);
    for_each_tile(args.layout, rows_of_line(args.layout), gapless, num_threads, [&](const LineTile& tile) {
        Coefficients<Value> coefficients;
        fill_line(coefficients.mask, args.mask, Value{1}, tile);
        fill_line(coefficients.scale, args.scale, Value{1}, tile);
        LineSums<Value> sums;
        if (wanted != Sums::none) std::fill_n(sums.mask, tile.width(), Value{0});
        if (wanted == Sums::all) {
            fill_line(coefficients.centre, args.centre, Value{0}, tile);
            fill_line(coefficients.slope, args.slope, Value{0}, tile);
            fill_line(coefficients.offset, args.offset, -Value{0}, tile);
            std::fill_n(sums.shift, tile.width(), Value{0});
            std::fill_n(sums.scale, tile.width(), Value{0});
        }
        Storage unwanted[tile_width];
        const bool wants_dx = args.dx.data != nullptr;
        const Lines<Storage> lines{first_of(args.dy, tile, args.layout),
                                   first_of(args.saved, tile, args.layout),
                                   first_of(x, tile, args.layout),
                                   first_of(others, tile, args.layout),
                                   wants_dx ? first_of(args.dx, tile, args.layout) : unwanted,
                                   tile.pitch(args.dy.outer_stride),
                                   tile.pitch(args.saved.outer_stride),
                                   tile.pitch(x.outer_stride),
                                   tile.pitch(others.outer_stride),
                                   wants_dx ? tile.pitch(args.dx.outer_stride) : 0};
        const int64_t count = tile.all_lines();
        const int64_t stretch = tile.rows > 1 ? lines_per_stretch / 2 : lines_per_stretch;
        for (int64_t begin = 0; begin < count; begin += stretch) {
            process(tile, begin, std::min(begin + stretch, count), lines, coefficients, sums);
            if (wanted != Sums::none) flush_sums(sums, tile, args.layout, partials);
        }
    });
}

}  // namespace

template <class Storage>
Status masked_act_backward(const MaskedActBackwardArgs<Storage>& args, int num_threads) {
    const int64_t count = chunks_of(args.layout).count;
    Real<Storage>* const totals[] = {args.dmask, args.dshift, args.dscale};
    std::vector<double> memory[3];
    for (int i = 0; i < 3; ++i) {
        if (totals[i] != nullptr) memory[i].resize(count * args.layout.channels);
    }
    const auto partials_of = [&](int i) { return totals[i] != nullptr ? memory[i].data() : nullptr; };
    run_backward(args, {partials_of(0), partials_of(1), partials_of(2)}, num_threads);
    for (int i = 0; i < 3; ++i) {
        if (totals[i] != nullptr) combine_chunks(memory[i].data(), args.layout, count, totals[i]);
    }
    return {};
}

template Status masked_act_backward(const MaskedActBackwardArgs<float>&, int);
template Status masked_act_backward(const MaskedActBackwardArgs<double>&, int);
template Status masked_act_backward(const MaskedActBackwardArgs<float16>&, int);
template Status masked_act_backward(const MaskedActBackwardArgs<bfloat16>&, int);

}  // namespace fastprune::cpu
