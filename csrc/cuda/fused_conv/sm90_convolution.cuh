// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Convolution with the instructions of sm_90a: the copy engine gathers the pixels under each tap of the window by
// itself (its im2col mode). CUTLASS has no persistent schedule for it.
#pragma once

#include "tensor_map.cuh"  // before CuTe

// Then these, since the headers below use what they declare without including them.
#include <cute/tensor.hpp>
#include <cutlass/kernel_hardware_info.hpp>

#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>

#include "sm90.cuh"

namespace fastprune::cuda::sm90 {

/// The first leaf of the epilogue's tree. This kernel's epilogue reuses the memory of its main loop, and the leaves
/// write their vectors there before CUTLASS synchronises: a warp that is done must wait for those that still multiply.
template <class Tile>
struct FirstPerChannel : PerChannel<Tile> {
    using PerChannel<Tile>::PerChannel;

    template <class Callbacks>
    struct Waiting : Callbacks {
        CUTLASS_DEVICE explicit Waiting(const Callbacks& callbacks) : Callbacks(callbacks) {}
        CUTLASS_DEVICE void begin() {
            cutlass::arch::NamedBarrier::sync(cutlass::NumThreadsPerWarpGroup,
                                              cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
            Callbacks::begin();
        }
    };
    template <bool reference_source, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(
        const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
        auto callbacks = PerChannel<Tile>::template get_consumer_store_callbacks<reference_source>(args);
        return Waiting<decltype(callbacks)>(callbacks);
    }
};

template <ConvType type, class Element, int m, int n, int cluster_m>
struct Convolution {
    using Tile = Shape<Size<m>, Size<n>, Shape<Size<64>>>;
    using Cluster = Shape<Size<cluster_m>, Size<1>, Size<1>>;
    using Layout = cutlass::layout::TensorNHWC;
    using CollectiveEpilogue =
        Epilogue<Tile, Cluster, Element, Layout, cutlass::epilogue::TmaWarpSpecialized, FirstPerChannel<Tile>>;
    using CollectiveMainloop = typename cutlass::conv::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, Element, Layout, 8,
        Element, Layout, 8, float, Tile, Cluster,
        cutlass::conv::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename CollectiveEpilogue::SharedStorage))>,
        cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
    using Problem = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;
    using Kernel = cutlass::conv::kernel::ConvUniversal<Problem, CollectiveMainloop, CollectiveEpilogue>;
    using Adapter = cutlass::conv::device::ConvUniversalAdapter<Kernel>;
    static_assert(sizeof(typename Kernel::SharedStorage) <= shared_memory_per_block);

    static typename Adapter::Arguments arguments(const FusedConvArgs& args) {
        const auto extent = [](int64_t images, int64_t height, int64_t width, int64_t channels) {
            return typename Problem::TensorExtent{static_cast<int>(images), static_cast<int>(height),
                                                  static_cast<int>(width), static_cast<int>(channels)};
        };
        const auto strides = [](int64_t height, int64_t width, int64_t pitch) {
            return typename Problem::TensorStride{height * width * pitch, width * pitch, pitch, 1};
        };
        const auto pair = [](const int32_t (&values)[2]) { return cute::array<int, 2>{values[0], values[1]}; };
        const Problem problem(cutlass::conv::Mode::kCrossCorrelation, extent(args.n, args.h, args.w, args.c),
                              strides(args.h, args.w, args.x_pitch), extent(args.k, args.r, args.s, args.c),
                              strides(args.r, args.s, args.weight_pitch), strides(args.p, args.q, args.y_pitch),
                              pair(args.padding), pair(args.padding), pair(args.stride), pair(args.dilation), 1);
        typename Kernel::StrideD y_strides{};  // of columns, rows and images
        cute::get<0, 0>(y_strides) = args.y_pitch;
        cute::get<0, 1>(y_strides) = args.y_pitch * args.q;
        cute::get<0, 2>(y_strides) = args.y_pitch * args.q * args.p;
        return {problem,
                {static_cast<const Element*>(args.x), static_cast<const Element*>(args.weight)},
                {fusion_arguments<CollectiveEpilogue>(args), nullptr, {}, static_cast<Element*>(args.y), y_strides}};
    }

    static bool supports(const FusedConvArgs& args) {
        return args.type == type && aligned(args) && args.stride[0] <= 8 && args.stride[1] <= 8 &&
               Adapter::can_implement(arguments(args)) == cutlass::Status::kSuccess;
    }
    static size_t workspace(const FusedConvArgs&) { return 0; }
    static Status launch(const FusedConvArgs& args, void* workspace, void* stream) {
        return sm90::launch<Adapter>(arguments(args), workspace, stream);
    }
    static constexpr ConvCandidate candidate(const char* name) {
        return {name, type, 90, 90, &supports, &workspace, &launch};
    }
};

template <ConvType type, class Element>
inline constexpr ConvCandidate convolution_candidates[] = {
    Convolution<type, Element, 128, 128, 2>::candidate("sm90 128x128x64 cluster 2"),
    Convolution<type, Element, 128, 64, 1>::candidate("sm90 128x64x64"),
    Convolution<type, Element, 64, 128, 1>::candidate("sm90 64x128x64"),
    Convolution<type, Element, 64, 64, 1>::candidate("sm90 64x64x64"),
};

}  // namespace fastprune::cuda::sm90
