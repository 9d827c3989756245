// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "candidates.h"
#include "sm80_half.cuh"

namespace fastprune::cuda {

ConvCandidates sm80_bfloat16() { return sm80::half_candidates<ConvType::bfloat16, cutlass::bfloat16_t>; }

}  // namespace fastprune::cuda
