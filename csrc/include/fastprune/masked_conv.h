// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_conv: a dense or depthwise convolution with frozen weights on the CPU, float32 and channels_last, and in its
// epilogue everything that follows it:
//
//     z = conv(x, W) + shift + residual,  r = min(max(z, lowest), highest),  y = r * mask
//
// Backward, where W is the transposed weight and x the gradient of z, the epilogue continues through the layer before
// the convolution. `previous` is that layer's r, which the forward convolution read, times a mask if there was one:
//
//     d = conv(x, W) + residual,  y = d * mask where lowest < previous < highest, else 0,  dmask = sum of d * previous
//
// with sums over batch and pixels: the gradients of the previous layer's z and of its mask, without another pass. An
// infinite bound bounds nothing.
//
// Skipping: `channels` and `rows` may be fewer than the weight was packed for. The kernel then reads the first
// `channels` inputs and computes the first `rows` outputs only. A prefix needs no copy of x or of the weight, since
// pixels have a pitch and weights are packed channel after channel.
//
// Two algorithms. `direct` multiplies the pixels that a tap reads with the tap's weights, registers full of sums; a 1x1
// convolution is one tap. `winograd` is F(2x2, 3x3) (Lavin and Gray, CVPR 2016): 16 products where the direct one has
// 36, for 3x3 kernels with stride and dilation 1; its rounding error was 1.3 to 1.7 times that of the direct one, which
// is as small as torch's or smaller (see docs/decisions.md).
//
// A third one, `depthwise`, is for depthwise convolutions of at most `depthwise_taps` taps, whose output k reads input
// k alone. It takes a weight of one channel; x may have fewer channels than there are rows, or more.
//
// Infinities and NaN in x reach the outputs that read them and no others. `winograd` turns an infinity into an infinity
// or a NaN: it subtracts transformed inputs.
#pragma once

#include <cstdint>

#include "fastprune/instruction_set.h"

namespace fastprune {

struct ConvGeometry {
    int64_t kernel[2];  // vertical, horizontal, as everywhere below
    int64_t stride[2];
    int64_t padding[2];  // less than what the dilated kernel spans
    int64_t dilation[2];
};

/// Most taps of a depthwise kernel: no sum of products is long enough to be cut.
inline constexpr int64_t depthwise_taps = 128;

/// NHWC: the channels of a pixel are neighbours, the next pixel begins `pitch` elements behind.
struct Pixels {
    const float* data;
    int64_t pitch;
};
struct MutablePixels {
    float* data;
    int64_t pitch;
};

/// Borrowed for the call. Outputs overlap nothing else.
struct MaskedConvArgs {
    int64_t batch, height, width;       // of x
    int64_t out_height, out_width;      // of y
    int64_t channels, packed_channels;  // inputs that x has, and that the weight was packed for
    int64_t rows, packed_rows;          // outputs to compute, and that the weight was packed for
    ConvGeometry geometry;
    Pixels x;
    const float* packed;  // from masked_conv_pack, for the same algorithm
    const float* shift;   // [rows], or null: 0, as it is backward
    const float* mask;    // [rows], or null: 1
    Pixels residual;      // like y; or null: 0
    float lowest, highest;
    MutablePixels y;      // or null: not wanted; not both
    MutablePixels saved;  // r; or null, as it is backward
    Pixels previous;      // like y; or null: forward
    float* dmask;         // [rows], backward; or null: not wanted
};

enum class ConvAlgorithm : int32_t { direct, winograd, depthwise };

struct ConvKernel {
    ConvAlgorithm algorithm;
    InstructionSet instructions;  // avx2 or avx512; the layout of packed weights depends on it
};

namespace cpu {

/// Whether `algorithm` computes convolutions of this geometry.
bool masked_conv_supports(ConvAlgorithm algorithm, const ConvGeometry& geometry);

/// How many floats the packed weight has.
int64_t masked_conv_packed_size(const ConvKernel& kernel, const ConvGeometry& geometry, int64_t rows, int64_t channels);
/// Packs weight[k, c, r, s], at strides[4] (in elements, negative ones allowed), with row k times scale[k] (null: 1).
void masked_conv_pack(const ConvKernel& kernel, const ConvGeometry& geometry, int64_t rows, int64_t channels,
                      const float* weight, const int64_t* strides, const float* scale, float* packed, int num_threads);

/// Deterministic: the same bits on every run and for every number of threads. All but dmask also has the same bits for
/// every instruction set, and however many outputs are computed. Takes at most `num_threads` OpenMP threads, each of
/// which keeps up to 16 MiB of scratch memory from call to call. This processor must have the instructions of `kernel`,
/// and its algorithm must support the geometry. Throws std::bad_alloc, with some of the results written.
void masked_conv(const ConvKernel& kernel, const MaskedConvArgs& args, int num_threads);

}  // namespace cpu
}  // namespace fastprune
