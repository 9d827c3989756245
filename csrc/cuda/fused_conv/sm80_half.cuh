// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Candidates for 16-bit types. Large tiles reuse what they load most; small ones fill the device where there are few
// pixels or filters; the last two take numbers of channels that the others refuse.
#pragma once

#include "sm80.cuh"

namespace fastprune::cuda::sm80 {

template <ConvType type, class Element, class Tile, class Warp, int stages, int input_width = 8, int output_width = 8>
using Half = Kernel<type, Element, GemmShape<16, 8, 16>, Tile, Warp, stages, input_width, output_width>;

template <ConvType type, class Element>
inline constexpr ConvCandidate half_candidates[] = {
    Half<type, Element, GemmShape<256, 128, 32>, GemmShape<64, 64, 32>, 3>::candidate("sm80 256x128x32 s3"),
    Half<type, Element, GemmShape<128, 256, 32>, GemmShape<64, 64, 32>, 3>::candidate("sm80 128x256x32 s3"),
    Half<type, Element, GemmShape<256, 64, 32>, GemmShape<64, 32, 32>, 4>::candidate("sm80 256x64x32 s4"),
    Half<type, Element, GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 4>::candidate("sm80 128x128x32 s4"),
    Half<type, Element, GemmShape<128, 128, 64>, GemmShape<64, 64, 64>, 3>::candidate("sm80 128x128x64 s3"),
    Half<type, Element, GemmShape<128, 64, 64>, GemmShape<64, 32, 64>, 3>::candidate("sm80 128x64x64 s3"),
    Half<type, Element, GemmShape<64, 128, 64>, GemmShape<32, 64, 64>, 3>::candidate("sm80 64x128x64 s3"),
    Half<type, Element, GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, 4>::candidate("sm80 64x64x64 s4"),
    Half<type, Element, GemmShape<128, 64, 64>, GemmShape<64, 32, 64>, 3, 8, 1>::candidate("sm80 128x64x64 s3 k1"),
    Half<type, Element, GemmShape<128, 64, 32>, GemmShape<64, 32, 32>, 3, 2, 1>::candidate("sm80 128x64x32 s3 c2 k1"),
};

}  // namespace fastprune::cuda::sm80
