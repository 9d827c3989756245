// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// One body for the CPU, for CUDA and for the host emulation of CUDA: functions marked so compile for whichever is
// asking.
#pragma once

#if defined(__CUDACC__)
#define FASTPRUNE_HD __host__ __device__ __forceinline__
#define FASTPRUNE_DEVICE __device__ __forceinline__
#else
#define FASTPRUNE_HD inline
#define FASTPRUNE_DEVICE inline
#endif
