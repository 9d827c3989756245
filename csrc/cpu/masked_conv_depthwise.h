// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolutions; part of masked_conv_body.h. Taps that lie outside of x are left out, so that nothing is
// copied.

/// A range of taps in one direction.
struct TapRange {
    int64_t begin, end;
};

/// Those of the taps of output `at` that lie in an input of `size`.
inline TapRange taps_inside(const ConvGeometry& g, int d, int64_t at, int64_t size) {
    const int64_t first = at * g.stride[d] - g.padding[d], step = g.dilation[d];
    const int64_t begin = first < 0 ? (-first + step - 1) / step : 0;
    const int64_t end = first >= size ? 0 : (size - 1 - first) / step + 1;
    return {begin, std::max(begin, std::min(end, g.kernel[d]))};
}

/// Outputs [begin, end) of a line, all of whose taps lie in x.
inline TapRange outputs_inside(const MaskedConvArgs& args) {
    const ConvGeometry& g = args.geometry;
    const int64_t span = g.dilation[1] * (g.kernel[1] - 1) + 1;
    const int64_t begin = std::min((g.padding[1] + g.stride[1] - 1) / g.stride[1], args.out_width);
    const int64_t room = args.width + g.padding[1] - span;  // how far the first tap of the last output may be
    const int64_t end = room < 0 ? 0 : std::min(room / g.stride[1] + 1, args.out_width);
    return {begin, std::max(begin, end)};
}

/// Neighbouring outputs of a line: their taps, where the first of these reads for the first output, and what it is
/// multiplied by.
struct DepthwiseStretch {
    TapRange lines, columns;
    int64_t x;            // the place in x of tap (0, 0), outside of it at an edge
    const float* weight;  // of tap (0, 0)
    int64_t channels;     // how many of the panel x has
    int64_t pixel;
};

template <int pixels, int vectors, bool whole>
FASTPRUNE_TARGET void depthwise_tile(const DepthwiseStretch& s, Epilogue& e) {
    const MaskedConvArgs& args = e.args;
    const ConvGeometry& g = args.geometry;
    const int64_t tap_step = g.dilation[1] * args.x.pitch, line_step = g.dilation[0] * args.width * args.x.pitch;
    const int64_t step = g.stride[1] * args.x.pitch;
    Sums<pixels, vectors> sums;
    clear<pixels, vectors>(sums);
    for (int64_t r = s.lines.begin; r < s.lines.end; ++r) {
        for (int64_t c = s.columns.begin; c < s.columns.end; ++c) {
            const float* const from = args.x.data + (s.x + r * line_step + c * tap_step);
            const float* const with = s.weight + (r * g.kernel[1] + c) * panel;
            for (int v = 0; v < vectors; ++v) {
                const Vector tap = load(with + v * width);
#pragma GCC unroll 16
                for (int m = 0; m < pixels; ++m) {
                    const float* const place = from + m * step + v * width;
                    const Vector value = whole ? load(place) : load_first(place, s.channels - v * width);
                    sums[m][v] = multiply_add(value, tap, sums[m][v]);
                }
            }
        }
    }
    finish_tile<pixels, vectors>(e, s.pixel, sums);
}

template <int vectors, bool whole>
FASTPRUNE_TARGET void depthwise_line(const DepthwiseStretch& line, const TapRange& inside, Epilogue& e) {
    const MaskedConvArgs& args = e.args;
    const int64_t step = args.geometry.stride[1] * args.x.pitch;
    const auto stretch_at = [&](int64_t column) {
        DepthwiseStretch s = line;
        s.x += column * step;
        s.pixel += column;
        return s;
    };
    const auto at_edge = [&](int64_t begin, int64_t end) {
        for (int64_t column = begin; column < end; ++column) {
            DepthwiseStretch s = stretch_at(column);
            s.columns = taps_inside(args.geometry, 1, column, args.width);
            depthwise_tile<1, vectors, whole>(s, e);
        }
    };
    constexpr int together = tile_pixels / 2;
    at_edge(0, inside.begin);
    int64_t column = inside.begin;
    for (; column + together <= inside.end; column += together) {
        depthwise_tile<together, vectors, whole>(stretch_at(column), e);
    }
    for (; column < inside.end; ++column) depthwise_tile<1, vectors, whole>(stretch_at(column), e);
    at_edge(inside.end, args.out_width);
}

FASTPRUNE_TARGET inline void depthwise_panel(const MaskedConvArgs& args, int64_t image, int64_t first_line,
                                             int64_t lines, int64_t p, DmaskParts& parts, int64_t task) {
    const ConvGeometry& g = args.geometry;
    Epilogue e = epilogue_of(args, p * panel);
    const TapRange inside = outputs_inside(args);
    const int64_t channels = args.channels - p * panel;
    const float* const weight = args.packed + p * g.kernel[0] * g.kernel[1] * panel;
    for (int64_t y = first_line; y < first_line + lines; ++y) {
        const int64_t top = image * args.height + y * g.stride[0] - g.padding[0];
        const int64_t x = (top * args.width - g.padding[1]) * args.x.pitch + p * panel;
        const DepthwiseStretch line{taps_inside(g, 0, y, args.height),
                                    {0, g.kernel[1]},
                                    x,
                                    weight,
                                    channels,
                                    (image * args.out_height + y) * args.out_width};
        if (e.valid > width) {
            channels >= panel ? depthwise_line<2, true>(line, inside, e) : depthwise_line<2, false>(line, inside, e);
        } else {
            channels >= width ? depthwise_line<1, true>(line, inside, e) : depthwise_line<1, false>(line, inside, e);
        }
    }
    flush_dmask(e, parts, task);
}

/// False if there was no memory.
inline bool depthwise(const MaskedConvArgs& args, int num_threads) {
    const int64_t panels = (args.rows + panel - 1) / panel;
    constexpr int64_t cached = 64 * 1024;  // floats of x that a task goes through once for every panel: a quarter of L2
    const int64_t columns = std::max<int64_t>(args.width, 1);  // an image of none may have outputs, of padding alone
    const double line = static_cast<double>(columns) * static_cast<double>(args.channels) *
                        static_cast<double>(args.geometry.stride[0]);
    const int64_t lines = std::clamp<int64_t>(static_cast<int64_t>(cached / line), 1, args.out_height);
    const int64_t per_image = (args.out_height + lines - 1) / lines, blocks = per_image * args.batch;
    const int64_t pieces = pieces_of_panels(blocks, panels, num_threads);
    DmaskParts parts(args, blocks);
    parallel_for(blocks * pieces, num_threads, [&](int64_t i, int) {
        const int64_t task = i / pieces, piece = i % pieces;
        const int64_t first = task % per_image * lines, count = std::min(lines, args.out_height - first);
        for (int64_t p = panels * piece / pieces; p < panels * (piece + 1) / pieces; ++p) {
            depthwise_panel(args, task / per_image, first, count, p, parts, task);
        }
        complete_streams();
    });
    parts.reduce();
    return true;
}
