// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// group_prox: the proximal operator of the group norm for every unit of a table, in place.
//
// A unit u owns elements of several tensors, which together are the vector w_u:
//
//     norm[u] = ||w_u||_2,    w_u <- w_u max(0, 1 - threshold[u] / ||w_u||)
//
// that is argmin_w 1/2 ||w - w_u||^2 + threshold[u] ||w||_2. For a unit of one element it is the soft threshold
// sign(w) max(|w| - threshold, 0), and computed as such.
#pragma once

#include <cstdint>

#include "fastprune/status.h"
#include "fastprune/unit_plan.h"

namespace fastprune {

/// Borrowed for the call, contiguous, on the device of the call. norms and threshold overlap no tensor of the plan.
template <class T>  // float or double
struct GroupProxArgs {
    UnitPlan plan;
    const T* threshold;    // [U], >= 0, inf allowed; or null: norms alone, nothing else is written
    T* norms;              // [U], the norms before; written completely, 0 for a unit without elements
    double* partial_sums;  // [plan.num_slots], scratch
    T* factors;            // [plan.num_shared()], scratch
    uint32_t* arrived;     // [plan.num_shared()], scratch of CUDA: all 0 before and after
};

// Which bits change: none of a unit whose threshold is 0, whose norm is NaN, or whose norm is inf (beyond the range of
// T) under a finite threshold. All elements of a unit with 0 < threshold >= norm become +0.0, infinite ones included.
// Squares are summed in double. Deterministic: the same bits on every run and for every number of threads. The CPU and
// CUDA cut the work differently, so that their norms may differ in the last place.

namespace cpu {
/// Refuses negative and NaN thresholds before anything is written. At most `num_threads` OpenMP threads.
template <class T>
Status group_prox(const GroupProxArgs<T>& args, int num_threads);
}  // namespace cpu

namespace cuda {
/// One launch on `stream` (a cudaStream_t) of `device`; a second one if there are shared units and a threshold. No
/// synchronisation, no allocation: fit for CUDA graphs. Values cannot be refused without waiting for them: a unit with
/// a negative or NaN threshold is left alone, and its norm is NaN.
template <class T>
Status group_prox(const GroupProxArgs<T>& args, int device, void* stream);
}  // namespace cuda

namespace emulated {
/// The device bodies of cuda::group_prox, run by `num_threads` host threads per block in warps of `warp_size`.
template <class T>
Status group_prox(const GroupProxArgs<T>& args, int num_threads, int warp_size);
}  // namespace emulated

}  // namespace fastprune
