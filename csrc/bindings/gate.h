// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The arguments of stochastic gates: their checks, and the dispatch by dtype and device.
#pragma once

#include <pybind11/pybind11.h>

#include "checks.h"
#include "fastprune/gate.h"
#include "fastprune/gumbel_gate.h"
#include "run.h"

namespace fastprune {

/// The arguments of a gate, borrowed for the call. The constructor checks all of them but the values of `input`.
class GateCall {
   public:
    /// `seed`: an int; `step`: an int, or an int64 tensor without dimensions on the device of `input`.
    GateCall(const Argument& input, pybind11::handle seed, pybind11::handle step, const Tensor& gate,
             const Tensor& slope);

    /// Runs on_cpu(args, threads) or on_cuda(args, device, stream), whichever the input asks for.
    template <class OnCpu, class OnCuda>
    void run(int num_threads, const OnCpu& on_cpu, const OnCuda& on_cuda) const {
        if (!input_.tensor.on_cuda()) check_step();
        dispatch([&](const auto& args) {
            fastprune::run(
                input_, num_threads, [&](int threads) { return on_cpu(args, threads); },
                [&](auto device, void* stream) { return on_cuda(args, device, stream); });
        });
    }

    /// Runs emulated(args), with the step where a device would find it.
    template <class Emulated>
    void emulate(const Emulated& emulated) const {
        check::on_cpu(input_, ": this is the emulation");
        dispatch([&](auto args) {
            args.draw.step_at = step_tensor_.data_as<const int64_t>();  // null for an int
            const pybind11::gil_scoped_release release;
            emulated(args);
        });
    }

   private:
    template <class Body>
    void dispatch(const Body& body) const {
        dtype_ == DType::float32 ? body(arguments<float>()) : body(arguments<double>());
    }
    template <class Real>
    GateArgs<Real> arguments() const {
        return {input_.tensor.data_as<const Real>(), gate_.data_as<Real>(), slope_.data_as<Real>(),
                input_.tensor.numel(), draw_};
    }
    void take_step(pybind11::handle step);
    void check_step() const;

    const Argument input_;
    const Tensor &gate_, &slope_;
    DType dtype_;
    Draw draw_{};
    Tensor step_tensor_;
};

/// Checks and returns the options of gumbel_gate.
GumbelOptions gumbel_options(pybind11::handle temperature, pybind11::handle base, bool hard, pybind11::handle noise);

}  // namespace fastprune
