// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Stochastic gates on the CPU, a chunk of units at a time: three loops compute random bits, noise and gates in the L1
// cache. In a single loop the steps of one unit form a chain so long that the processor cannot overlap it with the next
// one: gumbel_gate took a quarter longer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastprune/gate.h"
#include "fastprune/philox.h"
#include "instruction_set.h"
#include "parallel.h"

namespace fastprune::cpu {

inline constexpr int64_t chunk_units = 1024;

/// Returns the index of the first NaN, or -1.
template <class Real>
int64_t find_nan(const Real* values, int64_t size) {
    constexpr int64_t stretch = 1024;  // looked at without a branch, so that it vectorises
    for (int64_t begin = 0; begin < size; begin += stretch) {
        const int64_t end = std::min(begin + stretch, size);
        int32_t count = 0;
        for (int64_t i = begin; i < end; ++i) count += values[i] != values[i];
        if (count > 0) return std::find_if(values + begin, values + end, [](Real v) { return v != v; }) - values;
    }
    return -1;
}

/// Fills bits[0 .. 4 quads) for the units from 4 first_quad on.
inline void draw_bits(const Draw& draw, int64_t first_quad, int64_t quads, uint32_t* bits) {
    for (int64_t q = 0; q < quads; ++q) {
        const Philox4x32 random = Philox4x32::of(static_cast<uint64_t>(draw.seed), static_cast<uint64_t>(draw.step),
                                                 static_cast<uint64_t>(first_quad + q));
        for (int w = 0; w < Philox4x32::words; ++w) bits[Philox4x32::words * q + w] = random.word[w];
    }
}

/// Computes the chunk of `size` units from unit `begin` on.
template <class Real, class Formula>
void draw_chunk(const GateArgs<Real>& args, const Formula& formula, int64_t begin, int64_t size) {
    double noise[chunk_units];
    if constexpr (Formula::draws) {
        uint32_t bits[chunk_units];
        draw_bits(args.draw, begin / Philox4x32::words, (size + Philox4x32::words - 1) / Philox4x32::words, bits);
        for (int64_t i = 0; i < size; ++i) noise[i] = Formula::sample(bits[i]);
    } else {
        std::fill_n(noise, size, 0.0);
    }
    const Real* input = args.input + begin;
    Real* gate = args.gate + begin;
    Real* slope = args.slope + begin;
    const Formula local = formula;  // the compiler cannot know that gate does not point into `formula`
    for (int64_t i = 0; i < size; ++i) {
        const Gate<Real> result = local(input[i], noise[i]);
        gate[i] = result.value;
        slope[i] = result.slope;
    }
}

/// Computes gate, slope = formula(input, noise) for every unit. A thread takes at least `grain` units.
template <class Real, class Formula>
void draw_gates(const GateArgs<Real>& args, const Formula& formula, int64_t grain, int num_threads) {
    const int64_t chunks = args.num_units / chunk_units + (args.num_units % chunk_units != 0);
    parallel_for(chunks, threads_for(args.num_units, grain, num_threads), [&](int64_t chunk, int) {
        const int64_t begin = chunk * chunk_units;
        run_vectorised([&] { draw_chunk(args, formula, begin, std::min(chunk_units, args.num_units - begin)); });
    });
}

}  // namespace fastprune::cpu
