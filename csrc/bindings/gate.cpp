// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "gate.h"

#include <cmath>
#include <sstream>
#include <string>

namespace py = pybind11;

namespace fastprune {
namespace {

std::string type_name_of(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

[[noreturn]] void refuse_count(const char* name, const std::string& got) {
    check::refuse(name, got, "a whole number from 0 to 2^63 - 1");
}

/// Returns a seed or a step. Refuses bools, which are ints for Python, but hardly meant as such.
int64_t count_of(const char* name, py::handle object, const char* needs = "an int") {
    if (!PyLong_Check(object.ptr()) || PyBool_Check(object.ptr())) {
        throw py::type_error(std::string(name) + ": got an object of type " + type_name_of(object) + ", needs " +
                             needs);
    }
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    if (overflow != 0 || value < 0) refuse_count(name, py::str(object));
    return value;
}

/// Returns a number. Python's own error would not name the argument.
double real_number(const char* name, py::handle object) {
    const double value = PyFloat_AsDouble(object.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + ": got an object of type " + type_name_of(object) +
                             ", needs a number");
    }
    return value;
}

std::string text_of(double number) {
    std::ostringstream text;
    text << number;
    return text.str();
}

Noise noise_of(py::handle object) {
    const std::string got = py::isinstance<py::str>(object) ? std::string(py::repr(object)) : type_name_of(object);
    if (got == "'gumbel'") return Noise::gumbel;
    if (got == "'logistic'") return Noise::logistic;
    if (got == "'none'") return Noise::none;
    check::refuse("noise", got, "'gumbel', 'logistic' or 'none'");
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
        check::refuse("step", "a tensor of " + std::to_string(step_tensor_.ndim()) + " dimensions",
                      "an int or a tensor without dimensions");
    }
    check::same_device(argument, input_);
    if (step_tensor_.on_cuda()) {
        draw_.step_at = step_tensor_.data_as<const int64_t>();
        return;
    }
    draw_.step = *step_tensor_.data_as<const int64_t>();
}

void GateCall::check_step() const {
    if (draw_.step < 0) refuse_count("step", std::to_string(draw_.step));
}

GumbelOptions gumbel_options(py::handle temperature, py::handle base, bool hard, py::handle noise) {
    const GumbelOptions options{real_number("temperature", temperature), real_number("base", base), hard,
                                noise_of(noise)};
    if (!(options.temperature > 0 && std::isnormal(options.temperature) && std::isnormal(1 / options.temperature))) {
        check::refuse("temperature", text_of(options.temperature), "a positive number");
    }
    if (!std::isfinite(options.base)) check::refuse("base", text_of(options.base), "a finite number");
    return options;
}

}  // namespace fastprune
