// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Convolution with a 1x1 window, stride 1 and no padding: a plain matrix product, for CUTLASS's persistent kernels,
// whose epilogue overlaps the next tile. Apart from sm90_convolution.cuh, since CUTLASS's headers for both at once make
// a template ambiguous.
#pragma once

#include "tensor_map.cuh"  // before CuTe

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "sm90.cuh"

namespace fastprune::cuda::sm90 {

struct Cooperative {  // two groups of warps share a tile
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
    using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
struct Pingpong {  // they take turns: one multiplies while the other writes
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
    using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

template <ConvType type, class Element, int m, int n, int cluster_m, class Schedule>
struct Product {
    using Tile = Shape<Size<m>, Size<n>, Size<64>>;
    using Cluster = Shape<Size<cluster_m>, Size<1>, Size<1>>;
    using RowMajor = cutlass::layout::RowMajor;
    using CollectiveEpilogue =
        Epilogue<Tile, Cluster, Element, RowMajor, typename Schedule::Epilogue, PerChannel<Tile>>;
    using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element,
        cutlass::layout::ColumnMajor, 8, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename CollectiveEpilogue::SharedStorage))>,
        typename Schedule::Mainloop>::CollectiveOp;
    using Kernel =
        cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;
    using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    static_assert(sizeof(typename Kernel::SharedStorage) <= shared_memory_per_block);

    static typename Adapter::Arguments arguments(const FusedConvArgs& args) {
        const auto pixels = static_cast<int>(args.n * args.p * args.q);
        const cute::Int<1> one{};
        cutlass::KernelHardwareInfo hardware;
        return {cutlass::gemm::GemmUniversalMode::kGemm,
                {pixels, static_cast<int>(args.k), static_cast<int>(args.c), 1},
                {static_cast<const Element*>(args.x), cute::make_stride(args.x_pitch, one, int64_t{0}),
                 static_cast<const Element*>(args.weight), cute::make_stride(args.weight_pitch, one, int64_t{0})},
                {fusion_arguments<CollectiveEpilogue>(args),
                 nullptr,
                 {},
                 static_cast<Element*>(args.y),
                 cute::make_stride(args.y_pitch, one, int64_t{0})},
                hardware};
    }

    static bool supports(const FusedConvArgs& args) {
        const bool product = args.r == 1 && args.s == 1 && args.stride[0] == 1 && args.stride[1] == 1 &&
                             args.padding[0] == 0 && args.padding[1] == 0;
        return args.type == type && product && aligned(args) &&
               Adapter::can_implement(arguments(args)) == cutlass::Status::kSuccess;
    }
    static size_t workspace(const FusedConvArgs& args) { return Adapter::get_workspace_size(arguments(args)); }
    static Status launch(const FusedConvArgs& args, void* workspace, void* stream) {
        auto with_device = arguments(args);
        int device = 0;
        int multiprocessors = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error == cudaSuccess)
            error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        if (error != cudaSuccess) return Status::failed(cudaGetErrorString(error));
        with_device.hw_info.device_id = device;
        with_device.hw_info.sm_count = multiprocessors;
        return sm90::launch<Adapter>(with_device, workspace, stream);
    }
    static constexpr ConvCandidate candidate(const char* name) {
        return {name, type, 90, 90, &supports, &workspace, &launch};
    }
};

template <ConvType type, class Element>
inline constexpr ConvCandidate product_candidates[] = {
    Product<type, Element, 128, 256, 2, Cooperative>::candidate("sm90 1x1 128x256x64 cooperative cluster 2"),
    Product<type, Element, 128, 128, 1, Cooperative>::candidate("sm90 1x1 128x128x64 cooperative"),
    Product<type, Element, 64, 128, 2, Pingpong>::candidate("sm90 1x1 64x128x64 pingpong cluster 2"),
    Product<type, Element, 64, 64, 1, Pingpong>::candidate("sm90 1x1 64x64x64 pingpong"),
};

}  // namespace fastprune::cuda::sm90
