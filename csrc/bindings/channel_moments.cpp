// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// channel_moments for Python: checks, then dispatch by dtype and device.
#include "fastprune/channel_moments.h"

#include <pybind11/stl.h>

#include "bind.h"
#include "channel_moments_call.h"
#include "run.h"

namespace py = pybind11;

namespace fastprune {
namespace {

int64_t channel_moments_partials(const Tensor& x) {
    ChannelArguments arguments;
    arguments.add("x", x);
    arguments.check();
    if constexpr (build::has_cuda) return cuda::channel_moments_partials(arguments.layout());
    return 0;
}

void channel_moments(const Tensor& x, const Tensor& mean, const Tensor& variance, const Optional& partials,
                     int num_threads) {
    const MomentsCall call(x, mean, variance);
    if (x.on_cuda()) call.arguments.check_partials(partials, channel_moments_partials(x));
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const auto args = call.of<Storage>();
        run(
            call.arguments.first(), num_threads, [&](int threads) { return cpu::channel_moments(args, threads); },
            [&](auto device, void* stream) {
                return cuda::channel_moments(args, data_of<double>(partials), device, stream);
            });
    });
}

}  // namespace

void bind_channel_moments(py::module_& module) {
    module.def("channel_moments", &channel_moments, py::arg("x"), py::arg("mean"), py::arg("variance"),
               py::arg("partials").none(true), py::arg("num_threads") = 0,
               "Writes mean and biased variance of every channel. `partials`: float64, on CUDA.");
    module.def("channel_moments_partials", &channel_moments_partials, py::arg("x"),
               "How many elements `partials` needs.");
}

}  // namespace fastprune
