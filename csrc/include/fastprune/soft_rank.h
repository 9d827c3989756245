// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The mask as a function of the rank: DDNP (Gao et al., ECCV 2022), eq. 7, mirrored so that the best ranks open.
#pragma once

#include <cstdint>

#include "fastprune/portable.h"

namespace fastprune {

/// Positions are double whatever the scores are: u = C k rounded to float is off by C 2^-25 channels, which at C = 8192
/// would be the largest error of the mask. Doubles also give the CPU and CUDA the same bits (no contraction, see
/// CMake).
struct SoftRank {
    double centre;  // u = C k, in channels
    double width;   // gamma_eff, in channels: the largest window that stays inside [0, C], never above the asked one
    int64_t first;  // ranks below `first` are 1, …
    int64_t last;   // … ranks from `last` on are 0; only [first, last) needs to be sorted

    FASTPRUNE_HD SoftRank(int64_t size, double keep, double window) {
        const double channels = static_cast<double>(size);
        centre = channels * keep;
        width = smaller(window, smaller(2 * (channels - centre), 2 * centre));
        // One rank more on either side than exact arithmetic needs: the formula below then decides, not this rounding.
        first = static_cast<int64_t>(larger(0.0, centre - width / 2 - 1));
        last = static_cast<int64_t>(smaller(channels, centre + width / 2 + 2));
    }

    /// The mask of the channel at 0-based `rank` (rank = i - 1 of the paper).
    FASTPRUNE_HD double operator()(int64_t rank) const {
        const double distance = centre - (static_cast<double>(rank) + 0.5);
        if (!(width > 0)) return distance > 0 ? 1 : 0;
        // x = t + 1/2, clamped before the cubic, which turns back outside of [0, 1]. x^2 (3 - 2x) is -2t^3 + 1.5t + 1/2
        // without its cancellation near 0.
        const double x = smaller(1, larger(0, distance / width + 0.5));
        return x * x * (3 - 2 * x);
    }

   private:
    static FASTPRUNE_HD double smaller(double a, double b) { return a < b ? a : b; }
    static FASTPRUNE_HD double larger(double a, double b) { return a > b ? a : b; }
};

}  // namespace fastprune
