// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Checks of arguments, made before any memory is touched. Each check raises an error that names the argument, what it
// got and what it needs.
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

/// Checks for aligned memory on the CPU or on CUDA, of any strides. Returns the dtype, one of `allowed`.
DType strided_tensor(const Argument& argument, std::initializer_list<DType> allowed);

/// Checks for contiguous, aligned memory on the CPU or on CUDA. Returns the dtype, one of `allowed`.
DType tensor(const Argument& argument, std::initializer_list<DType> allowed);

/// Checks for such a tensor with one dimension of `length` elements; `meaning` says where the length comes from.
void vector(const Argument& argument, DType dtype, int64_t length, const char* meaning);

void one_dimension(const Argument& argument);

/// Checks for such a tensor with the dimensions of `as`.
void same_shape(const Argument& argument, DType dtype, const Argument& as);

/// `why`: the end of the message, which says why CUDA is refused.
void on_cpu(const Argument& argument, const std::string& why = "");
void same_device(const Argument& argument, const Argument& as);
void writable(const Argument& argument);
void disjoint(const Argument& output, const Argument& input);

/// Checks a stride, padding or dilation.
void pair(const char* name, const Pair& pair, int64_t least, int64_t most);

Activation activation(const std::string& name);

/// Returns the largest number of OpenMP threads for a kernel: `num_threads`, or OpenMP's default for 0 and less.
/// Refuses more than 1024, since the runtime ends the process when it cannot start the threads that it is asked for.
int threads_of(int num_threads);

/// Checks the shape of an emulated launch whose threads form warps.
void emulated_block(int num_threads, int warp_size);

/// Raises what a kernel refused or failed with; returns if it succeeded.
void status(const Status& status);

}  // namespace check
}  // namespace fastprune
