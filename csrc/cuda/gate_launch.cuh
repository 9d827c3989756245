// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The launch of stochastic gates, for any formula.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "block.cuh"
#include "device_guard.h"
#include "fastprune/gate.h"
#include "gate_body.cuh"

namespace fastprune::cuda {
namespace {

constexpr int gate_threads = 128;           // small blocks: the units of one network are spread over many processors
constexpr int64_t most_gate_blocks = 4096;  // more would not be resident at once

template <class Real, class Formula>
__global__ void __launch_bounds__(gate_threads) gate_kernel(GateArgs<Real> args, Formula formula) {
    device::draw_gates(Block{}, args, formula, blockIdx.x, gridDim.x);
}

template <class Real, class Formula>
Status launch_gates(const GateArgs<Real>& args, const Formula& formula, int device, void* stream) {
    if (args.num_units == 0) return {};
    const DeviceGuard guard(device);
    if (!guard.status().ok()) return guard.status();
    constexpr int64_t units_of_block = gate_threads * Philox4x32::words;
    const int64_t blocks = std::min((args.num_units - 1) / units_of_block + 1, most_gate_blocks);
    GateArgs<Real> arguments = args;
    Formula copy = formula;
    void* parameters[] = {&arguments, &copy};
    const auto* kernel = reinterpret_cast<const void*>(&gate_kernel<Real, Formula>);
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(gate_threads),
                                               parameters, 0, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? Status{} : Status::failed(cudaGetErrorString(error));
}

}  // namespace
}  // namespace fastprune::cuda
