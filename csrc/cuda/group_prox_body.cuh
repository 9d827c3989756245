// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// group_prox by thread blocks, one for each item of the plan: what the GPU runs, and what emulated/group_prox.cpp runs
// on the host.
//
// A scalar unit takes a thread, a whole one a warp, which reads it again from the cache to scale it. Shared units leave
// a partial sum in each of their tiles. Whoever brings the last one adds them up, in the order of the slots, so that
// the result does not depend on who that is; the scaling of the tiles is a launch of its own.
#pragma once

#include <cstdint>

#include "fastprune/group_prox.h"
#include "fastprune/portable.h"
#include "fastprune/shrinkage.h"
#include "reduce.cuh"

namespace fastprune::device {

/// Shared memory of the block.
struct ProxScratch {
    double* sums;    // [max(block size, longest line of a tile)]
    uint32_t* last;  // [longest line of a tile]: whether this block brought the last partial sum of the unit
};

inline constexpr int64_t loads_in_flight = 4;

/// Sum of squares of x[first], x[first + step], ... below x[size].
template <class T>
FASTPRUNE_DEVICE double strided_squares(const T* x, int64_t size, int64_t first, int64_t step, int64_t stride) {
    double sum = 0;
    int64_t i = first;
    for (; i + (loads_in_flight - 1) * step < size; i += loads_in_flight * step) {
        double values[loads_in_flight];
        for (int64_t n = 0; n < loads_in_flight; ++n) values[n] = static_cast<double>(x[(i + n * step) * stride]);
        for (int64_t n = 0; n < loads_in_flight; ++n) sum += values[n] * values[n];
    }
    for (; i < size; i += step) {
        const double value = static_cast<double>(x[i * stride]);
        sum += value * value;
    }
    return sum;
}

/// Scales the same elements. `factor` is not 1.
template <class T>
FASTPRUNE_DEVICE void strided_scale(T* x, int64_t size, int64_t first, int64_t step, int64_t stride, T factor) {
    int64_t i = first;
    for (; i + (loads_in_flight - 1) * step < size; i += loads_in_flight * step) {
        T values[loads_in_flight];
        for (int64_t n = 0; n < loads_in_flight; ++n) values[n] = x[(i + n * step) * stride];
        for (int64_t n = 0; n < loads_in_flight; ++n) x[(i + n * step) * stride] = scaled(values[n], factor);
    }
    for (; i < size; i += step) x[i * stride] = scaled(x[i * stride], factor);
}

template <class Block>
FASTPRUNE_DEVICE double sum_over_warp(const Block& block, double value) {
    for (int lanes = block.warp_size() / 2; lanes > 0; lanes /= 2) value += block.shuffle_xor(value, lanes);
    return value;
}

/// A threshold that cannot be refused any more leaves its unit alone.
template <class T>
FASTPRUNE_DEVICE Shrinkage<T> shrinkage_of(const GroupProxArgs<T>& args, double sum, int64_t unit) {
    const T threshold = args.threshold != nullptr ? args.threshold[unit] : T{0};
    if (!(threshold >= 0)) return {static_cast<T>(__builtin_nanf("")), 1};
    return Shrinkage<T>::of(sum, threshold);
}

template <class Block, class T>
FASTPRUNE_DEVICE void process_scalar_units(const Block& block, const GroupProxArgs<T>& args, const WorkItem& item) {
    const Bundle bundle = args.plan.bundles[item.index];
    T* x = args.plan.stretches[bundle.first_stretch].template data<T>();
    for (int64_t k = item.first + block.rank(); k < item.first + item.count; k += block.size()) {
        const int64_t unit = args.plan.unit_of[bundle.first_rank + k];
        const T threshold = args.threshold != nullptr ? args.threshold[unit] : T{0};
        const T value = x[k];
        const bool valid = threshold >= 0;
        args.norms[unit] = valid ? std::fabs(value) : static_cast<T>(__builtin_nanf(""));
        if (valid && threshold > 0) x[k] = soft_threshold(value, threshold);
    }
}

template <class Block, class T>
FASTPRUNE_DEVICE void process_whole_units(const Block& block, const GroupProxArgs<T>& args, const WorkItem& item) {
    const Bundle bundle = args.plan.bundles[item.index];
    const Stretch* stretches = args.plan.stretches + bundle.first_stretch;
    const int warp = block.rank() / block.warp_size(), lane = block.rank() % block.warp_size();
    for (int64_t k = item.first + warp; k < item.first + item.count; k += block.size() / block.warp_size()) {
        const auto for_each_run = [&](const auto& body) {
            for (int64_t s = 0; s < bundle.num_stretches; ++s) {
                const Stretch stretch = stretches[s];
                T* x = stretch.template data<T>() + k * stretch.run;
                for (int64_t row = 0; row < stretch.rows; ++row) body(x + row * stretch.row_stride, stretch.run);
            }
        };
        double sum = 0;
        for_each_run([&](const T* x, int64_t run) { sum += strided_squares(x, run, lane, block.warp_size(), 1); });
        const int64_t unit = args.plan.unit_of[bundle.first_rank + k];
        const Shrinkage<T> shrinkage = shrinkage_of(args, sum_over_warp(block, sum), unit);
        if (lane == 0) args.norms[unit] = shrinkage.norm;
        if (shrinkage.factor == 1) continue;
        // Each thread writes what it has read itself, so that nobody has to wait.
        for_each_run([&](T* x, int64_t run) { strided_scale(x, run, lane, block.warp_size(), 1, shrinkage.factor); });
    }
}

/// How the threads lie on a tile whose line is no longer than the block: side by side along the line, for coalesced
/// access, and as many lines deep as fit.
struct TileShape {
    int64_t width, lines;

