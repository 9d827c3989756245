// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The effect of the proximal operator on one unit whose sum of squares is known.
#pragma once

#include <cmath>
#include <limits>

#include "fastprune/portable.h"

namespace fastprune {

template <class T>
struct Shrinkage {
    T norm;
    T factor;  // exactly 1: not a bit of the unit changes; exactly 0: all of it becomes +0.0

    static constexpr T largest = std::numeric_limits<T>::max();

    /// `threshold` is not NaN.
    static FASTPRUNE_HD Shrinkage of(double sum_of_squares, T threshold) {
        const double exact = std::sqrt(sum_of_squares);
        const T norm = static_cast<T>(exact);
        const T factor = static_cast<T>((exact - threshold) / exact);  // 1 - threshold / exact would cancel near 0
        // Without branches, so that loops vectorise. Against the rounded norm, so that a threshold taken from earlier
        // norms ends a unit. If it is below the rounded norm it is below the exact one, too.
        const T finite = norm <= largest ? factor : T{1};
        const T alive = threshold >= norm ? T{0} : finite;
        return {norm, threshold > 0 ? alive : T{1}};
    }
};

/// The same for a unit of one element, without the roundings of a square and a quotient.
template <class T>
FASTPRUNE_HD T soft_threshold(T value, T threshold) {
    const T norm = std::fabs(value);
    const T shrunk = value - std::copysign(threshold, value);
    const T result = threshold >= norm ? T{0} : shrunk;
    // NaN stays the NaN that it is: its comparison above is false, but the subtraction may quieten it.
    return ((threshold > 0) & (norm == norm)) ? result : value;  // without a branch, so that loops vectorise
}

/// `value` times a factor of Shrinkage. In T: products in double would cost the CPU five times as much as all the rest
/// of the scaling, for half a unit in the last place.
template <class T>
FASTPRUNE_HD T scaled(T value, T factor) {
    // Infinite elements of a dead unit: 0 * inf would be NaN. And -1 * 0 would be -0.0.
    return factor == 0 ? T{0} : factor == 1 ? value : value * factor;
}

}  // namespace fastprune
