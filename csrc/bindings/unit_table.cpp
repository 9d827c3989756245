// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "unit_table.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace py = pybind11;

namespace fastprune {
namespace {

/// One worker of the CPU reads and scales a unit while it is in its L2 cache, and uses cache lines as a whole. A wave
/// is a megabyte, or the layers that hang together. Lines of 4 KB were slower: sums and factors of 512 leave L1 room.
PlanLimits cpu_limits(int64_t element_size) {
    return {(256 << 10) / element_size, 64 / element_size, 512, 32768, 1, (1 << 20) / element_size};
}

/// A warp has a whole unit, and at least four sectors of 32 bytes in each line; a block of 256 threads has a tile.
PlanLimits cuda_limits(int64_t element_size) { return {8192, 128 / element_size, 256, 4096, 8, 1}; }

std::string name_of(size_t slice) { return "slices[" + std::to_string(slice) + "]"; }

std::vector<int64_t> layout_of(const Tensor& tensor) {
    std::vector<int64_t> layout;
    for (int d = 0; d < tensor.ndim(); ++d) layout.push_back(tensor.size(d));
    for (int d = 0; d < tensor.ndim(); ++d) layout.push_back(tensor.stride(d));
    return layout;
}

/// The tensor as a block [rows, size of dim, run]. Refuses gaps and overlaps: element strides must be those of a
/// contiguous tensor whose dimensions were permuted.
UnitSlice block_of(const std::string& name, const Tensor& tensor, int dim) {
    std::vector<int> order;  // from the smallest stride; dimensions of size 1 have none that matters
    for (int d = 0; d < tensor.ndim(); ++d) {
        if (tensor.size(d) != 1 || d == dim) order.push_back(d);
    }
    const int64_t own_size = tensor.size(dim);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tensor.stride(a) < tensor.stride(b); });
    if (own_size == 1) {  // it has no place among the others: then everything is its run
        order.erase(std::find(order.begin(), order.end(), dim));
        order.push_back(dim);
    }
    UnitSlice slice{reinterpret_cast<uint64_t>(tensor.data()), 1, own_size, 1, nullptr};
    int64_t expected = 1;
    bool passed = false;
    for (const int d : order) {
        if (tensor.numel() > 0 && tensor.size(d) != 1 && tensor.stride(d) != expected) {
            check::refuse(name,
                          "a tensor whose elements overlap or leave gaps (stride " + std::to_string(tensor.stride(d)) +
                              " in dimension " + std::to_string(d) + ")",
                          "dense memory in any order of the dimensions");
        }
        expected *= tensor.size(d);
        if (d == dim) {
            passed = true;
        } else {
            (passed ? slice.rows : slice.run) *= tensor.size(d);
        }
    }
    return slice;
}

}  // namespace

UnitTable::UnitTable(const py::sequence& slices, int64_t num_units, const std::optional<PlanLimits>& limits)
    : num_units_(num_units) {
    if (num_units < 0 || num_units > max_table_units) {
        check::refuse("num_units", std::to_string(num_units), "a number in [0, 2^31)");
    }
    if (py::len(slices) == 0) {
        check::refuse("slices", "none", "at least one tensor, which tells the dtype and the device");
    }
    std::vector<UnitSlice> blocks;
    std::vector<py::object> kept;  // the units, until the plan is made
    for (size_t i = 0; i < py::len(slices); ++i) blocks.push_back(add_slice(i, slices[i], kept));
    check_overlaps();
    const int64_t element_size = dtype_ == DType::float32 ? 4 : 8;
    plan_ = plan_units(blocks, num_units, element_size,
                       limits     ? *limits
                       : on_cuda_ ? cuda_limits(element_size)
                                  : cpu_limits(element_size));
    plan_words_ = static_cast<int64_t>(plan_.pack().size());
    if (on_cuda_) return;
    partial_sums_.resize(plan_.counts.num_slots);
    factors_.resize(plan_.counts.num_shared());
    arrived_.resize(plan_.counts.num_shared());
}

UnitSlice UnitTable::add_slice(size_t index, py::handle slice, std::vector<py::object>& kept) {
    const std::string name = name_of(index);
    if (!py::isinstance<py::tuple>(slice) || py::len(slice) != 3) {
        throw py::type_error(name + ": got " + std::string(py::str(py::type::of(slice).attr("__name__"))) +
                             ", needs a tuple (tensor, dim, units)");
    }
    const auto parts = py::reinterpret_borrow<py::tuple>(slice);
    const py::object object = parts[0], dim_object = parts[1], units_object = parts[2];
    const Tensor tensor = Tensor::borrow(object);
    const DType dtype = check::strided_tensor({name.c_str(), tensor}, {DType::float32, DType::float64});
    check::writable({name.c_str(), tensor});
    if (index == 0) {
        dtype_ = dtype;
        on_cuda_ = tensor.on_cuda();
    } else {
        const Tensor first = first_tensor();
        check::strided_tensor({name.c_str(), tensor}, {dtype_});
        check::same_device({name.c_str(), tensor}, {"slices[0]", first});
    }
    if (!PyLong_CheckExact(dim_object.ptr()))
        throw py::type_error(name + ": got a dim of type " + Py_TYPE(dim_object.ptr())->tp_name + ", needs an int");
    int overflow = 0;
    const long long asked = PyLong_AsLongLongAndOverflow(dim_object.ptr(), &overflow);
    if (overflow != 0 || asked < -tensor.ndim() || asked >= tensor.ndim()) {
        check::refuse(name, "dim " + std::string(py::str(dim_object)),
                      "a dimension of a tensor that has " + std::to_string(tensor.ndim()));
    }
    const int dim = static_cast<int>(asked < 0 ? asked + tensor.ndim() : asked);

    const Tensor units = Tensor::borrow(units_object);
    const std::string units_name = name + " units";
    check::vector({units_name.c_str(), units}, DType::int64, tensor.size(dim), "one unit for each position of dim");
    check::on_cpu({units_name.c_str(), units});
    for (int64_t i = 0; i < units.size(0); ++i) {
        const int64_t unit = units.data_as<const int64_t>()[i];
        if (unit < -1 || unit >= num_units_) {
            check::refuse(units_name + "[" + std::to_string(i) + "]", std::to_string(unit),
                          "a unit in [0, " + std::to_string(num_units_) + "), or -1 for none");
        }
    }
    UnitSlice block = block_of(name, tensor, dim);
    block.units = units.data_as<const int64_t>();
    kept.push_back(units_object);
    slices_.push_back({object, tensor.exchange_api(), tensor.view(), layout_of(tensor)});
    const auto* begin = tensor.data_as<const char>();
    if (tensor.numel() > 0) intervals_.push_back({begin, begin + tensor.num_bytes(), index});
    return block;
}

