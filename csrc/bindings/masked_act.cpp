// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_act for Python: checks, then dispatch by dtype and device.
#include "fastprune/masked_act.h"

#include <pybind11/stl.h>

#include <string>

#include "bind.h"
#include "masked_act_call.h"
#include "run.h"

namespace py = pybind11;

namespace fastprune {
namespace {

/// Returns how many doubles a backward call on CUDA needs for its sums.
int64_t num_partials(const MaskedActBackwardCall& call) {
    if constexpr (build::has_cuda) return call.num_sums() * cuda::masked_act_partials(call.arguments.layout());
    return 0;
}

void masked_act(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& mask,
                const std::string& activation, const Optional& y, const Optional& saved, int num_threads,
                const Optional& residual) {
    const MaskedActCall call(x, scale, shift, mask, activation, y, saved, residual);
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const auto args = call.of<Storage>();
        run(
            call.arguments.first(), num_threads, [&](int threads) { return cpu::masked_act(args, threads); },
            [&](auto device, void* stream) { return cuda::masked_act(args, device, stream); });
    });
}

void masked_act_backward(const Tensor& dy, const Tensor& saved, const Optional& x, const Optional& mask,
                         const Optional& scale, const Optional& centre, const Optional& slope, const Optional& offset,
                         const std::string& activation, const Optional& dx, const Optional& dmask,
                         const Optional& dshift, const Optional& dscale, const Optional& partials, int num_threads,
                         const Optional& others) {
    const MaskedActBackwardCall call(dy, saved, x, mask, scale, centre, slope, offset, activation, dx, dmask, dshift,
                                     dscale, others);
    if (dy.on_cuda()) call.arguments.check_partials(partials, num_partials(call));
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const auto args = call.of<Storage>();
        run(
            call.arguments.first(), num_threads, [&](int threads) { return cpu::masked_act_backward(args, threads); },
            [&](auto device, void* stream) {
                return cuda::masked_act_backward(args, data_of<double>(partials), device, stream);
            });
    });
}

/// Returns how many doubles one sum over tensors of this layout needs. All tensors together determine the layout.
int64_t masked_act_partials(const Tensor& dy, const Tensor& saved, const Optional& x, const Optional& dx,
                            const Optional& others) {
    ChannelArguments arguments;
    arguments.add("dy", dy);
    arguments.add("saved", saved);
    arguments.add("x", x);
    arguments.add("others", others);
    arguments.add("dx", dx);
    arguments.check();
    if constexpr (build::has_cuda) return cuda::masked_act_partials(arguments.layout());
    return 0;
}

}  // namespace

void bind_masked_act(py::module_& module) {
    module.def("masked_act", &masked_act, py::arg("x"), py::arg("scale").none(true), py::arg("shift").none(true),
               py::arg("mask").none(true), py::arg("activation"), py::arg("y").none(true), py::arg("saved").none(true),
               py::arg("num_threads") = 0, py::arg("residual") = py::none(),
               "Writes act(x scale + shift + residual) mask into `y`, what backward needs into `saved`.");
    module.def("masked_act_backward", &masked_act_backward, py::arg("dy"), py::arg("saved"), py::arg("x").none(true),
               py::arg("mask").none(true), py::arg("scale").none(true), py::arg("centre").none(true),
               py::arg("slope").none(true), py::arg("offset").none(true), py::arg("activation"),
               py::arg("dx").none(true), py::arg("dmask").none(true), py::arg("dshift").none(true),
               py::arg("dscale").none(true), py::arg("partials").none(true), py::arg("num_threads") = 0,
               py::arg("others") = py::none(),
               "Writes the wanted ones of dx, dmask, dshift and dscale. `partials`: float64, on CUDA for the sums.");
    module.def("masked_act_partials", &masked_act_partials, py::arg("dy"), py::arg("saved"), py::arg("x").none(true),
               py::arg("dx").none(true), py::arg("others") = py::none(),
               "How many elements `partials` needs for each wanted sum.");
}

}  // namespace fastprune
