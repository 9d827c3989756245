// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_act: everything between two convolutions, forward and backward, each in one pass.
//
//     forward    z = x scale_c + shift_c + residual,  r = act(z),  y = r mask_c
//     backward   d = dy + others,  dz = d mask_c act'(z),  dx = dz scale_c [+ (x - centre_c) slope_c + offset_c]
//                dmask_c = sum d r,  dshift_c = sum dz,  dscale_c = sum dz (x - centre_c)
//
// with sums over everything but the channel. `saved` carries the forward pass to the backward pass, in as many bytes as
// y: r from before the mask (identity, relu, relu6), since the straight-through gradient of a closed channel's mask
// needs it, or z where act' is no function of r (silu, hardswish; see saves_input).
//
// The bracket is the gradient through batch statistics, whose coefficients are known only after dshift and dscale: a
// caller that needs it calls twice, for the sums and then for dx.
//
// Storage is float, double, float16 or bfloat16. Real, for the vectors and all arithmetic, is float (double for
// double); results are rounded once. Sums are accumulated in Real over short stretches and in double across them.
//
// Aliasing: y and saved may each be the same memory as x (same address, same stride), dx the same as dy, saved, x or
// others; outputs overlap nothing else. Views of different channels of one wider tensor do not overlap. Nothing outside
// of the views is written. Deterministic: the same bits for the same input, on every run and for every number of
// threads. y, saved and dx have the same bits on the CPU and on CUDA; the sums are cut differently there.
#pragma once

#include <cstdint>

#include "fastprune/activation.h"
#include "fastprune/channel_layout.h"
#include "fastprune/half.h"
#include "fastprune/status.h"

namespace fastprune {

/// Borrowed for the call. y or saved may be null, not both.
template <class Storage>
struct MaskedActArgs {
    ChannelLayout layout;
    Activation activation;
    ChannelView<const Storage> x;
    ChannelView<const Storage> residual;  // or null: 0
    const Real<Storage>* scale;           // [C], or null: 1
    const Real<Storage>* shift;           // [C], or null: 0
    const Real<Storage>* mask;            // [C], or null: 1
    ChannelView<Storage> y;
    ChannelView<Storage> saved;
};

/// Borrowed for the call. Outputs that are null are not wanted; at least one is.
template <class Storage>
struct MaskedActBackwardArgs {
    ChannelLayout layout;
    Activation activation;
    ChannelView<const Storage> dy;
    ChannelView<const Storage> saved;
    ChannelView<const Storage> x;  // needed for dscale and with slope and offset, else null
    ChannelView<const Storage>
        others;  // the gradient of y from its other readers, or null: 0; then no dshift, dscale and slope
    const Real<Storage>* mask;    // [C], or null: 1
    const Real<Storage>* scale;   // [C], or null: 1
    const Real<Storage>* centre;  // [C], or null: 0
    const Real<Storage>* slope;   // [C], with offset and x; or null, both
    const Real<Storage>* offset;  // [C]
    ChannelView<Storage> dx;
    Real<Storage>* dmask;   // [C]
    Real<Storage>* dshift;  // [C]
    Real<Storage>* dscale;  // [C], with x
};

namespace cpu {
/// At most `num_threads` OpenMP threads.
template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int num_threads);
/// The same; may throw std::bad_alloc.
template <class Storage>
Status masked_act_backward(const MaskedActBackwardArgs<Storage>& args, int num_threads);
}  // namespace cpu

namespace cuda {
/// One launch on `stream` (a cudaStream_t) of `device`, no synchronisation, no allocation: fit for CUDA graphs.
template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int device, void* stream);

/// How many doubles `partials` has to hold for each wanted sum.
int64_t masked_act_partials(const ChannelLayout& layout);

/// As above; one launch, or two if sums are wanted. `partials` is device memory that the caller may reuse when the
/// stream has passed the call: masked_act_partials doubles for each wanted sum.
template <class Storage>
Status masked_act_backward(const MaskedActBackwardArgs<Storage>& args, double* partials, int device, void* stream);
}  // namespace cuda

namespace emulated {
/// The device bodies, run by `num_threads` host threads per block in warps of `warp_size`. For tests without a GPU.
template <class Storage>
Status masked_act(const MaskedActArgs<Storage>& args, int num_threads, int warp_size);
template <class Storage>
Status masked_act_backward(const MaskedActBackwardArgs<Storage>& args, int num_threads, int warp_size);
}  // namespace emulated

}  // namespace fastprune
