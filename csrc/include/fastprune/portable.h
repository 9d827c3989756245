// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// One body for the CPU, for CUDA and for the host emulation of CUDA: functions marked so compile for whichever is
// asking.
#pragma once

#include <cstring>

#if defined(__CUDACC__)
#define FASTPRUNE_HD __host__ __device__ __forceinline__
#define FASTPRUNE_DEVICE __device__ __forceinline__
#define FASTPRUNE_UNROLL _Pragma("unroll")  // before a loop over an array that is meant to live in registers
#else
// Always, as on the device: a function that stays out of line keeps a loop over it from being vectorised.
#define FASTPRUNE_HD inline __attribute__((always_inline))
#define FASTPRUNE_DEVICE inline
#define FASTPRUNE_UNROLL
#endif

namespace fastprune {

template <class To, class From>
FASTPRUNE_HD To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

}  // namespace fastprune
