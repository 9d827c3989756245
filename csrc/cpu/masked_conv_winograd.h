// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// F(2x2, 3x3); part of masked_conv_body.h.

struct WinogradPlan {
    const MaskedConvArgs& args;
    int64_t across, down;  // tiles of 2x2 outputs in an image
    int64_t tiles;         // of all images
    int64_t tiles_per_task;
    int64_t pitch;  // of a transformed tile: channels, rounded up to whole vectors
    int64_t panels;
    int64_t scratch() const { return 16 * tiles_per_task * (pitch + panel) + pitch; }
};

inline WinogradPlan plan_winograd(const MaskedConvArgs& args, int num_threads) {
    WinogradPlan plan{args, (args.out_width + 1) / 2,       (args.out_height + 1) / 2, 0, 0,
                      0,    (args.rows + panel - 1) / panel};
    plan.tiles = args.batch * plan.across * plan.down;
    plan.pitch = (args.channels + width - 1) / width * width;
    constexpr int64_t cached = 12 * 1024;  // floats of one of the 16 products' inputs: 768 KiB for all of them
    const int64_t fair = (plan.tiles + 2 * num_threads - 1) / (2 * num_threads);  // two tasks for each thread
    const int64_t wanted = num_threads > 1 ? std::min(cached / plan.pitch, fair) : cached / plan.pitch;
    plan.tiles_per_task = std::clamp<int64_t>(wanted / tile_pixels, 2, 12) * tile_pixels;
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
template <int vectors, bool backward>
FASTPRUNE_TARGET FASTPRUNE_INLINE void transform_output(const WinogradPlan& plan, const Place& place,
                                                        const float* products, const Epilogue& e, Vector* dmask) {
    const MaskedConvArgs& args = plan.args;
    const int64_t product_step = plan.tiles_per_task * panel;
    Vector results[4][vectors];
    for (int v = 0; v < vectors; ++v) {
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
        finish<vectors, backward>(e, pixel, results[i], dmask);
    }
}

template <int vectors, bool backward>
FASTPRUNE_TARGET void transform_outputs(const WinogradPlan& plan, int64_t first, int64_t count, const float* products,
                                        Epilogue& e, DmaskParts& parts) {
    // Parts do not depend on how many tiles a task has, which depends on the number of threads.
    for (int64_t begin = 0; begin < count; begin += tile_pixels) {
        const int64_t end = count - begin < tile_pixels ? count : begin + tile_pixels;
        Vector dmask[vectors];
        for (Vector& sum : dmask) sum = zero();
        for (int64_t t = begin; t < end; ++t) {
            transform_output<vectors, backward>(plan, place_of(plan, first + t), products + t * panel, e, dmask);
        }
        if constexpr (backward) {
            for (int v = 0; v < vectors; ++v) e.dmask[v] = dmask[v];
            flush_dmask(e, parts, (first + begin) / tile_pixels);
        }
    }
}

FASTPRUNE_TARGET inline void winograd_panel(const WinogradPlan& plan, int64_t first, int64_t count, int64_t p,
                                            const float* inputs, float* products, DmaskParts& parts) {
    const MaskedConvArgs& args = plan.args;
    Epilogue e = epilogue_of(args, p * panel);
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
    const auto outputs = [&]<int vectors, bool backward>() FASTPRUNE_TARGET {
        transform_outputs<vectors, backward>(plan, first, count, products, e, parts);
    };
    const bool backward = plan.args.previous.data != nullptr;
    if (e.valid > width) {
        backward ? outputs.template operator()<2, true>() : outputs.template operator()<2, false>();
    } else {
        backward ? outputs.template operator()<1, true>() : outputs.template operator()<1, false>();
    }
}

/// False if there was no memory.
inline bool winograd(const MaskedConvArgs& args, int num_threads) {
    const WinogradPlan plan = plan_winograd(args, num_threads);
    const int64_t blocks = (plan.tiles + plan.tiles_per_task - 1) / plan.tiles_per_task;
    DmaskParts parts(args, (plan.tiles + tile_pixels - 1) / tile_pixels);
    std::atomic<bool> failed{false};
    parallel_for(blocks, num_threads, [&](int64_t block, int) {
        const Scratch scratch(plan.scratch());
        float* const zeros = scratch.data();
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
        for (int64_t p = 0; p < plan.panels; ++p) winograd_panel(plan, first, count, p, inputs, products, parts);
        complete_streams();
    });
    parts.reduce();
    return !failed;
}
