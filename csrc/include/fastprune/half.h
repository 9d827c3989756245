// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// float16 and bfloat16 as storage: 16 bits that are widened to float to compute and rounded to nearest even to store.
//
// On the host these are bit operations with selections in place of branches, so that loops over them vectorise on any
// CPU: no compiler flag, no F16C. Exact for subnormals (no subnormal float is ever touched, hence none is slow and none
// is flushed away), infinities and signed zeros; a NaN stays a NaN.
#pragma once

#include <cstdint>

#include "fastprune/portable.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastprune {

struct float16 {
    uint16_t bits;  // sign, 5 bits of exponent, 10 of significand
};

struct bfloat16 {
    uint16_t bits;  // the upper half of a float
};

/// What a storage type is computed in.
template <class Storage>
struct RealOf {
    using Type = float;
};
template <>
struct RealOf<double> {
    using Type = double;
};
template <class Storage>
using Real = typename RealOf<Storage>::Type;

FASTPRUNE_HD float widen(float value) { return value; }
FASTPRUNE_HD double widen(double value) { return value; }

FASTPRUNE_HD float widen(bfloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

FASTPRUNE_HD float widen(float16 value) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;  // the exponent's bias is still 15
    const uint32_t smallest_normal = 113u << 23;                                   // 2^-14
    // Its significand counts in steps of 2^-24, the smallest subnormal, once the leading 1 is taken away again.
    const float subnormal = bits_as<float>(magnitude + smallest_normal) - bits_as<float>(smallest_normal);
    const uint32_t infinity = 0x7c00u << 13, normal_from = 0x0400u << 13;
    const uint32_t rebias = magnitude >= infinity ? 224u << 23 : 112u << 23;
    const uint32_t wide = magnitude < normal_from ? bits_as<uint32_t>(subnormal) : magnitude + rebias;
    return bits_as<float>(sign | wide);
#endif
}

/// `value` in storage: narrow<float16>(x), narrow<float>(x), ...
template <class Storage>
FASTPRUNE_HD Storage narrow(Real<Storage> value) {
    return value;
}

template <>
FASTPRUNE_HD bfloat16 narrow<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t to_even = (bits >> 16) & 1u;
    const uint32_t rounded = (bits + 0x7fffu + to_even) >> 16;
    const uint32_t nan = (bits >> 16) | 0x0040u;  // quiet: a payload in the lower half alone would round to infinity
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
#endif
}

template <>
FASTPRUNE_HD float16 narrow<float16>(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t to_even = (magnitude >> 13) & 1u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + to_even) >> 13;  // 65520 and above carries to infinity
    // Below 2^-14 the sum with 1/2 is rounded to steps of 2^-24, as the result has to be.
    const float half = 0.5f;
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + half) - bits_as<uint32_t>(half);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t beyond = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? beyond : finite))};
#endif
}

}  // namespace fastprune
