// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "fastprune/masked_conv.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "../instruction_set.h"
#include "../parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTPRUNE_X86 1
#include <immintrin.h>
#else
#define FASTPRUNE_X86 0
#endif

namespace fastprune::cpu {
namespace {

/// Memory for the intermediate results of a task, aligned to cache lines. What is not too large to keep is kept for
/// this thread's next task: pages that the system hands out anew for every convolution would cost as much as some of
/// them.
class Scratch {
   public:
    explicit Scratch(int64_t floats) noexcept {
        static thread_local std::unique_ptr<float[]> kept;
        static thread_local int64_t kept_size = 0;
        constexpr int64_t largest_kept = int64_t{1} << 22;  // 16 MiB
        if (floats > largest_kept) {
            own_ = allocate(floats);
        } else if (kept_size < floats) {
            kept = allocate(floats);
            kept_size = kept != nullptr ? floats : 0;
        }
        float* const begin = floats > largest_kept ? own_.get() : kept.get();
        if (begin == nullptr) return;
        const auto address = reinterpret_cast<uintptr_t>(begin);
        data_ = begin + (line - address % line) % line / sizeof(float);
    }

    /// Null if there was no memory left.
    float* data() const { return data_; }

   private:
    static constexpr uintptr_t line = 64;  // bytes

    static std::unique_ptr<float[]> allocate(int64_t floats) noexcept {
        return std::unique_ptr<float[]>(new (std::nothrow) float[floats + line / sizeof(float)]);
    }

    std::unique_ptr<float[]> own_;
    float* data_ = nullptr;
};

/// The product; throws if it is more floats than a task's memory should have: systems that overcommit would grant more,
/// and end the process when it is used.
int64_t checked_size(std::initializer_list<int64_t> factors) {
    constexpr int64_t most = int64_t{1} << 32;
    int64_t product = 1;
    for (const int64_t factor : factors) {
        if (factor > most / product) throw std::bad_alloc();
        product *= factor;
    }
    return product;
}

/// What each part of the pixels adds to dmask, so that its sum does not depend on who computes which part.
class DmaskParts {
   public:
    DmaskParts(const MaskedConvArgs& args, int64_t parts)
        : args_(args), sums_(args.dmask != nullptr ? checked_size({parts, args.rows}) : 0) {}

    float* row(int64_t part) { return sums_.data() + part * args_.rows; }

    void reduce() const {
        if (args_.dmask == nullptr) return;
        std::vector<double> totals(args_.rows);
        for (auto part = sums_.begin(); part != sums_.end(); part += args_.rows) {
            for (int64_t c = 0; c < args_.rows; ++c) totals[c] += part[c];
        }
        for (int64_t c = 0; c < args_.rows; ++c) args_.dmask[c] = static_cast<float>(totals[c]);
    }

   private:
    const MaskedConvArgs& args_;
    std::vector<float> sums_;
};

/// Into how many pieces the panels of a block are cut, so that every thread has several tasks.
int64_t pieces_of_panels(int64_t blocks, int64_t panels, int num_threads) {
    if (num_threads <= 1) return 1;
    return std::clamp<int64_t>(int64_t{4} * num_threads / std::max<int64_t>(blocks, 1), 1,
                               std::max<int64_t>(panels, 1));
}

#if FASTPRUNE_X86
#define FASTPRUNE_INLINE inline __attribute__((always_inline))

/// Whether results go past the caches: they are too large to stay there, and their memory need not be read first.
bool streams(const MaskedConvArgs& args) {
    constexpr int64_t least = int64_t{8} << 20;  // bytes; faster for 12 MiB, slower for 4 MiB
    const auto aligned = [](const MutablePixels& to) {
        constexpr int64_t line = 64;
        return reinterpret_cast<uintptr_t>(to.data) % line == 0 &&
               to.pitch * static_cast<int64_t>(sizeof(float)) % line == 0;
    };
    const int64_t bytes = args.batch * args.out_height * args.out_width * args.rows * int64_t{sizeof(float)};
    return bytes >= least && aligned(args.y) && aligned(args.saved);
}

/// What was streamed comes before what follows, for other threads too.
FASTPRUNE_INLINE void complete_streams() { _mm_sfence(); }

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
#undef FASTPRUNE_OPERATION
#include "body.inc"
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
#undef FASTPRUNE_OPERATION
#include "body.inc"
#undef FASTPRUNE_TARGET
}  // namespace avx2
#endif

/// Threads worth waking: with 2^18 products each they have ten times as much to do as waking them takes.
int threads_worth(ConvAlgorithm algorithm, const MaskedConvArgs& args, int num_threads) {
    const ConvGeometry& g = args.geometry;
    const bool depthwise = algorithm == ConvAlgorithm::depthwise;
    const double products = static_cast<double>(args.batch) * args.out_height * args.out_width * args.rows *
                            (depthwise ? 1 : args.channels) * g.kernel[0] * g.kernel[1];
    return threads_for(static_cast<int64_t>(std::min(products, 1e18)), 1 << 18, num_threads);
}

}  // namespace

bool has_instructions(Instructions instructions) {
    return has_instruction_set(instructions == Instructions::avx512 ? InstructionSet::avx512 : InstructionSet::avx2);
}

bool masked_conv_supports(ConvAlgorithm algorithm, const ConvGeometry& g) {
    if (algorithm == ConvAlgorithm::direct) return true;
    if (algorithm == ConvAlgorithm::depthwise) return g.kernel[0] <= depthwise_taps / g.kernel[1];
    return g.kernel[0] == 3 && g.kernel[1] == 3 && g.stride[0] == 1 && g.stride[1] == 1 && g.dilation[0] == 1 &&
           g.dilation[1] == 1;
}

void masked_conv(const ConvKernel& kernel, const MaskedConvArgs& args, int num_threads) {
    if (args.batch * args.out_height * args.out_width * args.rows == 0) {
        if (args.dmask != nullptr) std::fill_n(args.dmask, args.rows, 0.0f);
        return;
    }
    const int threads = threads_worth(kernel.algorithm, args, num_threads);
#if FASTPRUNE_X86
    const bool wide = kernel.instructions == Instructions::avx512;
    const auto done = [&] {
        switch (kernel.algorithm) {
            case ConvAlgorithm::winograd: return wide ? avx512::winograd(args, threads) : avx2::winograd(args, threads);
            case ConvAlgorithm::depthwise:
                return wide ? avx512::depthwise(args, threads) : avx2::depthwise(args, threads);
            case ConvAlgorithm::direct: break;
        }
        return wide ? avx512::direct(args, threads) : avx2::direct(args, threads);
    };
    if (!done()) throw std::bad_alloc();
#else
    (void)kernel, (void)threads;  // no processor has what these kernels are written for
#endif
}

}  // namespace fastprune::cpu
