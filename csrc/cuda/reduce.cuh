// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Sums over the threads of a block, in an order that depends on the block's shape alone: the same bits on every run.
#pragma once

#include "fastprune/portable.h"

namespace fastprune::device {

/// The sum of `value` over all threads of the block, for every one of them. All threads take part.
/// `partials`: shared memory, one place for each warp; free again when the function returns.
template <class Block, class T>
FASTPRUNE_DEVICE T block_sum(const Block& block, T value, T* partials) {
    for (int lanes = block.warp_size() / 2; lanes > 0; lanes /= 2) value += block.shuffle_xor(value, lanes);
    if (block.rank() % block.warp_size() == 0) partials[block.rank() / block.warp_size()] = value;
    block.sync();
    T total{};
    for (int warp = 0; warp < block.size() / block.warp_size(); ++warp) total += partials[warp];
    block.sync();
    return total;
}

}  // namespace fastprune::device
