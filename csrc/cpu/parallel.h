// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// OpenMP behind two functions, so that every CPU kernel counts its threads in the same way.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace fastprune::cpu {

/// Threads worth waking for `work` units of which one thread should have at least `grain`: waking costs microseconds.
inline int threads_for(int64_t work, int64_t grain, int num_threads) {
    return static_cast<int>(std::clamp<int64_t>(work / grain, 1, std::max(num_threads, 1)));
}

/// Calls body(i, worker) for i in [0, count), in any order; `worker` in [0, num_threads) tells whose scratch to use.
/// `body` must not throw.
template <class Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
    if (count <= 1 || num_threads <= 1) {
        // No parallel region at all: it would start a thread pool, which does not survive a fork.
        for (int64_t i = 0; i < count; ++i) body(i, 0);
        return;
    }
    const int threads = static_cast<int>(std::min<int64_t>(num_threads, count));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
}

}  // namespace fastprune::cpu
