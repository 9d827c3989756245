// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "candidates.h"
#include "sm90_product.cuh"

namespace fastprune::cuda {

ConvCandidates sm90_product_float16() { return sm90::product_candidates<ConvType::float16, cutlass::half_t>; }

}  // namespace fastprune::cuda
