// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// How CPU kernels walk a tensor [outer, channels, inner]: as tiles of lines, each line a run of at most tile_width
// elements that a vectorised loop takes in one go, beside per-element coefficients of the same width.
//
//     rows, and planes of few elements   a line is some neighbouring channels of one index `outer`; each channel's
//                                        coefficient is repeated `inner` times, which the other lines share
//     short rows                         a line is several rows; where there is nothing between them, a single stretch
//     long planes                        a line is a piece of a plane, all of one channel
//
// So one loop serves all layouts. Sums are kept for every element of a line and folded to channels at the end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastprune/channel_layout.h"
#include "instruction_set.h"
#include "parallel.h"

namespace fastprune::cpu {

inline constexpr int64_t tile_width =
    4096;  // two coefficients and a sum fit the L1 cache; shorter lines defeat prefetch
inline constexpr int64_t short_plane = 256;
inline constexpr int64_t short_row = 64;    // of fewer channels several make a line
inline constexpr int64_t row_group = 16;    // or a multiple of these: whole vectors, whatever the number of channels
inline constexpr int64_t plane_line = 128;  // of a long plane: repeating coefficients and folding has to pay off
inline constexpr int64_t task_elements = 16384;           // enough to forget what starting a task costs
inline constexpr int64_t line_grain = 4 * task_elements;  // fewer elements are not worth waking a second thread

/// Lines of the same channels, whose sums belong to one chunk.
struct LineTile {
    int64_t outer, channel, inner;  // the first element
    int64_t channels;
    int64_t repeat;  // neighbouring elements of a line that belong to one channel
    int64_t rows;    // how many rows of these channels a line has, each with its own index `outer`
    bool joined;     // a line is one stretch of memory; otherwise each of its rows is one
    int64_t lines;   // full ones
    int64_t rest;    // width of the last, shorter line; may be 0
    bool gapless;    // lines follow each other; otherwise each begins at its own index `outer`
    int64_t chunk;   // index of the partial sums

