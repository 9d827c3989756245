// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The choices of the build. The FASTPRUNE_* macros come from CMakeLists.txt, and only this header reads them.
#pragma once

namespace fastprune::build {

inline constexpr bool has_cuda = FASTPRUNE_HAS_CUDA;
inline constexpr bool has_cutlass = FASTPRUNE_HAS_CUTLASS;
inline constexpr bool has_cutlass_sm90 = FASTPRUNE_HAS_CUTLASS_SM90;
inline constexpr const char* version = FASTPRUNE_VERSION;
inline constexpr const char* compiler = FASTPRUNE_COMPILER;
inline constexpr const char* build_type = FASTPRUNE_BUILD_TYPE;
inline constexpr const char* sanitizers = FASTPRUNE_SANITIZERS;
inline constexpr const char* cuda_toolkit = FASTPRUNE_CUDA_TOOLKIT;
inline constexpr const char* cuda_architectures = FASTPRUNE_CUDA_ARCHITECTURES;
inline constexpr const char* cutlass = FASTPRUNE_CUTLASS_VERSION;

}  // namespace fastprune::build
