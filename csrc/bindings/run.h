// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// From checked arguments to the kernel of their device.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "checks.h"
#include "fastprune/build.h"

namespace fastprune {

/// Runs on_cpu(threads) or on_cuda(device, stream), whichever `first` asks for, without the GIL. Raises what the kernel
/// reports. on_cuda is not compiled where the build has no CUDA kernels.
template <class OnCpu, class OnCuda>
void run(const Argument& first, int num_threads, const OnCpu& on_cpu, [[maybe_unused]] const OnCuda& on_cuda) {
    Status status;
    if (!first.tensor.on_cuda()) {
        const int threads = check::threads_of(num_threads);
        const pybind11::gil_scoped_release release;
        status = on_cpu(threads);
    } else if constexpr (build::has_cuda) {
        void* stream = first.tensor.current_stream();
        const int device = first.tensor.device().id;
        const pybind11::gil_scoped_release release;
        status = on_cuda(device, stream);
    } else {
        check::on_cpu(first, ": this build of fastprune has no CUDA kernels");
    }
    check::status(status);
}

}  // namespace fastprune
