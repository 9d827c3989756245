// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// topk_mask for Python: dispatch by dtype and device.
#include "fastprune/topk_mask.h"

#include <pybind11/stl.h>

#include "bind.h"
#include "run.h"
#include "topk_mask_call.h"

namespace py = pybind11;

namespace fastprune {
namespace {

void topk_mask(const Tensor& scores, const Tensor& keep, const Tensor& offsets, const std::optional<Tensor>& window,
               const Tensor& mask, int num_threads) {
    const TopkMaskCall call(scores, keep, offsets, window, mask);
    const auto run_on = [&](const auto& args) {
        run(
            {"scores", scores}, num_threads, [&](int threads) { return cpu::topk_mask(args, threads); },
            [&](auto device, void* stream) { return cuda::topk_mask(args, device, stream); });
    };
    call.dtype == DType::float32 ? run_on(call.of<float>()) : run_on(call.of<double>());
}

}  // namespace

void bind_topk_mask(py::module_& module) {
    module.def("topk_mask", &topk_mask, py::arg("scores"), py::arg("keep"), py::arg("offsets"),
               py::arg("window").none(true), py::arg("mask"), py::arg("num_threads") = 0,
               "Writes the soft top-k mask of every group into `mask`; num_threads = 0: as many as OpenMP would take.");
}

}  // namespace fastprune
