// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Stochastic gates by many thread blocks: what the GPU runs, and what emulated/*_gate.cpp run on the host. Threads need
// nothing of each other.
#pragma once

#include <cstdint>

#include "fastprune/gate.h"
#include "fastprune/philox.h"
#include "fastprune/portable.h"

namespace fastprune::device {

/// gate, slope = formula(input, noise) of every unit. The four units that share one Philox go to one thread; the quads
/// go round the threads of all blocks, any number of them.
template <class Block, class Real, class Formula>
FASTPRUNE_DEVICE void draw_gates(const Block& block, const GateArgs<Real>& args, const Formula& formula,
                                 int64_t block_index, int64_t num_blocks) {
    constexpr int words = Philox4x32::words;
    const int64_t step = Formula::draws ? args.draw.current_step() : 0;
    const int64_t num_quads = args.num_units / words + (args.num_units % words != 0);
    for (int64_t quad = block_index * block.size() + block.rank(); quad < num_quads;
         quad += num_blocks * block.size()) {
        const Philox4x32 random = Philox4x32::of(static_cast<uint64_t>(args.draw.seed), static_cast<uint64_t>(step),
                                                 static_cast<uint64_t>(quad));
        for (int word = 0; word < words; ++word) {
            const int64_t unit = words * quad + word;
            if (unit >= args.num_units) return;
            const Gate<Real> result =
                step >= 0 ? formula(args.input[unit], Formula::sample(random.word[word])) : Gate<Real>::not_a_number();
            args.gate[unit] = result.value;
            args.slope[unit] = result.slope;
        }
    }
}

}  // namespace fastprune::device
