// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The activations between a batch norm and a mask. NaN goes through all of them.
//
//     identity  r = z                relu  r = max(z, 0)       relu6  r = min(max(z, 0), 6)
//     silu      r = z / (1 + exp(-z))                          hardswish  r = z min(max(z + 3, 0), 6) / 6
#pragma once

#include <cstdint>

#include "fastprune/portable.h"

namespace fastprune {

enum class Activation : int32_t { identity, relu, relu6, silu, hardswish };

/// What a backward pass needs of the forward pass: r = act(z) itself where r' is a function of r, else z.
FASTPRUNE_HD constexpr bool saves_input(Activation activation) {
    return activation == Activation::silu || activation == Activation::hardswish;
}

}  // namespace fastprune
