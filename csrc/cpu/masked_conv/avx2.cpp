// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The algorithms of masked_conv for AVX2 with FMA.
#include "algorithms.h"

#if FASTPRUNE_X86
#include "avx2.h"
#include "parts.h"

namespace fastprune::cpu::avx2 {

#include "tile.inc"
// The parts below need the one above.
#include "depthwise.inc"
#include "direct.inc"
#include "winograd.inc"

static_assert(panel == panel_width(InstructionSet::avx2));

}  // namespace fastprune::cpu::avx2
#endif
