// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The device body of bernoulli_gate on host threads.
#include "fastprune/bernoulli_gate.h"

#include "fastprune/bernoulli.h"
#include "gate.h"

namespace fastprune::emulated {

template <class Real>
Status bernoulli_gate(const GateArgs<Real>& args, int num_threads, int num_blocks) {
    return run_gates(args, Bernoulli{}, num_threads, num_blocks);
}

template Status bernoulli_gate(const GateArgs<float>&, int, int);
template Status bernoulli_gate(const GateArgs<double>&, int, int);

}  // namespace fastprune::emulated
