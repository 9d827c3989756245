// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Convolution as a matrix product whose left side is gathered from the image on the fly (implicit GEMM), with the
// tensor core instructions and asynchronous copies of sm_80, which every later GPU has too. CUTLASS's main loop and
// kernel, our epilogue.
#pragma once

#include <cuda_runtime_api.h>
#include <cutlass/conv/conv2d_problem_size.h>  // the header below needs it before itself
#include <cutlass/conv/device/implicit_gemm_convolution.h>
#include <cutlass/conv/kernel/default_conv2d_fprop.h>

#include <cstdint>

#include "channel_epilogue.cuh"
#include "fastprune/fused_conv.h"

namespace fastprune::cuda::sm80 {

using Layout = cutlass::layout::TensorNHWC;

/// x and weights are read `input_width` elements at a time, y is written `output_width` at a time: the numbers of
/// channels, pitches and pointers must be multiples of them.
template <ConvType type, class Element, class Instruction, class Tile, class Warp, int stages, int input_width,
          int output_width>
struct Kernel {
    using Output = cutlass::platform::conditional_t<type == ConvType::tf32, float, Element>;
    using Operator = ChannelOperator<Output, output_width>;
    using Default = typename cutlass::conv::kernel::DefaultConv2dFprop<
        Element, Layout, Element, Layout, Output, Layout, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
        Tile, Warp, Instruction, Operator, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, stages,
        cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized,
        cutlass::conv::StrideSupport::kUnity, input_width, input_width>;
    using Convolution = cutlass::conv::device::ImplicitGemmConvolution<cutlass::conv::kernel::ImplicitGemmConvolution<
        typename Default::Mma, ChannelEpilogue<typename Default::Epilogue>,
        cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, cutlass::conv::Operator::kFprop>>;

    // What a block may ask for on the GPUs from sm_80 on that have least (99 KiB: sm_86, sm_89, sm_120).
    static_assert(sizeof(typename Convolution::UnderlyingKernel::SharedStorage) <= 101376);

    static typename Convolution::Arguments arguments(const FusedConvArgs& args) {
        const auto as_int = [](int64_t value) { return static_cast<int>(value); };
        const cutlass::conv::Conv2dProblemSize problem(
            as_int(args.n), as_int(args.h), as_int(args.w), as_int(args.c), as_int(args.k), as_int(args.r),
            as_int(args.s), as_int(args.p), as_int(args.q), args.padding[0], args.padding[1], args.stride[0],
            args.stride[1], args.dilation[0], args.dilation[1], cutlass::conv::Mode::kCrossCorrelation);
        const auto layout = [&](int64_t height, int64_t width, int64_t pitch) {
            return Layout(as_int(pitch), as_int(pitch * width), as_int(pitch * width * height));
        };
        // CUTLASS's references know no const; x and weight are only read.
        auto* x = const_cast<Element*>(static_cast<const Element*>(args.x));
        auto* weight = const_cast<Element*>(static_cast<const Element*>(args.weight));
        return {problem,
                {x, layout(args.h, args.w, args.x_pitch)},
                {weight, layout(args.r, args.s, args.weight_pitch)},
                {static_cast<Output*>(args.saved), layout(args.p, args.q, args.saved_pitch)},
                {static_cast<Output*>(args.y), layout(args.p, args.q, args.y_pitch)},
                {args.scale, args.shift, args.mask, as_int(args.k), args.activation, args.saved != nullptr}};
    }

    static bool supports(const FusedConvArgs& args) {
        const auto aligned = [](const void* pointer, int64_t pitch, int width) {
            const auto bytes = static_cast<int64_t>(width * sizeof(Element));
            return pitch % width == 0 && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
        };
        return args.type == type && aligned(args.x, args.x_pitch, input_width) &&
               aligned(args.weight, args.weight_pitch, input_width) && aligned(args.y, args.y_pitch, output_width) &&
               (args.saved == nullptr || aligned(args.saved, args.saved_pitch, output_width)) &&
               Convolution::can_implement(arguments(args)) == cutlass::Status::kSuccess;
    }

    static size_t workspace(const FusedConvArgs&) { return 0; }

    static Status launch(const FusedConvArgs& args, void*, void* stream) {
        Convolution convolution;
        if (convolution.initialize(arguments(args)) != cutlass::Status::kSuccess ||
            convolution.run(static_cast<cudaStream_t>(stream)) != cutlass::Status::kSuccess) {
            const cudaError_t error = cudaGetLastError();
            return Status::failed(error == cudaSuccess ? "CUTLASS refused the convolution" : cudaGetErrorString(error));
        }
        return {};
    }

    static constexpr ConvCandidate candidate(const char* name) {
        return {name, type, 80, 999, &supports, &workspace, &launch};
    }
};

using cutlass::gemm::GemmShape;

}  // namespace fastprune::cuda::sm80
