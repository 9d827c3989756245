// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Tensors together with the units that their elements belong to: what Python keeps between the steps.
#pragma once

#include <pybind11/pybind11.h>

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "fastprune/unit_plan.h"
#include "tensor.h"

namespace fastprune {

class UnitTable {
   public:
    /// `slices`: tuples (tensor, dim, units). Raises what the documentation of fastprune.ops.UnitTable lists.
    UnitTable(const pybind11::sequence& slices, int64_t num_units, const std::optional<PlanLimits>& limits);

    DType dtype() const { return dtype_; }
    bool on_cuda() const { return on_cuda_; }
    int64_t num_units() const { return num_units_; }
    size_t num_slices() const { return slices_.size(); }
    const std::vector<int64_t>& sizes() const { return plan_.sizes; }
    /// One access at a time: calls share the scratch memory.
    std::mutex& mutex() { return mutex_; }

    /// Raises if the memory of a tensor has moved.
    void check_tensors() const;
    Tensor first_tensor() const { return Tensor::borrow(slices_[0].object); }
    /// Raises if `argument` overlaps one of the tensors.
    void check_disjoint(const Argument& argument) const;

    /// How many words a device needs: the plan, followed by zeroed scratch memory.
    int64_t num_device_words() const;
    void write_device_words(const Tensor& words) const;
    /// Keeps `words`: those that write_device_words wrote, copied to the device.
    void attach(const pybind11::object& words);

    /// The memory that a kernel needs for a call, on the device of the tensors.
    struct Workspace {
        UnitPlan plan;
        double* partial_sums;
        void* factors;
        uint32_t* arrived;
    };
    Workspace workspace();

   private:
    struct Slice {
        pybind11::object object;
        const dlpack::ExchangeApi* api;
        dlpack::Tensor view;          // as it was when the table was built; its sizes and strides are gone
        std::vector<int64_t> layout;  // sizes, then strides

        bool unmoved() const;
    };
    struct Interval {
        const char *begin, *end;
        size_t slice;
    };

    UnitSlice add_slice(size_t index, pybind11::handle slice, std::vector<pybind11::object>& kept);
    void check_overlaps();

    DType dtype_ = DType::float32;
    bool on_cuda_ = false;
    int64_t num_units_;
    std::vector<Slice> slices_;
    std::vector<Interval> intervals_;  // of the tensors that have elements, ascending
    UnitPlanStorage plan_;
    int64_t plan_words_ = 0;
    std::vector<double> partial_sums_, factors_;
    std::vector<uint32_t> arrived_;
    pybind11::object device_words_;
    int64_t* device_base_ = nullptr;
    std::mutex mutex_;
};

}  // namespace fastprune
