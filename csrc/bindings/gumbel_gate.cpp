// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// gumbel_gate for Python.
#include "fastprune/gumbel_gate.h"

#include "bind.h"
#include "gate.h"

namespace py = pybind11;

namespace fastprune {
namespace {

void gumbel_gate(const Tensor& logits, py::handle seed, py::handle step, py::handle temperature, py::handle base,
                 bool hard, py::handle noise, const Tensor& gate, const Tensor& slope, int num_threads) {
    const GumbelOptions options = gumbel_options(temperature, base, hard, noise);
    GateCall({"logits", logits}, seed, step, gate, slope)
        .run(
            num_threads, [&](const auto& args, int threads) { return cpu::gumbel_gate(args, options, threads); },
            [&](const auto& args, int device, void* stream) {
                return cuda::gumbel_gate(args, options, device, stream);
            });
}

}  // namespace

void bind_gumbel_gate(py::module_& module) {
    module.def("gumbel_gate", &gumbel_gate, py::arg("logits"), py::arg("seed"), py::arg("step"), py::arg("temperature"),
               py::arg("base"), py::arg("hard"), py::arg("noise"), py::arg("gate"), py::arg("slope"),
               py::arg("num_threads") = 0,
               "Writes the sigmoids of noisy logits, or whether they reach 1/2, into `gate` and their derivatives into "
               "`slope`; num_threads = 0: as many as OpenMP would take.");
}

}  // namespace fastprune
