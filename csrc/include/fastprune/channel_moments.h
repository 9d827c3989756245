// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// channel_moments: mean and variance of every channel over batch and space, in one pass.
//
//     d = x - k_c,  mean_c = k_c + sum d / M,  variance_c = (sum d^2 - (sum d)^2 / M) / M,  M = outer inner
//
// with k_c the first value of the channel and all of it in double: M values of float32 with a mean of 10^6 standard
// deviations still give every digit that a float32 variance has. `variance` is the biased one, never negative.
//
// Deterministic: the same bits for the same input, on every run and for every number of threads. CPU and CUDA cut the
// sums differently, and may differ in the last place.
#pragma once

#include <cstdint>

#include "fastprune/channel_layout.h"
#include "fastprune/half.h"
#include "fastprune/status.h"

namespace fastprune {

/// Borrowed for the call. mean and variance overlap nothing else. The layout holds at least one value of each channel.
template <class Storage>
struct ChannelMomentsArgs {
    ChannelLayout layout;
    ChannelView<const Storage> x;
    Real<Storage>* mean;      // [C]
    Real<Storage>* variance;  // [C]
};

namespace cpu {
/// At most `num_threads` OpenMP threads; may throw std::bad_alloc.
template <class Storage>
Status channel_moments(const ChannelMomentsArgs<Storage>& args, int num_threads);
}  // namespace cpu

namespace cuda {
/// How many doubles `partials` has to hold.
int64_t channel_moments_partials(const ChannelLayout& layout);

/// Two launches on `stream` (a cudaStream_t) of `device`, no synchronisation, no allocation: fit for CUDA graphs.
template <class Storage>
Status channel_moments(const ChannelMomentsArgs<Storage>& args, double* partials, int device, void* stream);
}  // namespace cuda

namespace emulated {
/// The device bodies, run by `num_threads` host threads per block in warps of `warp_size`. For tests without a GPU.
template <class Storage>
Status channel_moments(const ChannelMomentsArgs<Storage>& args, int num_threads, int warp_size);
}  // namespace emulated

/// The moments of `count` values from the sums of d and d^2, on the CPU and on CUDA.
struct Moments {
    double mean, variance;
    static FASTPRUNE_HD Moments of(double first, double sum, double square_sum, double count) {
        const double variance = (square_sum - sum * (sum / count)) / count;
        return {first + sum / count, variance < 0 ? 0 : variance};
    }
};

}  // namespace fastprune
