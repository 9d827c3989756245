// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The device body of gumbel_gate on host threads.
#include "fastprune/gumbel_gate.h"

#include "fastprune/gumbel_sigmoid.h"
#include "gate.h"

namespace fastprune::emulated {

template <class Real>
Status gumbel_gate(const GateArgs<Real>& args, const GumbelOptions& options, int num_threads, int num_blocks) {
    return with_gumbel_sigmoid(options,
                               [&](const auto& formula) { return run_gates(args, formula, num_threads, num_blocks); });
}

template Status gumbel_gate(const GateArgs<float>&, const GumbelOptions&, int, int);
template Status gumbel_gate(const GateArgs<double>&, const GumbelOptions&, int, int);

}  // namespace fastprune::emulated
