// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_act for Python: checks, then dispatch by dtype and device.
#include "fastprune/masked_act.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>

#include "bind.h"
#include "channel_arguments.h"
#include "fastprune/build.h"

namespace py = pybind11;

namespace fastprune {
namespace {

Activation activation_of(const std::string& name) {
    constexpr std::array<std::pair<const char*, Activation>, 5> names{{{"identity", Activation::identity},
                                                                       {"relu", Activation::relu},
                                                                       {"relu6", Activation::relu6},
                                                                       {"silu", Activation::silu},
                                                                       {"hardswish", Activation::hardswish}}};
    for (const auto& [known, activation] : names) {
        if (name == known) return activation;
    }
    throw py::value_error("activation: got '" + name + "', needs identity, relu, relu6, silu or hardswish");
}

/// A forward call, checked when constructed.
struct Forward {
    Forward(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& mask,
            const std::string& activation_name, const Optional& y, const Optional& saved)
        : activation(activation_of(activation_name)), scale(scale), shift(shift), mask(mask) {
        x_place = arguments.add("x", x);
        y_place = arguments.add("y", y);
        saved_place = arguments.add("saved", saved);
        arguments.add_vector("scale", scale);
        arguments.add_vector("shift", shift);
        arguments.add_vector("mask", mask);
        arguments.check();
        if (!y && !saved) throw py::value_error("y: got None, needs a tensor here or in saved");
        arguments.check_output(y_place, 1);
        arguments.check_output(saved_place, 1);
    }
    template <class Storage>
    MaskedActArgs<Storage> of() const {
        return {arguments.layout(),
                activation,
                arguments.view<const Storage>(x_place),
                data_of<const Real<Storage>>(scale),
                data_of<const Real<Storage>>(shift),
                data_of<const Real<Storage>>(mask),
                arguments.view<Storage>(y_place),
                arguments.view<Storage>(saved_place)};
    }
    ChannelArguments arguments;
    Activation activation;
    const Optional &scale, &shift, &mask;
    ChannelArguments::Place x_place, y_place, saved_place;
};

/// A backward call, checked when constructed.
struct Backward {
    Backward(const Tensor& dy, const Tensor& saved, const Optional& x, const Optional& mask, const Optional& scale,
             const Optional& centre, const Optional& slope, const Optional& offset, const std::string& activation_name,
             const Optional& dx, const Optional& dmask, const Optional& dshift, const Optional& dscale)
        : activation(activation_of(activation_name)),
          mask(mask),
          scale(scale),
          centre(centre),
          slope(slope),
          offset(offset),
          dmask(dmask),
          dshift(dshift),
          dscale(dscale) {
        dy_place = arguments.add("dy", dy);
        saved_place = arguments.add("saved", saved);
        x_place = arguments.add("x", x);
        dx_place = arguments.add("dx", dx);
        arguments.add_vector("mask", mask);
        arguments.add_vector("scale", scale);
        arguments.add_vector("centre", centre);
        arguments.add_vector("slope", slope);
        arguments.add_vector("offset", offset);
        const size_t num_inputs = arguments.num_vectors();
        arguments.add_vector("dmask", dmask);
        arguments.add_vector("dshift", dshift);
        arguments.add_vector("dscale", dscale);
        arguments.check();
        if (!dx && !dmask && !dshift && !dscale) {
            throw py::value_error("dx: got None, needs a tensor here or in dmask, dshift or dscale");
        }
        if (slope.has_value() != offset.has_value()) {
            throw py::value_error(std::string(slope ? "offset" : "slope") + ": got None, needs a vector beside " +
                                  (slope ? "slope" : "offset"));
        }
        if (!x && (dscale || slope)) {
            throw py::value_error(std::string("x: got None, needs a tensor for ") + (dscale ? "dscale" : "slope"));
        }
        arguments.check_output(dx_place, dx_place.value_or(0));
        arguments.check_output_vectors(num_inputs);
    }
    template <class Storage>
    MaskedActBackwardArgs<Storage> of() const {
        using Value = Real<Storage>;
        return {arguments.layout(),
                activation,
                arguments.view<const Storage>(dy_place),
                arguments.view<const Storage>(saved_place),
                arguments.view<const Storage>(x_place),
                data_of<const Value>(mask),
                data_of<const Value>(scale),
                data_of<const Value>(centre),
                data_of<const Value>(slope),
                data_of<const Value>(offset),
                arguments.view<Storage>(dx_place),
                data_of<Value>(dmask),
                data_of<Value>(dshift),
                data_of<Value>(dscale)};
    }
    int num_sums() const { return dmask.has_value() + dshift.has_value() + dscale.has_value(); }

    ChannelArguments arguments;
    Activation activation;
    const Optional &mask, &scale, &centre, &slope, &offset, &dmask, &dshift, &dscale;
    ChannelArguments::Place dy_place, saved_place, x_place, dx_place;
};

/// How many doubles a backward call on CUDA needs for its sums.
int64_t num_partials(const Backward& call) {
    if constexpr (build::has_cuda) return call.num_sums() * cuda::masked_act_partials(call.arguments.layout());
    return 0;
}

void masked_act(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& mask,
                const std::string& activation, const Optional& y, const Optional& saved, int num_threads) {
    const Forward call(x, scale, shift, mask, activation, y, saved);
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const auto args = call.of<Storage>();
        run(
            call.arguments.first(), [&] { return cpu::masked_act(args, threads_of(num_threads)); },
            [&]([[maybe_unused]] void* stream) {
                if constexpr (build::has_cuda) return cuda::masked_act(args, x.device().id, stream);
                return Status{};
            });
    });
}

