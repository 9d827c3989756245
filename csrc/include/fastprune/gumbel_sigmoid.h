// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// One relaxed gate: the formula of gumbel_gate.h.
#pragma once

#include <cstdint>

#include "fastprune/elementary.h"
#include "fastprune/gumbel_gate.h"

namespace fastprune {

template <Noise noise>
struct GumbelSigmoid {
    static constexpr bool draws = noise != Noise::none;

    double inverse_temperature;
    double base;
    bool hard;

    explicit GumbelSigmoid(const GumbelOptions& options)
        : inverse_temperature(1 / options.temperature), base(options.base), hard(options.hard) {}

    static FASTPRUNE_HD double sample([[maybe_unused]] uint32_t bits) {
        if constexpr (noise == Noise::gumbel) return -natural_log(-natural_log(open_uniform(bits)));
        if constexpr (noise == Noise::logistic) {
            const double u = open_uniform(bits);
            return natural_log(u) - natural_log(1 - u);  // 1 - u is exact
        }
        return 0;
    }

    template <class Real>
    FASTPRUNE_HD Gate<Real> operator()(Real logit, double drawn) const {
        const double x = (static_cast<double>(logit) + base + drawn) * inverse_temperature;
        // Both tails from e^-|x|, which cannot overflow: y = 1 / (1 + e) on the right, e / (1 + e) on the left, and
        // y (1 - y) = e / (1 + e)^2 on either side, without the cancellation of 1 - y.
        const double e = exponential(x < 0 ? x : -x);
        const double larger = 1 / (1 + e);
        const double soft = x < 0 ? e * larger : larger;
        const double step = x < 0 ? 0.0 : 1.0;
        const double slope = e * larger * larger * inverse_temperature;
        return x == x ? Gate<Real>{static_cast<Real>(hard ? step : soft), static_cast<Real>(slope)}
                      : Gate<Real>::not_a_number();
    }
};

/// Calls run(formula) with the formula that `options` ask for: the kind of noise is settled before any loop.
template <class Run>
Status with_gumbel_sigmoid(const GumbelOptions& options, const Run& run) {
    if (options.noise == Noise::gumbel) return run(GumbelSigmoid<Noise::gumbel>(options));
    if (options.noise == Noise::logistic) return run(GumbelSigmoid<Noise::logistic>(options));
    return run(GumbelSigmoid<Noise::none>(options));
}

}  // namespace fastprune
