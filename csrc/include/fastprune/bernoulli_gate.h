// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// bernoulli_gate: discrete gates, each open with a probability of its own.
//
//     gate  = 1 if u < theta else 0,   u uniform on {0, 1, ..., 2^32 - 1} / 2^32, from (seed, step, unit)
//     slope = 1 if 0 <= theta <= 1 else 0
//
// theta <= 0 never opens, theta >= 1 always does. In between the probability is theta rounded up to a multiple of
// 2^-32: theta itself for every float of at least 2^-9.
//
// Source: DMC (Gao et al., CVPR 2020), eq. 3 and 4.
#pragma once

#include "fastprune/gate.h"
#include "fastprune/status.h"

namespace fastprune {

// Deterministic: the same bits for the same input, seed and step, on every run, for every number of threads, on the CPU
// and on CUDA. The gate of unit i depends on no other unit.

namespace cpu {
/// Refuses NaN theta, and writes nothing then. At most `num_threads` OpenMP threads.
template <class Real>
Status bernoulli_gate(const GateArgs<Real>& args, int num_threads);
}  // namespace cpu

namespace cuda {
/// One launch on `stream` (a cudaStream_t) of `device`, no synchronisation, no allocation: fit for CUDA graphs.
/// Values cannot be refused without waiting for them. Instead a NaN theta gets a gate and a slope of NaN, and so does
/// every unit where draw.step_at holds a negative step.
template <class Real>
Status bernoulli_gate(const GateArgs<Real>& args, int device, void* stream);
}  // namespace cuda

namespace emulated {
/// The device body of cuda::bernoulli_gate, run by `num_blocks` blocks of `num_threads` host threads. For tests on
/// machines without a GPU.
template <class Real>
Status bernoulli_gate(const GateArgs<Real>& args, int num_threads, int num_blocks);
}  // namespace emulated

}  // namespace fastprune
