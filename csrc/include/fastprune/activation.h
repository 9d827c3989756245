// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The activations between a batch norm and a mask, and their derivatives. NaN goes through all of them; at the kinks
// the derivatives are torch's.
//
//     identity  r = z
//     relu      r = max(z, 0)             r' = 1[r > 0]
//     relu6     r = min(max(z, 0), 6)     r' = 1[0 < r < 6]
//     silu      r = z s(z)                r' = s (1 + z (1 - s)),  s(z) = 1 / (1 + exp(-z))
//     hardswish r = z min(max(z + 3, 0), 6) / 6    r' = 0 up to -3, 1 from 3 on, z / 3 + 1/2 between
#pragma once

#include <cstdint>

#include "fastprune/elementary.h"
#include "fastprune/portable.h"

namespace fastprune {

enum class Activation : int32_t { identity, relu, relu6, silu, hardswish };

/// Whether a backward pass needs z rather than r = act(z): where r' is no function of r.
FASTPRUNE_HD constexpr bool saves_input(Activation activation) {
    return activation == Activation::silu || activation == Activation::hardswish;
}

template <class Real>
FASTPRUNE_HD Real sigmoid(Real z) {
    const Real e = exp_of_negative(z > 0 ? -z : z);  // e <= 1: nothing overflows
    return (z > 0 ? Real{1} : e) / (1 + e);
}

/// r = act(z).
template <class Real>
FASTPRUNE_HD Real activate(Activation activation, Real z) {
    const Real rectified = z < 0 ? Real{0} : z;
    switch (activation) {
        case Activation::identity: return z;
        case Activation::relu: return rectified;
        case Activation::relu6: return rectified > 6 ? Real{6} : rectified;
        case Activation::silu: return z * sigmoid(z);
        case Activation::hardswish: break;
    }
    const Real part = z * (z + 3 < 0 ? Real{0} : z + 3) / 6;
    return z >= 3 ? z : part;  // not z * 6 / 6, which may overflow
}

/// What a backward pass computes from the saved value (see saves_input).
template <class Real>
struct Activated {
    Real value;       // r
    Real derivative;  // dr/dz
};

template <class Real>
FASTPRUNE_HD Activated<Real> reactivate(Activation activation, Real saved) {
    switch (activation) {
        case Activation::identity: return {saved, Real{1}};
        case Activation::relu: return {saved, saved <= 0 ? Real{0} : Real{1}};
        case Activation::relu6: return {saved, saved <= 0 || saved >= 6 ? Real{0} : Real{1}};
        case Activation::silu: {
            const Real s = sigmoid(saved);
            return {saved * s, s * (1 + saved * (1 - s))};
        }
        case Activation::hardswish: break;
    }
    const Real between = saved / 3 + static_cast<Real>(0.5);
    const Real derivative = saved <= -3 ? Real{0} : saved >= 3 ? Real{1} : between;
    return {activate(Activation::hardswish, saved), derivative};
}

/// dz = dy mask act'(z), where a derivative of 0 gives 0 even for an infinite dy, as in torch.
template <class Real>
FASTPRUNE_HD Real masked_gradient(Real dy, Real mask, Real derivative) {
    return derivative == 0 ? Real{0} : dy * mask * derivative;
}

}  // namespace fastprune
