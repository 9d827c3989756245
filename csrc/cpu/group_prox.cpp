// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// group_prox on the CPU. Memory traffic is the cost, so that a unit which fits a core's cache is read and scaled by one
// thread: two passes over the memory in place of three. Only larger units, and those whose short runs lie in many rows,
// are shared: squares of all tiles, then the norms, then the scaling of all tiles.
#include "fastprune/group_prox.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "clones.h"
#include "fastprune/shrinkage.h"
#include "parallel.h"

namespace fastprune::cpu {
namespace {

constexpr int64_t thread_grain = 16384;  // elements, a few microseconds
constexpr int64_t combined_units = 512;  // shared units whose partial sums one thread adds up in one go

/// A sum that remembers what its additions rounded away (Knuth's TwoSum). In float64 a plain sum over the many short
/// runs of a unit was off by 60 units in the last place, where torch's cascade is off by one.
struct LongSum {
    double total = 0, lost = 0;

    FASTPRUNE_INTO_CLONES void add(double value) {
        const double sum = total + value;
        const double added = sum - total;
        lost += (total - (sum - added)) + (value - added);
        total = sum;
    }
    FASTPRUNE_INTO_CLONES double result() const { return lost == lost ? total + lost : total; }  // inf - inf above
};

template <class T>
FASTPRUNE_INTO_CLONES double square(T value) {
    return static_cast<double>(value) * static_cast<double>(value);
}

template <class T>
FASTPRUNE_INTO_CLONES void add_squares(const T* x, int64_t size, LongSum& total) {
    constexpr int64_t lanes = 16;  // independent chains of additions …
    while (size >= lanes) {
        const int64_t block = std::min<int64_t>(size - size % lanes, 64 * lanes);  // … which are kept short
        double sums[lanes] = {};
        for (int64_t i = 0; i < block; i += lanes) {
            for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += square(x[i + lane]);
        }
        for (int64_t width = lanes / 2; width > 0; width /= 2) {
            for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
        }
        total.add(sums[0]);
        x += block;
        size -= block;
    }
    if (size == 0) return;
    double rest = 0;
    for (int64_t i = 0; i < size; ++i) rest += square(x[i]);
    total.add(rest);
}

/// `factor` is not 1.
template <class T>
FASTPRUNE_INTO_CLONES void scale(T* x, int64_t size, T factor) {
    if (factor == 0) {
        std::fill_n(x, size, T{0});
    } else {
        for (int64_t i = 0; i < size; ++i) x[i] *= factor;
    }
}

template <class T>
FASTPRUNE_INTO_CLONES Shrinkage<T> shrinkage_of(const GroupProxArgs<T>& args, double sum, int64_t unit) {
    return Shrinkage<T>::of(sum, args.threshold != nullptr ? args.threshold[unit] : T{0});
}

/// Norms first, since x changes; `thresholds` may be null.
template <class T>
FASTPRUNE_INTO_CLONES void soft_thresholds(T* __restrict x, int64_t size, const T* __restrict thresholds,
                                           T* __restrict norms) {
    for (int64_t k = 0; k < size; ++k) norms[k] = std::fabs(x[k]);
    if (thresholds == nullptr) return;
    for (int64_t k = 0; k < size; ++k) x[k] = soft_threshold(x[k], thresholds[k]);
}

template <class T>
FASTPRUNE_INTO_CLONES void process_scalar_units(const GroupProxArgs<T>& args, const WorkItem& item) {
    const Bundle& bundle = args.plan.bundles[item.index];
    constexpr int64_t stretch = 256;
    T thresholds[stretch], norms[stretch];
    for (int64_t first = item.first; first < item.first + item.count; first += stretch) {
        const int64_t count = std::min(stretch, item.first + item.count - first);
        T* x = args.plan.stretches[bundle.first_stretch].template data<T>() + first;
        const int32_t* units = args.plan.unit_of + bundle.first_rank + first;
        uint32_t jumps = 0;
        for (int64_t k = 0; k < count; ++k)
            jumps |= static_cast<uint32_t>(units[k]) - static_cast<uint32_t>(units[0] + k);
        if (jumps == 0) {  // the rule, and several times as fast as to gather and scatter
            const T* own = args.threshold != nullptr ? args.threshold + units[0] : nullptr;
            soft_thresholds(x, count, own, args.norms + units[0]);
            continue;
        }
        for (int64_t k = 0; k < count && args.threshold != nullptr; ++k) thresholds[k] = args.threshold[units[k]];
        soft_thresholds(x, count, args.threshold != nullptr ? thresholds : nullptr, norms);
        for (int64_t k = 0; k < count; ++k) args.norms[units[k]] = norms[k];
    }
}

/// Calls body(x, run) for every run of unit k of the bundle.
template <class T, class Body>
FASTPRUNE_INTO_CLONES void for_each_run(const UnitPlan& plan, const Bundle& bundle, int64_t k, const Body& body) {
    for (int64_t s = bundle.first_stretch; s < bundle.first_stretch + bundle.num_stretches; ++s) {
        const Stretch& stretch = plan.stretches[s];
        T* x = stretch.data<T>() + k * stretch.run;
        for (int64_t row = 0; row < stretch.rows; ++row, x += stretch.row_stride) body(x, stretch.run);
    }
}

template <class T>
FASTPRUNE_INTO_CLONES void process_whole_units(const GroupProxArgs<T>& args, const WorkItem& item) {
    const Bundle& bundle = args.plan.bundles[item.index];
    const int32_t* units = args.plan.unit_of + bundle.first_rank;
    int64_t size = 0;
    for_each_run<T>(args.plan, bundle, 0, [&](const T*, int64_t run) __attribute__((always_inline)) { size += run; });
    // Many small units at once: one after the other each would wait for its own square root and quotient.
    constexpr int64_t most = 64;
    const int64_t at_once = std::clamp<int64_t>(8192 / size, 1, most);
    for (int64_t first = item.first; first < item.first + item.count; first += at_once) {
        const int64_t count = std::min(at_once, item.first + item.count - first);
        double sums[most];
        T factors[most];
        for (int64_t k = 0; k < count; ++k) {
            LongSum sum;
            for_each_run<T>(args.plan, bundle, first + k,
                            [&](const T* x, int64_t run) __attribute__((always_inline)) { add_squares(x, run, sum); });
            sums[k] = sum.result();
        }
        for (int64_t k = 0; k < count; ++k) {
            const auto shrinkage = shrinkage_of(args, sums[k], units[first + k]);
            args.norms[units[first + k]] = shrinkage.norm;
            factors[k] = shrinkage.factor;
        }
        for (int64_t k = 0; k < count; ++k) {
            if (factors[k] == 1) continue;
            for_each_run<T>(args.plan, bundle, first + k,
                            [&](T* x, int64_t run) __attribute__((always_inline)) { scale(x, run, factors[k]); });
        }
    }
}

/// Down the columns of up to 64 rows: one loop over the line, however short the runs are.
template <class T>
FASTPRUNE_INTO_CLONES void sum_columns(const T* x, int64_t rows, int64_t row_stride, int64_t width, double* sums) {
    std::fill_n(sums, width, 0.0);
    for (; rows >= 4; rows -= 4, x += 4 * row_stride) {  // the sums are loaded and stored once for four
        const T *x1 = x + row_stride, *x2 = x1 + row_stride, *x3 = x2 + row_stride;
        for (int64_t i = 0; i < width; ++i) {
            sums[i] += (square(x[i]) + square(x1[i])) + (square(x2[i]) + square(x3[i]));
        }
    }
    for (; rows > 0; --rows, x += row_stride) {
        for (int64_t i = 0; i < width; ++i) sums[i] += square(x[i]);
    }
}

template <class T>
FASTPRUNE_INTO_CLONES void sum_tile(const GroupProxArgs<T>& args, const Tile& tile) {
    const Stretch& part = tile.part;
    const int64_t* slots = args.plan.slots + tile.first_slot;
    const T* x = part.data<T>();
    if (tile.count == 1) {
        LongSum sum;
        for (int64_t row = 0; row < part.rows; ++row) add_squares(x + row * part.row_stride, part.run, sum);
        args.partial_sums[slots[0]] = sum.result();
        return;
    }
    const int64_t width = tile.count * part.run;
    double sums[max_tile_width];
    LongSum totals[max_tile_width];
    for (int64_t row = 0; row < part.rows; row += 64, x += 64 * part.row_stride) {
        sum_columns(x, std::min<int64_t>(64, part.rows - row), part.row_stride, width, sums);
        for (int64_t k = 0; k < tile.count; ++k) {
            double sum = 0;
            for (int64_t i = 0; i < part.run; ++i) sum += sums[k * part.run + i];
            totals[k].add(sum);
        }
    }
    for (int64_t k = 0; k < tile.count; ++k) args.partial_sums[slots[k]] = totals[k].result();
}

template <class T>
FASTPRUNE_INTO_CLONES void process(const GroupProxArgs<T>& args, const WorkItem& item) {
    switch (item.kind) {
        case WorkItem::scalar: return process_scalar_units(args, item);
        case WorkItem::whole: return process_whole_units(args, item);
        default: return sum_tile(args, args.plan.tiles[item.index]);
    }
}

template <class T>
FASTPRUNE_INTO_CLONES void combine(const GroupProxArgs<T>& args, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
        LongSum sum;
        for (int64_t s = args.plan.first_slots[i]; s < args.plan.first_slots[i + 1]; ++s) sum.add(args.partial_sums[s]);
        const int64_t unit = args.plan.unit_of[args.plan.first_shared + i];
        const auto shrinkage = shrinkage_of(args, sum.result(), unit);
        args.norms[unit] = shrinkage.norm;
        args.factors[i] = shrinkage.factor;
    }
}

/// What scaled() does to a line of a tile with several units, without a branch for each element.
template <class T>
struct LineFactors {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    T factors[max_tile_width];
    Bits kept[max_tile_width], changed[max_tile_width];

