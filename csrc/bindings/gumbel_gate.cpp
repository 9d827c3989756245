// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// gumbel_gate for Python.
#include "bind.h"

#include <cmath>
#include <sstream>
#include <string>

#include "fastprune/gumbel_gate.h"
#include "gate.h"

namespace py = pybind11;

namespace fastprune {
namespace {

[[noreturn]] void raise_number(const char* name, double got, const char* needs) {
    std::ostringstream message;
    message << name << ": got " << got << ", needs " << needs;
    throw py::value_error(message.str());
}

Noise noise_of(py::handle object) {
    const std::string got =
        py::isinstance<py::str>(object) ? std::string(py::repr(object)) : std::string(Py_TYPE(object.ptr())->tp_name);
    if (got == "'gumbel'") return Noise::gumbel;
    if (got == "'logistic'") return Noise::logistic;
    if (got == "'none'") return Noise::none;
    throw py::value_error("noise: got " + got + ", needs 'gumbel', 'logistic' or 'none'");
}

GumbelOptions options_of(py::handle temperature, py::handle base, bool hard, py::handle noise) {
    const GumbelOptions options{check::real_number("temperature", temperature), check::real_number("base", base), hard,
                                noise_of(noise)};
    if (!(options.temperature > 0 && std::isnormal(options.temperature) && std::isnormal(1 / options.temperature))) {
        raise_number("temperature", options.temperature, "a positive number");
    }
    if (!std::isfinite(options.base)) raise_number("base", options.base, "a finite number");
    return options;
}

void gumbel_gate(const Tensor& logits, py::handle seed, py::handle step, py::handle temperature, py::handle base,
                 bool hard, py::handle noise, const Tensor& gate, const Tensor& slope, int num_threads) {
    const GumbelOptions options = options_of(temperature, base, hard, noise);
    GateCall({"logits", logits}, seed, step, gate, slope)
        .run(
            num_threads, [&](const auto& args, int threads) { return cpu::gumbel_gate(args, options, threads); },
            [&](const auto& args, int device, void* stream) {
                return cuda::gumbel_gate(args, options, device, stream);
            });
}

void emulated_gumbel_gate(const Tensor& logits, py::handle seed, py::handle step, py::handle temperature,
                          py::handle base, bool hard, py::handle noise, const Tensor& gate, const Tensor& slope,
                          int num_threads, int num_blocks) {
    check::launch_shape(num_threads, num_blocks);
    const GumbelOptions options = options_of(temperature, base, hard, noise);
    GateCall({"logits", logits}, seed, step, gate, slope).emulate([&](const auto& args) {
        return emulated::gumbel_gate(args, options, num_threads, num_blocks);
    });
}

}  // namespace

void bind_gumbel_gate(py::module_& module) {
    module.def("gumbel_gate", &gumbel_gate, py::arg("logits"), py::arg("seed"), py::arg("step"), py::arg("temperature"),
               py::arg("base"), py::arg("hard"), py::arg("noise"), py::arg("gate"), py::arg("slope"),
               py::arg("num_threads") = 0,
               "Writes the sigmoids of noisy logits, or whether they reach 1/2, into `gate` and their derivatives into "
               "`slope`; num_threads = 0: as many as OpenMP would take.");
    module.def("emulated_gumbel_gate", &emulated_gumbel_gate, py::arg("logits"), py::arg("seed"), py::arg("step"),
               py::arg("temperature"), py::arg("base"), py::arg("hard"), py::arg("noise"), py::arg("gate"),
               py::arg("slope"), py::arg("num_threads") = 4, py::arg("num_blocks") = 3,
               "The device body of gumbel_gate on host threads, for tests without a GPU.");
}

}  // namespace fastprune
