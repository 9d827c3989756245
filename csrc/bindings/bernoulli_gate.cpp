// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// bernoulli_gate for Python.
#include "fastprune/bernoulli_gate.h"

#include "bind.h"
#include "gate.h"

namespace py = pybind11;

namespace fastprune {
namespace {

void bernoulli_gate(const Tensor& theta, py::handle seed, py::handle step, const Tensor& gate, const Tensor& slope,
                    int num_threads) {
    GateCall({"theta", theta}, seed, step, gate, slope)
        .run(
            num_threads, [](const auto& args, int threads) { return cpu::bernoulli_gate(args, threads); },
            [](const auto& args, int device, void* stream) { return cuda::bernoulli_gate(args, device, stream); });
}

}  // namespace

void bind_bernoulli_gate(py::module_& module) {
    module.def("bernoulli_gate", &bernoulli_gate, py::arg("theta"), py::arg("seed"), py::arg("step"), py::arg("gate"),
               py::arg("slope"), py::arg("num_threads") = 0,
               "Writes discrete gates that are open with probability theta into `gate`, and what backward multiplies "
               "by into `slope`; num_threads = 0: as many as OpenMP would take.");
}

}  // namespace fastprune
