// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "gate.h"

#include <string>

namespace py = pybind11;

namespace fastprune {
namespace {

std::string type_name_of(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

[[noreturn]] void raise_out_of_range(const char* name, const std::string& got) {
    throw py::value_error(std::string(name) + ": got " + got + ", needs a whole number from 0 to 2^63 - 1");
}

/// Seeds and steps. A bool is an int for Python, but hardly meant as one.
int64_t count_of(const char* name, py::handle object, const char* needs = "an int") {
    if (!PyLong_Check(object.ptr()) || PyBool_Check(object.ptr())) {
        throw py::type_error(std::string(name) + ": got an object of type " + type_name_of(object) + ", needs " +
                             needs);
    }
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    if (overflow != 0 || value < 0) raise_out_of_range(name, py::str(object));
    return value;
}

}  // namespace

GateCall::GateCall(const Argument& input, py::handle seed, py::handle step, const Tensor& gate, const Tensor& slope)
    : input_(input), gate_(gate), slope_(slope), dtype_(check::tensor(input, {DType::float32, DType::float64})) {
    draw_.seed = count_of("seed", seed);
    take_step(step);
    for (const Argument& output : {Argument{"gate", gate}, Argument{"slope", slope}}) {
        check::same_shape(output, dtype_, input);
        check::writable(output);
        check::same_device(output, input);
        check::disjoint(output, input);
        if (step_tensor_.data() != nullptr) check::disjoint(output, {"step", step_tensor_});
    }
    check::disjoint({"slope", slope}, {"gate", gate});
}

void GateCall::take_step(py::handle step) {
    if (PyLong_Check(step.ptr()) || !py::hasattr(step, "__dlpack__")) {
        draw_.step = count_of("step", step, "an int or a tensor without dimensions");
        return;
    }
    step_tensor_ = Tensor::borrow(step);
    const Argument argument{"step", step_tensor_};
    check::tensor(argument, {DType::int64});
    if (step_tensor_.ndim() != 0) {
        throw py::value_error("step: got a tensor of " + std::to_string(step_tensor_.ndim()) +
                              " dimensions, needs an int or a tensor without dimensions");
    }
    check::same_device(argument, input_);
    if (step_tensor_.on_cuda()) {
        draw_.step_at = step_tensor_.data_as<const int64_t>();
        return;
    }
    draw_.step = *step_tensor_.data_as<const int64_t>();
}

void GateCall::check_step() const {
    if (draw_.step < 0) raise_out_of_range("step", std::to_string(draw_.step));
}

void GateCall::refuse_cuda() const {
    throw py::value_error(std::string(input_.name) +
                          ": got a CUDA tensor, needs one on the CPU: this build of fastprune has no CUDA kernels");
}

void GateCall::check_emulation() const {
    if (!input_.tensor.on_cpu()) {
        throw py::value_error(std::string(input_.name) +
                              ": got a CUDA tensor, needs one on the CPU: this is the emulation");
    }
}

namespace check {

double real_number(const char* name, py::handle object) {
    const double value = PyFloat_AsDouble(object.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + ": got an object of type " + type_name_of(object) +
                             ", needs a number");
    }
    return value;
}

void launch_shape(int num_threads, int num_blocks) {
    if (num_threads <= 0 || num_threads > 1024) throw py::value_error("num_threads: needs a number from 1 to 1024");
    if (num_blocks <= 0 || num_blocks > 1024) throw py::value_error("num_blocks: needs a number from 1 to 1024");
}

}  // namespace check
}  // namespace fastprune
