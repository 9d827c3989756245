// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Which instruction set the CPU kernels use, for tests that compare them.
#include "fastprune/instruction_set.h"

#include <string>

#include "bind.h"
#include "checks.h"

namespace py = pybind11;

namespace fastprune {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512"};  // in the order of InstructionSet

bool limit_instruction_set(const std::string& highest) {
    for (int i = 0; i < 3; ++i) {
        if (highest == names[i]) return cpu::limit_instruction_set(static_cast<InstructionSet>(i));
    }
    check::refuse("highest", "'" + highest + "'", "'baseline', 'avx2' or 'avx512'");
}

}  // namespace

void bind_instruction_set(py::module_& module) {
    module.def(
        "instruction_set", [] { return names[static_cast<int>(cpu::instruction_set())]; },
        "What the CPU kernels are vectorised for: 'baseline', 'avx2' or 'avx512'.");
    module.def(
        "limit_instruction_set", &limit_instruction_set, py::arg("highest"),
        "Makes the CPU kernels of this process use no wider instruction set. Returns False, and changes nothing, "
        "where the machine does not have it. The results are the same.");
}

}  // namespace fastprune
