// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The kernels, by the file that compiles them: one file for each kind and type, so that they compile side by side.
#pragma once

#include <span>

#include "fastprune/fused_conv.h"

namespace fastprune::cuda {

using ConvCandidates = std::span<const ConvCandidate>;

ConvCandidates sm80_float16();
ConvCandidates sm80_bfloat16();
ConvCandidates sm80_tf32();
ConvCandidates sm90_convolution_float16();
ConvCandidates sm90_convolution_bfloat16();
ConvCandidates sm90_product_float16();
ConvCandidates sm90_product_bfloat16();

}  // namespace fastprune::cuda
