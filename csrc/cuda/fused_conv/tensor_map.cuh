// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The driver encodes the tensor maps that the copy engine (TMA) reads. Where it refuses, CUTLASS goes on with an
// undefined map in release builds, and the kernel hangs or faults. CUTLASS calls the driver through a macro, which this
// header replaces, so that a launch can ask afterwards. Include it before every header of CuTe.
#pragma once

#ifdef CUTE_HOST_DEVICE
#error "tensor_map.cuh: include it before CuTe, which has taken the macro as it was"
#endif

#include <cuda.h>
#include <cutlass/cuda_host_adapter.hpp>

namespace fastprune::cuda {

/// Whether the driver has refused a map on this thread since the value was set to false.
inline thread_local bool tensor_map_refused = false;

inline CUresult noted(CUresult result) {
    if (result != CUDA_SUCCESS) tensor_map_refused = true;
    return result;
}

}  // namespace fastprune::cuda

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) \
    [](auto... arguments) { return ::fastprune::cuda::noted(cutlass::call_##function(arguments...)); }
