// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Vectors of AVX-512, under the names that the .inc files of this folder use: FASTPRUNE_TARGET is the attribute of
// functions that use these instructions. The other instruction set has the same names: a source file includes one of
// both headers.
//
// Functions have the attribute, and no file has a flag -m: the linker keeps one copy of an inline function of std,
// which has to run on every machine.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../instruction_set.h"

#define FASTPRUNE_TARGET __attribute__((target("avx512f")))
#define FASTPRUNE_OPERATION FASTPRUNE_TARGET FASTPRUNE_INLINE

namespace fastprune::cpu::avx512 {

inline constexpr int width = 16, tile_pixels = 12;  // 24 sums, two columns of the weight, a value of x: of 32 registers
using Vector = __m512;
FASTPRUNE_OPERATION __mmask16 first(int64_t count) {
    return static_cast<__mmask16>(count >= width ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}
FASTPRUNE_OPERATION Vector zero() { return _mm512_setzero_ps(); }
FASTPRUNE_OPERATION Vector broadcast(float value) { return _mm512_set1_ps(value); }
FASTPRUNE_OPERATION Vector load(const float* from) { return _mm512_loadu_ps(from); }
FASTPRUNE_OPERATION void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
FASTPRUNE_OPERATION void stream(float* to, Vector value) { _mm512_stream_ps(to, value); }
FASTPRUNE_OPERATION Vector load_first(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first(count), from);
}
FASTPRUNE_OPERATION void store_first(float* to, Vector value, int64_t count) {
    _mm512_mask_storeu_ps(to, first(count), value);
}
FASTPRUNE_OPERATION Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
FASTPRUNE_OPERATION Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
FASTPRUNE_OPERATION Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
FASTPRUNE_OPERATION Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
// The forms without a mask are built on an undefined value, which GCC warns about.
FASTPRUNE_OPERATION Vector larger(Vector a, Vector b) { return _mm512_maskz_max_ps(0xffff, a, b); }
FASTPRUNE_OPERATION Vector smaller(Vector a, Vector b) { return _mm512_maskz_min_ps(0xffff, a, b); }
/// value, or 0 where not lowest < r < highest. NaN among these is as if it were between.
FASTPRUNE_OPERATION Vector keep_between(Vector value, Vector r, Vector lowest, Vector highest) {
    const __mmask16 above = _mm512_cmp_ps_mask(r, lowest, _CMP_NLE_UQ);
    return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, r, highest, _CMP_NGE_UQ), value);
}

}  // namespace fastprune::cpu::avx512

#undef FASTPRUNE_OPERATION
