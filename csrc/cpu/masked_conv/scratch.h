// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Memory of the convolutions beside their results.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "fastprune/masked_conv.h"

namespace fastprune::cpu {

/// Memory for the intermediate results of a task, aligned to cache lines. The thread keeps it for its next task unless
/// it is very large: pages that the system hands out anew for every convolution would cost as much as some of them.
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

/// The product. Throws if a task should not have that many floats: a system that overcommits would grant them, and end
/// the process when it uses them.
inline int64_t checked_size(std::initializer_list<int64_t> factors) {
    constexpr int64_t most = int64_t{1} << 32;
    int64_t product = 1;
    for (const int64_t factor : factors) {
        if (factor > most / product) throw std::bad_alloc();
        product *= factor;
    }
    return product;
}

/// What each part of the pixels adds to dmask, so that the sum does not depend on which thread computes which part.
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

}  // namespace fastprune::cpu
