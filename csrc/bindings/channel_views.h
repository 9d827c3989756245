// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// From tensors [N, C, *spatial] with strides to the [outer, channels, inner] that kernels see (channel_layout.h).
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "fastprune/channel_layout.h"

namespace fastprune {

/// Returns the distance from pixel to pixel of a channels_last tensor [N, C, *spatial], or of a view of neighbouring
/// channels of one: its outer stride as "rows". Returns nothing for other tensors.
std::optional<int64_t> rows_stride(const Tensor& tensor);

/// The layout that all tensors of a call share, and the outer stride of each.
struct ChannelViews {
    ChannelLayout layout;
    std::vector<int64_t> outer_strides;  // in the order of the arguments
};

/// Returns the layout of arguments of one shape, [N, C] or [N, C, *spatial], that are either all contiguous from the
/// channel on ("planes") or all channels_last ("rows"). Raises an error that names the first one that is not. Each may
/// be a view of neighbouring channels of a wider tensor.
ChannelViews channel_views(const std::vector<Argument>& arguments);

namespace check {

/// Raises if view number `o`, an output, overlaps view number `i`. With `may_be_same` both may be exactly the same
/// memory. Views of different channels of one wider tensor are disjoint.
void disjoint_views(const std::vector<Argument>& arguments, const ChannelViews& views, size_t o, size_t i,
                    bool may_be_same);
/// Raises if view number `v` overlaps a contiguous tensor; the error names the one that is written.
void disjoint_vector(const std::vector<Argument>& arguments, const ChannelViews& views, size_t v,
                     const Argument& vector, bool vector_is_output);

}  // namespace check
}  // namespace fastprune
