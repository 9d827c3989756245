// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The algorithms of masked_conv, written for each instruction set: avx2.cpp and avx512.cpp. Each function computes the
// whole convolution on at most `num_threads` threads and returns false if there was no memory.
#pragma once

#include "fastprune/masked_conv.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTPRUNE_X86 1
#else
#define FASTPRUNE_X86 0
#endif

namespace fastprune::cpu {

/// How many rows of a weight are packed next to each other: two vectors.
constexpr int panel_width(InstructionSet instructions) { return instructions == InstructionSet::avx512 ? 32 : 16; }

#if FASTPRUNE_X86
namespace avx2 {
bool direct(const MaskedConvArgs& args, int num_threads);
bool winograd(const MaskedConvArgs& args, int num_threads);
bool depthwise(const MaskedConvArgs& args, int num_threads);
}  // namespace avx2

namespace avx512 {
bool direct(const MaskedConvArgs& args, int num_threads);
bool winograd(const MaskedConvArgs& args, int num_threads);
bool depthwise(const MaskedConvArgs& args, int num_threads);
}  // namespace avx512
#endif

}  // namespace fastprune::cpu
