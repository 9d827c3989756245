// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// bernoulli_gate for Python.
#include "bind.h"

#include "fastprune/bernoulli_gate.h"
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

void emulated_bernoulli_gate(const Tensor& theta, py::handle seed, py::handle step, const Tensor& gate,
                             const Tensor& slope, int num_threads, int num_blocks) {
    check::launch_shape(num_threads, num_blocks);
    GateCall({"theta", theta}, seed, step, gate, slope).emulate([&](const auto& args) {
        return emulated::bernoulli_gate(args, num_threads, num_blocks);
    });
}

}  // namespace

void bind_bernoulli_gate(py::module_& module) {
    module.def("bernoulli_gate", &bernoulli_gate, py::arg("theta"), py::arg("seed"), py::arg("step"), py::arg("gate"),
               py::arg("slope"), py::arg("num_threads") = 0,
               "Writes discrete gates that are open with probability theta into `gate`, and what backward multiplies "
               "by into `slope`; num_threads = 0: as many as OpenMP would take.");
    module.def("emulated_bernoulli_gate", &emulated_bernoulli_gate, py::arg("theta"), py::arg("seed"), py::arg("step"),
               py::arg("gate"), py::arg("slope"), py::arg("num_threads") = 4, py::arg("num_blocks") = 3,
               "The device body of bernoulli_gate on host threads, for tests without a GPU.");
}

}  // namespace fastprune
