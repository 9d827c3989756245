// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The module _emulated: the device bodies on host threads, for tests on machines without a GPU. Functions have the
// names of fastprune._C and take the same arguments, checked in the same way, and the shape of the launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../bindings/channel_moments_call.h"
#include "../bindings/gate.h"
#include "../bindings/group_prox_call.h"
#include "../bindings/masked_act_call.h"
#include "../bindings/topk_mask_call.h"
#include "fastprune/bernoulli_gate.h"
#include "fastprune/build.h"

namespace py = pybind11;

namespace fastprune {
namespace {

constexpr const char* here = ": this is the emulation";

void check_grid(int num_threads, int num_blocks) {
    const auto check = [](const char* name, int value) {
        if (value <= 0 || value > 1024) check::refuse(name, std::to_string(value), "a number from 1 to 1024");
    };
    check("num_threads", num_threads);
    check("num_blocks", num_blocks);
}

void topk_mask(const Tensor& scores, const Tensor& keep, const Tensor& offsets, const std::optional<Tensor>& window,
               const Tensor& mask, int num_threads, int warp_size, int capacity) {
    const TopkMaskCall call(scores, keep, offsets, window, mask);
    check::on_cpu({"scores", scores}, here);
    check::emulated_block(num_threads, warp_size);
    if (capacity <= 0 || (capacity & (capacity - 1)) != 0 || capacity > (1 << 20)) {
        check::refuse("capacity", std::to_string(capacity), "a power of two up to 2^20");
    }
    const auto run = [&](const auto& args) {
        const py::gil_scoped_release release;
        emulated::topk_mask(args, num_threads, warp_size, capacity);
    };
    call.dtype == DType::float32 ? run(call.of<float>()) : run(call.of<double>());
}

void bernoulli_gate(const Tensor& theta, py::handle seed, py::handle step, const Tensor& gate, const Tensor& slope,
                    int num_threads, int num_blocks) {
    check_grid(num_threads, num_blocks);
    GateCall({"theta", theta}, seed, step, gate, slope).emulate([&](const auto& args) {
        emulated::bernoulli_gate(args, num_threads, num_blocks);
    });
}

void gumbel_gate(const Tensor& logits, py::handle seed, py::handle step, py::handle temperature, py::handle base,
                 bool hard, py::handle noise, const Tensor& gate, const Tensor& slope, int num_threads,
                 int num_blocks) {
    check_grid(num_threads, num_blocks);
    const GumbelOptions options = gumbel_options(temperature, base, hard, noise);
    GateCall({"logits", logits}, seed, step, gate, slope).emulate([&](const auto& args) {
        emulated::gumbel_gate(args, options, num_threads, num_blocks);
    });
}

void group_prox(UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms, int num_threads,
                int warp_size) {
    check_group_prox(table, threshold, norms);
    check::on_cpu({"norms", norms}, here);
    check::emulated_block(num_threads, warp_size);
    const auto run = [&](const auto& args) {
        const py::gil_scoped_release release;
        const std::lock_guard lock(table.mutex());
        emulated::group_prox(args, num_threads, warp_size);
    };
    table.dtype() == DType::float32 ? run(group_prox_args<float>(table, threshold, norms))
                                    : run(group_prox_args<double>(table, threshold, norms));
}

/// For the calls of per-channel kernels: emulate(args, num_threads, warp_size).
template <class Call, class Emulate>
void run_channels(const Call& call, int num_threads, int warp_size, const Emulate& emulate) {
    check::on_cpu(call.arguments.first(), here);
    check::emulated_block(num_threads, warp_size);
    dispatch_storage(call.arguments.dtype(), [&]<class Storage>() {
        const py::gil_scoped_release release;
        emulate(call.template of<Storage>());
    });
}

void masked_act(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& mask,
                const std::string& activation, const Optional& y, const Optional& saved, int num_threads, int warp_size,
                const Optional& residual) {
    const MaskedActCall call(x, scale, shift, mask, activation, y, saved, residual);
    run_channels(call, num_threads, warp_size,
                 [&](const auto& args) { emulated::masked_act(args, num_threads, warp_size); });
}

void masked_act_backward(const Tensor& dy, const Tensor& saved, const Optional& x, const Optional& mask,
                         const Optional& scale, const Optional& centre, const Optional& slope, const Optional& offset,
                         const std::string& activation, const Optional& dx, const Optional& dmask,
                         const Optional& dshift, const Optional& dscale, int num_threads, int warp_size,
                         const Optional& others) {
    const MaskedActBackwardCall call(dy, saved, x, mask, scale, centre, slope, offset, activation, dx, dmask, dshift,
                                     dscale, others);
    run_channels(call, num_threads, warp_size,
                 [&](const auto& args) { emulated::masked_act_backward(args, num_threads, warp_size); });
}

void channel_moments(const Tensor& x, const Tensor& mean, const Tensor& variance, int num_threads, int warp_size) {
    const MomentsCall call(x, mean, variance);
    run_channels(call, num_threads, warp_size,
                 [&](const auto& args) { emulated::channel_moments(args, num_threads, warp_size); });
}

}  // namespace
}  // namespace fastprune

