// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// What every entry point asks of its arguments before it touches memory. Each check raises an error that names the
// argument, what it got and what it needs.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "fastprune/activation.h"
#include "fastprune/status.h"
#include "tensor.h"

namespace fastprune {

/// A tensor argument together with the name that the caller knows it by.
struct Argument {
    const char* name;
    const Tensor& tensor;
};

enum class DType { float32, float64, float16, bfloat16, int64 };

using Pair = std::array<int64_t, 2>;  // vertical, horizontal

std::string describe_shape(const Tensor& tensor);

namespace check {

/// Raises ValueError "name: got ..., needs ...".
[[noreturn]] void refuse(const std::string& name, const std::string& got, const std::string& needs);

/// It lends its memory, on the CPU or on CUDA, aligned; strides may be anything. Returns its dtype, one of `allowed`.
DType strided_tensor(const Argument& argument, std::initializer_list<DType> allowed);

/// It lends its memory, on the CPU or on CUDA, contiguous and aligned. Returns its dtype, one of `allowed`.
DType tensor(const Argument& argument, std::initializer_list<DType> allowed);

/// A tensor as above with one dimension of `length` elements; `meaning` says where the length comes from.
void vector(const Argument& argument, DType dtype, int64_t length, const char* meaning);

void one_dimension(const Argument& argument);

/// A tensor as above, any number of dimensions, those of `as`.
void same_shape(const Argument& argument, DType dtype, const Argument& as);

/// `why`: the rest of the message, why there is nothing for CUDA.
void on_cpu(const Argument& argument, const std::string& why = "");
void same_device(const Argument& argument, const Argument& as);
void writable(const Argument& argument);
void disjoint(const Argument& output, const Argument& input);

/// Strides, paddings and dilations.
void pair(const char* name, const Pair& pair, int64_t least, int64_t most);

Activation activation(const std::string& name);

/// How many OpenMP threads a kernel takes: at most `num_threads`; as many as OpenMP would take for 0 and less. More
/// than 1024 are refused: the runtime ends the process when it cannot start as many as it is told.
int threads_of(int num_threads);

/// The shape of an emulated launch whose threads form warps.
void emulated_block(int num_threads, int warp_size);

/// Raises what a kernel refused or failed with; returns if it succeeded.
void status(const Status& status);

}  // namespace check
}  // namespace fastprune
