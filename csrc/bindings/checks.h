// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// What every entry point asks of its arguments before it touches memory. Each check raises an error that names the
// argument, what it got and what it needs.
#pragma once

#include <initializer_list>
#include <string>

#include "fastprune/status.h"
#include "tensor.h"

namespace fastprune {

/// A tensor argument together with the name that the caller knows it by.
struct Argument {
    const char* name;
    const Tensor& tensor;
};

enum class DType { float32, float64, float16, bfloat16, int64 };

namespace check {

/// It lends its memory, on the CPU or on CUDA, aligned; strides may be anything. Returns its dtype, one of `allowed`.
DType strided_tensor(const Argument& argument, std::initializer_list<DType> allowed);

/// It lends its memory, on the CPU or on CUDA, contiguous and aligned. Returns its dtype, one of `allowed`.
DType tensor(const Argument& argument, std::initializer_list<DType> allowed);

/// A tensor as above with one dimension of `length` elements; `meaning` says where the length comes from.
void vector(const Argument& argument, DType dtype, int64_t length, const char* meaning);

void one_dimension(const Argument& argument);

/// A tensor as above, any number of dimensions, those of `as`.
void same_shape(const Argument& argument, DType dtype, const Argument& as);

void same_device(const Argument& argument, const Argument& as);
void writable(const Argument& argument);
void disjoint(const Argument& output, const Argument& input);

/// Raises what a kernel refused or failed with; returns if it succeeded.
void status(const Status& status);

}  // namespace check
}  // namespace fastprune
