// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The list of candidates, and the launch of one of them.
#include "fastprune/fused_conv.h"

#include <cuda_runtime_api.h>

#include <vector>

#include "../device_guard.h"
#include "candidates.h"
#include "fastprune/build.h"

namespace fastprune::cuda {
namespace {

const std::vector<ConvCandidate>& candidates() {
    static const std::vector<ConvCandidate> all = [] {
        std::vector<ConvCandidate> list;
        const auto add = [&](ConvCandidates more) { list.insert(list.end(), more.begin(), more.end()); };
        if constexpr (build::has_cutlass) {
            for (const auto& more : {sm80_float16(), sm80_bfloat16(), sm80_tf32()}) add(more);
        }
        if constexpr (build::has_cutlass_sm90) {
            for (const auto& more : {sm90_convolution_float16(), sm90_convolution_bfloat16(), sm90_product_float16(),
                                     sm90_product_bfloat16()})
                add(more);
        }
        return list;
    }();
    return all;
}

Status check_capability(const ConvCandidate& candidate, int device) {
    int major = 0;
    int minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) return Status::failed(cudaGetErrorString(error));
    const int capability = 10 * major + minor;
    if (capability < candidate.first_capability || capability > candidate.last_capability)
        return Status::failed("this candidate has no code for the compute capability of the device");
    return {};
}

}  // namespace

int fused_conv_candidates() { return static_cast<int>(candidates().size()); }

const ConvCandidate& fused_conv_candidate(int index) { return candidates()[static_cast<size_t>(index)]; }

Status fused_conv(const FusedConvArgs& args, int candidate, void* workspace, int device, void* stream) {
    if (args.n == 0 || args.k == 0) return {};
    const DeviceGuard guard(device);
    if (!guard.status().ok()) return guard.status();
    const ConvCandidate& chosen = fused_conv_candidate(candidate);
    const Status capable = check_capability(chosen, device);
    return capable.ok() ? chosen.launch(args, workspace, stream) : capable;
}

}  // namespace fastprune::cuda
