// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_conv for one instruction set. masked_conv.cpp includes this file once for each, inside a namespace that
// provides Vector, `width` (floats in a vector), `tile_pixels` (how many pixels' sums fit into the registers) and the
// operations on vectors. FASTPRUNE_TARGET is the attribute that makes a function use the instruction set. No std
// function may be called from code with it other than inlined: one compiled for AVX-512 could be what the linker keeps.

constexpr int panel = 2 * width;  // output channels that are computed together

/// Where the taps of a kernel lie, relative to a pixel of x and to a panel of the weight.
struct Taps {
    int64_t count;
    const int64_t* x;
    const int64_t* weight;
    int64_t depth;  // elements that follow each other behind a tap, in both
};

/// What stands behind the sums of one panel.
struct Epilogue {
    const MaskedConvArgs& args;
    int64_t channel;  // the first of the panel
    int64_t valid;    // how many of the panel there are
    Vector shift[2], mask[2];
    Vector lowest, highest;
};

FASTPRUNE_TARGET inline Epilogue epilogue_of(const MaskedConvArgs& args, int64_t channel) {
    Epilogue e{args, channel, args.rows - channel < panel ? args.rows - channel : panel, {}, {}, {}, {}};
    for (int v = 0; v < 2; ++v) {
        const int64_t count = e.valid - v * width;
        e.shift[v] = args.shift != nullptr ? load_first(args.shift + channel + v * width, count) : zero();
        e.mask[v] = args.mask != nullptr ? load_first(args.mask + channel + v * width, count) : broadcast(1.0f);
    }
    e.lowest = broadcast(args.lowest);
    e.highest = broadcast(args.highest);
    return e;
}

/// Writes one vector of results, of which `count` exist; `whole`: all, which plain stores write faster than masked
/// ones.
template <bool whole>
FASTPRUNE_TARGET FASTPRUNE_INLINE void finish(const Epilogue& e, int64_t pixel, int v, Vector sum) {
    const MaskedConvArgs& args = e.args;
    const int64_t first = e.channel + v * width, count = e.valid - v * width;
    Vector z = add(sum, e.shift[v]);
    if (args.residual.data != nullptr) {
        const float* residual = args.residual.data + pixel * args.residual.pitch + first;
        z = add(z, whole ? load(residual) : load_first(residual, count));
    }
    const Vector r = smaller(e.highest, larger(e.lowest, z));  // in this order a NaN stays one
    const auto write = [&](const MutablePixels& to, Vector value) __attribute__((always_inline)) FASTPRUNE_TARGET {
        float* const place = to.data + pixel * to.pitch + first;
        whole ? store(place, value) : store_first(place, value, count);
    };
    if (args.saved.data != nullptr) write(args.saved, r);
    if (args.y.data != nullptr) write(args.y, args.mask != nullptr ? multiply(r, e.mask[v]) : r);
}

/// Writes the results of one output pixel, of which `sums` holds `vectors` times `width` channels.
template <int vectors>
FASTPRUNE_TARGET FASTPRUNE_INLINE void finish(const Epilogue& e, int64_t pixel, const Vector* sums) {
    for (int v = 0; v < vectors; ++v) {
        if (e.valid == panel) {
            finish<true>(e, pixel, v, sums[v]);
        } else {
            finish<false>(e, pixel, v, sums[v]);
        }
    }
}

/// Sums over taps and channels of `pixels` neighbouring pixels, `step` elements apart, for a panel of the weight.
template <int pixels, int vectors>
FASTPRUNE_TARGET FASTPRUNE_INLINE void accumulate(const Taps& taps, const float* x, int64_t step, const float* weight,
                                                  Vector (&sums)[pixels][vectors]) {
    for (auto& pixel : sums) {
        for (Vector& sum : pixel) sum = zero();
    }
    for (int64_t tap = 0; tap < taps.count; ++tap) {
        const float* from = x + taps.x[tap];
        const float* with = weight + taps.weight[tap];
        for (int64_t k = 0; k < taps.depth; ++k) {
            Vector column[vectors];
            for (int v = 0; v < vectors; ++v) column[v] = load(with + k * panel + v * width);
#pragma GCC unroll 16
            for (int m = 0; m < pixels; ++m) {
                const Vector value = broadcast(from[m * step + k]);
                for (int v = 0; v < vectors; ++v) sums[m][v] = multiply_add(value, column[v], sums[m][v]);
            }
        }
    }
}

/// A stretch of a line of output pixels: where its inputs begin, how far apart they are, its first output pixel.
struct Stretch {
    const float* x;
    int64_t step;
    int64_t pixel;
};

