// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// topk_mask for Python: checks, then dispatch by dtype and device.
#include "fastprune/topk_mask.h"

#include <omp.h>
#include <pybind11/stl.h>

#include <optional>

#include "bind.h"
#include "checks.h"
#include "fastprune/build.h"

namespace py = pybind11;

namespace fastprune {
namespace {

DType check_arguments(const Tensor& scores, const Tensor& keep, const Tensor& offsets,
                      const std::optional<Tensor>& window, const Tensor& mask) {
    const DType dtype = check::tensor({"scores", scores}, {DType::float32, DType::float64});
    check::one_dimension({"scores", scores});
    if (scores.size(0) > max_topk_units)
        throw py::value_error("scores: got " + std::to_string(scores.size(0)) + " units, needs fewer than 2^31");
    check::tensor({"offsets", offsets}, {DType::int64});
    check::one_dimension({"offsets", offsets});
    const int64_t num_groups = offsets.size(0) - 1;
    if (num_groups < 0) throw py::value_error("offsets: got shape [0], needs shape [G + 1], starting with 0");
    if (num_groups == 0 && scores.size(0) > 0) {
        throw py::value_error("offsets: got no group, needs groups for the " + std::to_string(scores.size(0)) +
                              " units of scores");
    }
    check::vector({"keep", keep}, dtype, num_groups, "one fraction for each group of offsets");
    check::vector({"mask", mask}, dtype, scores.size(0), "one for each score");
    check::writable({"mask", mask});
    check::same_device({"keep", keep}, {"scores", scores});
    check::same_device({"offsets", offsets}, {"scores", scores});
    check::same_device({"mask", mask}, {"scores", scores});
    check::disjoint({"mask", mask}, {"scores", scores});
    check::disjoint({"mask", mask}, {"keep", keep});
    check::disjoint({"mask", mask}, {"offsets", offsets});
    if (window) {
        check::vector({"window", *window}, dtype, num_groups, "one width for each group of offsets");
        check::same_device({"window", *window}, {"scores", scores});
        check::disjoint({"mask", mask}, {"window", *window});
    }
    return dtype;
}

template <class Score>
TopkMaskArgs<Score> arguments(const Tensor& scores, const Tensor& keep, const Tensor& offsets,
                              const std::optional<Tensor>& window, const Tensor& mask) {
    return {scores.data_as<const Score>(),
            keep.data_as<const Score>(),
            offsets.data_as<const int64_t>(),
            window ? window->data_as<const Score>() : nullptr,
            mask.data_as<Score>(),
            scores.size(0),
            offsets.size(0) - 1};
}

template <class Score>
Status run(const TopkMaskArgs<Score>& args, const Tensor& scores, int num_threads) {
    if constexpr (build::has_cuda) {
        if (scores.on_cuda()) {
            void* stream = scores.current_stream();
            const py::gil_scoped_release release;
            return cuda::topk_mask(args, scores.device().id, stream);
        }
    } else if (scores.on_cuda()) {
        throw py::value_error(
            "scores: got a CUDA tensor, needs one on the CPU: this build of fastprune has no CUDA kernels");
    }
    const py::gil_scoped_release release;
    return cpu::topk_mask(args, num_threads > 0 ? num_threads : omp_get_max_threads());
}

void topk_mask(const Tensor& scores, const Tensor& keep, const Tensor& offsets, const std::optional<Tensor>& window,
               const Tensor& mask, int num_threads) {
    const DType dtype = check_arguments(scores, keep, offsets, window, mask);
    check::status(dtype == DType::float32
                      ? run(arguments<float>(scores, keep, offsets, window, mask), scores, num_threads)
                      : run(arguments<double>(scores, keep, offsets, window, mask), scores, num_threads));
}

void emulated_topk_mask(const Tensor& scores, const Tensor& keep, const Tensor& offsets,
                        const std::optional<Tensor>& window, const Tensor& mask, int num_threads, int warp_size,
                        int capacity) {
    const DType dtype = check_arguments(scores, keep, offsets, window, mask);
    if (!scores.on_cpu())
        throw py::value_error("scores: got a CUDA tensor, needs one on the CPU: this is the emulation");
    const auto power_of_two = [](int value) { return value > 0 && (value & (value - 1)) == 0; };
    if (!power_of_two(warp_size) || num_threads <= 0 || num_threads > 1024 || num_threads % warp_size != 0) {
        throw py::value_error("warp_size: needs a power of two that divides num_threads, which is at most 1024");
    }
    if (!power_of_two(capacity) || capacity > (1 << 20))
        throw py::value_error("capacity: needs a power of two up to 2^20");
    const py::gil_scoped_release release;
    if (dtype == DType::float32) {
        emulated::topk_mask(arguments<float>(scores, keep, offsets, window, mask), num_threads, warp_size, capacity);
    } else {
        emulated::topk_mask(arguments<double>(scores, keep, offsets, window, mask), num_threads, warp_size, capacity);
    }
}

}  // namespace

void bind_topk_mask(py::module_& module) {
    module.def("topk_mask", &topk_mask, py::arg("scores"), py::arg("keep"), py::arg("offsets"),
               py::arg("window").none(true), py::arg("mask"), py::arg("num_threads") = 0,
               "Writes the soft top-k mask of every group into `mask`; num_threads = 0: as many as OpenMP would take.");
    module.def("emulated_topk_mask", &emulated_topk_mask, py::arg("scores"), py::arg("keep"), py::arg("offsets"),
               py::arg("window").none(true), py::arg("mask"), py::arg("num_threads") = 8, py::arg("warp_size") = 4,
               py::arg("capacity") = 8192, "The device body of topk_mask on host threads, for tests without a GPU.");
}

}  // namespace fastprune
