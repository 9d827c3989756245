// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Logarithm and exponentials with the same bits on every machine. Those of libm and of CUDA differ in their last
// places, and no compiler vectorises std::exp under IEEE rules. These use only what IEEE 754 rounds in one way (+, -,
// *, /) and integers, without a branch, so that loops vectorise.
#pragma once

#include <cstdint>

#include "fastprune/portable.h"

namespace fastprune {
namespace elementary {

/// ln 2 in two parts; the upper one ends in zero bits, so that its product with an exponent is exact. `round`, 1.5
/// times a power of two: adding it rounds to an integer, which the lowest bits of the sum then hold.
template <class Real>
struct Constants;
template <>
struct Constants<float> {
    using Integer = int32_t;
    static constexpr int significand_bits = 23, bias = 127, degree = 7;
    static constexpr float lowest = -87.0f;
    static constexpr float round = 0x1.8p23f;
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Constants<double> {
    using Integer = int64_t;
    static constexpr int significand_bits = 52, bias = 1023, degree = 13;
    static constexpr double lowest = -708.0;
    static constexpr double round = 0x1.8p52;
    static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
};

/// x = exponent ln 2 + rest, |rest| <= ln(2) / 2.
template <class Real>
struct Reduced {
    typename Constants<Real>::Integer exponent;
    Real rest;
};

template <class Real>
FASTPRUNE_HD Reduced<Real> reduce(Real x) {
    using Integer = typename Constants<Real>::Integer;
    const Real round = Constants<Real>::round;
    const Real shifted = x * static_cast<Real>(0x1.71547652b82fep+0) + round;  // 1 / ln 2
    const Real n = shifted - round;
    return {bits_as<Integer>(shifted) - bits_as<Integer>(round),
            (x - n * Constants<Real>::ln2_high) - n * Constants<Real>::ln2_low};
}

template <int k>
inline constexpr double inverse_factorial = inverse_factorial<k - 1> / k;
template <>
inline constexpr double inverse_factorial<0> = 1;

/// The terms of exp(t) from t^k / k! on, over t^k.
template <class Real, int k, int degree>
FASTPRUNE_HD Real exp_series(Real t) {
    constexpr Real coefficient = static_cast<Real>(inverse_factorial<k>);
    if constexpr (k == degree) {
        return coefficient;
    } else {
        return coefficient + t * exp_series<Real, k + 1, degree>(t);
    }
}

}  // namespace elementary

/// ln(x) of a positive, finite, normal x. Relative error at most 2.3e-16, one unit in the last place, also next to 1
/// (the largest of 20 million arguments was 1.7e-16).
FASTPRUNE_HD double natural_log(double x) {
    using Constants = elementary::Constants<double>;
    // x = 2^k m with m in [sqrt(1/2), sqrt(2)): around 1 there is no k whose product could cancel.
    constexpr uint64_t root = 0x3fe6a09e667f3bcdu;  // of 1/2
    constexpr uint64_t one = 0x3ff0000000000000u;
    constexpr uint64_t mantissa = 0x000fffffffffffffu;
    const uint64_t shifted = bits_as<uint64_t>(x) + (one - root);
    const double m = bits_as<double>((shifted & mantissa) + root);
    // An integer below 2^52 becomes a double as the mantissa of 2^52 + itself: SSE2 has no conversion.
    const double k = bits_as<double>((shifted >> 52) | 0x4330000000000000u) - (0x1p52 + 1023);
    // ln(m) = 2 artanh(s) with s = f / (2 + f) for f = m - 1, |s| < 0.172. Eleven terms leave 2e-19.
    const double f = m - 1;
    const double s = f / (2 + f);
    const double z = s * s;
    double series = 1.0 / 23;
    series = series * z + 1.0 / 21;
    series = series * z + 1.0 / 19;
    series = series * z + 1.0 / 17;
    series = series * z + 1.0 / 15;
    series = series * z + 1.0 / 13;
    series = series * z + 1.0 / 11;
    series = series * z + 1.0 / 9;
    series = series * z + 1.0 / 7;
    series = series * z + 1.0 / 5;
    series = series * z + 1.0 / 3;
    // 2 s = f - s f, and f is exact: the rounding of s then weighs a sixth.
    const double tail = s * (f - 2 * z * series);
    return k * Constants::ln2_high + (f - (tail - k * Constants::ln2_low));
}

/// e^x of x <= 0, for the sigmoid of an activation: 0 where it is nearly subnormal. The remainder of the series is a
/// tenth of a rounding error.
template <class Real>
FASTPRUNE_HD Real exp_of_negative(Real x) {
    using Constants = elementary::Constants<Real>;
    using Integer = typename Constants::Integer;
    const elementary::Reduced<Real> reduced = elementary::reduce(x);
    const Integer exponent = (reduced.exponent + Constants::bias) << Constants::significand_bits;
    const Real series = elementary::exp_series<Real, 0, Constants::degree>(reduced.rest);
    return x < Constants::lowest ? Real{0} : series * bits_as<Real>(exponent);
}

/// e^x of x <= 0, for the sigmoid of a gate: 0 below -708, where the result would be subnormal. Relative error at most
/// 2.3e-16, one unit in the last place (the largest of 20 million arguments was 1.6e-16): the 1 of the series is added
/// last, which exp_of_negative does not do. The two differ in last bits, and gates are to keep theirs.
FASTPRUNE_HD double exponential(double x) {
    const double lowest = elementary::Constants<double>::lowest;
    const auto [exponent, r] = elementary::reduce(x < lowest ? lowest : x);
    // Taylor's series up to r^13 leaves 4e-18.
    double series = 1.0 / 6227020800;
    series = series * r + 1.0 / 479001600;
    series = series * r + 1.0 / 39916800;
    series = series * r + 1.0 / 3628800;
    series = series * r + 1.0 / 362880;
    series = series * r + 1.0 / 40320;
    series = series * r + 1.0 / 5040;
    series = series * r + 1.0 / 720;
    series = series * r + 1.0 / 120;
    series = series * r + 1.0 / 24;
    series = series * r + 1.0 / 6;
    series = series * r + 1.0 / 2;
    series = series * r * r + r;
    const double scaled = bits_as<double>(bits_as<uint64_t>(series + 1) + (static_cast<uint64_t>(exponent) << 52));
    return x < lowest ? 0 : scaled;
}

}  // namespace fastprune
