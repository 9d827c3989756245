// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Each function adds the Python functions of one operator to the module, in <operator>.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fastprune {

void bind_bernoulli_gate(pybind11::module_& module);
void bind_channel_moments(pybind11::module_& module);
void bind_fused_conv(pybind11::module_& module);
void bind_group_prox(pybind11::module_& module);
void bind_gumbel_gate(pybind11::module_& module);
void bind_instruction_set(pybind11::module_& module);
void bind_masked_act(pybind11::module_& module);
void bind_masked_conv(pybind11::module_& module);
void bind_random(pybind11::module_& module);
void bind_topk_mask(pybind11::module_& module);

}  // namespace fastprune
