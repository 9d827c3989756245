// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "channel_views.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace py = pybind11;

namespace fastprune {
namespace {

std::string describe_strides(const Tensor& tensor) {
    std::string text = "strides [";
    for (int d = 0; d < tensor.ndim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(tensor.stride(d));
    return text + "]";
}

int64_t plane_size(const Tensor& tensor) {
    int64_t size = 1;
    for (int d = 2; d < tensor.ndim(); ++d) size *= tensor.size(d);
    return size;
}

/// Returns the outer stride as planes, if everything from the channel on is contiguous.
std::optional<int64_t> planes_stride(const Tensor& tensor) {
    int64_t expected = 1;
    for (int d = tensor.ndim() - 1; d >= 1; --d) {
        if (tensor.size(d) != 1 && tensor.stride(d) != expected) return std::nullopt;
        expected *= tensor.size(d);
    }
    if (tensor.size(0) <= 1) return expected;
    if (tensor.stride(0) < expected) return std::nullopt;
    return tensor.stride(0);
}

bool same_shape(const Tensor& a, const Tensor& b) {
    if (a.ndim() != b.ndim()) return false;
    for (int d = 0; d < a.ndim(); ++d) {
        if (a.size(d) != b.size(d)) return false;
    }
    return true;
}

using StrideOf = std::optional<int64_t> (*)(const Tensor&);

/// Returns the index of the first tensor without a stride, or the number of tensors.
size_t collect(const std::vector<Argument>& arguments, StrideOf stride_of, std::vector<int64_t>& strides) {
    strides.clear();
    for (const Argument& argument : arguments) {
        const auto stride = stride_of(argument.tensor);
        if (!stride) break;
        strides.push_back(*stride);
    }
    return strides.size();
}

/// First and one-past-last byte of a view.
struct Extent {
    const char *begin, *end;
};

Extent extent_of(const Tensor& tensor, const ChannelLayout& layout, int64_t outer_stride) {
    const auto* begin = tensor.data_as<const char>();
    const int64_t elements = (layout.outer - 1) * outer_stride + layout.channels * layout.inner;
    return {begin, begin + elements * (tensor.dtype().bits / 8)};
}

/// Whether two views are different columns of one matrix, whose rows never overlap.
bool interleaved(const Extent& a, const Extent& b, int64_t row_bytes, int64_t stride_bytes) {
    const int64_t apart = ((b.begin - a.begin) % stride_bytes + stride_bytes) % stride_bytes;
    return apart >= row_bytes && apart + row_bytes <= stride_bytes;
}

}  // namespace

std::optional<int64_t> rows_stride(const Tensor& tensor) {
    const int64_t channels = tensor.size(1);
    if (channels != 1 && tensor.stride(1) != 1) return std::nullopt;
    std::optional<int64_t> row;
    int64_t expected = 0;
    for (int d = tensor.ndim() - 1; d >= 0; --d) {
        if (d == 1 || tensor.size(d) == 1) continue;
        if (!row) {
            row = expected = tensor.stride(d);
        } else if (tensor.stride(d) != expected) {
            return std::nullopt;
        }
        expected *= tensor.size(d);
    }
    if (!row) return channels;
    if (*row < channels) return std::nullopt;
    return row;
}

ChannelViews channel_views(const std::vector<Argument>& arguments) {
    const Argument& first = arguments.front();
    if (first.tensor.ndim() < 2) {
        check::refuse(first.name, describe_shape(first.tensor), "[N, C] or [N, C, *spatial]");
    }
    for (const Argument& argument : arguments) {
        if (!same_shape(argument.tensor, first.tensor)) {
            check::refuse(argument.name, describe_shape(argument.tensor),
                          describe_shape(first.tensor) + " as " + first.name);
        }
    }
    const int64_t batch = first.tensor.size(0), channels = first.tensor.size(1), inner = plane_size(first.tensor);
    ChannelViews views{{batch, channels, inner}, {}};
    if (first.tensor.numel() == 0) {
        views.outer_strides.assign(arguments.size(), channels * inner);
        return views;
    }
    const size_t as_planes = collect(arguments, planes_stride, views.outer_strides);
    if (as_planes < arguments.size()) {
        const size_t as_rows = collect(arguments, rows_stride, views.outer_strides);
        if (as_rows < arguments.size()) {
            const Argument& misfit = arguments[std::max(as_planes, as_rows)];
            check::refuse(misfit.name, describe_strides(misfit.tensor) + " for " + describe_shape(misfit.tensor),
                          "contiguous or channels_last memory, or some neighbouring channels of such" +
                              (&misfit == &first ? "" : std::string(", in the format of ") + first.name));
        }
        views.layout = {batch * inner, channels, 1};
    }
    const ChannelLayout& layout = views.layout;
    const auto gapless = [&](int64_t stride) { return stride == layout.inner; };
    if (layout.channels == 1 && std::all_of(views.outer_strides.begin(), views.outer_strides.end(), gapless)) {
        views.layout = {1, 1, layout.outer * layout.inner};  // one long plane in place of many short rows
    }
    return views;
}

namespace check {

void disjoint_views(const std::vector<Argument>& arguments, const ChannelViews& views, size_t o, size_t i,
                    bool may_be_same) {
    const Tensor &output = arguments[o].tensor, &input = arguments[i].tensor;
    if (output.numel() == 0) return;
    const int64_t stride = views.outer_strides[o];
    const bool same_stride = stride == views.outer_strides[i];
    if (may_be_same && same_stride && output.data() == input.data()) return;
    const Extent a = extent_of(output, views.layout, stride);
    const Extent b = extent_of(input, views.layout, views.outer_strides[i]);
    if (a.end <= b.begin || b.end <= a.begin) return;
    const int64_t size = output.dtype().bits / 8, row = views.layout.channels * views.layout.inner;
    if (same_stride && interleaved(a, b, row * size, stride * size)) return;
    refuse(arguments[o].name, std::string("memory that overlaps ") + arguments[i].name,
           std::string("memory of its own") + (may_be_same ? " or exactly the same" : ""));
}

void disjoint_vector(const std::vector<Argument>& arguments, const ChannelViews& views, size_t v,
                     const Argument& vector, bool vector_is_output) {
    const Argument& view = arguments[v];
    if (view.tensor.numel() == 0) return;
    const Extent a = extent_of(view.tensor, views.layout, views.outer_strides[v]);
    const auto* begin = vector.tensor.data_as<const char>();
    if (a.end <= begin || begin + vector.tensor.num_bytes() <= a.begin) return;
    const auto& [output, input] =
        vector_is_output ? std::pair(vector.name, view.name) : std::pair(view.name, vector.name);
    refuse(output, std::string("memory that overlaps ") + input, "memory of its own");
}

}  // namespace check
}  // namespace fastprune
