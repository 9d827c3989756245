// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The algorithms of masked_conv for AVX-512.
#include "algorithms.h"

#if FASTPRUNE_X86
#include "avx512.h"
#include "parts.h"

namespace fastprune::cpu::avx512 {

#include "tile.inc"
// The parts below need the one above.
#include "depthwise.inc"
#include "direct.inc"
#include "winograd.inc"

static_assert(panel == panel_width(InstructionSet::avx512));

}  // namespace fastprune::cpu::avx512
#endif
