// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "candidates.h"
#include "sm90_convolution.cuh"

namespace fastprune::cuda {

ConvCandidates sm90_convolution_bfloat16() {
    return sm90::convolution_candidates<ConvType::bfloat16, cutlass::bfloat16_t>;
}

}  // namespace fastprune::cuda
