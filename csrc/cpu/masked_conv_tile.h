// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Sums of a tile of pixels, and what stands behind them; part of masked_conv_body.h.

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
    Vector dmask[2];  // sums of d * previous
    bool streams;
};

FASTPRUNE_TARGET inline Epilogue epilogue_of(const MaskedConvArgs& args, int64_t channel) {
    Epilogue e{args, channel,      args.rows - channel < panel ? args.rows - channel : panel, {}, {}, {}, {},
               {},   streams(args)};
    for (int v = 0; v < 2; ++v) {
        const int64_t count = e.valid - v * width;
        e.shift[v] = args.shift != nullptr ? load_first(args.shift + channel + v * width, count) : zero();
        e.mask[v] = args.mask != nullptr ? load_first(args.mask + channel + v * width, count) : broadcast(1.0f);
        e.dmask[v] = zero();
    }
    // Backward even an infinite activation is inside of infinite bounds, which NaN says.
    const bool backward = args.previous.data != nullptr;
    e.lowest = broadcast(backward && args.lowest == -__builtin_inff() ? __builtin_nanf("") : args.lowest);
    e.highest = broadcast(backward && args.highest == __builtin_inff() ? __builtin_nanf("") : args.highest);
    return e;
}

/// Writes what the panel's pixels have come to so far, and starts anew.
FASTPRUNE_TARGET inline void flush_dmask(Epilogue& e, DmaskParts& parts, int64_t part) {
    if (e.args.dmask == nullptr) return;
    for (int v = 0; v < 2; ++v) {
        store_first(parts.row(part) + e.channel + v * width, e.dmask[v], e.valid - v * width);
        e.dmask[v] = zero();
    }
}

/// Writes one vector of results, of which `count` exist; `whole`: all, which plain stores write faster than masked
/// ones. `dmask` is added to where `backward`.
template <bool whole, bool backward>
FASTPRUNE_TARGET FASTPRUNE_INLINE void finish(const Epilogue& e, int64_t pixel, int v, Vector sum, Vector& dmask) {
    const MaskedConvArgs& args = e.args;
    const int64_t first = e.channel + v * width, count = e.valid - v * width;
    const auto read = [&](const Pixels& from) __attribute__((always_inline)) FASTPRUNE_TARGET {
        const float* const place = from.data + pixel * from.pitch + first;
        return whole ? load(place) : load_first(place, count);
    };
    const auto write = [&](const MutablePixels& to, Vector value) __attribute__((always_inline)) FASTPRUNE_TARGET {
        float* const place = to.data + pixel * to.pitch + first;
        if (!whole) return store_first(place, value, count);
        e.streams ? stream(place, value) : store(place, value);
    };
    Vector z = add(sum, e.shift[v]);
    if (args.residual.data != nullptr) z = add(z, read(args.residual));
    if constexpr (backward) {
        const Vector previous = read(args.previous);
        dmask = multiply_add(z, previous, dmask);
        write(args.y, keep_between(multiply(z, e.mask[v]), previous, e.lowest, e.highest));
    } else {
        const Vector r = smaller(e.highest, larger(e.lowest, z));  // in this order a NaN stays one
        if (args.saved.data != nullptr) write(args.saved, r);
        if (args.y.data != nullptr) write(args.y, args.mask != nullptr ? multiply(r, e.mask[v]) : r);
    }
}

/// Writes the results of one output pixel, of which `sums` holds `vectors` times `width` channels.
template <int vectors, bool backward>
FASTPRUNE_TARGET FASTPRUNE_INLINE void finish(const Epilogue& e, int64_t pixel, const Vector* sums, Vector* dmask) {
    for (int v = 0; v < vectors; ++v) {
        if (e.valid == panel) {
            finish<true, backward>(e, pixel, v, sums[v], dmask[v]);
        } else {
            finish<false, backward>(e, pixel, v, sums[v], dmask[v]);
        }
    }
}

/// How many products are added up before the sum goes into a total of such sums. One chain of 2304 products had five
/// times the error of torch's convolution; this takes less than 2 % of the time.
constexpr int64_t chain = 128;

template <int pixels, int vectors>
using Sums = Vector[pixels][vectors];

