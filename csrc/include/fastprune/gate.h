// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The common part of stochastic gates: which noise a call draws, and what it writes.
#pragma once

#include <cstdint>

#include "fastprune/portable.h"

namespace fastprune {

/// Names the noise of one call: unit i draws the same bits for the same (seed, step), see Philox4x32::of.
struct Draw {
    int64_t seed;  // >= 0
    int64_t step;  // >= 0
    const int64_t*
        step_at;  // CUDA alone: where the device finds the step, so that a captured graph draws anew; or null

    FASTPRUNE_HD int64_t current_step() const { return step_at != nullptr ? *step_at : step; }
};

/// A gate and the slope that training sees: backward multiplies the gradient of `value` by `slope`.
template <class Real>
struct Gate {
    Real value;
    Real slope;

    static FASTPRUNE_HD Gate not_a_number() {
        return {static_cast<Real>(__builtin_nanf("")), static_cast<Real>(__builtin_nanf(""))};
    }
};

/// Borrowed for the call. All vectors are contiguous and on the device of the call; gate and slope overlap nothing.
template <class Real>  // float or double
struct GateArgs {
    const Real* input;  // [U], what decides how likely a gate is open; any number but NaN, inf allowed
    Real* gate;         // [U], written completely
    Real* slope;        // [U], written completely: d gate / d input
    int64_t num_units;  // U
    Draw draw;
};

/// 32 random bits as a uniform number on [0, 1): a multiple of 2^-32, exact in a double.
FASTPRUNE_HD double uniform(uint32_t bits) {
    // Through a signed integer, since SSE2 converts no unsigned ones; every step is exact.
    return (static_cast<double>(static_cast<int32_t>(bits ^ 0x80000000u)) + 0x1p31) * 0x1p-32;
}

/// The same on (0, 1), where a logarithm is finite: (n + 1/2) 2^-32, symmetric about 1/2.
FASTPRUNE_HD double open_uniform(uint32_t bits) { return uniform(bits) + 0x1p-33; }

}  // namespace fastprune
