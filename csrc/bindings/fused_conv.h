// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace fastprune {

void bind_fused_conv(pybind11::module_& module);

}  // namespace fastprune