void masked_act_backward(const Tensor& dy, const Tensor& saved, const Optional& x, const Optional& mask,
                         const Optional& scale, const Optional& centre, const Optional& slope, const Optional& offset,
                         const std::string& activation, const Optional& dx, const Optional& dmask,
                         const Optional& dshift, const Optional& dscale, const Optional& partials, int num_threads) {
    const Backward call(dy, saved, x, mask, scale, centre, slope, offset, activation, dx, dmask, dshift, dscale);
    if (dy.on_cuda()) call.arguments.check_partials(partials, num_partials(call));
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const auto args = call.of<Storage>();
        run(
            call.arguments.first(), [&] { return cpu::masked_act_backward(args, threads_of(num_threads)); },
            [&]([[maybe_unused]] void* stream) {
                if constexpr (build::has_cuda) {
                    auto* memory = data_of<double>(partials);
                    return cuda::masked_act_backward(args, memory, dy.device().id, stream);
                }
                return Status{};
            });
    });
}

/// For one sum over tensors of this layout; `others` may decide whether the layout is that of one long plane.
int64_t masked_act_partials(const Tensor& dy, const Tensor& saved, const Optional& x, const Optional& dx) {
    ChannelArguments arguments;
    arguments.add("dy", dy);
    arguments.add("saved", saved);
    arguments.add("x", x);
    arguments.add("dx", dx);
    arguments.check();
    if constexpr (build::has_cuda) return cuda::masked_act_partials(arguments.layout());
    return 0;
}

void emulated_masked_act(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& mask,
                         const std::string& activation, const Optional& y, const Optional& saved, int num_threads,
                         int warp_size) {
    const Forward call(x, scale, shift, mask, activation, y, saved);
    check_block(call.arguments.first(), num_threads, warp_size);
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const py::gil_scoped_release release;
        emulated::masked_act(call.of<Storage>(), num_threads, warp_size);
    });
}

void emulated_masked_act_backward(const Tensor& dy, const Tensor& saved, const Optional& x, const Optional& mask,
                                  const Optional& scale, const Optional& centre, const Optional& slope,
                                  const Optional& offset, const std::string& activation, const Optional& dx,
                                  const Optional& dmask, const Optional& dshift, const Optional& dscale,
                                  int num_threads, int warp_size) {
    const Backward call(dy, saved, x, mask, scale, centre, slope, offset, activation, dx, dmask, dshift, dscale);
    check_block(call.arguments.first(), num_threads, warp_size);
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const py::gil_scoped_release release;
        emulated::masked_act_backward(call.of<Storage>(), num_threads, warp_size);
    });
}

}  // namespace

void bind_masked_act(py::module_& module) {
    module.def("masked_act", &masked_act, py::arg("x"), py::arg("scale").none(true), py::arg("shift").none(true),
               py::arg("mask").none(true), py::arg("activation"), py::arg("y").none(true), py::arg("saved").none(true),
               py::arg("num_threads") = 0,
               "Writes act(x scale + shift) mask into `y`, what backward needs into `saved`.");
    module.def("masked_act_backward", &masked_act_backward, py::arg("dy"), py::arg("saved"), py::arg("x").none(true),
               py::arg("mask").none(true), py::arg("scale").none(true), py::arg("centre").none(true),
               py::arg("slope").none(true), py::arg("offset").none(true), py::arg("activation"),
               py::arg("dx").none(true), py::arg("dmask").none(true), py::arg("dshift").none(true),
               py::arg("dscale").none(true), py::arg("partials").none(true), py::arg("num_threads") = 0,
               "Writes the wanted ones of dx, dmask, dshift and dscale. `partials`: float64, on CUDA for the sums.");
    module.def("masked_act_partials", &masked_act_partials, py::arg("dy"), py::arg("saved"), py::arg("x").none(true),
               py::arg("dx").none(true), "How many elements `partials` needs for each wanted sum.");
    module.def("emulated_masked_act", &emulated_masked_act, py::arg("x"), py::arg("scale").none(true),
               py::arg("shift").none(true), py::arg("mask").none(true), py::arg("activation"), py::arg("y").none(true),
               py::arg("saved").none(true), py::arg("num_threads") = 8, py::arg("warp_size") = 4,
               "The device body of masked_act on host threads, for tests without a GPU.");
    module.def("emulated_masked_act_backward", &emulated_masked_act_backward, py::arg("dy"), py::arg("saved"),
               py::arg("x").none(true), py::arg("mask").none(true), py::arg("scale").none(true),
               py::arg("centre").none(true), py::arg("slope").none(true), py::arg("offset").none(true),
               py::arg("activation"), py::arg("dx").none(true), py::arg("dmask").none(true),
               py::arg("dshift").none(true), py::arg("dscale").none(true), py::arg("num_threads") = 8,
               py::arg("warp_size") = 4, "The device body of masked_act_backward on host threads.");
}

}  // namespace fastprune