    template <class Block>
    static FASTPRUNE_DEVICE TileShape of(const Block& block, const Tile& tile) {
        const int64_t width = tile.count * tile.part.run;
        return {width, width < block.size() ? block.size() / width : 1};
    }
};

/// A line of one unit that is longer than the block.
template <class Block>
FASTPRUNE_DEVICE bool has_long_line(const Block& block, const Tile& tile) {
    return tile.count == 1 && tile.part.run > block.size();
}

/// Adds up the partial sums of a shared unit, by one warp.
template <class Block, class T>
FASTPRUNE_DEVICE void finish_unit(const Block& block, const GroupProxArgs<T>& args, int64_t shared) {
    const int lane = block.rank() % block.warp_size();
    // Written by other blocks during this launch: a cached line could be older.
    const auto* fresh = static_cast<const volatile double*>(args.partial_sums);
    double sum = 0;
    for (int64_t s = args.plan.first_slots[shared] + lane; s < args.plan.first_slots[shared + 1];
         s += block.warp_size()) {
        sum += fresh[s];
    }
    sum = sum_over_warp(block, sum);
    if (lane > 0) return;
    const int64_t unit = args.plan.unit_of[args.plan.first_shared + shared];
    const Shrinkage<T> shrinkage = shrinkage_of(args, sum, unit);
    args.norms[unit] = shrinkage.norm;
    args.factors[shared] = shrinkage.factor;
    args.arrived[shared] = 0;  // for the next call
}

/// The sum of unit k of the tile, for thread k; `scratch.sums` keeps what each thread has found.
template <class Block, class T>
FASTPRUNE_DEVICE void sum_lines(const Block& block, const Tile& tile, const ProxScratch& scratch) {
    const TileShape shape = TileShape::of(block, tile);
    for (int64_t place = block.rank(); place < shape.lines * shape.width; place += block.size()) {
        const T* x = tile.part.data<T>() + place % shape.width;
        scratch.sums[place] =
            strided_squares(x, tile.part.rows, place / shape.width, shape.lines, tile.part.row_stride);
    }
    block.sync();
}

template <class Block>
FASTPRUNE_DEVICE double unit_of_lines(const Block& block, const Tile& tile, const ProxScratch& scratch, int64_t k) {
    const TileShape shape = TileShape::of(block, tile);
    double sum = 0;
    for (int64_t line = 0; line < shape.lines; ++line) {
        for (int64_t i = 0; i < tile.part.run; ++i) sum += scratch.sums[line * shape.width + k * tile.part.run + i];
    }
    return sum;
}

template <class Block, class T>
FASTPRUNE_DEVICE void sum_tile(const Block& block, const GroupProxArgs<T>& args, const Tile& tile,
                               const ProxScratch& scratch) {
    const int64_t first_shared = tile.first_rank - args.plan.first_shared;
    const bool long_line = has_long_line(block, tile);
    double long_sum = 0;
    if (long_line) {
        for (int64_t row = 0; row < tile.part.rows; ++row) {
            const T* x = tile.part.data<T>() + row * tile.part.row_stride;
            long_sum += strided_squares(x, tile.part.run, block.rank(), block.size(), 1);
        }
        long_sum = block_sum(block, long_sum, scratch.sums);
    } else {
        sum_lines<Block, T>(block, tile, scratch);
    }
    for (int64_t k = block.rank(); k < tile.count; k += block.size()) {
        const int64_t shared = first_shared + k;
        const int64_t slot = args.plan.slots[tile.first_slot + k];
        static_cast<volatile double*>(args.partial_sums)[slot] =
            long_line ? long_sum : unit_of_lines(block, tile, scratch, k);
        block.fence();  // the sum is there before its arrival is
        const int64_t expected = args.plan.first_slots[shared + 1] - args.plan.first_slots[shared];
        scratch.last[k] = block.fetch_add(&args.arrived[shared], 1) + 1 == expected;
    }
    block.fence();
    block.sync();
    const int warp = block.rank() / block.warp_size();
    for (int64_t k = warp; k < tile.count; k += block.size() / block.warp_size()) {
        if (scratch.last[k]) finish_unit(block, args, first_shared + k);
    }
}

/// The first launch: block `index` does item `index`.
template <class Block, class T>
FASTPRUNE_DEVICE void group_prox_items(const Block& block, const GroupProxArgs<T>& args, int64_t index,
                                       int64_t num_blocks, const ProxScratch& scratch) {
    for (int64_t rank = args.plan.num_ranks + index * block.size() + block.rank(); rank < args.plan.num_units;
         rank += num_blocks * block.size()) {
        args.norms[args.plan.unit_of[rank]] = 0;  // owns nothing
    }
    if (index >= args.plan.num_items) return;
    const WorkItem item = args.plan.items[index];
    if (item.kind == WorkItem::scalar) {
        process_scalar_units(block, args, item);
    } else if (item.kind == WorkItem::whole) {
        process_whole_units(block, args, item);
    } else {
        const Tile tile = args.plan.tiles[item.index];
        sum_tile(block, args, tile, scratch);
    }
}

/// The second launch: block `index` scales tile `index`.
template <class Block, class T>
FASTPRUNE_DEVICE void group_prox_tile(const Block& block, const GroupProxArgs<T>& args, int64_t index) {
    const Tile tile = args.plan.tiles[index];
    const T* factors = args.factors + tile.first_rank - args.plan.first_shared;
    if (has_long_line(block, tile)) {
        if (factors[0] == 1) return;
        for (int64_t row = 0; row < tile.part.rows; ++row) {
            T* x = tile.part.data<T>() + row * tile.part.row_stride;
            strided_scale(x, tile.part.run, block.rank(), block.size(), 1, factors[0]);
        }
        return;
    }
    const TileShape shape = TileShape::of(block, tile);
    for (int64_t place = block.rank(); place < shape.lines * shape.width; place += block.size()) {
        const int64_t column = place % shape.width;
        const T factor = factors[column / tile.part.run];
        if (factor == 1) continue;
        strided_scale(tile.part.data<T>() + column, tile.part.rows, place / shape.width, shape.lines,
                      tile.part.row_stride, factor);
    }
}

}  // namespace fastprune::device
