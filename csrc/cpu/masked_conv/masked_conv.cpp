// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_conv on the CPU: what the algorithms support, and the choice of their code.
#include "fastprune/masked_conv.h"

#include <algorithm>
#include <cstdint>
#include <new>

#include "../parallel.h"
#include "algorithms.h"

namespace fastprune::cpu {
namespace {

/// Threads worth waking: with 2^18 products each they have ten times as much to do as waking them takes.
int threads_worth(ConvAlgorithm algorithm, const MaskedConvArgs& args, int num_threads) {
    const ConvGeometry& g = args.geometry;
    const bool depthwise = algorithm == ConvAlgorithm::depthwise;
    const double products = static_cast<double>(args.batch) * args.out_height * args.out_width * args.rows *
                            (depthwise ? 1 : args.channels) * g.kernel[0] * g.kernel[1];
    return threads_for(static_cast<int64_t>(std::min(products, 1e18)), 1 << 18, num_threads);
}

}  // namespace

bool masked_conv_supports(ConvAlgorithm algorithm, const ConvGeometry& g) {
    if (algorithm == ConvAlgorithm::direct) return true;
    if (algorithm == ConvAlgorithm::depthwise) return g.kernel[0] <= depthwise_taps / g.kernel[1];
    return g.kernel[0] == 3 && g.kernel[1] == 3 && g.stride[0] == 1 && g.stride[1] == 1 && g.dilation[0] == 1 &&
           g.dilation[1] == 1;
}

void masked_conv(const ConvKernel& kernel, const MaskedConvArgs& args, int num_threads) {
    if (args.batch * args.out_height * args.out_width * args.rows == 0) {
        if (args.dmask != nullptr) std::fill_n(args.dmask, args.rows, 0.0f);
        return;
    }
    const int threads = threads_worth(kernel.algorithm, args, num_threads);
#if FASTPRUNE_X86
    const bool wide = kernel.instructions == InstructionSet::avx512;
    const auto done = [&] {
        switch (kernel.algorithm) {
            case ConvAlgorithm::winograd: return wide ? avx512::winograd(args, threads) : avx2::winograd(args, threads);
            case ConvAlgorithm::depthwise:
                return wide ? avx512::depthwise(args, threads) : avx2::depthwise(args, threads);
            case ConvAlgorithm::direct: break;
        }
        return wide ? avx512::direct(args, threads) : avx2::direct(args, threads);
    };
    if (!done()) throw std::bad_alloc();
#else
    (void)kernel, (void)threads;  // no processor has what these kernels are written for
#endif
}

}  // namespace fastprune::cpu
