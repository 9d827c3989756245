// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// From tensors [N, C, *spatial] with strides to the [outer, channels, inner] that kernels see (channel_layout.h).
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "fastprune/channel_layout.h"

namespace fastprune {

/// The distance from pixel to pixel of a channels_last tensor [N, C, *spatial], or of some neighbouring channels of a
/// wider one: its outer stride as "rows". None if it is neither.
std::optional<int64_t> rows_stride(const Tensor& tensor);

/// The layout that all tensors of a call share, and the outer stride of each.
struct ChannelViews {
    ChannelLayout layout;
    std::vector<int64_t> outer_strides;  // in the order of the arguments
};

/// All of one shape, [N, C] or [N, C, *spatial], and either all contiguous from the channel on ("planes"), or all with
/// neighbouring channels ("rows", channels_last); raises what names the first that is not. Each may be a view of some
/// neighbouring channels of a wider tensor.
ChannelViews channel_views(const std::vector<Argument>& arguments);

namespace check {

/// No element of `output` (number `o` of the views) lies in `input` (number `i`), unless they are the same memory and
/// `may_be_same`. Views of different channels of one wider tensor are disjoint.
void disjoint_views(const std::vector<Argument>& arguments, const ChannelViews& views, size_t o, size_t i,
                    bool may_be_same);
/// The same for view number `v` and a contiguous tensor; the error is that of the one which is written.
void disjoint_vector(const std::vector<Argument>& arguments, const ChannelViews& views, size_t v,
                     const Argument& vector, bool vector_is_output);

}  // namespace check
}  // namespace fastprune
