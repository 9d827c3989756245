// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The tensor arguments of per-channel kernels: their checks, and the dispatch by dtype.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "channel_views.h"
#include "checks.h"
#include "fastprune/half.h"

namespace fastprune {

using Optional = std::optional<Tensor>;

/// The tensor arguments of one call: images [N, C, *spatial], which share a layout, and vectors over the channels.
class ChannelArguments {
   public:
    using Place = std::optional<size_t>;

    Place add(const char* name, const Tensor& tensor) {
        views_.push_back({name, tensor});
        return views_.size() - 1;
    }
    Place add(const char* name, const Optional& tensor) { return tensor ? add(name, *tensor) : std::nullopt; }
    void add_vector(const char* name, const Tensor& vector) { vectors_.push_back({name, vector}); }
    void add_vector(const char* name, const Optional& vector) {
        if (vector) add_vector(name, *vector);
    }
    /// Checks everything but overlap. Vectors are float64 for float64 images, otherwise float32.
    void check() {
        dtype_ =
            check::strided_tensor(views_.front(), {DType::float32, DType::float64, DType::float16, DType::bfloat16});
        for (const Argument& view : views_) {
            check::strided_tensor(view, {dtype_});
            check::same_device(view, views_.front());
        }
        shared_ = channel_views(views_);
        const DType real = dtype_ == DType::float64 ? DType::float64 : DType::float32;
        for (const Argument& vector : vectors_) {
            check::vector(vector, real, views_.front().tensor.size(1), "one for each channel");
            check::same_device(vector, views_.front());
        }
    }
    /// Checks that `output` is the memory of one of the first `num_inputs` views, or overlaps no view before it.
    void check_output(Place output, size_t num_inputs) const {
        if (!output) return;
        check::writable(views_[*output]);
        for (size_t i = 0; i < *output; ++i) check::disjoint_views(views_, shared_, *output, i, i < num_inputs);
        for (const Argument& vector : vectors_) check::disjoint_vector(views_, shared_, *output, vector, false);
    }
    /// Checks the vectors from number `first` on as outputs.
    void check_output_vectors(size_t first) const {
        for (size_t o = first; o < vectors_.size(); ++o) {
            check::writable(vectors_[o]);
            for (size_t i = 0; i < o; ++i) check::disjoint(vectors_[o], vectors_[i]);
            for (size_t i = 0; i < views_.size(); ++i) check::disjoint_vector(views_, shared_, i, vectors_[o], true);
        }
    }
    /// Checks scratch memory on CUDA: `count` float64 elements that overlap nothing else.
    void check_partials(const Optional& partials, int64_t count) const {
        if (count == 0) return;
        if (!partials) check::refuse("partials", "None", std::to_string(count) + " float64 elements");
        const Argument scratch{"partials", *partials};
        check::vector(scratch, DType::float64, count, "the number that the partials function returns");
        check::writable(scratch);
        check::same_device(scratch, views_.front());
        for (const Argument& vector : vectors_) check::disjoint(scratch, vector);
        for (size_t i = 0; i < views_.size(); ++i) check::disjoint_vector(views_, shared_, i, scratch, true);
    }
    size_t num_vectors() const { return vectors_.size(); }
    DType dtype() const { return dtype_; }
    const Argument& first() const { return views_.front(); }
    const ChannelLayout& layout() const { return shared_.layout; }

    template <class T>
    ChannelView<T> view(Place place) const {
        if (!place) return {nullptr, 0};
        return {views_[*place].tensor.data_as<T>(), shared_.outer_strides[*place]};
    }

   private:
    std::vector<Argument> views_, vectors_;
    ChannelViews shared_;
    DType dtype_{};
};

template <class T>
T* data_of(const Optional& tensor) {
    return tensor ? tensor->data_as<T>() : nullptr;
}

/// Calls body.template operator()<Storage>().
template <class Body>
void dispatch_storage(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::float32: return body.template operator()<float>();
        case DType::float64: return body.template operator()<double>();
        case DType::float16: return body.template operator()<float16>();
        case DType::bfloat16: return body.template operator()<bfloat16>();
        case DType::int64: return;
    }
}

}  // namespace fastprune
