// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Activations on accumulators, for the epilogues of every kernel.
#pragma once

#include "fastprune/activation.h"

namespace fastprune::cuda {

/// NaN stays NaN, as in torch.
template <Activation activation>
__device__ __forceinline__ float activate(float z) {
    if constexpr (activation == Activation::relu) return z < 0.0f ? 0.0f : z;
    if constexpr (activation == Activation::relu6) return z < 0.0f ? 0.0f : (z > 6.0f ? 6.0f : z);
    // Two units in the last place of float32, and a fifth of the instructions of expf and a division.
    if constexpr (activation == Activation::silu) return __fdividef(z, 1.0f + __expf(-z));
    if constexpr (activation == Activation::hardswish)
        return z * (z < -3.0f ? 0.0f : (z > 3.0f ? 1.0f : (z + 3.0f) * (1.0f / 6.0f)));
    return z;
}

template <Activation activation, class Values>
__device__ __forceinline__ void activate_as(Values& values) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(Values::kElements); ++i) values[i] = activate<activation>(values[i]);
}

/// In place, on a cutlass::Array. The activation is the same for the whole grid: one jump, no divergence.
template <class Values>
__device__ __forceinline__ void activate_all(Values& values, Activation activation) {
    switch (activation) {
        case Activation::identity: return;
        case Activation::relu: return activate_as<Activation::relu>(values);
        case Activation::relu6: return activate_as<Activation::relu6>(values);
        case Activation::silu: return activate_as<Activation::silu>(values);
        case Activation::hardswish: return activate_as<Activation::hardswish>(values);
    }
}

}  // namespace fastprune::cuda
