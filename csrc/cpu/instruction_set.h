// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Loops compiled for every instruction set.
#pragma once

#include "fastprune/instruction_set.h"

#define FASTPRUNE_INLINE inline __attribute__((always_inline))

namespace fastprune::cpu {

#if defined(__x86_64__) && defined(__GNUC__)
// flatten: what the body calls is compiled into it, for the same instruction set.
template <class Body>
[[gnu::target("avx512f,avx512dq,avx512bw,avx512vl"), gnu::flatten]] void run_for_avx512(const Body& body) {
    body();
}
template <class Body>
[[gnu::target("avx2"), gnu::flatten]] void run_for_avx2(const Body& body) {
    body();
}
#endif

/// Calls body(), compiled for the instruction set that instruction_set() returns. Worth it around loops of arithmetic:
/// gumbel_gate takes a third of the time with AVX-512 and half with AVX2.
template <class Body>
void run_vectorised(const Body& body) {
#if defined(__x86_64__) && defined(__GNUC__)
    switch (instruction_set()) {
        case InstructionSet::avx512: return run_for_avx512(body);
        case InstructionSet::avx2: return run_for_avx2(body);
        case InstructionSet::baseline: break;
    }
#endif
    body();
}

}  // namespace fastprune::cpu