template <int pixels, int vectors>
FASTPRUNE_TARGET void convolve_tile(const Taps& taps, const Stretch& stretch, const float* weight, const Epilogue& e) {
    Vector sums[pixels][vectors];
    accumulate(taps, stretch.x, stretch.step, weight, sums);
    for (int m = 0; m < pixels; ++m) finish<vectors>(e, stretch.pixel + m, sums[m]);
}

/// The product of the same with a plain destination, `panel` elements a pixel.
template <int pixels, int vectors>
FASTPRUNE_TARGET void multiply_tile(const Taps& taps, const float* x, int64_t step, const float* weight, float* to) {
    Vector sums[pixels][vectors];
    accumulate(taps, x, step, weight, sums);
    for (int m = 0; m < pixels; ++m) {
        for (int v = 0; v < vectors; ++v) store(to + m * panel + v * width, sums[m][v]);
    }
}

/// Calls action<n>() for the run-time n in [1, tile_pixels].
template <int n = tile_pixels, class Action>
FASTPRUNE_INLINE void with_constant(int64_t pixels, const Action& action) {
    if constexpr (n > 0) {
        if (pixels == n) return action.template operator()<n>();
        with_constant<n - 1>(pixels, action);
    }
}

/// Cuts `count` pixels into tiles of about the same size, so that none is much slower than its share.
template <class Action>
FASTPRUNE_INLINE void for_each_tile(int64_t count, const Action& action) {
    const int64_t tiles = (count + tile_pixels - 1) / tile_pixels;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = count * tile / tiles;
        with_constant(count * (tile + 1) / tiles - begin,
                      [&]<int pixels>() { action.template operator()<pixels>(begin); });
    }
}

inline void convolve_line(const Taps& taps, const Stretch& line, int64_t count, const float* weight,
                          const Epilogue& e) {
    for_each_tile(count, [&]<int pixels>(int64_t begin) {
        const Stretch stretch{line.x + begin * line.step, line.step, line.pixel + begin};
        if (e.valid > width) {
            convolve_tile<pixels, 2>(taps, stretch, weight, e);
        } else {
            convolve_tile<pixels, 1>(taps, stretch, weight, e);
        }
    });
}

// ---- direct --------------------------------------------------------------------------------------------------------

/// How a direct convolution is cut: tasks of output lines, or of pixels where lines do not matter.
struct DirectPlan {
    const MaskedConvArgs& args;
    bool flat;               // a 1x1 convolution of every pixel: all of them are one line
    bool padded;             // input lines are copied with their margins
    int64_t lines, length;   // of the output: how many, how many pixels each
    int64_t lines_per_task;  // of one image, unless flat: then pixels
    int64_t tasks_per_image;
    int64_t in_lines, in_length;  // of the copy that a task makes
    int64_t panels;
    std::vector<int64_t> tap_x, tap_weight;
    int64_t depth;
};

inline DirectPlan plan_direct(const MaskedConvArgs& args) {
    const ConvGeometry& g = args.geometry;
    DirectPlan plan{
        args, false, g.padding[0] > 0 || g.padding[1] > 0, args.out_height, args.out_width, 0, 0, 0, 0, 0, {}, {}, 0};
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
        const int64_t line = plan.in_length * args.channels * g.stride[0];
        plan.lines_per_task = std::clamp<int64_t>(cached / std::max<int64_t>(line, 1), 1, args.out_height);
        plan.tasks_per_image = (args.out_height + plan.lines_per_task - 1) / plan.lines_per_task;
        plan.in_lines = (plan.lines_per_task - 1) * g.stride[0] + g.dilation[0] * (g.kernel[0] - 1) + 1;
    }
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
                                           int64_t lines, int64_t length, int64_t line_step, int64_t begin,
                                           int64_t end) {
    const MaskedConvArgs& args = plan.args;
    const int64_t panel_size = args.geometry.kernel[0] * args.geometry.kernel[1] * args.packed_channels * panel;
    for (int64_t p = begin; p < end; ++p) {
        const Epilogue e = epilogue_of(args, p * panel);
        for (int64_t line = 0; line < lines; ++line) {
            const Stretch stretch{first.x + line * line_step, first.step, first.pixel + line * length};
            convolve_line(taps, stretch, length, args.packed + p * panel_size, e);
        }
    }
}