/// sums += values, where the next values are to start from zero.
template <int pixels, int vectors>
FASTPRUNE_TARGET FASTPRUNE_INLINE void fold(Sums<pixels, vectors>& sums, Sums<pixels, vectors>& values) {
#pragma GCC unroll 16
    for (int m = 0; m < pixels; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
            sums[m][v] = add(sums[m][v], values[m][v]);
            values[m][v] = zero();
        }
    }
}

template <int pixels, int vectors>
FASTPRUNE_TARGET FASTPRUNE_INLINE void clear(Sums<pixels, vectors>& sums) {
    for (auto& pixel : sums) {
        for (Vector& sum : pixel) sum = zero();
    }
}

/// Sums over taps and channels of `pixels` neighbouring pixels, `step` elements apart, for a panel of the weight. In
/// the order of taps and channels, cut every `chain` products: bits depend neither on tiles nor on merged taps.
template <int pixels, int vectors>
FASTPRUNE_TARGET FASTPRUNE_INLINE void accumulate(const Taps& taps, const float* x, int64_t step, const float* weight,
                                                  Sums<pixels, vectors>& sums) {
    Sums<pixels, vectors> totals;
    clear<pixels, vectors>(sums);
    const bool long_chain = taps.count * taps.depth > chain;
    if (long_chain) clear<pixels, vectors>(totals);
    int64_t left = chain;
    for (int64_t tap = 0; tap < taps.count; ++tap) {
        const float* from = x + taps.x[tap];
        const float* with = weight + taps.weight[tap];
        for (int64_t k = 0; k < taps.depth;) {
            const int64_t end = taps.depth - k < left ? taps.depth : k + left;
            left -= end - k;
            for (; k < end; ++k) {
                Vector column[vectors];
                for (int v = 0; v < vectors; ++v) column[v] = load(with + k * panel + v * width);
#pragma GCC unroll 16
                for (int m = 0; m < pixels; ++m) {
                    const Vector value = broadcast(from[m * step + k]);
                    for (int v = 0; v < vectors; ++v) sums[m][v] = multiply_add(value, column[v], sums[m][v]);
                }
            }
            if (left > 0) continue;
            left = chain;
            if (long_chain) fold<pixels, vectors>(totals, sums);
        }
    }
    if (long_chain) fold<pixels, vectors>(sums, totals);
}

/// A stretch of a line of output pixels: where its inputs begin, how far apart they are, its first output pixel.
struct Stretch {
    const float* x;
    int64_t step;
    int64_t pixel;
};

/// What stands behind the sums of neighbouring pixels.
template <int pixels, int vectors>
FASTPRUNE_TARGET FASTPRUNE_INLINE void finish_tile(Epilogue& e, int64_t pixel, const Sums<pixels, vectors>& sums) {
    // A copy for the loops below, whose index would otherwise keep clang from having the sums in registers: 2.5x
    // slower.
    Sums<pixels, vectors> results;
    for (int m = 0; m < pixels; ++m) {
        for (int v = 0; v < vectors; ++v) results[m][v] = sums[m][v];
    }
    Vector dmask[vectors];  // a sum of its own keeps long ones accurate
    for (Vector& sum : dmask) sum = zero();
    if (e.args.previous.data != nullptr) {
        for (int m = 0; m < pixels; ++m) finish<vectors, true>(e, pixel + m, results[m], dmask);
        for (int v = 0; v < vectors; ++v) e.dmask[v] = add(e.dmask[v], dmask[v]);
    } else {
        for (int m = 0; m < pixels; ++m) finish<vectors, false>(e, pixel + m, results[m], dmask);
    }
}

template <int pixels, int vectors>
FASTPRUNE_TARGET void convolve_tile(const Taps& taps, const Stretch& stretch, const float* weight, Epilogue& e) {
    Vector sums[pixels][vectors];
    accumulate(taps, stretch.x, stretch.step, weight, sums);
    finish_tile<pixels, vectors>(e, stretch.pixel, sums);
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

inline void convolve_line(const Taps& taps, const Stretch& line, int64_t count, const float* weight, Epilogue& e) {
    for_each_tile(count, [&]<int pixels>(int64_t begin) {
        const Stretch stretch{line.x + begin * line.step, line.step, line.pixel + begin};
        if (e.valid > width) {
            convolve_tile<pixels, 2>(taps, stretch, weight, e);
        } else {
            convolve_tile<pixels, 1>(taps, stretch, weight, e);
        }
    });
}
