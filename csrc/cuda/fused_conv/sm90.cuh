// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// What the kernels for sm_90a share: one warp lets the copy engine (TMA) fetch tiles, the others multiply them straight
// from shared memory (wgmma), and CUTLASS's tree of epilogue visitors computes y = mask * activation(scale * sum +
// shift).
#pragma once

#include "tensor_map.cuh"  // before CuTe

#include <cuda_runtime_api.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>

#include <cstdint>

#include "activation.cuh"
#include "fastprune/fused_conv.h"

namespace fastprune::cuda::sm90 {

using cute::Shape;
template <int value>
using Size = cute::Int<value>;

template <class Vector>
struct ChannelActivation;
template <>
struct ChannelActivation<float> {
    struct Arguments {
        Activation activation;
    };
};
template <int elements>
struct ChannelActivation<cutlass::Array<float, elements>> {
    using Vector = cutlass::Array<float, elements>;
    __device__ __forceinline__ Vector operator()(const Vector& z,
                                                 const ChannelActivation<float>::Arguments& arguments) const {
        Vector r = z;
        activate_all(r, arguments.activation);
        return r;
    }
};

template <class Tile>
using PerChannel = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float>;
template <template <class> class Function, class Output, class... Inputs>
using Node = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<Function, Output, float, cutlass::FloatRoundStyle::round_to_nearest>,
    Inputs...>;
template <class Tile>
using ScaleAndShift = Node<cutlass::homogeneous_multiply_add, float, PerChannel<Tile>,
                           cutlass::epilogue::fusion::Sm90AccFetch, PerChannel<Tile>>;
template <class Tile, class Element, class Mask>
using Fusion = Node<cutlass::multiplies, Element, Mask, Node<ChannelActivation, float, ScaleAndShift<Tile>>>;

template <class Collective>
typename Collective::FusionCallbacks::Arguments fusion_arguments(const FusedConvArgs& args) {
    // Children first, the node's own arguments last; a null pointer stands for the number beside it.
    return {{args.mask, 1.0f, {}}, {{{args.scale, 1.0f, {}}, {}, {args.shift, 0.0f, {}}, {}}, {args.activation}}, {}};
}

template <class Tile, class Cluster, class Element, class Layout, class Schedule, class Mask>
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    float, float, void, Layout, 8, Element, Layout, 8, Schedule, Fusion<Tile, Element, Mask>>::CollectiveOp;

/// What a block may ask for on sm_90 (227 KiB).
inline constexpr size_t shared_memory_per_block = 232448;

/// The copy engine moves 16 bytes at a time.
inline bool aligned(const FusedConvArgs& args) {
    const auto fits = [](const void* pointer, int64_t channels, int64_t pitch) {
        return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && channels % 8 == 0 && pitch % 8 == 0;
    };
    return fits(args.x, args.c, args.x_pitch) && fits(args.weight, args.c, args.weight_pitch) &&
           fits(args.y, args.k, args.y_pitch) && args.saved == nullptr;
}

template <class Adapter>
Status launch(const typename Adapter::Arguments& arguments, void* workspace, void* stream) {
    Adapter adapter;
    tensor_map_refused = false;
    const cutlass::Status initialized = adapter.initialize(arguments, workspace, static_cast<cudaStream_t>(stream));
    if (tensor_map_refused) return Status::failed("the driver refused to map a tensor for the copy engine");
    if (initialized != cutlass::Status::kSuccess ||
        adapter.run(static_cast<cudaStream_t>(stream)) != cutlass::Status::kSuccess) {
        const cudaError_t error = cudaGetLastError();
        return Status::failed(error == cudaSuccess ? "CUTLASS refused the convolution" : cudaGetErrorString(error));
    }
    return {};
}

}  // namespace fastprune::cuda::sm90
