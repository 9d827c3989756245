// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The arguments of topk_mask, for the kernels and for the emulation.
#pragma once

#include <optional>

#include "checks.h"
#include "fastprune/topk_mask.h"

namespace fastprune {

/// A call, checked when constructed. Borrows the tensors.
struct TopkMaskCall {
    TopkMaskCall(const Tensor& scores, const Tensor& keep, const Tensor& offsets, const std::optional<Tensor>& window,
                 const Tensor& mask)
        : scores(scores), keep(keep), offsets(offsets), window(window), mask(mask) {
        dtype = check::tensor({"scores", scores}, {DType::float32, DType::float64});
        check::one_dimension({"scores", scores});
        if (scores.size(0) > max_topk_units) {
            check::refuse("scores", std::to_string(scores.size(0)) + " units", "fewer than 2^31");
        }
        check::tensor({"offsets", offsets}, {DType::int64});
        check::one_dimension({"offsets", offsets});
        const int64_t num_groups = offsets.size(0) - 1;
        if (num_groups < 0) check::refuse("offsets", "shape [0]", "shape [G + 1], starting with 0");
        if (num_groups == 0 && scores.size(0) > 0) {
            check::refuse("offsets", "no group",
                          "groups for the " + std::to_string(scores.size(0)) + " units of scores");
        }
        check::vector({"keep", keep}, dtype, num_groups, "one fraction for each group of offsets");
        check::vector({"mask", mask}, dtype, scores.size(0), "one for each score");
        check::writable({"mask", mask});
        check::same_device({"keep", keep}, {"scores", scores});
        check::same_device({"offsets", offsets}, {"scores", scores});
        check::same_device({"mask", mask}, {"scores", scores});
        check::disjoint({"mask", mask}, {"scores", scores});
        check::disjoint({"mask", mask}, {"keep", keep});
        check::disjoint({"mask", mask}, {"offsets", offsets});
        if (!window) return;
        check::vector({"window", *window}, dtype, num_groups, "one width for each group of offsets");
        check::same_device({"window", *window}, {"scores", scores});
        check::disjoint({"mask", mask}, {"window", *window});
    }

    template <class Score>
    TopkMaskArgs<Score> of() const {
        return {scores.data_as<const Score>(),
                keep.data_as<const Score>(),
                offsets.data_as<const int64_t>(),
                window ? window->data_as<const Score>() : nullptr,
                mask.data_as<Score>(),
                scores.size(0),
                offsets.size(0) - 1};
    }

    const Tensor &scores, &keep, &offsets;
    const std::optional<Tensor>& window;
    const Tensor& mask;
    DType dtype;
};

}  // namespace fastprune
