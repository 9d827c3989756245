// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_act for one thread block: what the GPU runs, and what emulated/masked_act.cpp runs on the host. Bound by
// memory: a thread loads several vectors before it works on the first.
#pragma once

#include <cstdint>

#include "channel_runs.cuh"
#include "fastprune/masked_act.h"

namespace fastprune::device {

/// Which sums a body makes; `all` also reads x.
enum class Sums { none, mask, all };

/// `adds`: whether there is a residual.
template <class Storage, int vector, bool rows, bool adds, class Block>
FASTPRUNE_DEVICE void masked_act(const Block& block, const MaskedActArgs<Storage>& args, const ChannelTasks& tasks,
                                 int64_t task) {
    using Value = Real<Storage>;
    constexpr int in_flight = adds ? 2 : 4;  // two vectors for each where something is added
    constexpr int channels = rows ? vector : 1;
    const Run run = rows ? row_run(block, tasks, task) : plane_run(block, tasks, task);
    const Coefficients<Value, channels> scale(args.scale, Value{1}, run), shift(args.shift, -Value{0}, run),
        mask(args.mask, Value{1}, run);
    const Storage* x = run.first(args.x, args.layout);
    const int64_t x_step = run.step(args.x), y_step = run.step(args.y), saved_step = run.step(args.saved);
    for (int64_t k = 0; k < run.count; k += in_flight) {
        Vector<Storage, vector> loaded[in_flight], added[in_flight];
        FASTPRUNE_UNROLL
        for (int j = 0; j < in_flight; ++j) {
            if (k + j >= run.count) continue;
            loaded[j] = load<Storage, vector>(x + (k + j) * x_step);
            if (adds)
                added[j] =
                    load<Storage, vector>(run.first(args.residual, args.layout) + (k + j) * run.step(args.residual));
        }
        FASTPRUNE_UNROLL
        for (int j = 0; j < in_flight; ++j) {
            if (k + j >= run.count) continue;
            Vector<Storage, vector> y, saved;
            FASTPRUNE_UNROLL
            for (int v = 0; v < vector; ++v) {
                Value z = widen(loaded[j].values[v]) * scale[v] + shift[v];
                if (adds) z += widen(added[j].values[v]);
                const Value r = activate(args.activation, z);
                saved.values[v] = narrow<Storage>(saves_input(args.activation) ? z : r);
                y.values[v] = narrow<Storage>(r * mask[v]);
            }
            if (args.saved.data != nullptr) store(run.first(args.saved, args.layout) + (k + j) * saved_step, saved);
            if (args.y.data != nullptr) store(run.first(args.y, args.layout) + (k + j) * y_step, y);
        }
    }
}

/// Partial sums [chunks, channels]; null where not wanted.
struct SumPartials {
    double *mask, *shift, *scale;
};

/// `scratch`: shared memory, for rows one Real for each element of every thread's vector.
template <class Storage, int vector, bool rows, Sums wanted, class Block>
FASTPRUNE_DEVICE void masked_act_backward(const Block& block, const MaskedActBackwardArgs<Storage>& args,
                                          const ChannelTasks& tasks, int64_t task, const SumPartials& partials,
                                          Real<Storage>* scratch) {
    using Value = Real<Storage>;
    // Three vectors for each, and up to three sums: registers are short.
    constexpr int in_flight = (wanted == Sums::all ? 2 : 4) / (sizeof(Storage) == 8 ? 2 : 1);
    constexpr int channels = rows ? vector : 1;
    const Run run = rows ? row_run(block, tasks, task) : plane_run(block, tasks, task);
    const Coefficients<Value, channels> mask(args.mask, Value{1}, run), scale(args.scale, Value{1}, run),
        centre(args.centre, Value{0}, run), slope(args.slope, Value{0}, run), offset(args.offset, -Value{0}, run);
    const bool reads_x = wanted == Sums::all && args.x.data != nullptr;
    const bool adds = wanted != Sums::all && args.others.data != nullptr;
    const Storage *dy = run.first(args.dy, args.layout), *saved = run.first(args.saved, args.layout);
    const int64_t dy_step = run.step(args.dy), saved_step = run.step(args.saved), x_step = run.step(args.x),
                  dx_step = run.step(args.dx);
    Value mask_sums[channels] = {}, shift_sums[channels] = {}, scale_sums[channels] = {};

    for (int64_t k = 0; k < run.count; k += in_flight) {
        Vector<Storage, vector> dy_loaded[in_flight], saved_loaded[in_flight], x_loaded[in_flight], added[in_flight];
        FASTPRUNE_UNROLL
        for (int j = 0; j < in_flight; ++j) {
            if (k + j >= run.count) continue;
            dy_loaded[j] = load<Storage, vector>(dy + (k + j) * dy_step);
            saved_loaded[j] = load<Storage, vector>(saved + (k + j) * saved_step);
            if (reads_x) x_loaded[j] = load<Storage, vector>(run.first(args.x, args.layout) + (k + j) * x_step);
            if (adds)
                added[j] = load<Storage, vector>(run.first(args.others, args.layout) + (k + j) * run.step(args.others));
        }
        FASTPRUNE_UNROLL
        for (int j = 0; j < in_flight; ++j) {
            if (k + j >= run.count) continue;
            Vector<Storage, vector> dx;
            FASTPRUNE_UNROLL
            for (int v = 0; v < vector; ++v) {
                const int c = rows ? v : 0;
                Value gradient = widen(dy_loaded[j].values[v]);
                if (adds) gradient += widen(added[j].values[v]);
                const Activated<Value> r = reactivate(args.activation, widen(saved_loaded[j].values[v]));
                const Value dz = masked_gradient(gradient, mask[v], r.derivative);
                Value result = dz * scale[v];
                if constexpr (wanted != Sums::none) mask_sums[c] += gradient * r.value;
                if constexpr (wanted == Sums::all) shift_sums[c] += dz;
                if (reads_x) {
                    const Value x = widen(x_loaded[j].values[v]) - centre[v];
                    scale_sums[c] += dz * x;
                    result = result + (x * slope[v] + offset[v]);
                }
                dx.values[v] = narrow<Storage>(result);
            }
            if (args.dx.data != nullptr) store(run.first(args.dx, args.layout) + (k + j) * dx_step, dx);
        }
    }
    const auto store_sums = [&](const Value* sums, double* to) {
        if (to == nullptr) return;
        if constexpr (rows) {
            store_row_sums<vector>(block, tasks, task, sums, scratch, to);
        } else {
            store_plane_sum(block, tasks, run, sums[0], to);
        }
    };
    if constexpr (wanted != Sums::none) store_sums(mask_sums, partials.mask);
    if constexpr (wanted == Sums::all) store_sums(shift_sums, partials.shift);
    if constexpr (wanted == Sums::all) store_sums(scale_sums, partials.scale);
}

/// The wanted sums of combined_channels channels. `scratch`: shared memory, a double for every thread.
template <class Storage, class Block>
FASTPRUNE_DEVICE void combine_sums(const Block& block, const MaskedActBackwardArgs<Storage>& args,
                                   const SumPartials& partials, int64_t num_chunks, int64_t task, double* scratch) {
    const int64_t channel = task * combined_channels + block.rank();
    const auto combine = [&](const double* from, Real<Storage>* to) {
        if (to == nullptr) return;
        const double total = combined_partials(block, from, num_chunks, args.layout.channels, task, scratch);
        if (block.rank() < combined_channels && channel < args.layout.channels) {
            to[channel] = static_cast<Real<Storage>>(total);
        }
    };
    combine(partials.mask, args.dmask);
    combine(partials.shift, args.dshift);
    combine(partials.scale, args.dscale);
}

/// The wanted ones among consecutive blocks of `each` doubles.
template <class Storage>
SumPartials partials_of(const MaskedActBackwardArgs<Storage>& args, double* memory, int64_t each) {
    const auto next = [&](const void* wanted) {
        double* place = wanted != nullptr ? memory : nullptr;
        if (wanted != nullptr) memory += each;
        return place;
    };
    double* mask = next(args.dmask);
    double* shift = next(args.dshift);
    return {mask, shift, next(args.dscale)};
}

template <class Storage>
Sums sums_of(const MaskedActBackwardArgs<Storage>& args) {
    if (args.dshift != nullptr || args.dscale != nullptr || args.slope != nullptr) return Sums::all;
    return args.dmask != nullptr ? Sums::mask : Sums::none;
}

/// Elements of a vector for these arguments.
template <class Storage>
int vector_for(const MaskedActArgs<Storage>& args) {
    constexpr int wide = widest_vector<Storage>;
    return divides(args.layout, wide) && can_load(args.x, wide) && can_load(args.residual, wide) &&
                   can_load(args.y, wide) && can_load(args.saved, wide)
               ? wide
               : 1;
}
template <class Storage>
int vector_for(const MaskedActBackwardArgs<Storage>& args) {
    constexpr int wide = widest_vector<Storage>;
    return divides(args.layout, wide) && can_load(args.dy, wide) && can_load(args.saved, wide) &&
                   can_load(args.x, wide) && can_load(args.others, wide) && can_load(args.dx, wide)
               ? wide
               : 1;
}

}  // namespace fastprune::device
