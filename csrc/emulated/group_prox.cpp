// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The device bodies of group_prox on host threads, block after block.
#include "fastprune/group_prox.h"

#include <algorithm>
#include <vector>

#include "../cuda/group_prox_body.cuh"
#include "block.h"

namespace fastprune::emulated {

template <class T>
Status group_prox(const GroupProxArgs<T>& args, int num_threads, int warp_size) {
    std::vector<double> sums(std::max<int64_t>(num_threads, max_tile_width));
    std::vector<uint32_t> last(max_tile_width);
    const device::ProxScratch scratch{sums.data(), last.data()};
    const int64_t num_blocks = std::max<int64_t>(args.plan.num_items, 1);
    for (int64_t index = 0; index < num_blocks; ++index) {
        run_block(num_threads, warp_size,
                  [&](const Block& block) { device::group_prox_items(block, args, index, num_blocks, scratch); });
    }
    if (args.threshold == nullptr) return {};
    for (int64_t index = 0; index < args.plan.num_tiles; ++index) {
        run_block(num_threads, warp_size, [&](const Block& block) { device::group_prox_tile(block, args, index); });
    }
    return {};
}

template Status group_prox(const GroupProxArgs<float>&, int, int);
template Status group_prox(const GroupProxArgs<double>&, int, int);

}  // namespace fastprune::emulated
