// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// Which memory belongs to which unit, and how the work on it is cut: compiled once from a list of tensors, then read by
// every step on the CPU, on CUDA and in the emulation.
//
// A tensor without gaps, seen along one of its dimensions, is a block [rows, size, run] whatever its layout: dim 0 of a
// contiguous weight has one row, dim 1 of [O, I, k, k] has O rows of I runs of k^2 elements. Neighbouring positions
// whose units are neighbours as well form a stretch, which needs no index array.
#pragma once

#include <cstdint>
#include <vector>

#include "fastprune/portable.h"

namespace fastprune {

/// Units are numbered with 32 bits inside the plan.
inline constexpr int64_t max_table_units = 2147483647;

/// No line of a tile with several units is longer.
inline constexpr int64_t max_tile_width = 1024;

/// One tensor along one dimension.
struct UnitSlice {
    uint64_t address;      // of its first element
    int64_t rows;          // product of the sizes of the dimensions with larger strides
    int64_t size;          // of the dimension
    int64_t run;           // product of the sizes of the dimensions with smaller strides
    const int64_t* units;  // [size], in [-1, num_units); -1: left alone
};

/// Unit k of a stretch owns the elements data[r * row_stride + k * run + i], r < rows, i < run.
struct Stretch {
    uint64_t address;
    int64_t rows;
    int64_t row_stride;  // in elements
    int64_t run;

    template <class T>
    FASTPRUNE_HD T* data() const {
        return reinterpret_cast<T*>(address);
    }
};

/// Units that own the same stretches, unit k of the bundle being unit k of each of them.
struct Bundle {
    int64_t first_rank;
    int64_t count;  // units
    int64_t first_stretch;
    int64_t num_stretches;
    int64_t first_unit;  // unit k is unit first_unit + k of the caller; or -1, where unit_of has to be asked
};

/// A part of a stretch of shared units: `count` units, of which each leaves one partial sum of squares.
struct Tile {
    Stretch part;
    int64_t first_rank;
    int64_t count;
    int64_t first_slot;  // partial sums go to slots[first_slot + k]
};

/// Shared units whose tiles are no other unit's tiles, few enough to be scaled while the last cache holds them.
struct Wave {
    int64_t first_tile;
    int64_t num_tiles;
    int64_t first_shared;  // counted from the first shared unit
    int64_t num_shared;
    int64_t num_elements;
};

/// What one thread of the CPU, or one block on CUDA, does in one go.
struct WorkItem {
    enum Kind : int64_t {
        scalar,  // units of one element: a soft threshold
        whole,   // units that one worker reads, and scales while they are still in its cache
        tile     // a part of units that many workers share: squares first, scaling in a second pass
    };
    int64_t kind;
    int64_t index;  // of the bundle; of the tile
    int64_t first;  // first unit of the bundle
    int64_t count;  // units
};

/// Where the cuts are. Tests choose small numbers, so that small tables take every path.
struct PlanLimits {
    int64_t whole_elements;  // larger units are shared
    int64_t narrow_run;      // units with shorter runs in several rows are shared: alone they would waste cache lines
    int64_t tile_width;      // longest line of a tile with several units, up to max_tile_width
    int64_t work_elements;   // about as many for each item and each tile …
    int64_t whole_at_once;   // … but no fewer whole units than this for an item: a block has a warp for each
    int64_t wave_elements;   // a wave ends where it has so many; the CPU's alone
};

/// A view of the plan, on the host or copied to a device. Ranks number the units that own elements: first the scalar
/// ones, then the whole ones, then the shared ones, each in the order in which the slices mention them.
struct UnitPlan {
    const WorkItem* items;       // [num_items], those of the tiles last
    const Bundle* bundles;       //
    const Stretch* stretches;    // those of a bundle in the order of the slices: sums are formed in this order
    const Tile* tiles;           // [num_tiles]
    const Wave* waves;           // [num_waves]
    const int64_t* slots;        // of the tiles' partial sums
    const int64_t* first_slots;  // [num_shared + 1]: a shared unit's partial sums lie side by side
    const int32_t* unit_of;      // [num_units], by rank; the last ones are the units without elements
    int64_t num_items;
    int64_t num_tiles;
    int64_t num_waves;
    int64_t first_shared;  // rank of the first shared unit
    int64_t num_ranks;     // units that own elements
    int64_t num_units;
    int64_t num_slots;
    int64_t num_elements;

    FASTPRUNE_HD int64_t num_shared() const { return num_ranks - first_shared; }
};

/// A plan on the host.
struct UnitPlanStorage {
    std::vector<WorkItem> items;
    std::vector<Bundle> bundles;
    std::vector<Stretch> stretches;
    std::vector<Tile> tiles;
    std::vector<Wave> waves;
    std::vector<int64_t> slots, first_slots;
    std::vector<int32_t> unit_of;
    std::vector<int64_t> sizes;  // [num_units]: how many elements each unit owns
    UnitPlan counts{};           // the numbers alone

    UnitPlan view() const;
    /// All arrays as one block of 64-bit words, to be copied to a device …
    std::vector<int64_t> pack() const;
    /// … and the plan as it is there, when the block lies at `base`. The stretches keep their addresses.
    UnitPlan view_at(const int64_t* base) const;
};

/// `slices` lend memory without gaps that does not overlap, and their `units` are in range. May throw std::bad_alloc.
UnitPlanStorage plan_units(const std::vector<UnitSlice>& slices, int64_t num_units, int64_t element_size,
                           const PlanLimits& limits);

}  // namespace fastprune
