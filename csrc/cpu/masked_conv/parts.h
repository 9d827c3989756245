// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// What the .inc files of this folder include and call: avx2.cpp and avx512.cpp include those inside of a namespace.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "fastprune/masked_conv.h"
#include "scratch.h"

namespace fastprune::cpu {

/// Into how many pieces the panels of a block are cut, so that every thread has several tasks.
inline int64_t pieces_of_panels(int64_t blocks, int64_t panels, int num_threads) {
    if (num_threads <= 1) return 1;
    return std::clamp<int64_t>(int64_t{4} * num_threads / std::max<int64_t>(blocks, 1), 1,
                               std::max<int64_t>(panels, 1));
}

/// Whether the results go past the caches: they are too large to stay there, and their memory need not be read first.
inline bool streams(const MaskedConvArgs& args) {
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
inline void complete_streams() { _mm_sfence(); }

}  // namespace fastprune::cpu