/// False if there was no memory.
inline bool direct_task(const DirectPlan& plan, int64_t task, int64_t begin, int64_t end) {
    const MaskedConvArgs& args = plan.args;
    const ConvGeometry& g = args.geometry;
    const Taps taps{static_cast<int64_t>(plan.tap_x.size()), plan.tap_x.data(), plan.tap_weight.data(), plan.depth};
    if (plan.flat) {
        const int64_t pixel = task * plan.lines_per_task;
        const Stretch first{args.x.data + pixel * args.x.pitch, args.x.pitch, pixel};
        direct_panels(plan, taps, first, 1, std::min(plan.lines_per_task, plan.length - pixel), 0, begin, end);
        return true;
    }
    const int64_t image = task / plan.tasks_per_image, line = task % plan.tasks_per_image * plan.lines_per_task;
    const int64_t lines = std::min(plan.lines_per_task, args.out_height - line);
    const int64_t pixel = (image * args.out_height + line) * args.out_width;
    const float* x = args.x.data + (image * args.height + line * g.stride[0]) * args.width * args.x.pitch;
    int64_t pitch = args.x.pitch, width_in = args.width;
    if (plan.padded) {
        float* const copy = scratch(plan.in_lines * plan.in_length * args.channels);
        if (copy == nullptr) return false;
        copy_padded(plan, image, line, lines, copy);
        x = copy, pitch = args.channels, width_in = plan.in_length;
    }
    direct_panels(plan, taps, {x, g.stride[1] * pitch, pixel}, lines, args.out_width, g.stride[0] * width_in * pitch,
                  begin, end);
    return true;
}

inline Status direct(const MaskedConvArgs& args, int num_threads) {
    const DirectPlan plan = plan_direct(args);
    const int64_t blocks = plan.tasks_per_image * (plan.flat ? 1 : args.batch);
    const int64_t pieces = pieces_of_panels(blocks, plan.panels, num_threads);
    std::atomic<bool> failed{false};
    parallel_for(blocks * pieces, num_threads, [&](int64_t i, int) {
        const int64_t piece = i % pieces, begin = plan.panels * piece / pieces,
                      end = plan.panels * (piece + 1) / pieces;
        if (!direct_task(plan, i / pieces, begin, end)) failed = true;
    });
    return failed ? out_of_memory : Status{};
}

// ---- winograd ------------------------------------------------------------------------------------------------------

struct WinogradPlan {
    const MaskedConvArgs& args;
    int64_t across, down;  // tiles of 2x2 outputs in an image
    int64_t tiles;         // of all images
    int64_t tiles_per_task;
    int64_t pitch;  // of a transformed tile: channels, rounded up to whole vectors
    int64_t panels;
    int64_t scratch() const { return 16 * tiles_per_task * (pitch + panel) + pitch; }
};

inline WinogradPlan plan_winograd(const MaskedConvArgs& args) {
    WinogradPlan plan{args, (args.out_width + 1) / 2,       (args.out_height + 1) / 2, 0, 0,
                      0,    (args.rows + panel - 1) / panel};
    plan.tiles = args.batch * plan.across * plan.down;
    plan.pitch = (args.channels + width - 1) / width * width;
    constexpr int64_t cached = 12 * 1024;  // floats of one of the 16 products' inputs: 768 KiB for all of them
    const int64_t fitting = cached / plan.pitch / tile_pixels * tile_pixels;
    plan.tiles_per_task = std::clamp<int64_t>(fitting, 2 * tile_pixels, 12 * tile_pixels);
    return plan;
}

/// The transform of one 4x4 patch, for `count` channels from 16 places of x: B^T d B.
FASTPRUNE_TARGET inline void transform_input(const float* const* x, int64_t channels, float* to, int64_t product_step) {
    for (int64_t c = 0; c < channels; c += width) {
        const int64_t count = channels - c;
        Vector d[16], t[16];
        for (int i = 0; i < 16; ++i) d[i] = load_first(x[i] + c, count);
        for (int j = 0; j < 4; ++j) {
            t[j] = subtract(d[j], d[8 + j]);
            t[4 + j] = add(d[4 + j], d[8 + j]);
            t[8 + j] = subtract(d[8 + j], d[4 + j]);
            t[12 + j] = subtract(d[4 + j], d[12 + j]);
        }
        for (int i = 0; i < 4; ++i) {
            const Vector* row = t + 4 * i;
            float* into = to + 4 * i * product_step + c;
            store(into, subtract(row[0], row[2]));
            store(into + product_step, add(row[1], row[2]));
            store(into + 2 * product_step, subtract(row[2], row[1]));
            store(into + 3 * product_step, subtract(row[1], row[3]));
        }
    }
}

/// Where tile `tile` lies.
struct Place {
    int64_t image, y, x;
};

inline Place place_of(const WinogradPlan& plan, int64_t tile) {
    const int64_t image = tile / (plan.across * plan.down), rest = tile % (plan.across * plan.down);
    return {image, rest / plan.across, rest % plan.across};
}

