// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The device body of topk_mask on host threads, block after block.
#include "fastprune/topk_mask.h"

#include <vector>

#include "../cuda/topk_mask_body.cuh"
#include "block.h"

namespace fastprune::emulated {

template <class Score>
Status topk_mask(const TopkMaskArgs<Score>& args, int num_threads, int warp_size, int capacity) {
    using Scratch = device::TopkScratch<Score>;
    std::vector<device::Item<Score>> shared(Scratch::bytes(capacity) / sizeof(device::Item<Score>) + 1);
    const Scratch scratch = Scratch::of(shared.data(), capacity);
    for (int64_t group = 0; group < args.num_groups; ++group) {
        run_block(num_threads, warp_size, [&](const Block& block) { device::topk_mask(block, args, group, scratch); });
    }
    return {};
}

template Status topk_mask(const TopkMaskArgs<float>&, int, int, int);
template Status topk_mask(const TopkMaskArgs<double>&, int, int, int);

}  // namespace fastprune::emulated
