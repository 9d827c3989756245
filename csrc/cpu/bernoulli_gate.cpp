// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// bernoulli_gate on the CPU.
#include "fastprune/bernoulli_gate.h"

#include "fastprune/bernoulli.h"
#include "gate.h"

namespace fastprune::cpu {
namespace {

constexpr int64_t thread_grain = 16384;  // at 2 ns a unit: fewer are faster on one thread than the wake-up of a second

}  // namespace

template <class Real>
Status bernoulli_gate(const GateArgs<Real>& args, int num_threads) {
    const int64_t bad = find_nan(args.input, args.num_units);
    if (bad >= 0) return Status::refused("theta", bad, args.input[bad], "a number to compare with");
    draw_gates(args, Bernoulli{}, thread_grain, num_threads);
    return {};
}

template Status bernoulli_gate(const GateArgs<float>&, int);
template Status bernoulli_gate(const GateArgs<double>&, int);

}  // namespace fastprune::cpu
