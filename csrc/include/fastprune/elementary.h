// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Logarithm and exponential with the same bits on every machine. Those of libm and of CUDA differ in their last places;
// these use only what IEEE 754 rounds in one way (+, -, *, /) and integers, without a branch, so that loops vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "fastprune/portable.h"

namespace fastprune {
namespace elementary {

// ln 2 in two parts; the upper one has 21 zero bits at its end, so that its product with an exponent is exact.
inline constexpr double ln2_high = 0x1.62e42fee00000p-1;
inline constexpr double ln2_low = 0x1.a39ef35793c76p-33;

FASTPRUNE_HD uint64_t bits_of(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
FASTPRUNE_HD double of_bits(uint64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

}  // namespace elementary

/// ln(x) of a positive, finite, normal x. Relative error at most 2.3e-16, one unit in the last place, also next to 1
/// (the largest of 20 million arguments was 1.7e-16).
FASTPRUNE_HD double natural_log(double x) {
    using namespace elementary;
    // x = 2^k m with m in [sqrt(1/2), sqrt(2)): around 1 there is no k whose product could cancel.
    constexpr uint64_t root = 0x3fe6a09e667f3bcdu;  // of 1/2
    constexpr uint64_t one = 0x3ff0000000000000u;
    constexpr uint64_t mantissa = 0x000fffffffffffffu;
    const uint64_t shifted = bits_of(x) + (one - root);
    const double m = of_bits((shifted & mantissa) + root);
    // An integer below 2^52 becomes a double as the mantissa of 2^52 + itself: SSE2 has no conversion.
    const double k = of_bits((shifted >> 52) | 0x4330000000000000u) - (0x1p52 + 1023);
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
    return k * ln2_high + (f - (tail - k * ln2_low));
}

/// e^x of x <= 0, for sigmoids: 0 below -708, where the result would be subnormal. Relative error at most 2.3e-16, one
/// unit in the last place (the largest of 20 million arguments was 1.6e-16).
FASTPRUNE_HD double exponential(double x) {
    using namespace elementary;
    const double lowest = -708;
    const double inside = x < lowest ? lowest : x;
    // Adding 1.5 2^52 rounds to the nearest integer k, and leaves it in the lowest bits of the sum.
    constexpr double rounding = 0x1.8p52;
    const double sum = inside * 0x1.71547652b82fep+0 + rounding;
    const double k = sum - rounding;
    const double r = (inside - k * ln2_high) - k * ln2_low;  // |r| < 0.347
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
    const double scaled = of_bits(bits_of(series + 1) + (bits_of(sum) << 52));
    return x < lowest ? 0 : scaled;
}

}  // namespace fastprune
