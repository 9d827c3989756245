// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// group_prox on the CPU. Memory traffic is the cost: one thread reads and scales a unit that fits a core's cache, which
// is two passes over the memory instead of three. Threads share only larger units, and units whose short runs lie in
// many rows: they sum the squares of all tiles of a wave, find its norms, and scale its tiles, which the last cache
// holds.
#include "fastprune/group_prox.h"

#include <algorithm>
#include <cmath>

#include "fastprune/shrinkage.h"
#include "instruction_set.h"
#include "parallel.h"

namespace fastprune::cpu {
namespace {

constexpr int64_t thread_grain = 16384;  // elements, a few microseconds
constexpr int64_t block = 1024;          // squares in one plain sum
constexpr int64_t units_at_once = 64;    // units whose norms one loop finds

/// A sum that remembers what its additions rounded away (Knuth's TwoSum). In float64 a plain sum over the many short
/// runs of a unit was off by 60 units in the last place, where torch's cascade is off by one.
struct LongSum {
    double total = 0, lost = 0;

    void add(double value) {
        const double sum = total + value;
        const double added = sum - total;
        lost += (total - (sum - added)) + (value - added);
        total = sum;
    }
    double result() const { return lost == lost ? total + lost : total; }  // inf - inf above
};

template <class T>
double square(T value) {
    return static_cast<double>(value) * static_cast<double>(value);
}

/// The sum of up to `block` squares. The sum over the lanes is written out: as a loop that halves them it went through
/// memory and cost a unit of nine elements seven times as much.
template <class T>
double sum_of_squares(const T* x, int64_t size) {
    constexpr int64_t lanes = 16;  // independent chains of additions
    double s[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
        for (int64_t lane = 0; lane < lanes; ++lane) s[lane] += square(x[i + lane]);
    }
    for (int64_t lane = 0; lane < 8; ++lane) s[lane] += s[lane + 8];
    double sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    for (; i < size; ++i) sum += square(x[i]);
    return sum;
}

template <class T>
void add_squares(const T* x, int64_t size, LongSum& total) {
    for (int64_t i = 0; i < size; i += block) total.add(sum_of_squares(x + i, std::min(block, size - i)));
}

/// `factor` is not 1.
template <class T>
void scale(T* x, int64_t size, T factor) {
    if (factor == 0) {
        std::fill_n(x, size, T{0});
    } else {
        for (int64_t i = 0; i < size; ++i) x[i] *= factor;
    }
}

/// Finds the norms and factors of up to `units_at_once` units whose squares are summed.
template <class T>
void shrink(const GroupProxArgs<T>& args, const int32_t* units, int64_t count, const double* sums,
            T* __restrict factors) {
    T thresholds[units_at_once], norms[units_at_once];
    for (int64_t k = 0; k < count; ++k) thresholds[k] = args.threshold != nullptr ? args.threshold[units[k]] : T{0};
    for (int64_t k = 0; k < count; ++k) {  // a loop of its own: square roots and quotients of several units at once
        const auto shrinkage = Shrinkage<T>::of(sums[k], thresholds[k]);
        norms[k] = shrinkage.norm;
        factors[k] = shrinkage.factor;
    }
    for (int64_t k = 0; k < count; ++k) args.norms[units[k]] = norms[k];
}

/// `thresholds` may be null.
template <class T>
void soft_thresholds(T* __restrict x, int64_t size, const T* __restrict thresholds, T* __restrict norms) {
    if (thresholds == nullptr) {
        for (int64_t k = 0; k < size; ++k) norms[k] = std::fabs(x[k]);
        return;
    }
    for (int64_t k = 0; k < size; ++k) {
        const T value = x[k];
        norms[k] = std::fabs(value);
        x[k] = soft_threshold(value, thresholds[k]);
    }
}

template <class T>
void process_scalar_units(const GroupProxArgs<T>& args, const WorkItem& item) {
    const Bundle& bundle = args.plan.bundles[item.index];
    T* x = args.plan.stretches[bundle.first_stretch].template data<T>() + item.first;
    if (bundle.first_unit >= 0) {  // the rule, and several times as fast as to gather and scatter
        const int64_t unit = bundle.first_unit + item.first;
        const T* own = args.threshold != nullptr ? args.threshold + unit : nullptr;
        return soft_thresholds(x, item.count, own, args.norms + unit);
    }
    constexpr int64_t stretch = 256;
    T thresholds[stretch], norms[stretch];
    const int32_t* units = args.plan.unit_of + bundle.first_rank + item.first;
    for (int64_t first = 0; first < item.count; first += stretch, units += stretch) {
        const int64_t count = std::min(stretch, item.count - first);
        for (int64_t k = 0; k < count && args.threshold != nullptr; ++k) thresholds[k] = args.threshold[units[k]];
        soft_thresholds(x + first, count, args.threshold != nullptr ? thresholds : nullptr, norms);
        for (int64_t k = 0; k < count; ++k) args.norms[units[k]] = norms[k];
    }
}

/// Calls body(x, run) for every run of unit k of the bundle.
template <class T, class Body>
void for_each_run(const UnitPlan& plan, const Bundle& bundle, int64_t k, const Body& body) {
    for (int64_t s = bundle.first_stretch; s < bundle.first_stretch + bundle.num_stretches; ++s) {
        const Stretch& stretch = plan.stretches[s];
        T* x = stretch.data<T>() + k * stretch.run;
        for (int64_t row = 0; row < stretch.rows; ++row, x += stretch.row_stride) body(x, stretch.run);
    }
}

// Units of one run each, one behind the other, have loops of their own: a quarter of the time of 9 to 64 elements.

template <class T>
void sum_units(const UnitPlan& plan, const Bundle& bundle, int64_t first, int64_t count, double* sums) {
    const Stretch stretch = plan.stretches[bundle.first_stretch];
    if (bundle.num_stretches == 1 && stretch.rows == 1 && stretch.run <= block) {
        const T* x = stretch.data<T>() + first * stretch.run;
        for (int64_t k = 0; k < count; ++k, x += stretch.run) sums[k] = sum_of_squares(x, stretch.run);
        return;
    }
    for (int64_t k = 0; k < count; ++k) {
        LongSum sum;
        for_each_run<T>(plan, bundle, first + k, [&](const T* x, int64_t run) { add_squares(x, run, sum); });
        sums[k] = sum.result();
    }
}

template <class T>
void scale_units(const UnitPlan& plan, const Bundle& bundle, int64_t first, int64_t count, const T* factors) {
    const Stretch stretch = plan.stretches[bundle.first_stretch];
    if (bundle.num_stretches == 1 && stretch.rows == 1) {
        T* x = stretch.data<T>() + first * stretch.run;
        for (int64_t k = 0; k < count; ++k, x += stretch.run) {
            if (factors[k] != 1) scale(x, stretch.run, factors[k]);
        }
        return;
    }
    for (int64_t k = 0; k < count; ++k) {
        if (factors[k] == 1) continue;
        for_each_run<T>(plan, bundle, first + k, [&](T* x, int64_t run) { scale(x, run, factors[k]); });
    }
}

template <class T>
void process_whole_units(const GroupProxArgs<T>& args, const WorkItem& item) {
    const Bundle& bundle = args.plan.bundles[item.index];
    const int32_t* units = args.plan.unit_of + bundle.first_rank;
    int64_t size = 0;
    for_each_run<T>(args.plan, bundle, 0, [&](const T*, int64_t run) { size += run; });
    // Many small units at once: one after the other each would wait for its own square root and quotient.
    const int64_t at_once = std::clamp<int64_t>(8192 / size, 1, units_at_once);
    for (int64_t first = item.first; first < item.first + item.count; first += at_once) {
        const int64_t count = std::min(at_once, item.first + item.count - first);
        double sums[units_at_once];
        T factors[units_at_once];
        sum_units<T>(args.plan, bundle, first, count, sums);
        shrink(args, units + first, count, sums, factors);
        scale_units<T>(args.plan, bundle, first, count, factors);
    }
}

/// Down the columns of up to 64 rows: one loop over the line, however short the runs are.
template <class T>
void sum_columns(const T* x, int64_t rows, int64_t row_stride, int64_t width, double* __restrict sums) {
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
void sum_tile(const GroupProxArgs<T>& args, const Tile& tile) {
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
        for (int64_t k = 0; k < tile.count && part.run > 1; ++k) {
            double sum = 0;
            for (int64_t i = 0; i < part.run; ++i) sum += sums[k * part.run + i];
            sums[k] = sum;
        }
        if (part.rows <= 64) break;
        for (int64_t k = 0; k < tile.count; ++k) totals[k].add(sums[k]);
    }
    for (int64_t k = 0; k < tile.count; ++k)
        args.partial_sums[slots[k]] = part.rows <= 64 ? sums[k] : totals[k].result();
}

/// Adds up the partial sums of the shared units [first, last), up to `units_at_once`, and finds their factors.
template <class T>
void combine(const GroupProxArgs<T>& args, int64_t first, int64_t last) {
    const int64_t* slots = args.plan.first_slots;
    double sums[units_at_once];
    for (int64_t shared = first; shared < last; ++shared) {
        LongSum sum;
        for (int64_t slot = slots[shared]; slot < slots[shared + 1]; ++slot) sum.add(args.partial_sums[slot]);
        sums[shared - first] = sum.result();
    }
    const int32_t* units = args.plan.unit_of + args.plan.first_shared + first;
    shrink(args, units, last - first, sums, args.factors + first);
}

/// Scales the lines of a tile with several units. No factor is 1.
template <class T>
void scale_lines(const Tile& tile, const T* by_unit) {
    const int64_t run = tile.part.run, width = tile.count * run;
    T factors[max_tile_width];
    for (int64_t k = 0; k < tile.count; ++k) std::fill_n(factors + k * run, run, by_unit[k]);
    T* lines = tile.part.data<T>();
    for (int64_t row = 0; row < tile.part.rows; ++row) {
        T* __restrict x = lines + row * tile.part.row_stride;
        for (int64_t i = 0; i < width; ++i) x[i] = factors[i] == 0 ? T{0} : x[i] * factors[i];
    }
}

template <class T>
void scale_tile(const GroupProxArgs<T>& args, const Tile& tile) {
    const T* factors = args.factors + tile.first_rank - args.plan.first_shared;
    // Units that keep their bits are left out: rare within a tile, and often all of it.
    Tile part = tile;
    for (int64_t first = 0, last = 0; first < tile.count; first = last) {
        const bool kept = factors[first] == 1;
        for (last = first + 1; last < tile.count && (factors[last] == 1) == kept;) ++last;
        if (kept) continue;
        part.count = last - first;
        part.part.address = tile.part.address + first * tile.part.run * sizeof(T);
        if (part.count > 1) {
            scale_lines<T>(part, factors + first);
            continue;
        }
        T* x = part.part.template data<T>();
        for (int64_t row = 0; row < part.part.rows; ++row) {
            scale(x + row * part.part.row_stride, part.part.run, factors[first]);
        }
    }
}

template <class T>
void process(const GroupProxArgs<T>& args, const WorkItem& item) {
    item.kind == WorkItem::scalar ? process_scalar_units(args, item) : process_whole_units(args, item);
}

template <class T>
void process_wave(const GroupProxArgs<T>& args, const Wave& wave, int threads) {
    const Tile* tiles = args.plan.tiles + wave.first_tile;
    parallel_for(wave.num_tiles, threads, [&](int64_t i, int) { run_vectorised([&] { sum_tile(args, tiles[i]); }); });
    const int64_t last = wave.first_shared + wave.num_shared;
    parallel_for((wave.num_shared + units_at_once - 1) / units_at_once, threads, [&](int64_t i, int) {
        const int64_t first = wave.first_shared + i * units_at_once;
        run_vectorised([&] { combine(args, first, std::min(first + units_at_once, last)); });
    });
    if (args.threshold == nullptr) return;
    parallel_for(wave.num_tiles, threads, [&](int64_t i, int) { run_vectorised([&] { scale_tile(args, tiles[i]); }); });
}

template <class T>
int64_t count_good(const T* thresholds, int64_t size) {
    int64_t good = 0;
    constexpr int64_t stretch = 4096;  // with counts of 32 bits, of which a register holds more
    for (int64_t begin = 0; begin < size; begin += stretch) {
        int32_t count = 0;
        for (int64_t i = begin; i < std::min(begin + stretch, size); ++i) count += thresholds[i] >= 0;
        good += count;
    }
    return good;
}

template <class T>
Status check_thresholds(const GroupProxArgs<T>& args) {
    if (args.threshold == nullptr) return {};
    int64_t good = 0;
    run_vectorised([&] { good = count_good(args.threshold, args.plan.num_units); });
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
    // Small waves have a thread each: where threads met after every step of every wave, and others wanted the machine,
    // a ResNet-50 took ten times as long on two threads as on one.
    const auto small = [&](const Wave& wave) { return wave.num_elements <= plan.num_elements / (2 * threads); };
    const int64_t num_items = plan.num_items - plan.num_tiles;  // the items of the tiles come last
    parallel_for(num_items + plan.num_waves, threads, [&](int64_t i, int) {
        if (i < num_items) {
            run_vectorised([&] { process(args, plan.items[i]); });
        } else if (small(plan.waves[i - num_items])) {
            process_wave(args, plan.waves[i - num_items], 1);
        }
    });
    for (int64_t i = 0; i < plan.num_waves; ++i) {
        if (!small(plan.waves[i])) process_wave(args, plan.waves[i], threads);
    }
    return {};
}

template Status group_prox(const GroupProxArgs<float>&, int);
template Status group_prox(const GroupProxArgs<double>&, int);

}  // namespace fastprune::cpu
