// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// topk_mask: the soft (or hard) top-k mask of every channel group in one call.
//
// For group g with C = offsets[g+1] - offsets[g] channels, u = C keep[g] and gamma = window[g]:
//
//     rank the scores of the group in descending order, ties to the lowest index; for the i-th (i = 1..C)
//     mask = S((u - (i - 1/2)) / gamma_eff),  gamma_eff = min(gamma, 2 (C - u), 2 u)
//     S(t) = -2 t^3 + 1.5 t + 1/2 on [-1/2, 1/2], 0 below, 1 above; gamma_eff = 0: mask = 1 if i - 1/2 < u else 0
//
// Source: DDNP (Gao et al., ECCV 2022), eq. 7, mirrored as its Fig. 2 shows, with half-integer ranks so that the mask
// sums to u.
#pragma once

#include <cstdint>

#include "fastprune/status.h"

namespace fastprune {

/// A group, and all groups together, hold at most this many units: indices inside the kernels are 32 bits wide.
inline constexpr int64_t max_topk_units = 2147483647;

/// Borrowed for the call. All vectors are contiguous and on the device of the call; mask overlaps none of the others.
template <class Score>  // float or double
struct TopkMaskArgs {
    const Score* scores;     // [U], -inf and inf allowed, -0.0 ties with 0.0
    const Score* keep;       // [G], fraction to keep, in [0, 1]
    const int64_t* offsets;  // [G + 1], ascending from 0 to U; empty groups allowed
    const Score* window;     // [G], channels >= 0, inf allowed; or null: 0 everywhere, the hard mask
    Score* mask;             // [U], written completely
    int64_t num_units;       // U <= max_topk_units
    int64_t num_groups;      // G
};

// Deterministic: the same bits for the same input, on every run, for every number of threads, on the CPU and on CUDA.

namespace cpu {
/// Refuses NaN scores, keep outside of [0, 1], negative or NaN windows and malformed offsets; mask is then unspecified.
/// At most `num_threads` OpenMP threads; may throw std::bad_alloc. Time is linear in U for any input.
template <class Score>
Status topk_mask(const TopkMaskArgs<Score>& args, int num_threads);
}  // namespace cpu

namespace cuda {
/// One launch on `stream` (a cudaStream_t) of `device`, no synchronisation, no allocation: fit for CUDA graphs.
/// Values cannot be refused without waiting for them. Instead a group with a NaN score, or whose keep or window is out
/// of range, gets a mask of NaN; malformed offsets give NaN everywhere. Nothing is read or written out of bounds.
/// Groups of up to 8192 units (fewer where shared memory is smaller) are sorted at once, larger ones in rounds.
template <class Score>
Status topk_mask(const TopkMaskArgs<Score>& args, int device, void* stream);
}  // namespace cuda

namespace emulated {
/// The device body of cuda::topk_mask, run by `num_threads` host threads per block in warps of `warp_size`, with room
/// for `capacity` items (a power of two) in shared memory. For tests on machines without a GPU.
template <class Score>
Status topk_mask(const TopkMaskArgs<Score>& args, int num_threads, int warp_size, int capacity);
}  // namespace emulated

}  // namespace fastprune
