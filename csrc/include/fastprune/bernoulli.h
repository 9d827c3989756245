// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// One discrete gate: DMC (Gao et al., CVPR 2020), eq. 3 and 4.
#pragma once

#include <cstdint>

#include "fastprune/gate.h"

namespace fastprune {

struct Bernoulli {
    static constexpr bool draws = true;

    static FASTPRUNE_HD double sample(uint32_t bits) { return uniform(bits); }

    template <class Real>
    FASTPRUNE_HD Gate<Real> operator()(Real theta, double u) const {
        // In double whatever theta is: a float would round the largest u to 1, and theta = 1 would not always open.
        const Real value = u < static_cast<double>(theta) ? Real{1} : Real{0};
        const bool inside = (theta >= 0) & (theta <= 1);
        const Real slope = inside ? Real{1} : Real{0};
        return theta == theta ? Gate<Real>{value, slope} : Gate<Real>::not_a_number();
    }
};

}  // namespace fastprune
