// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The direct algorithm; part of masked_conv_body.h.

/// How a direct convolution is cut: tasks of output lines, or of pixels where lines do not matter.
struct DirectPlan {
    const MaskedConvArgs& args;
    bool flat;               // a 1x1 convolution of every pixel: all of them are one line
    bool padded;             // input lines are copied with their margins
    int64_t lines, length;   // of the output: how many, how many pixels each
    int64_t lines_per_task;  // of one image, unless flat: then pixels
    int64_t tasks_per_image;
    int64_t in_lines, in_length;  // of the copy that a task makes
    int64_t copy;                 // floats of it
    int64_t panels;
    std::vector<int64_t> tap_x, tap_weight;
    int64_t depth;
};

inline DirectPlan plan_direct(const MaskedConvArgs& args) {
    const ConvGeometry& g = args.geometry;
    DirectPlan plan{
        args, false, g.padding[0] > 0 || g.padding[1] > 0, args.out_height, args.out_width, 0, 0, 0, 0, 0, 0, {},
        {},   0};
    plan.panels = (args.rows + panel - 1) / panel;
    plan.flat = !plan.padded && g.kernel[0] * g.kernel[1] == 1 && g.stride[0] == 1 && g.stride[1] == 1;
    plan.in_length = (args.out_width - 1) * g.stride[1] + g.dilation[1] * (g.kernel[1] - 1) + 1;
    constexpr int64_t cached = 64 * 1024;  // floats of x that a task goes through once for every panel: a quarter of L2
    if (plan.flat) {
        plan.length = args.batch * args.height * args.width;
        // Few enough pixels that their outputs, written panel by panel, are still in the cache when the row is
        // complete.
        const int64_t fitting = std::min(cached / args.channels, cached / 2 / args.rows) / tile_pixels;
        plan.lines_per_task = std::clamp<int64_t>(fitting, 4, 40) * tile_pixels;
        plan.tasks_per_image = (plan.length + plan.lines_per_task - 1) / plan.lines_per_task;
    } else {
        const double line = static_cast<double>(plan.in_length) * args.channels * g.stride[0];
        plan.lines_per_task = std::clamp<int64_t>(static_cast<int64_t>(cached / line), 1, args.out_height);
        plan.tasks_per_image = (args.out_height + plan.lines_per_task - 1) / plan.lines_per_task;
        plan.in_lines = (plan.lines_per_task - 1) * g.stride[0] + g.dilation[0] * (g.kernel[0] - 1) + 1;
    }
    // Once it is known that the copy fits into memory, so do all distances within it into 64 bits.
    if (plan.padded) plan.copy = checked_size({plan.in_lines, plan.in_length, args.channels});
    const int64_t pitch = plan.padded ? args.channels : args.x.pitch;
    const int64_t row = (plan.padded ? plan.in_length : args.width) * pitch;
    // Taps that are neighbours in x and in the weight are one.
    const bool merged = g.dilation[1] == 1 && pitch == args.channels && args.channels == args.packed_channels;
    plan.depth = args.channels * (merged ? g.kernel[1] : 1);
    for (int64_t r = 0; r < g.kernel[0]; ++r) {
        for (int64_t s = 0; s < (merged ? 1 : g.kernel[1]); ++s) {
            plan.tap_x.push_back(r * g.dilation[0] * row + s * g.dilation[1] * pitch);
            plan.tap_weight.push_back((r * g.kernel[1] + s) * args.packed_channels * panel);
        }
    }
    return plan;
}

