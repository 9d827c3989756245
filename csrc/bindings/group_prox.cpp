// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// group_prox and its table for Python: checks, then dispatch by dtype and device.
#include "fastprune/group_prox.h"

#include <omp.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "bind.h"
#include "checks.h"
#include "fastprune/build.h"
#include "unit_table.h"

namespace py = pybind11;

namespace fastprune {
namespace {

void check_arguments(const UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms) {
    table.check_tensors();
    const Tensor first = table.first_tensor();
    check::vector({"norms", norms}, table.dtype(), table.num_units(), "one norm for each unit of the table");
    check::writable({"norms", norms});
    check::same_device({"norms", norms}, {"slices[0]", first});
    table.check_disjoint({"norms", norms});
    if (!threshold) return;
    check::vector({"threshold", *threshold}, table.dtype(), table.num_units(), "one number for each unit of the table");
    check::same_device({"threshold", *threshold}, {"slices[0]", first});
    check::disjoint({"norms", norms}, {"threshold", *threshold});
    table.check_disjoint({"threshold", *threshold});
}

template <class T>
GroupProxArgs<T> arguments(UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms) {
    const UnitTable::Workspace workspace = table.workspace();
    return {workspace.plan,
            threshold ? threshold->data_as<const T>() : nullptr,
            norms.data_as<T>(),
            workspace.partial_sums,
            static_cast<T*>(workspace.factors),
            workspace.arrived};
}

template <class T>
Status run(UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms, int num_threads) {
    const GroupProxArgs<T> args = arguments<T>(table, threshold, norms);
    if constexpr (build::has_cuda) {
        if (table.on_cuda()) {
            void* stream = norms.current_stream();
            const py::gil_scoped_release release;
            return cuda::group_prox(args, norms.device().id, stream);
        }
    }
    const py::gil_scoped_release release;
    const std::lock_guard lock(table.mutex());
    return cpu::group_prox(args, num_threads > 0 ? num_threads : omp_get_max_threads());
}

void group_prox(UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms, int num_threads) {
    check_arguments(table, threshold, norms);
    check::status(table.dtype() == DType::float32 ? run<float>(table, threshold, norms, num_threads)
                                                  : run<double>(table, threshold, norms, num_threads));
}

void emulated_group_prox(UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms, int num_threads,
                         int warp_size) {
    check_arguments(table, threshold, norms);
    if (table.on_cuda()) throw py::value_error("table: got one on CUDA, needs one on the CPU: this is the emulation");
    const bool power_of_two = warp_size > 0 && (warp_size & (warp_size - 1)) == 0;
    if (!power_of_two || num_threads <= 0 || num_threads > 1024 || num_threads % warp_size != 0) {
        throw py::value_error("warp_size: needs a power of two that divides num_threads, which is at most 1024");
    }
    const auto emulate = [&](const auto& args) {
        const py::gil_scoped_release release;
        const std::lock_guard lock(table.mutex());
        emulated::group_prox(args, num_threads, warp_size);
    };
    if (table.dtype() == DType::float32) {
        emulate(arguments<float>(table, threshold, norms));
    } else {
        emulate(arguments<double>(table, threshold, norms));
    }
}

/// `limits`: the numbers of PlanLimits in their order.
std::unique_ptr<UnitTable> make_table(const py::sequence& slices, int64_t num_units,
                                      const std::optional<std::vector<int64_t>>& limits) {
    if (!limits) return std::make_unique<UnitTable>(slices, num_units, std::nullopt);
    const bool positive = std::all_of(limits->begin(), limits->end(), [](int64_t limit) { return limit > 0; });
    if (limits->size() != 6 || !positive || (*limits)[2] > max_tile_width) {
        throw py::value_error("limits: needs six positive numbers, the third up to " + std::to_string(max_tile_width));
    }
    const auto& l = *limits;
    return std::make_unique<UnitTable>(slices, num_units, PlanLimits{l[0], l[1], l[2], l[3], l[4], l[5]});
}

void write_sizes(const UnitTable& table, const Tensor& sizes) {
    check::vector({"sizes", sizes}, DType::int64, table.num_units(), "one size for each unit of the table");
    check::writable({"sizes", sizes});
    if (!sizes.on_cpu()) throw py::value_error("sizes: got a CUDA tensor, needs one on the CPU");
    std::copy(table.sizes().begin(), table.sizes().end(), sizes.data_as<int64_t>());
}

}  // namespace

void bind_group_prox(py::module_& module) {
    py::class_<UnitTable>(module, "UnitTable", "Tensors and the units that their elements belong to.")
        .def(py::init(&make_table), py::arg("slices"), py::arg("num_units"), py::arg("limits") = py::none(),
             "limits: (whole_elements, narrow_run, tile_width, work_elements, whole_at_once, wave_elements), for tests")
        .def("write_sizes", &write_sizes, py::arg("sizes"), "Writes how many elements each unit owns.")
        .def_property_readonly("num_device_words", &UnitTable::num_device_words)
        .def("write_device_words", &UnitTable::write_device_words, py::arg("words"),
             "Writes what a device needs, int64 [num_device_words].")
        .def("attach", &UnitTable::attach, py::arg("words"), "Takes the words, copied to the device of the tensors.");
    module.def("group_prox", &group_prox, py::arg("table"), py::arg("threshold").none(true), py::arg("norms"),
               py::arg("num_threads") = 0,
               "Shrinks every unit in place and writes its norm before; threshold = None: norms alone.");
    module.def("emulated_group_prox", &emulated_group_prox, py::arg("table"), py::arg("threshold").none(true),
               py::arg("norms"), py::arg("num_threads") = 8, py::arg("warp_size") = 4,
               "The device bodies of group_prox on host threads, for tests without a GPU.");
}

}  // namespace fastprune
