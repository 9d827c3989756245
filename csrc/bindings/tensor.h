// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// A tensor argument of a Python call: anything that speaks DLPack, borrowed for the length of the call.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "dlpack.h"

namespace fastprune {

class Tensor {
   public:
    /// Never throws: an object that cannot be borrowed gives a tensor with a `problem` and without dimensions. The
    /// checks report it together with the name of the argument, which pybind11's own message would not contain.
    static Tensor borrow(pybind11::handle object);

    const std::string& problem() const { return problem_; }
    bool read_only() const { return read_only_; }
    dlpack::DataType dtype() const { return view_.dtype; }
    dlpack::Device device() const { return view_.device; }
    bool on_cuda() const { return view_.device.type == dlpack::cuda || view_.device.type == dlpack::cuda_managed; }
    bool on_cpu() const { return view_.device.type == dlpack::cpu || view_.device.type == dlpack::cuda_host; }
    int ndim() const { return view_.ndim; }
    int64_t size(int dim) const { return view_.shape[dim]; }
    /// In elements.
    int64_t stride(int dim) const;
    int64_t numel() const;
    int64_t num_bytes() const { return numel() * (view_.dtype.bits / 8); }
    bool contiguous() const;
    void* data() const { return static_cast<char*>(view_.data) + view_.byte_offset; }

    template <class T>
    T* data_as() const {
        return static_cast<T*>(data());
    }

    /// The table through which the object lends its memory, for callers who borrow it often; null: it uses capsules.
    const dlpack::ExchangeApi* exchange_api() const { return api_; }
    const dlpack::Tensor& view() const { return view_; }

    /// Returns the current stream of the producer's framework, or the legacy default stream if it has none to tell.
    void* current_stream() const;

   private:
    void borrow_through_exchange_api(pybind11::handle object);
    void borrow_through_capsule(pybind11::handle object);

    dlpack::Tensor view_{};
    bool read_only_ = false;
    const dlpack::ExchangeApi* api_ = nullptr;
    pybind11::object capsule_;  // owns what `view_` points to where the producer handed out a capsule
    std::string problem_;
};

}  // namespace fastprune

namespace pybind11::detail {

template <>
struct type_caster<fastprune::Tensor> {
    PYBIND11_TYPE_CASTER(fastprune::Tensor, const_name("SupportsDLPack"));
    bool load(handle source, bool) {
        value = fastprune::Tensor::borrow(source);
        return true;
    }
};

}  // namespace pybind11::detail