/// Copies the input lines of a task, and zeros around them where the kernel looks over the edge.
inline void copy_padded(const DirectPlan& plan, int64_t image, int64_t first_line, int64_t lines, float* to) {
    const MaskedConvArgs& args = plan.args;
    const ConvGeometry& g = args.geometry;
    const int64_t count = (lines - 1) * g.stride[0] + g.dilation[0] * (g.kernel[0] - 1) + 1;
    const int64_t top = first_line * g.stride[0] - g.padding[0];
    const int64_t left = std::min(g.padding[1], plan.in_length);
    const int64_t inside = std::clamp<int64_t>(args.width, 0, plan.in_length - left);
    for (int64_t i = 0; i < count; ++i, to += plan.in_length * args.channels) {
        if (top + i < 0 || top + i >= args.height) {
            std::fill_n(to, plan.in_length * args.channels, 0.0f);
            continue;
        }
        const float* from = args.x.data + ((image * args.height + top + i) * args.width) * args.x.pitch;
        std::fill_n(to, left * args.channels, 0.0f);
        for (int64_t column = 0; column < inside; ++column) {
            std::copy_n(from + column * args.x.pitch, args.channels, to + (left + column) * args.channels);
        }
        std::fill_n(to + (left + inside) * args.channels, (plan.in_length - left - inside) * args.channels, 0.0f);
    }
}

FASTPRUNE_TARGET inline void direct_panels(const DirectPlan& plan, const Taps& taps, const Stretch& first,
                                           int64_t lines, int64_t length, int64_t line_step, int64_t begin, int64_t end,
                                           DmaskParts& parts, int64_t task) {
    const MaskedConvArgs& args = plan.args;
    const int64_t panel_size = args.geometry.kernel[0] * args.geometry.kernel[1] * args.packed_channels * panel;
    for (int64_t p = begin; p < end; ++p) {
        Epilogue e = epilogue_of(args, p * panel);
        for (int64_t line = 0; line < lines; ++line) {
            const Stretch stretch{first.x + line * line_step, first.step, first.pixel + line * length};
            convolve_line(taps, stretch, length, args.packed + p * panel_size, e);
        }
        flush_dmask(e, parts, task);
    }
}

/// False if there was no memory.
inline bool direct_task(const DirectPlan& plan, int64_t task, int64_t begin, int64_t end, DmaskParts& parts) {
    const MaskedConvArgs& args = plan.args;
    const ConvGeometry& g = args.geometry;
    const Taps taps{static_cast<int64_t>(plan.tap_x.size()), plan.tap_x.data(), plan.tap_weight.data(), plan.depth};
    if (plan.flat) {
        const int64_t pixel = task * plan.lines_per_task;
        const Stretch first{args.x.data + pixel * args.x.pitch, args.x.pitch, pixel};
        direct_panels(plan, taps, first, 1, std::min(plan.lines_per_task, plan.length - pixel), 0, begin, end, parts,
                      task);
        return true;
    }
    const int64_t image = task / plan.tasks_per_image, line = task % plan.tasks_per_image * plan.lines_per_task;
    const int64_t lines = std::min(plan.lines_per_task, args.out_height - line);
    const int64_t pixel = (image * args.out_height + line) * args.out_width;
    if (plan.padded) {
        const Scratch copy(plan.copy);
        if (copy.data() == nullptr) return false;
        copy_padded(plan, image, line, lines, copy.data());
        direct_panels(plan, taps, {copy.data(), g.stride[1] * args.channels, pixel}, lines, args.out_width,
                      g.stride[0] * plan.in_length * args.channels, begin, end, parts, task);
        return true;
    }
    const float* x = args.x.data + (image * args.height + line * g.stride[0]) * args.width * args.x.pitch;
    direct_panels(plan, taps, {x, g.stride[1] * args.x.pitch, pixel}, lines, args.out_width,
                  g.stride[0] * args.width * args.x.pitch, begin, end, parts, task);
    return true;
}

/// False if there was no memory.
inline bool direct(const MaskedConvArgs& args, int num_threads) {
    const DirectPlan plan = plan_direct(args);
    const int64_t blocks = plan.tasks_per_image * (plan.flat ? 1 : args.batch);
    const int64_t pieces = pieces_of_panels(blocks, plan.panels, num_threads);
    DmaskParts parts(args, blocks);
    std::atomic<bool> failed{false};
    parallel_for(blocks * pieces, num_threads, [&](int64_t i, int) {
        const int64_t piece = i % pieces, begin = plan.panels * piece / pieces,
                      end = plan.panels * (piece + 1) / pieces;
        if (!direct_task(plan, i / pieces, begin, end, parts)) failed = true;
        complete_streams();
    });
    parts.reduce();
    return !failed;
}
