// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "fastprune/masked_conv.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTPRUNE_X86 1
#include <immintrin.h>
#else
#define FASTPRUNE_X86 0
#endif

namespace fastprune::cpu {
namespace {

/// This thread's memory for intermediate results, aligned to cache lines; null if there is none left. Kept from call to
/// call: pages that the system hands out anew for every convolution would cost as much as some of them.
float* scratch(int64_t floats) noexcept {
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local int64_t size = 0;
    if (size < floats) {
        memory.reset(new (std::nothrow) float[floats + 16]);
        size = memory != nullptr ? floats : 0;
        if (memory == nullptr) return nullptr;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (64 - address % 64) % 64 / sizeof(float);
}

[[maybe_unused]] const Status out_of_memory = Status::failed("masked_conv: no memory for intermediate results");

/// Into how many pieces the panels of a block are cut, so that every thread has several tasks.
int64_t pieces_of_panels(int64_t blocks, int64_t panels, int num_threads) {
    if (num_threads <= 1) return 1;
    return std::clamp<int64_t>(4 * num_threads / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(panels, 1));
}

#if FASTPRUNE_X86
#define FASTPRUNE_INLINE inline __attribute__((always_inline))

namespace avx512 {
#define FASTPRUNE_TARGET __attribute__((target("avx512f")))
constexpr int width = 16, tile_pixels = 12;  // 24 sums, two columns of the weight, a value of x: of 32 registers
using Vector = __m512;
#define FASTPRUNE_OPERATION FASTPRUNE_TARGET FASTPRUNE_INLINE
FASTPRUNE_OPERATION __mmask16 first(int64_t count) {
    return static_cast<__mmask16>(count >= width ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}
FASTPRUNE_OPERATION Vector zero() { return _mm512_setzero_ps(); }
FASTPRUNE_OPERATION Vector broadcast(float value) { return _mm512_set1_ps(value); }
FASTPRUNE_OPERATION Vector load(const float* from) { return _mm512_loadu_ps(from); }
FASTPRUNE_OPERATION void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
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
#undef FASTPRUNE_OPERATION
#include "masked_conv_body.h"
#undef FASTPRUNE_TARGET
}  // namespace avx512

namespace avx2 {
#define FASTPRUNE_TARGET __attribute__((target("avx2,fma")))
constexpr int width = 8, tile_pixels = 6;  // 12 sums, two columns of the weight, a value of x: of 16 registers
using Vector = __m256;
#define FASTPRUNE_OPERATION FASTPRUNE_TARGET FASTPRUNE_INLINE
FASTPRUNE_OPERATION __m256i first(int64_t count) {
    const int limit = static_cast<int>(count >= width ? width : count <= 0 ? 0 : count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTPRUNE_OPERATION Vector zero() { return _mm256_setzero_ps(); }
FASTPRUNE_OPERATION Vector broadcast(float value) { return _mm256_set1_ps(value); }
FASTPRUNE_OPERATION Vector load(const float* from) { return _mm256_loadu_ps(from); }
FASTPRUNE_OPERATION void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
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
#undef FASTPRUNE_OPERATION
#include "masked_conv_body.h"
#undef FASTPRUNE_TARGET
}  // namespace avx2
#endif

int64_t panel_width(Instructions instructions) { return instructions == Instructions::avx512 ? 32 : 16; }

int64_t products_of(ConvAlgorithm algorithm, const ConvGeometry& geometry) {
    return algorithm == ConvAlgorithm::winograd ? 16 : geometry.kernel[0] * geometry.kernel[1];
}

/// G g G^T of a 3x3 kernel, in double: one rounding for each transformed weight.
void transform_kernel(const double* g, double* u) {
    double t[12];
    for (int j = 0; j < 3; ++j) {
        t[j] = g[j];
        t[3 + j] = 0.5 * (g[j] + g[3 + j] + g[6 + j]);
        t[6 + j] = 0.5 * (g[j] - g[3 + j] + g[6 + j]);
        t[9 + j] = g[6 + j];
    }
    for (int i = 0; i < 4; ++i) {
        const double* row = t + 3 * i;
        u[4 * i] = row[0];
        u[4 * i + 1] = 0.5 * (row[0] + row[1] + row[2]);
        u[4 * i + 2] = 0.5 * (row[0] - row[1] + row[2]);
        u[4 * i + 3] = row[2];
    }
}

}  // namespace

bool has_instructions(Instructions instructions) {
#if FASTPRUNE_X86
    if (instructions == Instructions::avx512) return __builtin_cpu_supports("avx512f");
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    (void)instructions;
    return false;
#endif
}

bool masked_conv_supports(ConvAlgorithm algorithm, const ConvGeometry& g) {
    if (algorithm == ConvAlgorithm::direct) return true;
    return g.kernel[0] == 3 && g.kernel[1] == 3 && g.stride[0] == 1 && g.stride[1] == 1 && g.dilation[0] == 1 &&
           g.dilation[1] == 1;
}

int64_t packed_conv_size(const ConvKernel& kernel, const ConvGeometry& geometry, int64_t rows, int64_t channels) {
    const int64_t width = panel_width(kernel.instructions);
    return (rows + width - 1) / width * width * channels * products_of(kernel.algorithm, geometry);
}

// Layouts: direct [panel][tap][channel][row of the panel], winograd [product][panel][channel][row of the panel].
void pack_masked_conv(const ConvKernel& kernel, const ConvGeometry& geometry, int64_t rows, int64_t channels,
                      const float* weight, const int64_t* strides, const float* scale, float* packed, int num_threads) {
    const int64_t width = panel_width(kernel.instructions), panels = (rows + width - 1) / width;
    const int64_t taps = geometry.kernel[0] * geometry.kernel[1];
    const auto element = [&](int64_t row, int64_t channel, int64_t tap) {
        if (row >= rows) return 0.0f;
        const int64_t r = tap / geometry.kernel[1], s = tap % geometry.kernel[1];
        const float value = weight[row * strides[0] + channel * strides[1] + r * strides[2] + s * strides[3]];
        return scale != nullptr ? value * scale[row] : value;
    };
    parallel_for(panels, num_threads, [&](int64_t p, int) {
        if (kernel.algorithm == ConvAlgorithm::direct) {
            float* to = packed + p * taps * channels * width;
            for (int64_t tap = 0; tap < taps; ++tap) {
                for (int64_t c = 0; c < channels; ++c) {
                    for (int64_t i = 0; i < width; ++i) *to++ = element(p * width + i, c, tap);
                }
            }
            return;
        }
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t i = 0; i < width; ++i) {
                double g[9], products[16];
                for (int tap = 0; tap < 9; ++tap) g[tap] = element(p * width + i, c, tap);
                transform_kernel(g, products);
                for (int k = 0; k < 16; ++k) {
                    packed[((k * panels + p) * channels + c) * width + i] = static_cast<float>(products[k]);
                }
            }
        }
    });
}

Status masked_conv(const ConvKernel& kernel, const MaskedConvArgs& args, int num_threads) {
    if (args.batch * args.out_height * args.out_width * args.rows == 0) return {};
#if FASTPRUNE_X86
    const bool winograd = kernel.algorithm == ConvAlgorithm::winograd;
    if (kernel.instructions == Instructions::avx512) {
        return winograd ? avx512::winograd(args, num_threads) : avx512::direct(args, num_threads);
    }
    return winograd ? avx2::winograd(args, num_threads) : avx2::direct(args, num_threads);
#else
    (void)kernel;
    (void)num_threads;
    return Status::failed("masked_conv: not written for this processor");
#endif
}

}  // namespace fastprune::cpu
