// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The parts of the gates' noise, one value at a time: for tests against published and correctly rounded values.
#include "bind.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "fastprune/elementary.h"
#include "fastprune/philox.h"

namespace py = pybind11;

namespace fastprune {
namespace {

std::array<uint32_t, 4> philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const auto [w0, w1, w2, w3] = Philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]).word;
    return {w0, w1, w2, w3};
}

}  // namespace

void bind_random(py::module_& module) {
    module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"),
               "The four words of Philox4x32-10 for four words of counter and two of key.");
    module.def("natural_log", &natural_log, py::arg("x"),
               "ln(x) of a positive, finite, normal x, as gumbel_gate has it.");
    module.def("exponential", &exponential, py::arg("x"), "e^x of x <= 0, as gumbel_gate has it.");
}

}  // namespace fastprune
