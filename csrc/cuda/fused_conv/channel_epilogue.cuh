// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The epilogue of CUTLASS's kernels of the 2.x kind, which turns accumulators into results: z = scale * sum + shift,
// r = activation(z), y = mask * r, with one scale, shift and mask per output channel.
//
// CUTLASS's own epilogue hands its functor values without their coordinates, and its epilogue with a broadcast takes
// one vector. Here the threads of a block hold fixed columns (output channels) for all rows of the tile, hence each
// reads its part of the three vectors once and keeps it in registers.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/threadblock/default_epilogue_tensor_op.h>
#include <cutlass/numeric_conversion.h>

#include <utility>

#include "activation.cuh"
#include "fastprune/fused_conv.h"

namespace fastprune::cuda {

/// What CUTLASS knows as the output operator: types, and the parameters of the epilogue below.
template <class Output, int elements_per_access>
struct ChannelOperator {
    using ElementOutput = Output;
    using ElementAccumulator = float;
    using ElementCompute = float;
    static int const kCount = elements_per_access;

    struct Params {
        const float* scale;
        const float* shift;
        const float* mask;
        int channels;
        Activation activation;
        bool save;
    };

    CUTLASS_DEVICE explicit ChannelOperator(const Params& params) : params(params) {}
    CUTLASS_DEVICE void set_k_partition(int, int) {}  // CUTLASS's kernel asks for it; the reduction is never split

    const Params& params;
};

/// Drop-in for the `Default` epilogue of a kernel, made of its parts.
template <class Default>
class ChannelEpilogue : public cutlass::epilogue::threadblock::EpilogueBase<
                            typename Default::Shape, typename Default::WarpMmaOperator::Shape, Default::kPartitionsK,
                            typename Default::AccumulatorFragmentIterator, typename Default::WarpTileIterator,
                            typename Default::Padding, Default::Base::kFragmentsPerIteration> {
   public:
    using Base = cutlass::epilogue::threadblock::EpilogueBase<
        typename Default::Shape, typename Default::WarpMmaOperator::Shape, Default::kPartitionsK,
        typename Default::AccumulatorFragmentIterator, typename Default::WarpTileIterator, typename Default::Padding,
        Default::Base::kFragmentsPerIteration>;
    using Shape = typename Default::Shape;
    using WarpMmaOperator = typename Default::WarpMmaOperator;
    using OutputTileIterator = typename Default::OutputTileIterator;
    using AccumulatorFragmentIterator = typename Default::AccumulatorFragmentIterator;
    using SharedLoadIterator = typename Default::SharedLoadIterator;
    using OutputOp = typename Default::OutputOp;
    using AccumulatorTile = typename Default::AccumulatorTile;

    static_assert(Default::kPartitionsK == 1, "warps share the rows and columns of a tile, never its reduction");

    CUTLASS_DEVICE ChannelEpilogue(typename Base::SharedStorage& shared_storage, int thread, int warp, int lane)
        : Base(shared_storage, thread, warp, lane), shared_load_iterator_(shared_storage.reference(), thread) {}

    /// `saved` is what CUTLASS's kernel built for the source operand C, which we do not have: its memory is a second
    /// destination.
    CUTLASS_DEVICE void operator()(const OutputOp& output, OutputTileIterator y, const AccumulatorTile& accumulators,
                                   OutputTileIterator saved) {
        Channels channels;
        channels.load(output.params, y.thread_start_column());
        // Not unrolled: with every activation in each of the tiles the code would be three times as long.
        CUTLASS_PRAGMA_NO_UNROLL
        for (int tile = 0; tile < OutputTileIterator::kIterations; ++tile) {
            const auto fragment = fragment_of(tile, accumulators, Tiles{});
            __syncthreads();  // the main loop, or the tile before, has been read
            this->warp_tile_iterator_.store(fragment);
            __syncthreads();
            typename SharedLoadIterator::Fragment sums;
            shared_load_iterator_.load(sums);

            channels.scale_and_shift(sums);
            if (output.params.save && saves_input(output.params.activation)) saved.store(rounded(sums));
            activate_all(sums, output.params.activation);
            if (output.params.save && !saves_input(output.params.activation)) saved.store(rounded(sums));
            channels.apply_mask(sums);
            y.store(rounded(sums));
            ++y;
            ++saved;
        }
    }

   private:
    using ThreadMap = typename OutputTileIterator::ThreadMap;
    using Sums = typename SharedLoadIterator::Fragment;
    static constexpr int width = OutputTileIterator::kElementsPerAccess;
    static constexpr int columns = ThreadMap::Iterations::kColumn;
    static constexpr int elements = OutputTileIterator::Fragment::kElements;
    static_assert(Sums::kElements == elements && elements % (columns * width) == 0);

    /// The three vectors at the columns of this thread. A fragment is [rows][columns][width], so that element i of it
    /// lies in column i % (columns * width) of these.
    struct Channels {
        float scale[columns * width], shift[columns * width], mask[columns * width];

        CUTLASS_DEVICE void load(const typename OutputOp::Params& params, int first) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < columns * width; ++i) {
                const int channel = first + i / width * ThreadMap::Delta::kColumn + i % width;
                const bool inside = channel < params.channels;  // the last tile may be wider than the tensor
                scale[i] = inside && params.scale != nullptr ? __ldg(params.scale + channel) : 1.0f;
                shift[i] = inside && params.shift != nullptr ? __ldg(params.shift + channel) : 0.0f;
                mask[i] = inside && params.mask != nullptr ? __ldg(params.mask + channel) : 1.0f;
            }
        }
        CUTLASS_DEVICE void scale_and_shift(Sums& sums) const {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < elements; ++i)
                sums[i] = fmaf(sums[i], scale[i % (columns * width)], shift[i % (columns * width)]);
        }
        CUTLASS_DEVICE void apply_mask(Sums& sums) const {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < elements; ++i) sums[i] *= mask[i % (columns * width)];
        }
    };

    using Fragment = typename AccumulatorFragmentIterator::Fragment;
    using Tiles = std::make_index_sequence<OutputTileIterator::kIterations>;

    /// Accumulators live in registers, which can be indexed by constants alone: one branch for each tile.
    template <size_t... tiles>
    CUTLASS_DEVICE static Fragment fragment_of(int tile, const AccumulatorTile& accumulators,
                                               std::index_sequence<tiles...>) {
        Fragment fragment;
        const auto load = [&](auto constant) {
            AccumulatorFragmentIterator iterator(accumulators);
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < decltype(constant)::value; ++i) ++iterator;
            iterator.load(fragment);
        };
        ((tile == static_cast<int>(tiles) ? load(std::integral_constant<int, tiles>{}) : void()), ...);
        return fragment;
    }

    CUTLASS_DEVICE static typename OutputTileIterator::Fragment rounded(const Sums& sums) {
        return cutlass::NumericArrayConverter<typename OutputTileIterator::Element, float, elements>()(sums);
    }

    SharedLoadIterator shared_load_iterator_;
};

}  // namespace fastprune::cuda
