// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// gumbel_gate on the CPU.
#include "fastprune/gumbel_gate.h"

#include "fastprune/gumbel_sigmoid.h"
#include "gate.h"

namespace fastprune::cpu {
namespace {

constexpr int64_t thread_grain = 4096;  // at 6 to 20 ns a unit: for fewer, waking a second thread costs more

}  // namespace

template <class Real>
Status gumbel_gate(const GateArgs<Real>& args, const GumbelOptions& options, int num_threads) {
    const int64_t bad = find_nan(args.input, args.num_units);
    if (bad >= 0) return Status::refused("logits", bad, args.input[bad], "a number or inf");
    return with_gumbel_sigmoid(options, [&](const auto& formula) {
        draw_gates(args, formula, thread_grain, num_threads);
        return Status{};
    });
}

template Status gumbel_gate(const GateArgs<float>&, const GumbelOptions&, int);
template Status gumbel_gate(const GateArgs<double>&, const GumbelOptions&, int);

}  // namespace fastprune::cpu
