// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// What the stochastic gates have in common before their kernels run: checks, then dispatch by dtype and device.
#pragma once

#include <omp.h>
#include <pybind11/pybind11.h>

#include "checks.h"
#include "fastprune/build.h"
#include "fastprune/gate.h"

namespace fastprune {

/// The arguments of a gate, borrowed for the call. The constructor checks all of them but the values of `input`.
class GateCall {
   public:
    /// `seed`: an int; `step`: an int, or an int64 tensor without dimensions on the device of `input`.
    GateCall(const Argument& input, pybind11::handle seed, pybind11::handle step, const Tensor& gate,
             const Tensor& slope);

    /// on_cpu(args, threads) or on_cuda(args, device, stream), whichever the input asks for.
    template <class OnCpu, class OnCuda>
    void run(int num_threads, const OnCpu& on_cpu, const OnCuda& on_cuda) const {
        if (!input_.tensor.on_cuda()) {
            check_step();
            dispatch(
                [&](const auto& args) { return on_cpu(args, num_threads > 0 ? num_threads : omp_get_max_threads()); });
        } else if constexpr (build::has_cuda) {
            void* stream = input_.tensor.current_stream();
            dispatch([&](const auto& args) { return on_cuda(args, input_.tensor.device().id, stream); });
        } else {
            refuse_cuda();
        }
    }

    /// emulated(args), where the step is read as on a device.
    template <class Emulated>
    void emulate(const Emulated& emulated) const {
        check_emulation();
        dispatch([&](auto args) {
            args.draw.step_at = step_tensor_.data_as<const int64_t>();  // null for an int
            return emulated(args);
        });
    }

   private:
    template <class Run>
    void dispatch(const Run& run) const {
        Status status;
        {
            const pybind11::gil_scoped_release release;
            status = dtype_ == DType::float32 ? run(arguments<float>()) : run(arguments<double>());
        }
        check::status(status);
    }
    template <class Real>
    GateArgs<Real> arguments() const {
        return {input_.tensor.data_as<const Real>(), gate_.data_as<Real>(), slope_.data_as<Real>(),
                input_.tensor.numel(), draw_};
    }
    void take_step(pybind11::handle step);
    void check_step() const;
    [[noreturn]] void refuse_cuda() const;
    void check_emulation() const;

    const Argument input_;
    const Tensor &gate_, &slope_;
    DType dtype_;
    Draw draw_{};
    Tensor step_tensor_;
};

namespace check {

/// A number; Python's own message would not name the argument.
double real_number(const char* name, pybind11::handle object);

/// The number of threads and blocks of an emulated launch.
void launch_shape(int num_threads, int num_blocks);

}  // namespace check
}  // namespace fastprune
