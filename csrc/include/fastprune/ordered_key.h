// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Floating-point scores as integers whose ascending order is the descending order of the scores.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fastprune/portable.h"

namespace fastprune {

template <class Score>
struct OrderedKey {
    static_assert(std::is_same_v<Score, float> || std::is_same_v<Score, double>);

    // Signed, because SSE2 compares signed integers only: the pass over all scores then vectorises on every x86-64.
    using Signed = std::conditional_t<sizeof(Score) == 4, int32_t, int64_t>;
    using Unsigned = std::make_unsigned_t<Signed>;

    static constexpr int bits = 8 * sizeof(Score);
    static constexpr Signed magnitude = static_cast<Signed>(~Unsigned{0} >> 1);  // all bits but the sign

    static FASTPRUNE_HD Signed of(Score score) {
        score += Score{0};  // -0.0 becomes +0.0: the two tie
        Signed pattern;
        std::memcpy(&pattern, &score, sizeof(pattern));
        return ~(pattern ^ ((pattern >> (bits - 1)) & magnitude));
    }

    /// NaNs have keys outside of those of [-inf, inf], so that a minimum and a maximum over keys find them.
    static FASTPRUNE_HD bool is_nan(Signed key) { return key < of_infinity() || key > ~of_infinity(); }

    /// The same order in unsigned integers, whose digits a radix selection can walk.
    static FASTPRUNE_HD Unsigned unsigned_of(Score score) {
        return static_cast<Unsigned>(of(score)) ^ (Unsigned{1} << (bits - 1));
    }

   private:
    static FASTPRUNE_HD Signed of_infinity() {
        constexpr Unsigned pattern =
            sizeof(Score) == 4 ? Unsigned{0x7f800000u} : static_cast<Unsigned>(0x7ff0000000000000ull);
        return ~static_cast<Signed>(pattern);
    }
};

}  // namespace fastprune
