// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// bernoulli_gate on CUDA: one launch.
#include "fastprune/bernoulli_gate.h"

#include "fastprune/bernoulli.h"
#include "gate_launch.cuh"

namespace fastprune::cuda {

template <class Real>
Status bernoulli_gate(const GateArgs<Real>& args, int device, void* stream) {
    return launch_gates(args, Bernoulli{}, device, stream);
}

template Status bernoulli_gate(const GateArgs<float>&, int, void*);
template Status bernoulli_gate(const GateArgs<double>&, int, void*);

}  // namespace fastprune::cuda
