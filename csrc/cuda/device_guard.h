// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Launches go to the device of the tensors, which need not be the current one; the caller's choice is put back.
#pragma once

#include <cuda_runtime_api.h>

#include "fastprune/status.h"

namespace fastprune::cuda {

class DeviceGuard {
   public:
    explicit DeviceGuard(int device) {
        cudaError_t error = cudaGetDevice(&previous_);
        if (error == cudaSuccess && previous_ != device) {
            error = cudaSetDevice(device);
            switched_ = error == cudaSuccess;
        }
        if (error != cudaSuccess) status_ = Status::failed(cudaGetErrorString(error));
    }
    ~DeviceGuard() {
        if (switched_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    const Status& status() const { return status_; }

   private:
    int previous_ = 0;
    bool switched_ = false;
    Status status_;
};

}  // namespace fastprune::cuda
