// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The widest vectors of the CPU that runs us, from one source: a wheel is built for the oldest x86-64, whose vectors
// hold four floats. Contraction is off, so that a loop has the same bits whatever it was compiled for.
#pragma once

#define FASTPRUNE_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__linux__)
#define FASTPRUNE_HAS_X86_VECTORS 1
#else
#define FASTPRUNE_HAS_X86_VECTORS 0
#endif

namespace fastprune::cpu {

#if FASTPRUNE_HAS_X86_VECTORS
template <class Body>
__attribute__((target("avx2"))) void with_avx2(const Body& body) {
    body();
}
template <class Body>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void with_avx512(const Body& body) {
    body();
}

enum class Vectors { baseline, avx2, avx512 };

inline Vectors widest_vectors() {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        return Vectors::avx512;
    }
    return __builtin_cpu_supports("avx2") ? Vectors::avx2 : Vectors::baseline;
}
#endif

/// Calls body(), a lambda that is `__attribute__((always_inline))`. What it calls has to be FASTPRUNE_INLINE, too, to
/// be compiled for the vectors of this CPU: a function that stays out of line keeps those that it was compiled for.
template <class Body>
void with_widest_vectors(const Body& body) {
#if FASTPRUNE_HAS_X86_VECTORS
    static const Vectors vectors = widest_vectors();
    if (vectors == Vectors::avx512) return with_avx512(body);
    if (vectors == Vectors::avx2) return with_avx2(body);
#endif
    body();
}

}  // namespace fastprune::cpu
