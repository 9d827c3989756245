// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// gumbel_gate: relaxed gates, the sigmoid of noisy logits.
//
//     y     = sigmoid(x),  x = (logit + base + noise) / temperature
//     gate  = y, or if hard: 1 if x >= 0 (that is y >= 1/2) else 0
//     slope = y (1 - y) / temperature, whether hard or not (straight-through)
//
//     noise   gumbel: -ln(-ln u)          P(x >= 0) = 1 - exp(-exp(logit + base))
//             logistic: ln u - ln(1 - u)  P(x >= 0) = sigmoid(logit + base)
//             none: 0                     for the final mask
//
// with u = (n + 1/2) / 2^32, n uniform on {0, 1, ..., 2^32 - 1}, from (seed, step, unit): gumbel noise lies in
// [-3.14, 22.88], logistic noise in [-22.88, 22.88], and probabilities are multiples of 2^-32.
//
// Everything is computed in double and rounded once. The slope is an output, not left to backward to make from y: where
// y is next to 1, as base = 3 makes most of them, 1 - y of a float has few bits left or none.
//
// Source: the releases of DDNP and SANP (one Gumbel sample, temperature 0.4, base 3); for logistic noise Maddison et
// al. (ICLR 2017), the binary Concrete distribution.
#pragma once

#include "fastprune/gate.h"
#include "fastprune/status.h"

namespace fastprune {

enum class Noise { gumbel, logistic, none };

struct GumbelOptions {
    double temperature;  // normal, positive and finite
    double base;         // finite
    bool hard;
    Noise noise;  // with `none` the seed and the step are not looked at
};

// Deterministic: the same bits for the same input, seed and step, on every run, for every number of threads, on the CPU
// and on CUDA. The gate of unit i depends on no other unit.

namespace cpu {
/// Refuses NaN logits, and writes nothing then. At most `num_threads` OpenMP threads.
template <class Real>
Status gumbel_gate(const GateArgs<Real>& args, const GumbelOptions& options, int num_threads);
}  // namespace cpu

namespace cuda {
/// One launch on `stream` (a cudaStream_t) of `device`, no synchronisation, no allocation: fit for CUDA graphs.
/// Values cannot be refused without waiting for them. Instead a NaN logit gets a gate and a slope of NaN, and so does
/// every unit where draw.step_at holds a negative step.
template <class Real>
Status gumbel_gate(const GateArgs<Real>& args, const GumbelOptions& options, int device, void* stream);
}  // namespace cuda

namespace emulated {
/// The device body of cuda::gumbel_gate, run by `num_blocks` blocks of `num_threads` host threads. For tests on
/// machines without a GPU.
template <class Real>
Status gumbel_gate(const GateArgs<Real>& args, const GumbelOptions& options, int num_threads, int num_blocks);
}  // namespace emulated

}  // namespace fastprune
