// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// gumbel_gate on CUDA: one launch.
#include "fastprune/gumbel_gate.h"

#include "fastprune/gumbel_sigmoid.h"
#include "gate_launch.cuh"

namespace fastprune::cuda {

template <class Real>
Status gumbel_gate(const GateArgs<Real>& args, const GumbelOptions& options, int device, void* stream) {
    return with_gumbel_sigmoid(options,
                               [&](const auto& formula) { return launch_gates(args, formula, device, stream); });
}

template Status gumbel_gate(const GateArgs<float>&, const GumbelOptions&, int, void*);
template Status gumbel_gate(const GateArgs<double>&, const GumbelOptions&, int, void*);

}  // namespace fastprune::cuda
