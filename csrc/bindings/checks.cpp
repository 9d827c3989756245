// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include <omp.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace fastprune {

std::string describe_shape(const Tensor& tensor) {
    std::string text = "shape [";
    for (int d = 0; d < tensor.ndim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
    return text + "]";
}

namespace check {
namespace {

[[noreturn]] void refuse_type(const char* name, const std::string& got, const std::string& needs) {
    throw py::type_error(std::string(name) + ": got " + got + ", needs " + needs);
}

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::float32: return "float32";
        case DType::float64: return "float64";
        case DType::float16: return "float16";
        case DType::bfloat16: return "bfloat16";
        case DType::int64: return "int64";
    }
    return "";
}

bool matches(dlpack::DataType type, DType dtype) {
    const auto is = [&](int code, int bits) { return type.lanes == 1 && type.code == code && type.bits == bits; };
    switch (dtype) {
        case DType::float32: return is(dlpack::code_float, 32);
        case DType::float64: return is(dlpack::code_float, 64);
        case DType::float16: return is(dlpack::code_float, 16);
        case DType::bfloat16: return is(dlpack::code_bfloat, 16);
        case DType::int64: return is(dlpack::code_int, 64);
    }
    return false;
}

std::string describe(dlpack::DataType type) {
    const char* kind = "type";
    switch (type.code) {
        case dlpack::code_int: kind = "int"; break;
        case dlpack::code_uint: kind = "uint"; break;
        case dlpack::code_float: kind = "float"; break;
        case dlpack::code_bfloat: kind = "bfloat"; break;
        case dlpack::code_complex: kind = "complex"; break;
        case dlpack::code_bool: return "dtype bool";
    }
    return "dtype " + std::string(kind) + std::to_string(type.bits) +
           (type.lanes == 1 ? "" : "x" + std::to_string(type.lanes));
}

std::string describe(dlpack::Device device) {
    if (device.type == dlpack::cpu || device.type == dlpack::cuda_host) return "the CPU";
    return (device.type == dlpack::cuda || device.type == dlpack::cuda_managed ? "cuda:" : "DLPack device ") +
           std::to_string(device.id);
}

}  // namespace

void refuse(const std::string& name, const std::string& got, const std::string& needs) {
    throw py::value_error(name + ": got " + got + ", needs " + needs);
}

DType strided_tensor(const Argument& argument, std::initializer_list<DType> allowed) {
    const auto& [name, tensor] = argument;
    if (!tensor.problem().empty()) refuse_type(name, tensor.problem(), "a tensor or array with memory (DLPack)");
    if (!tensor.on_cpu() && !tensor.on_cuda())
        refuse(name, "a tensor on " + describe(tensor.device()), "one on the CPU or on CUDA");
    std::string names;
    for (const DType dtype : allowed) {
        if (!matches(tensor.dtype(), dtype)) {
            names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
            continue;
        }
        if (reinterpret_cast<uintptr_t>(tensor.data()) % (tensor.dtype().bits / 8) != 0) {
            refuse(name, "unaligned memory", "elements at multiples of their size");
        }
        return dtype;
    }
    refuse_type(name, describe(tensor.dtype()), "dtype " + names);
}

DType tensor(const Argument& argument, std::initializer_list<DType> allowed) {
    const DType dtype = strided_tensor(argument, allowed);
    if (!argument.tensor.contiguous()) refuse(argument.name, "a strided view", "contiguous memory");
    return dtype;
}

void one_dimension(const Argument& argument) {
    if (argument.tensor.ndim() != 1) refuse(argument.name, describe_shape(argument.tensor), "one dimension");
}

void vector(const Argument& argument, DType dtype, int64_t length, const char* meaning) {
    tensor(argument, {dtype});
    if (argument.tensor.ndim() != 1 || argument.tensor.size(0) != length) {
        refuse(argument.name, describe_shape(argument.tensor),
               "shape [" + std::to_string(length) + "] (" + meaning + ")");
    }
}

void same_shape(const Argument& argument, DType dtype, const Argument& as) {
    tensor(argument, {dtype});
    const std::string shape = describe_shape(argument.tensor), needed = describe_shape(as.tensor);
    if (shape != needed) refuse(argument.name, shape, needed + ", that of " + as.name);
}

void on_cpu(const Argument& argument, const std::string& why) {
    if (!argument.tensor.on_cpu()) refuse(argument.name, "a CUDA tensor", "one on the CPU" + why);
}

void same_device(const Argument& argument, const Argument& as) {
    const bool same = argument.tensor.on_cpu()
                          ? as.tensor.on_cpu()
                          : as.tensor.on_cuda() && argument.tensor.device().id == as.tensor.device().id;
    if (!same) {
        refuse(argument.name, "a tensor on " + describe(argument.tensor.device()),
               "one on " + describe(as.tensor.device()) + ", where " + as.name + " is");
    }
}

void writable(const Argument& argument) {
    if (argument.tensor.read_only()) refuse(argument.name, "a read-only array", "a writable one");
}

void disjoint(const Argument& output, const Argument& input) {
    const auto* out = output.tensor.data_as<const char>();
    const auto* in = input.tensor.data_as<const char>();
    if (out < in + input.tensor.num_bytes() && in < out + output.tensor.num_bytes()) {
        refuse(output.name, std::string("memory that overlaps ") + input.name, "memory of its own");
    }
}

void pair(const char* name, const Pair& pair, int64_t least, int64_t most) {
    for (const int64_t value : pair) {
        if (value >= least && value <= most) continue;
        refuse(name, std::to_string(value),
               "integers in [" + std::to_string(least) + ", " + std::to_string(most) + "]");
    }
}

Activation activation(const std::string& name) {
    constexpr std::pair<const char*, Activation> names[] = {{"identity", Activation::identity},
                                                            {"relu", Activation::relu},
                                                            {"relu6", Activation::relu6},
                                                            {"silu", Activation::silu},
                                                            {"hardswish", Activation::hardswish}};
    for (const auto& [known, activation] : names) {
        if (name == known) return activation;
    }
    refuse("activation", "'" + name + "'", "identity, relu, relu6, silu or hardswish");
}

int threads_of(int num_threads) {
    constexpr int most = 1024;
    if (num_threads > most) refuse("num_threads", std::to_string(num_threads), "at most " + std::to_string(most));
    return num_threads > 0 ? num_threads : omp_get_max_threads();
}

void emulated_block(int num_threads, int warp_size) {
    const bool power_of_two = warp_size > 0 && (warp_size & (warp_size - 1)) == 0;
    if (power_of_two && num_threads > 0 && num_threads <= 1024 && num_threads % warp_size == 0) return;
    refuse("warp_size", std::to_string(warp_size) + " for num_threads=" + std::to_string(num_threads),
           "a power of two that divides num_threads, which is at most 1024");
}

void status(const Status& status) {
    if (status.failure != nullptr) throw std::runtime_error(std::string("CUDA: ") + status.failure);
    if (status.argument == nullptr) return;
    std::ostringstream value;
    value.precision(17);
    value << status.value;
    const std::string element = std::string(status.argument) + "[" + std::to_string(status.index) + "]";
    refuse(element, value.str(), status.needs);
}

}  // namespace check
}  // namespace fastprune
