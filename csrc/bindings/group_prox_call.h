// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The table and the arguments of group_prox, for the kernels and for the emulation.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "fastprune/group_prox.h"
#include "unit_table.h"

namespace fastprune {

/// Checks all arguments of a call.
inline void check_group_prox(const UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms) {
    table.check_tensors();
    const Tensor first = table.first_tensor();
    check::vector({"norms", norms}, table.dtype(), table.num_units(), "one norm for each unit of the table");
    check::writable({"norms", norms});
    check::same_device({"norms", norms}, {"slices[0]", first});
    table.check_disjoint({"norms", norms});
    if (!threshold) return;
    check::vector({"threshold", *threshold}, table.dtype(), table.num_units(), "one number for each unit of the table");
    check::same_device({"threshold", *threshold}, {"slices[0]", first});
    check::disjoint({"norms", norms}, {"threshold", *threshold});
    table.check_disjoint({"threshold", *threshold});
}

template <class T>
GroupProxArgs<T> group_prox_args(UnitTable& table, const std::optional<Tensor>& threshold, const Tensor& norms) {
    const UnitTable::Workspace workspace = table.workspace();
    return {workspace.plan,
            threshold ? threshold->data_as<const T>() : nullptr,
            norms.data_as<T>(),
            workspace.partial_sums,
            static_cast<T*>(workspace.factors),
            workspace.arrived};
}

/// `limits`: the numbers of PlanLimits in their order.
inline std::unique_ptr<UnitTable> make_table(const pybind11::sequence& slices, int64_t num_units,
                                             const std::optional<std::vector<int64_t>>& limits) {
    if (!limits) return std::make_unique<UnitTable>(slices, num_units, std::nullopt);
    const bool positive = std::all_of(limits->begin(), limits->end(), [](int64_t limit) { return limit > 0; });
    if (limits->size() != 6 || !positive || (*limits)[2] > max_tile_width) {
        throw pybind11::value_error("limits: needs six positive numbers, the third up to " +
                                    std::to_string(max_tile_width));
    }
    const auto& l = *limits;
    return std::make_unique<UnitTable>(slices, num_units, PlanLimits{l[0], l[1], l[2], l[3], l[4], l[5]});
}

}  // namespace fastprune