void UnitTable::check_overlaps() {
    std::sort(intervals_.begin(), intervals_.end(), [](const Interval& a, const Interval& b) {
        return std::tie(a.begin, a.slice) < std::tie(b.begin, b.slice);
    });
    for (size_t i = 1; i < intervals_.size(); ++i) {
        if (intervals_[i].begin >= intervals_[i - 1].end) continue;
        const auto [first, second] = std::minmax(intervals_[i - 1].slice, intervals_[i].slice);
        check::refuse(name_of(second), "memory that overlaps " + name_of(first),
                      "memory of its own: an element that belongs to two units cannot be scaled for both");
    }
}

bool UnitTable::Slice::unmoved() const {
    dlpack::Tensor now;
    Tensor borrowed;
    if (api != nullptr) {  // there may be 160 tensors at every step: skip the look-ups of Tensor::borrow
        if (api->borrow_from_object(object.ptr(), &now) != 0) {
            PyErr_Clear();
            return false;
        }
    } else {
        borrowed = Tensor::borrow(object);
        if (!borrowed.problem().empty()) return false;
        now = borrowed.view();
    }
    if (now.data != view.data || now.byte_offset != view.byte_offset || now.ndim != view.ndim ||
        now.device.type != view.device.type || now.device.id != view.device.id || now.dtype.code != view.dtype.code ||
        now.dtype.bits != view.dtype.bits || now.dtype.lanes != view.dtype.lanes ||
        (now.strides == nullptr) != (view.strides == nullptr)) {
        return false;
    }
    if (!std::equal(layout.begin(), layout.begin() + now.ndim, now.shape)) return false;
    return now.strides == nullptr || std::equal(layout.begin() + now.ndim, layout.end(), now.strides);
}

void UnitTable::check_tensors() const {
    for (size_t i = 0; i < slices_.size(); ++i) {
        if (slices_[i].unmoved()) continue;
        throw py::value_error(name_of(i) +
                              ": the tensor's memory has moved since the table was built; build a new UnitTable");
    }
}

void UnitTable::check_disjoint(const Argument& argument) const {
    const auto* begin = argument.tensor.data_as<const char>();
    const auto* end = begin + argument.tensor.num_bytes();
    if (begin == end) return;
    // Intervals do not overlap, so their ends ascend as well.
    const auto next =
        std::upper_bound(intervals_.begin(), intervals_.end(), begin,
                         [](const char* value, const Interval& interval) { return value < interval.end; });
    if (next == intervals_.end() || next->begin >= end) return;
    check::refuse(argument.name, "memory that overlaps " + name_of(next->slice), "memory of its own");
}

int64_t UnitTable::num_device_words() const {
    const UnitPlan& counts = plan_.counts;
    return plan_words_ + counts.num_slots + counts.num_shared() + (counts.num_shared() + 1) / 2;
}

void UnitTable::write_device_words(const Tensor& words) const {
    check::vector({"words", words}, DType::int64, num_device_words(), "num_device_words");
    check::writable({"words", words});
    check::on_cpu({"words", words});
    const std::vector<int64_t> packed = plan_.pack();
    auto* rest = std::copy(packed.begin(), packed.end(), words.data_as<int64_t>());
    std::fill(rest, words.data_as<int64_t>() + words.size(0), int64_t{0});
}

void UnitTable::attach(const py::object& object) {
    const Tensor words = Tensor::borrow(object);
    check::vector({"words", words}, DType::int64, num_device_words(), "num_device_words");
    const Tensor first = first_tensor();
    check::same_device({"words", words}, {"slices[0]", first});
    if (!words.on_cuda()) check::refuse("words", "a tensor on the CPU", "one on CUDA");
    device_words_ = object;
    device_base_ = words.data_as<int64_t>();
}

UnitTable::Workspace UnitTable::workspace() {
    if (!on_cuda_) return {plan_.view(), partial_sums_.data(), factors_.data(), arrived_.data()};
    if (device_base_ == nullptr) check::refuse("table", "one without attached words", "them on CUDA");
    const UnitPlan& counts = plan_.counts;
    auto* partial_sums = reinterpret_cast<double*>(device_base_ + plan_words_);
    auto* factors = partial_sums + counts.num_slots;
    return {plan_.view_at(device_base_), partial_sums, factors,
            reinterpret_cast<uint32_t*>(factors + counts.num_shared())};
}

}  // namespace fastprune