PYBIND11_MODULE(_emulated, module) {
    using namespace fastprune;
    module.doc() = "The device bodies of fastprune's CUDA kernels on host threads.";
    module.attr("sanitizers") = build::sanitizers;
    // Local: fastprune._C has a class of the same C++ type.
    py::class_<UnitTable>(module, "UnitTable", py::module_local(), "As in fastprune._C, for group_prox of this module.")
        .def(py::init(&make_table), py::arg("slices"), py::arg("num_units"), py::arg("limits") = py::none());
    module.def("topk_mask", &topk_mask, py::arg("scores"), py::arg("keep"), py::arg("offsets"),
               py::arg("window").none(true), py::arg("mask"), py::arg("num_threads") = 8, py::arg("warp_size") = 4,
               py::arg("capacity") = 8192);
    module.def("bernoulli_gate", &bernoulli_gate, py::arg("theta"), py::arg("seed"), py::arg("step"), py::arg("gate"),
               py::arg("slope"), py::arg("num_threads") = 4, py::arg("num_blocks") = 3);
    module.def("gumbel_gate", &gumbel_gate, py::arg("logits"), py::arg("seed"), py::arg("step"), py::arg("temperature"),
               py::arg("base"), py::arg("hard"), py::arg("noise"), py::arg("gate"), py::arg("slope"),
               py::arg("num_threads") = 4, py::arg("num_blocks") = 3);
    module.def("group_prox", &group_prox, py::arg("table"), py::arg("threshold").none(true), py::arg("norms"),
               py::arg("num_threads") = 8, py::arg("warp_size") = 4);
    module.def("masked_act", &masked_act, py::arg("x"), py::arg("scale").none(true), py::arg("shift").none(true),
               py::arg("mask").none(true), py::arg("activation"), py::arg("y").none(true), py::arg("saved").none(true),
               py::arg("num_threads") = 8, py::arg("warp_size") = 4, py::arg("residual") = py::none());
    module.def("masked_act_backward", &masked_act_backward, py::arg("dy"), py::arg("saved"), py::arg("x").none(true),
               py::arg("mask").none(true), py::arg("scale").none(true), py::arg("centre").none(true),
               py::arg("slope").none(true), py::arg("offset").none(true), py::arg("activation"),
               py::arg("dx").none(true), py::arg("dmask").none(true), py::arg("dshift").none(true),
               py::arg("dscale").none(true), py::arg("num_threads") = 8, py::arg("warp_size") = 4,
               py::arg("others") = py::none());
    module.def("channel_moments", &channel_moments, py::arg("x"), py::arg("mean"), py::arg("variance"),
               py::arg("num_threads") = 8, py::arg("warp_size") = 4);
}
