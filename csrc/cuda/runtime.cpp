// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Whether the kernels of this build can run here.
#include "runtime.h"

#include <cuda_runtime_api.h>

namespace fastprune::cuda {

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();  // no driver or no device is an answer here, not an error to leave behind
        return 0;
    }
    return count;
}

}  // namespace fastprune::cuda