    int64_t width() const { return channels * repeat * rows; }
    int64_t all_lines() const { return lines + (rest > 0); }
    /// Elements from one row to the next in a tensor of this outer stride; between gapless lines, to the next line.
    int64_t pitch(int64_t outer_stride) const { return gapless ? repeat : outer_stride; }
};

/// Calls action(row, at, width) for each stretch of the lines from `begin` up to `end`: the first of its rows, counted
/// from the tile's first, its place in the line, and its width. The action is compiled into both places that call it:
/// a single one, whose `at` varies, was a tenth slower for lines of one stretch.
template <class Action>
FASTPRUNE_INLINE void for_each_stretch(const LineTile& tile, int64_t begin, int64_t end, const Action& action) {
    const int64_t rows = tile.rows, channels = tile.channels, rest = tile.rest, full = std::min(end, tile.lines);
    if (tile.joined) {
        int64_t line = begin, last = full, width = tile.width();
        for (int part = 0; part < 2; ++part, last = end, width = rest) {  // the full lines, then the rest
            for (; line < last; ++line) action(line * rows, 0, width);
        }
        return;
    }
    for (int64_t line = begin; line < end; ++line) {
        const int64_t count = line < full ? rows : rest / channels;
        for (int64_t row = 0; row < count; ++row) action(line * rows + row, row * channels, channels);
    }
}

/// How many rows make a line: several if they are short. Depends on the layout alone, since it cuts the sums.
inline int64_t rows_of_line(const ChannelLayout& layout) {
    const bool brief = layout.inner == 1 && layout.channels > 0 && layout.channels < short_row;
    return brief ? std::max<int64_t>(1, short_row / 2 / layout.channels) * row_group : 1;
}

/// Whether the rows of every view follow each other without a gap.
template <class... Views>
bool are_gapless(const ChannelLayout& layout, const Views&... views) {
    return ((views.data == nullptr || views.outer_stride == layout.channels * layout.inner) && ...);
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool has_short_planes(const ChannelLayout& layout) { return layout.inner <= short_plane; }

inline ChannelChunks chunks_of(const ChannelLayout& layout) {
    if (layout.numel() == 0) return {1, 1, 0};
    if (has_short_planes(layout)) {
        const int64_t lines = 4 * task_elements / (layout.channels * layout.inner);
        const int64_t outer = std::max<int64_t>(lines, 32);
        return {outer, layout.inner, ceil_divide(layout.outer, outer)};
    }
    const int64_t pieces = ceil_divide(layout.inner, task_elements);
    const int64_t inner = ceil_divide(ceil_divide(layout.inner, pieces), plane_line) * plane_line;
    return {1, inner, layout.outer * ceil_divide(layout.inner, inner)};
}

/// Calls body(tile) for all tiles of the tensor, in any order, on at most `num_threads` threads. `rows`: rows_of_line,
/// or 1 where nothing is summed. `gapless`: all views that the body goes over.
template <class Body>
void for_each_tile(const ChannelLayout& layout, int64_t rows, bool gapless, int num_threads, const Body& body) {
    const ChannelChunks chunks = chunks_of(layout);
    if (chunks.count == 0) return;
    const int threads = threads_for(layout.numel(), line_grain, num_threads);
    if (has_short_planes(layout)) {
        const int64_t together = tile_width / layout.inner, tiles = ceil_divide(layout.channels, together);
        parallel_for(chunks.count * tiles, threads, [&](int64_t task, int) {
            const int64_t chunk = task / tiles, channel = task % tiles * together, first = chunk * chunks.outer;
            const int64_t channels = std::min(together, layout.channels - channel);
            const int64_t count = std::min(chunks.outer, layout.outer - first);
            body(LineTile{first, channel, 0, channels, layout.inner, rows, gapless || rows == 1, count / rows,
                          count % rows * channels, false, chunk});
        });
        return;
    }
    const int64_t pieces = chunks.count / layout.outer, count = chunks.count * layout.channels;
    const int64_t group = ceil_divide(task_elements, chunks.inner);
    parallel_for(ceil_divide(count, group), threads, [&](int64_t task, int) {
        for (int64_t i = task * group; i < std::min(count, (task + 1) * group); ++i) {
            const int64_t plane = i / pieces, begin = i % pieces * chunks.inner;
            const int64_t outer = plane / layout.channels, size = std::min(chunks.inner, layout.inner - begin);
            body(LineTile{outer, plane % layout.channels, begin, 1, plane_line, 1, true, size / plane_line,
                          size % plane_line, true, outer * pieces + i % pieces});
        }
    });
}

/// The first element of a tile of a view.
template <class T>
T* first_of(const ChannelView<T>& view, const LineTile& tile, const ChannelLayout& layout) {
    if (view.data == nullptr) return nullptr;
    return view.data + tile.outer * view.outer_stride + tile.channel * layout.inner + tile.inner;
}

/// Coefficients of a line; `neutral` for a null vector.
template <class Real>
void fill_line(Real* line, const Real* vector, Real neutral, const LineTile& tile) {
    if (vector == nullptr) {
        std::fill_n(line, tile.width(), neutral);
    } else if (tile.repeat == 1) {
        for (int64_t row = 0; row < tile.rows; ++row) {
            std::copy_n(vector + tile.channel, tile.channels, line + row * tile.channels);
        }
    } else {
        for (int64_t c = 0; c < tile.channels; ++c) {
            std::fill_n(line + c * tile.repeat, tile.repeat, vector[tile.channel + c]);
        }
    }
}

/// Returns the sum of values[0, count) and overwrites them. Adds pairwise: exact, and vectorised.
template <class Real>
Real fold(Real* values, int64_t count) {
    while (count > 1) {
        const int64_t half = (count + 1) / 2;
#pragma omp simd
        for (int64_t i = 0; i < count - half; ++i) values[i] += values[half + i];
        count = half;
    }
    return values[0];
}

/// Adds the sums of a line of several rows, [rows, channels], to those of its channels, in double.
template <class Real>
FASTPRUNE_INLINE void add_rows(const Real* sums, int64_t rows, int64_t channels, double* partial) {
    double totals[row_group * short_row];  // of rows that are row_group apart
    const int64_t together = row_group * channels;
    std::fill_n(totals, together, 0.0);
    for (int64_t row = 0; row < rows; row += row_group) {
#pragma omp simd
        for (int64_t i = 0; i < together; ++i) totals[i] += sums[row * channels + i];
    }
    for (int64_t half = row_group / 2; half > 0; half /= 2) {
#pragma omp simd
        for (int64_t i = 0; i < half * channels; ++i) totals[i] += totals[half * channels + i];
    }
    for (int64_t c = 0; c < channels; ++c) partial[c] += totals[c];
}

/// Adds the sums of a line to the partial sums [chunks, channels], and sets them back to 0. Does nothing for null.
template <class Real>
FASTPRUNE_INLINE void flush_line(Real* sums, const LineTile& tile, const ChannelLayout& layout, double* partials) {
    if (partials == nullptr) return;
    double* partial = partials + tile.chunk * layout.channels + tile.channel;
    if (tile.repeat == 1) {
        if (tile.rows > 1) {
            add_rows(sums, tile.rows, tile.channels, partial);
        } else {
            for (int64_t c = 0; c < tile.channels; ++c) partial[c] += sums[c];
        }
    } else {
        for (int64_t c = 0; c < tile.channels; ++c) partial[c] += fold(sums + c * tile.repeat, tile.repeat);
    }
    std::fill_n(sums, tile.width(), Real{0});
}

/// Adds up the partial sums [chunks, channels] of every channel, in the order of the chunks.
template <class Real>
void combine_chunks(const double* partials, const ChannelLayout& layout, int64_t count, Real* totals) {
    for (int64_t first = 0; first < layout.channels; first += tile_width) {
        const int64_t width = std::min(tile_width, layout.channels - first);
        double sums[tile_width];
        std::fill_n(sums, width, 0.0);
        for (int64_t chunk = 0; chunk < count; ++chunk) {
            const double* partial = partials + chunk * layout.channels + first;
            for (int64_t c = 0; c < width; ++c) sums[c] += partial[c];
        }
        for (int64_t c = 0; c < width; ++c) totals[first + c] = static_cast<Real>(sums[c]);
    }
}

}  // namespace fastprune::cpu
