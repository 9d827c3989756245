// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// A tensor [N, C, *spatial] as kernels of per-channel operations see it: [outer, channels, inner], where the element
// (o, c, i) lies outer_stride * o + inner * c + i elements behind the first.
//
//     planes, contiguous [N, C, H, W]:  outer = N,          inner = H * W
//     rows, channels_last:              outer = N * H * W,  inner = 1
//
// An outer_stride above channels * inner makes the tensor a view of the first channels of a wider one. Every tensor of
// a call has an outer stride of its own.
#pragma once

#include <cstdint>

namespace fastprune {

struct ChannelLayout {
    int64_t outer;
    int64_t channels;
    int64_t inner;

    int64_t numel() const { return outer * channels * inner; }
};

template <class T>
struct ChannelView {
    T* data;  // null: not there
    int64_t outer_stride;
};

/// How a sum over `outer` and `inner` is cut into partial sums: a function of the layout alone, never of the number of
/// threads or of the device, so that the result has the same bits everywhere.
struct ChannelChunks {
    int64_t outer;  // rows of one chunk; 1 for planes
    int64_t inner;  // elements of a plane in one chunk; 1 for rows
    int64_t count;  // chunks, each with a partial sum for every channel
};

}  // namespace fastprune
