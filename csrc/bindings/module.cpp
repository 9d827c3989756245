// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The module fastprune._C: one bind_<operator> per kernel, and what this build is made of.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "../cuda/runtime.h"
#include "bind.h"
#include "fastprune/build.h"

namespace py = pybind11;

namespace fastprune {
namespace {

py::list split(const std::string& text) {
    py::list words;
    std::istringstream stream(text);
    for (std::string word; stream >> word;) words.append(word);
    return words;
}

py::dict build_info() {
    py::dict info;
    info["version"] = build::version;
    info["build_type"] = build::build_type;
    info["compiler"] = build::compiler;
    info["cpp_standard"] = static_cast<long>(__cplusplus);
    info["openmp"] = _OPENMP;
    info["openmp_max_threads"] = omp_get_max_threads();
    info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
    info["cuda"] = build::has_cuda ? py::object(py::str(build::cuda_toolkit)) : py::none();
    info["cuda_architectures"] = split(build::cuda_architectures);
    info["sanitizers"] = split(build::sanitizers);
    info["cutlass"] = build::has_cutlass ? py::object(py::str(build::cutlass)) : py::none();
    return info;
}

int cuda_device_count() {
    if constexpr (build::has_cuda) return cuda::device_count();
    return 0;
}

}  // namespace
}  // namespace fastprune

PYBIND11_MODULE(_C, module) {
    using namespace fastprune;
    module.doc() = "The kernels of fastprune: DLPack tensors in, results written into tensors that the caller made.";
    module.def("build_info", &build_info, "Versions, compilers and CUDA architectures of this build.");
    module.def("cuda_device_count", &cuda_device_count,
               "CUDA devices that these kernels can use; 0 in a build without CUDA.");
    module.def(
        "cuda_available", [] { return cuda_device_count() > 0; },
        "Whether this build has CUDA kernels and a device for them.");
    bind_bernoulli_gate(module);
    bind_channel_moments(module);
    bind_fused_conv(module);
    bind_group_prox(module);
    bind_gumbel_gate(module);
    bind_instruction_set(module);
    bind_masked_act(module);
    bind_masked_conv(module);
    bind_random(module);
    bind_topk_mask(module);
}
