// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// channel_moments for Python: checks, then dispatch by dtype and device.
#include "fastprune/channel_moments.h"

#include <pybind11/stl.h>

#include "bind.h"
#include "channel_arguments.h"

namespace py = pybind11;

namespace fastprune {
namespace {

/// A call, checked when constructed.
struct MomentsCall {
    MomentsCall(const Tensor& x, const Optional& mean, const Optional& variance) : mean(mean), variance(variance) {
        place = arguments.add("x", x);
        arguments.add_vector("mean", mean);
        arguments.add_vector("variance", variance);
        arguments.check();
        arguments.check_output_vectors(0);
        if (x.numel() == 0 && x.size(1) > 0) {
            throw py::value_error("x: got no value, needs at least one for each channel");
        }
    }
    template <class Storage>
    ChannelMomentsArgs<Storage> of() const {
        return {arguments.layout(), arguments.view<const Storage>(place), data_of<Real<Storage>>(mean),
                data_of<Real<Storage>>(variance)};
    }
    ChannelArguments arguments;
    ChannelArguments::Place place;
    const Optional &mean, &variance;
};

int64_t channel_moments_partials(const Tensor& x) {
    ChannelArguments arguments;
    arguments.add("x", x);
    arguments.check();
    if constexpr (build::has_cuda) return cuda::channel_moments_partials(arguments.layout());
    return 0;
}

void channel_moments(const Tensor& x, const Tensor& mean, const Tensor& variance, const Optional& partials,
                     int num_threads) {
    const Optional mean_out = mean, variance_out = variance;
    const MomentsCall call(x, mean_out, variance_out);
    if (x.on_cuda()) call.arguments.check_partials(partials, channel_moments_partials(x));
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const auto args = call.of<Storage>();
        run(
            call.arguments.first(), [&] { return cpu::channel_moments(args, threads_of(num_threads)); },
            [&]([[maybe_unused]] void* stream) {
                if constexpr (build::has_cuda) {
                    return cuda::channel_moments(args, data_of<double>(partials), x.device().id, stream);
                }
                return Status{};
            });
    });
}

void emulated_channel_moments(const Tensor& x, const Tensor& mean, const Tensor& variance, int num_threads,
                              int warp_size) {
    const Optional mean_out = mean, variance_out = variance;
    const MomentsCall call(x, mean_out, variance_out);
    check_block(call.arguments.first(), num_threads, warp_size);
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const py::gil_scoped_release release;
        emulated::channel_moments(call.of<Storage>(), num_threads, warp_size);
    });
}

}  // namespace

void bind_channel_moments(py::module_& module) {
    module.def("channel_moments", &channel_moments, py::arg("x"), py::arg("mean"), py::arg("variance"),
               py::arg("partials").none(true), py::arg("num_threads") = 0,
               "Writes mean and biased variance of every channel. `partials`: float64, on CUDA.");
    module.def("channel_moments_partials", &channel_moments_partials, py::arg("x"),
               "How many elements `partials` needs.");
    module.def("emulated_channel_moments", &emulated_channel_moments, py::arg("x"), py::arg("mean"),
               py::arg("variance"), py::arg("num_threads") = 8, py::arg("warp_size") = 4,
               "The device body of channel_moments on host threads, for tests without a GPU.");
}

}  // namespace fastprune
