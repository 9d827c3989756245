// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Philox4x32-10: random bits as a function of what they are for, so that no generator has a state to keep, to order or
// to copy between processes and devices.
//
// Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.
#pragma once

#include <cstdint>

#include "fastprune/portable.h"

namespace fastprune {

/// The 128 random bits of one value of the counter.
struct Philox4x32 {
    static constexpr int words = 4;
    static constexpr int rounds = 10;

    uint32_t word[words];

    FASTPRUNE_HD Philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        for (int round = 0; round < rounds; ++round) {
            const uint64_t even = uint64_t{0xd2511f53u} * c0;
            const uint64_t odd = uint64_t{0xcd9e8d57u} * c2;
            c0 = static_cast<uint32_t>(odd >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(even >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(odd);
            c3 = static_cast<uint32_t>(even);
            k0 += 0x9e3779b9u;  // the golden ratio and, below, the square root of 3 less 1, as fractions of 2^32
            k1 += 0xbb67ae85u;
        }
        word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
    }

    /// Unit i of a vector takes word i mod 4 of `of(seed, step, i / 4)`. The key is the seed, low half first; the
    /// counter is i / 4 in its lower and the step in its upper 64 bits. Hence no two of (seed, step, i) share a word,
    /// and unit i draws the same whatever the length of its vector.
    static FASTPRUNE_HD Philox4x32 of(uint64_t seed, uint64_t step, uint64_t quad) {
        return {low(quad), high(quad), low(step), high(step), low(seed), high(seed)};
    }

   private:
    static FASTPRUNE_HD uint32_t low(uint64_t value) { return static_cast<uint32_t>(value); }
    static FASTPRUNE_HD uint32_t high(uint64_t value) { return static_cast<uint32_t>(value >> 32); }
};

}  // namespace fastprune
