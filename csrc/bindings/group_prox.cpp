// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// group_prox and its table for Python: checks, then dispatch by dtype and device.
#include "fastprune/group_prox.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>

#include "bind.h"
#include "group_prox_call.h"
#include "run.h"

namespace py = pybind11;

namespace fastprune {
namespace {

template <class T>
void run_group_prox(UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms, int num_threads) {
    const GroupProxArgs<T> args = group_prox_args<T>(table, threshold, norms);
    run(
        {"norms", norms}, num_threads,
        [&](int threads) {
            const std::lock_guard lock(table.mutex());
            return cpu::group_prox(args, threads);
        },
        [&](auto device, void* stream) { return cuda::group_prox(args, device, stream); });
}

void group_prox(UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms, int num_threads) {
    check_group_prox(table, threshold, norms);
    table.dtype() == DType::float32 ? run_group_prox<float>(table, threshold, norms, num_threads)
                                    : run_group_prox<double>(table, threshold, norms, num_threads);
}

void write_sizes(const UnitTable& table, const Tensor& sizes) {
    check::vector({"sizes", sizes}, DType::int64, table.num_units(), "one size for each unit of the table");
    check::writable({"sizes", sizes});
    check::on_cpu({"sizes", sizes});
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
}

}  // namespace fastprune
