// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Weights in the order in which masked_conv reads them: direct [panel][tap][channel][row of the panel], winograd
// [product][panel][channel][row of the panel]. Rows after the last one are zeros.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../instruction_set.h"
#include "../parallel.h"
#include "algorithms.h"
#include "fastprune/masked_conv.h"

namespace fastprune::cpu {
namespace {

constexpr int winograd_products = 16;

/// A weight in memory, and the scale of its rows.
struct Source {
    int64_t rows, channels;
    const float* weight;
    int64_t row_stride, channel_stride;
    std::vector<int64_t> taps;  // where each tap lies, relative to the first
    const float* scale;
};

Source source_of(const ConvGeometry& geometry, int64_t rows, int64_t channels, const float* weight,
                 const int64_t* strides, const float* scale) {
    Source source{rows, channels, weight, strides[0], strides[1], {}, scale};
    for (int64_t r = 0; r < geometry.kernel[0]; ++r) {
        for (int64_t s = 0; s < geometry.kernel[1]; ++s) source.taps.push_back(r * strides[2] + s * strides[3]);
    }
    return source;
}

/// The scaled taps of `width` rows in one channel, those of a row `tap_step` apart, rows next to each other.
template <int width>
void gather(const Source& source, int64_t first_row, int64_t channel, float* to, int64_t tap_step) {
    const float* from = source.weight + first_row * source.row_stride + channel * source.channel_stride;
    const int64_t valid = std::min<int64_t>(width, source.rows - first_row);
    const auto taps = static_cast<int64_t>(source.taps.size());
    for (int64_t tap = 0; tap < taps; ++tap) {
        const float* place = from + source.taps[tap];
        float* column = to + tap * tap_step;
        for (int64_t i = 0; i < valid; ++i) column[i] = place[i * source.row_stride];
        std::fill(column + valid, column + width, 0.0f);
        if (source.scale == nullptr) continue;
        for (int64_t i = 0; i < valid; ++i) column[i] *= source.scale[first_row + i];
    }
}

template <int width>
void pack_direct(const Source& source, int64_t p, float* packed) {
    const int64_t tap_step = source.channels * width;
    float* const to = packed + p * static_cast<int64_t>(source.taps.size()) * tap_step;
    for (int64_t c = 0; c < source.channels; ++c) gather<width>(source, p * width, c, to + c * width, tap_step);
}

/// G g G^T of 3x3 kernels, `width` of them at once; in double, so that each transformed weight is rounded once.
template <int width>
void transform_kernels(const float (&g)[9][width], float (&products)[winograd_products][width]) {
    for (int i = 0; i < width; ++i) {
        double t[4][3];
        for (int j = 0; j < 3; ++j) {
            const double first = g[j][i], second = g[3 + j][i], third = g[6 + j][i];
            t[0][j] = first;
            t[1][j] = 0.5 * (first + second + third);
            t[2][j] = 0.5 * (first - second + third);
            t[3][j] = third;
        }
        for (int k = 0; k < 4; ++k) {
            products[4 * k][i] = static_cast<float>(t[k][0]);
            products[4 * k + 1][i] = static_cast<float>(0.5 * (t[k][0] + t[k][1] + t[k][2]));
            products[4 * k + 2][i] = static_cast<float>(0.5 * (t[k][0] - t[k][1] + t[k][2]));
            products[4 * k + 3][i] = static_cast<float>(t[k][2]);
        }
    }
}

template <int width>
void pack_winograd(const Source& source, int64_t p, int64_t panels, float* packed) {
    for (int64_t c = 0; c < source.channels; ++c) {
        // Local arrays: the compiler cannot know that the places in `packed` do not overlap.
        float g[9][width], products[winograd_products][width];
        gather<width>(source, p * width, c, g[0], width);
        transform_kernels(g, products);
        for (int k = 0; k < winograd_products; ++k) {
            std::copy_n(products[k], width, packed + ((k * panels + p) * source.channels + c) * width);
        }
    }
}

template <int width>
void pack(ConvAlgorithm algorithm, const Source& source, float* packed, int num_threads) {
    const int64_t panels = (source.rows + width - 1) / width;
    parallel_for(panels, num_threads, [&](int64_t p, int) {
        run_vectorised([&] {
            if (algorithm == ConvAlgorithm::winograd) {
                pack_winograd<width>(source, p, panels, packed);
            } else {
                pack_direct<width>(source, p, packed);
            }
        });
    });
}

}  // namespace

int64_t masked_conv_packed_size(const ConvKernel& kernel, const ConvGeometry& geometry, int64_t rows,
                                int64_t channels) {
    const int64_t width = panel_width(kernel.instructions);
    const bool winograd = kernel.algorithm == ConvAlgorithm::winograd;
    const int64_t products = winograd ? winograd_products : geometry.kernel[0] * geometry.kernel[1];
    return (rows + width - 1) / width * width * channels * products;
}

void masked_conv_pack(const ConvKernel& kernel, const ConvGeometry& geometry, int64_t rows, int64_t channels,
                      const float* weight, const int64_t* strides, const float* scale, float* packed, int num_threads) {
    const Source source = source_of(geometry, rows, channels, weight, strides, scale);
    const int threads = threads_for(rows * channels, 1 << 14, num_threads);
    if (kernel.instructions == InstructionSet::avx512) {
        pack<panel_width(InstructionSet::avx512)>(kernel.algorithm, source, packed, threads);
    } else {
        pack<panel_width(InstructionSet::avx2)>(kernel.algorithm, source, packed, threads);
    }
}

}  // namespace fastprune::cpu
