// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "candidates.h"
#include "sm80.cuh"

namespace fastprune::cuda {
namespace sm80 {
namespace {

// Elements stay float, so that they are rounded to tf32 in registers; as tfloat32_t the tensor cores would cut off the
// low bits, an error twice as large that always points to zero.
template <class Tile, class Warp, int stages, int input_width = 4, int output_width = 4>
using Tf32 = Kernel<ConvType::tf32, float, GemmShape<16, 8, 8>, Tile, Warp, stages, input_width, output_width>;

constexpr ConvCandidate tf32_candidates[] = {
    Tf32<GemmShape<256, 128, 16>, GemmShape<64, 64, 16>, 3>::candidate("sm80 256x128x16 s3"),
    Tf32<GemmShape<128, 128, 16>, GemmShape<64, 64, 16>, 4>::candidate("sm80 128x128x16 s4"),
    Tf32<GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 3>::candidate("sm80 128x128x32 s3"),
    Tf32<GemmShape<128, 64, 32>, GemmShape<64, 32, 32>, 3>::candidate("sm80 128x64x32 s3"),
    Tf32<GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, 4>::candidate("sm80 64x64x32 s4"),
    Tf32<GemmShape<128, 64, 16>, GemmShape<64, 32, 16>, 4, 1, 1>::candidate("sm80 128x64x16 s4 c1 k1"),
};

}  // namespace
}  // namespace sm80

ConvCandidates sm80_tf32() { return sm80::tf32_candidates; }

}  // namespace fastprune::cuda