inline void transform_inputs(const WinogradPlan& plan, int64_t first, int64_t count, float* to, const float* zeros) {
    const MaskedConvArgs& args = plan.args;
    for (int64_t t = 0; t < count; ++t) {
        const Place place = place_of(plan, first + t);
        const float* sources[16];
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) {
                const int64_t y = 2 * place.y - args.geometry.padding[0] + i,
                              x = 2 * place.x - args.geometry.padding[1] + j;
                const bool inside = y >= 0 && y < args.height && x >= 0 && x < args.width;
                const int64_t pixel = (place.image * args.height + y) * args.width + x;
                sources[4 * i + j] = inside ? args.x.data + pixel * args.x.pitch : zeros;
            }
        }
        transform_input(sources, args.channels, to + t * plan.pitch, plan.tiles_per_task * plan.pitch);
    }
}

/// A^T m A for one tile and panel, and the epilogue of the 2x2 outputs that exist.
FASTPRUNE_TARGET inline void transform_output(const WinogradPlan& plan, const Place& place, const float* products,
                                              const Epilogue& e) {
    const MaskedConvArgs& args = plan.args;
    const int64_t product_step = plan.tiles_per_task * panel;
    Vector results[4][2];
    for (int v = 0; v < (e.valid > width ? 2 : 1); ++v) {
        Vector m[16], t[8];
        for (int i = 0; i < 16; ++i) m[i] = load(products + i * product_step + v * width);
        for (int j = 0; j < 4; ++j) {
            t[j] = add(add(m[j], m[4 + j]), m[8 + j]);
            t[4 + j] = subtract(subtract(m[4 + j], m[8 + j]), m[12 + j]);
        }
        for (int i = 0; i < 2; ++i) {
            results[2 * i][v] = add(add(t[4 * i], t[4 * i + 1]), t[4 * i + 2]);
            results[2 * i + 1][v] = subtract(subtract(t[4 * i + 1], t[4 * i + 2]), t[4 * i + 3]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        const int64_t y = 2 * place.y + i / 2, x = 2 * place.x + i % 2;
        if (y >= args.out_height || x >= args.out_width) continue;
        const int64_t pixel = (place.image * args.out_height + y) * args.out_width + x;
        if (e.valid > width) {
            finish<2>(e, pixel, results[i]);
        } else {
            finish<1>(e, pixel, results[i]);
        }
    }
}

FASTPRUNE_TARGET inline void winograd_panel(const WinogradPlan& plan, int64_t first, int64_t count, int64_t p,
                                            const float* inputs, float* products) {
    const MaskedConvArgs& args = plan.args;
    const Epilogue e = epilogue_of(args, p * panel);
    const int64_t none = 0, panels = (args.packed_rows + panel - 1) / panel;
    const Taps one{1, &none, &none, args.channels};
    for (int i = 0; i < 16; ++i) {
        const float* x = inputs + i * plan.tiles_per_task * plan.pitch;
        const float* weight = args.packed + (i * panels + p) * args.packed_channels * panel;
        float* to = products + i * plan.tiles_per_task * panel;
        for_each_tile(count, [&]<int pixels>(int64_t begin) {
            if (e.valid > width) {
                multiply_tile<pixels, 2>(one, x + begin * plan.pitch, plan.pitch, weight, to + begin * panel);
            } else {
                multiply_tile<pixels, 1>(one, x + begin * plan.pitch, plan.pitch, weight, to + begin * panel);
            }
        });
    }
    for (int64_t t = 0; t < count; ++t) transform_output(plan, place_of(plan, first + t), products + t * panel, e);
}

inline Status winograd(const MaskedConvArgs& args, int num_threads) {
    const WinogradPlan plan = plan_winograd(args);
    const int64_t blocks = (plan.tiles + plan.tiles_per_task - 1) / plan.tiles_per_task;
    std::atomic<bool> failed{false};
    parallel_for(blocks, num_threads, [&](int64_t block, int) {
        float* const zeros = scratch(plan.scratch());
        if (zeros == nullptr) {
            failed = true;
            return;
        }
        float* const inputs = zeros + plan.pitch;
        float* const products = inputs + 16 * plan.tiles_per_task * plan.pitch;
        std::fill_n(zeros, plan.pitch, 0.0f);
        const int64_t first = block * plan.tiles_per_task;
        const int64_t count = std::min(plan.tiles_per_task, plan.tiles - first);
        transform_inputs(plan, first, count, inputs, zeros);
        for (int64_t p = 0; p < plan.panels; ++p) winograd_panel(plan, first, count, p, inputs, products);
    });
    return failed ? out_of_memory : Status{};
}
