// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "candidates.h"
#include "sm90_convolution.cuh"

namespace fastprune::cuda {

ConvCandidates sm90_convolution_float16() { return sm90::convolution_candidates<ConvType::float16, cutlass::half_t>; }

}  // namespace fastprune::cuda
