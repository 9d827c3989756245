// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_conv for one instruction set. masked_conv.cpp includes this file once for each, inside a namespace that
// provides Vector, `width` (floats in a vector), `tile_pixels` (how many pixels' sums fit into the registers) and the
// operations on vectors. FASTPRUNE_TARGET is the attribute that makes a function use the instruction set. No std
// function may be called from code with it other than inlined: one compiled for AVX-512 could be what the linker keeps.
// clang-format off: each needs the ones before it
#include "masked_conv_tile.h"
#include "masked_conv_direct.h"
#include "masked_conv_winograd.h"
#include "masked_conv_depthwise.h"
// clang-format on
