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

template <class T>
FASTPRUNE_INTO_CLONES double sum_of_squares(const T* x, int64_t size) {
    constexpr int64_t lanes = 16;  // independent chains of additions; also fewer roundings in each
    double sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const double value = x[i + lane];
            sums[lane] += value * value;
        }
    }
    double rest = 0;
    for (; i < size; ++i) rest += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    if (size < lanes) return rest;
    for (int64_t width = lanes / 2; width > 0; width /= 2) {
        for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0] + rest;
}

/// `factor` is not 1.
template <class T>
FASTPRUNE_INTO_CLONES void scale(T* x, int64_t size, double factor) {
    if (factor == 0) {
        std::fill_n(x, size, T{0});
    } else {
        for (int64_t i = 0; i < size; ++i) x[i] = static_cast<T>(static_cast<double>(x[i]) * factor);
    }
}

template <class T>
FASTPRUNE_INTO_CLONES Shrinkage<T> shrinkage_of(const GroupProxArgs<T>& args, double sum, int64_t unit) {
    return Shrinkage<T>::of(sum, args.threshold != nullptr ? args.threshold[unit] : T{0});
}

template <class T>
FASTPRUNE_INTO_CLONES void process_scalar_units(const GroupProxArgs<T>& args, const WorkItem& item) {
    const Bundle& bundle = args.plan.bundles[item.index];
    constexpr int64_t stretch = 256;
    T thresholds[stretch];
    for (int64_t first = item.first; first < item.first + item.count; first += stretch) {
        const int64_t count = std::min(stretch, item.first + item.count - first);
        T* x = args.plan.stretches[bundle.first_stretch].template data<T>() + first;
        const int32_t* units = args.plan.unit_of + bundle.first_rank + first;
        for (int64_t k = 0; k < count; ++k) args.norms[units[k]] = std::fabs(x[k]);
        if (args.threshold == nullptr) continue;
        for (int64_t k = 0; k < count; ++k) thresholds[k] = args.threshold[units[k]];
        for (int64_t k = 0; k < count; ++k) x[k] = soft_threshold(x[k], thresholds[k]);
    }
}

template <class T>
FASTPRUNE_INTO_CLONES void process_whole_units(const GroupProxArgs<T>& args, const WorkItem& item) {
    const Bundle& bundle = args.plan.bundles[item.index];
    const Stretch* stretches = args.plan.stretches + bundle.first_stretch;
    for (int64_t k = item.first; k < item.first + item.count; ++k) {
        const auto for_each_run = [&](const auto& body) __attribute__((always_inline)) {
            for (int64_t s = 0; s < bundle.num_stretches; ++s) {
                T* x = stretches[s].data<T>() + k * stretches[s].run;
                for (int64_t row = 0; row < stretches[s].rows; ++row, x += stretches[s].row_stride) {
                    body(x, stretches[s].run);
                }
            }
        };
        double sum = 0;
        for_each_run([&](const T* x, int64_t run) __attribute__((always_inline)) { sum += sum_of_squares(x, run); });
        const int64_t unit = args.plan.unit_of[bundle.first_rank + k];
        const auto shrinkage = shrinkage_of(args, sum, unit);
        args.norms[unit] = shrinkage.norm;
        if (shrinkage.factor == 1) continue;
        for_each_run([&](T* x, int64_t run) __attribute__((always_inline)) { scale(x, run, shrinkage.factor); });
    }
}

template <class T>
FASTPRUNE_INTO_CLONES void sum_tile(const GroupProxArgs<T>& args, const Tile& tile) {
    const Stretch& part = tile.part;
    const int64_t* slots = args.plan.slots + tile.first_slot;
    const T* x = part.data<T>();
    if (tile.count == 1) {
        double sum = 0;
        for (int64_t row = 0; row < part.rows; ++row) sum += sum_of_squares(x + row * part.row_stride, part.run);
        args.partial_sums[slots[0]] = sum;
        return;
    }
    double sums[max_tile_width];  // down the columns: one loop over the line, however short the runs are
    const int64_t width = tile.count * part.run;
    std::fill_n(sums, width, 0.0);
    for (int64_t row = 0; row < part.rows; ++row, x += part.row_stride) {
        for (int64_t i = 0; i < width; ++i) sums[i] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    for (int64_t k = 0; k < tile.count; ++k) {
        double sum = 0;
        for (int64_t i = 0; i < part.run; ++i) sum += sums[k * part.run + i];
        args.partial_sums[slots[k]] = sum;
    }
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
        double sum = 0;
        for (int64_t s = args.plan.first_slots[i]; s < args.plan.first_slots[i + 1]; ++s) sum += args.partial_sums[s];
        const int64_t unit = args.plan.unit_of[args.plan.first_shared + i];
        const auto shrinkage = shrinkage_of(args, sum, unit);
        args.norms[unit] = shrinkage.norm;
        args.factors[i] = shrinkage.factor;
    }
}

/// Lines of a tile with several units: what scaled() does, without a branch for each element.
template <class T>
FASTPRUNE_INTO_CLONES void scale_lines(const Tile& tile, const double* factors) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    double by_element[max_tile_width];
    Bits kept[max_tile_width], changed[max_tile_width];
    const int64_t width = tile.count * tile.part.run;
    for (int64_t k = 0; k < tile.count; ++k) {
        for (int64_t i = k * tile.part.run; i < (k + 1) * tile.part.run; ++i) {
            by_element[i] = factors[k];
            kept[i] = factors[k] == 1 ? ~Bits{0} : 0;
            changed[i] = factors[k] == 1 || factors[k] == 0 ? 0 : ~Bits{0};
        }
    }
    T* x = tile.part.data<T>();
    for (int64_t row = 0; row < tile.part.rows; ++row, x += tile.part.row_stride) {
        for (int64_t i = 0; i < width; ++i) {
            const T product = static_cast<T>(static_cast<double>(x[i]) * by_element[i]);
            const Bits bits = (std::bit_cast<Bits>(x[i]) & kept[i]) | (std::bit_cast<Bits>(product) & changed[i]);
            x[i] = std::bit_cast<T>(bits);
        }
    }
}

template <class T>
FASTPRUNE_INTO_CLONES void scale_tile(const GroupProxArgs<T>& args, const Tile& tile) {
    const double* factors = args.factors + tile.first_rank - args.plan.first_shared;
    if (std::all_of(factors, factors + tile.count, [](double factor) { return factor == 1; })) return;
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
    bool bad = false;
    for (int64_t unit = 0; unit < args.plan.num_units; ++unit) bad |= !(args.threshold[unit] >= 0);
    if (!bad) return {};
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
