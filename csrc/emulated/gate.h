// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The device body of the stochastic gates on host threads, block after block.
#pragma once

#include "../cuda/gate_body.cuh"
#include "block.h"

namespace fastprune::emulated {

template <class Real, class Formula>
Status run_gates(const GateArgs<Real>& args, const Formula& formula, int num_threads, int num_blocks) {
    for (int index = 0; index < num_blocks; ++index) {
        run_block(num_threads, num_threads,
                  [&](const Block& block) { device::draw_gates(block, args, formula, index, num_blocks); });
    }
    return {};
}

}  // namespace fastprune::emulated