    FASTPRUNE_INTO_CLONES LineFactors(const Tile& tile, const T* by_unit) {
        for (int64_t k = 0; k < tile.count; ++k) {
            for (int64_t i = k * tile.part.run; i < (k + 1) * tile.part.run; ++i) {
                factors[i] = by_unit[k];
                kept[i] = by_unit[k] == 1 ? ~Bits{0} : 0;
                changed[i] = by_unit[k] == 1 || by_unit[k] == 0 ? 0 : ~Bits{0};
            }
        }
    }

    FASTPRUNE_INTO_CLONES T operator()(T value, int64_t i) const {
        const auto product = std::bit_cast<Bits>(value * factors[i]);
        return std::bit_cast<T>((std::bit_cast<Bits>(value) & kept[i]) | (product & changed[i]));
    }
};

template <class T>
FASTPRUNE_INTO_CLONES void scale_lines(const Tile& tile, const T* by_unit) {
    const LineFactors<T> scaled_at(tile, by_unit);
    const int64_t width = tile.count * tile.part.run, stride = tile.part.row_stride;
    T* lines = tile.part.data<T>();
    int64_t row = 0;
    for (; row + 2 <= tile.part.rows; row += 2, lines += 2 * stride) {  // factors are loaded once for two
        T* __restrict x0 = lines, * __restrict x1 = lines + stride;
        for (int64_t i = 0; i < width; ++i) {
            x0[i] = scaled_at(x0[i], i);
            x1[i] = scaled_at(x1[i], i);
        }
    }
    if (row == tile.part.rows) return;
    for (int64_t i = 0; i < width; ++i) lines[i] = scaled_at(lines[i], i);
}

template <class T>
FASTPRUNE_INTO_CLONES void scale_tile(const GroupProxArgs<T>& args, const Tile& tile) {
    const T* factors = args.factors + tile.first_rank - args.plan.first_shared;
    if (std::all_of(factors, factors + tile.count, [](T factor) { return factor == 1; })) return;
    if (tile.count > 1) return scale_lines<T>(tile, factors);
    T* x = tile.part.data<T>();
    for (int64_t row = 0; row < tile.part.rows; ++row) scale(x + row * tile.part.row_stride, tile.part.run, factors[0]);
}

FASTPRUNE_CLONES void process_item(const GroupProxArgs<float>& args, const WorkItem& item) { process(args, item); }
FASTPRUNE_CLONES void process_item(const GroupProxArgs<double>& args, const WorkItem& item) { process(args, item); }
FASTPRUNE_CLONES void finish_tile(const GroupProxArgs<float>& args, const Tile& tile) { scale_tile(args, tile); }
FASTPRUNE_CLONES void finish_tile(const GroupProxArgs<double>& args, const Tile& tile) { scale_tile(args, tile); }

template <class T>
Status check_thresholds(const GroupProxArgs<T>& args) {
    if (args.threshold == nullptr) return {};
    int64_t good = 0;
    for (int64_t unit = 0; unit < args.plan.num_units; ++unit) good += args.threshold[unit] >= 0;
    if (good == args.plan.num_units) return {};
    int64_t first = 0;
    while (args.threshold[first] >= 0) ++first;
    return Status::refused("threshold", first, args.threshold[first], "a number >= 0");
}

}  // namespace

template <class T>
Status group_prox(const GroupProxArgs<T>& args, int num_threads) {
    const UnitPlan& plan = args.plan;
    const Status status = check_thresholds(args);
    if (!status.ok()) return status;
    for (int64_t rank = plan.num_ranks; rank < plan.num_units; ++rank) args.norms[plan.unit_of[rank]] = 0;

    const int threads = threads_for(plan.num_elements, thread_grain, num_threads);
    parallel_for(plan.num_items, threads, [&](int64_t i, int) { process_item(args, plan.items[i]); });
    if (plan.num_shared() == 0) return {};
    parallel_for((plan.num_shared() + combined_units - 1) / combined_units, threads, [&](int64_t i, int) {
        combine(args, i * combined_units, std::min((i + 1) * combined_units, plan.num_shared()));
    });
    if (args.threshold == nullptr) return {};
    parallel_for(plan.num_tiles, threads, [&](int64_t i, int) { finish_tile(args, plan.tiles[i]); });
    return {};
}

template Status group_prox(const GroupProxArgs<float>&, int);
template Status group_prox(const GroupProxArgs<double>&, int);

}  // namespace fastprune::cpu
