// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// fused_conv: a convolution whose scale, shift, activation and mask happen in registers, before y is first written.
//
//     z = scale_k * sum over r, s, c of x[n, p stride + r dilation - padding, ..., c] * weight[k, r, s, c] + shift_k
//     r = activation(z)
//     y = mask_k * r
//
// with sums, scale, shift, activation and mask in float32 and one rounding to the type of y. One group: depthwise and
// grouped convolutions are bound by memory, and the caller's convolution and one-pass epilogue serve them.
//
// There are several kernels, the candidates: tiles of another shape, other tensor core instructions. Each gives the
// same bits on every run; two candidates add in another order, hence may differ in the last bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastprune/activation.h"
#include "fastprune/status.h"

namespace fastprune {

enum class ConvType : int32_t { float16, bfloat16, tf32 };  // tf32: float32 in memory, multiplied with 10 bits

/// Borrowed for the call, all on the device of the call. Pixels follow each other at a pitch of elements, which is
/// larger than the number of channels where the tensor is the first channels of a wider one. y and saved overlap
/// nothing.
struct FusedConvArgs {
    ConvType type;
    const void* x;       // [N, H, W, C]
    const void* weight;  // [K, R, S, C]
    const float* scale;  // [K], or null: 1
    const float* shift;  // [K], or null: 0
    const float* mask;   // [K], or null: 1
    void* y;             // [N, P, Q, K]
    void* saved;         // [N, P, Q, K] or null: z or r for a backward pass, as saves_input says
    int64_t n, h, w, c, k, r, s, p, q;
    int64_t x_pitch, weight_pitch, y_pitch, saved_pitch;  // >= c, c, k, k
    int32_t stride[2], padding[2], dilation[2];  // vertical, horizontal; stride and dilation >= 1, padding >= 0
    Activation activation;
};

/// Output pixels along one axis; 0 or less where the window does not fit.
constexpr int64_t conv_output_size(int64_t input, int64_t window, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t room = input + 2 * padding - dilation * (window - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

/// Every tensor spans fewer bytes than this: the kernels compute coordinates with 32 bits.
inline constexpr int64_t max_conv_bytes = int64_t{1} << 31;

namespace cuda {

/// One kernel. `supports` looks at the arguments alone, pointers for their alignment included, and touches no device.
struct ConvCandidate {
    const char* name;  // "sm80 128x64x64 s3 k1": instructions, tile, stages; takes any number of filters
    ConvType type;
    int first_capability, last_capability;  // 10 major + minor of the devices that it has code for, inclusive
    bool (*supports)(const FusedConvArgs&);
    size_t (*workspace)(const FusedConvArgs&);  // bytes
    Status (*launch)(const FusedConvArgs&, void* workspace, void* stream);
};

/// How many there are; 0 in a build without CUTLASS.
int fused_conv_candidates();
const ConvCandidate& fused_conv_candidate(int index);

/// Launches one candidate on `stream` (a cudaStream_t) of `device`: no synchronisation, no allocation, fit for CUDA
/// graphs. The candidate must support the arguments. `workspace`: as many bytes as it asks for, aligned to 256.
Status fused_conv(const FusedConvArgs& args, int candidate, void* workspace, int device, void* stream);

}  // namespace cuda
}  // namespace fastprune
