// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// A wheel has to run on any x86-64, whose baseline has vectors of 128 bits. A function marked so is compiled for wider
// ones as well, and the loader picks; without contraction (see CMakeLists.txt) all of them compute the same bits.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)  // the loader resolves clones before a sanitizer is ready for their code
#define FASTPRUNE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTPRUNE_CLONES
#endif

/// Templates cannot have clones. They are inlined into a function that has.
#define FASTPRUNE_INTO_CLONES inline __attribute__((always_inline))
