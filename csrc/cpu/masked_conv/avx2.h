// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Vectors of AVX2 with FMA, under the names that the .inc files of this folder use: FASTPRUNE_TARGET is the attribute
// of functions that use these instructions. The other instruction set has the same names: a source file includes one of
// both headers.
//
// Functions have the attribute, and no file has a flag -m: the linker keeps one copy of an inline function of std,
// which has to run on every machine.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../instruction_set.h"

#define FASTPRUNE_TARGET __attribute__((target("avx2,fma")))
#define FASTPRUNE_OPERATION FASTPRUNE_TARGET FASTPRUNE_INLINE

namespace fastprune::cpu::avx2 {

inline constexpr int width = 8, tile_pixels = 6;  // 12 sums, two columns of the weight, a value of x: of 16 registers
using Vector = __m256;
FASTPRUNE_OPERATION __m256i first(int64_t count) {
    const int limit = static_cast<int>(count >= width ? width : count <= 0 ? 0 : count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTPRUNE_OPERATION Vector zero() { return _mm256_setzero_ps(); }
FASTPRUNE_OPERATION Vector broadcast(float value) { return _mm256_set1_ps(value); }
FASTPRUNE_OPERATION Vector load(const float* from) { return _mm256_loadu_ps(from); }
FASTPRUNE_OPERATION void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
FASTPRUNE_OPERATION void stream(float* to, Vector value) { _mm256_stream_ps(to, value); }
FASTPRUNE_OPERATION Vector load_first(const float* from, int64_t count) {
    return _mm256_maskload_ps(from, first(count));
}
FASTPRUNE_OPERATION void store_first(float* to, Vector value, int64_t count) {
    _mm256_maskstore_ps(to, first(count), value);
}
FASTPRUNE_OPERATION Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
FASTPRUNE_OPERATION Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
FASTPRUNE_OPERATION Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
FASTPRUNE_OPERATION Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
FASTPRUNE_OPERATION Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
FASTPRUNE_OPERATION Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
FASTPRUNE_OPERATION Vector keep_between(Vector value, Vector r, Vector lowest, Vector highest) {
    const Vector above = _mm256_cmp_ps(r, lowest, _CMP_NLE_UQ), below = _mm256_cmp_ps(r, highest, _CMP_NGE_UQ);
    return _mm256_and_ps(value, _mm256_and_ps(above, below));
}

}  // namespace fastprune::cpu::avx2

#undef FASTPRUNE_OPERATION
