// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "fastprune/unit_plan.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

namespace fastprune {
namespace {

enum Class : int8_t { scalar_unit, whole_unit, shared_unit, num_classes };

/// Units [first_rank, first_rank + count) along one stretch.
struct Segment {
    Stretch stretch;
    int64_t first_rank;
    int64_t count;
};

/// The length of the parts when `length` is cut into as few equal ones as `longest` permits.
int64_t even_part(int64_t length, int64_t longest) {
    const int64_t parts = std::max<int64_t>(1, (length + longest - 1) / longest);
    return std::max<int64_t>(1, (length + parts - 1) / parts);
}

class Builder {
   public:
    Builder(const std::vector<UnitSlice>& slices, int64_t num_units, int64_t element_size, const PlanLimits& limits)
        : slices_(slices), num_units_(num_units), element_size_(element_size), limits_(limits) {}

    UnitPlanStorage build() {
        classify();
        rank();
        find_segments();
        bundle();
        add_items();
        cut_waves();
        number_slots();
        count();
        return std::move(plan_);
    }

   private:
    bool shared(const Segment& segment) const { return segment.first_rank >= first_shared(); }
    int64_t first_shared() const { return first_rank_[shared_unit]; }

    /// Calls body(stretch, unit, position, repeats) for every sequence of neighbouring positions of one unit. A
    /// flattened feature map, for one, gives each channel k^2 columns of the linear layer behind it.
    template <class Body>
    void for_each_sequence(const UnitSlice& slice, const Body& body) const {
        if (slice.rows * slice.run == 0) return;
        for (int64_t begin = 0, end = 0; begin < slice.size; begin = end) {
            const int64_t unit = slice.units[begin];
            for (end = begin + 1; end < slice.size && slice.units[end] == unit;) ++end;
            if (unit < 0) continue;
            const int64_t repeats = end - begin, row = slice.size * slice.run;
            Stretch stretch{slice.address + static_cast<uint64_t>(begin * slice.run * element_size_), slice.rows, row,
                            repeats * slice.run};
            if (stretch.run == row) stretch = {stretch.address, 1, 0, slice.rows * row};  // rows without a gap
            body(stretch, unit, begin, repeats);
        }
    }

    void classify() {
        plan_.sizes.assign(num_units_, 0);
        std::vector<char> narrow(num_units_);
        for (const UnitSlice& slice : slices_) {
            for_each_sequence(slice, [&](const Stretch& stretch, int64_t unit, int64_t, int64_t) {
                if (plan_.sizes[unit] == 0) order_.push_back(static_cast<int32_t>(unit));
                plan_.sizes[unit] += stretch.rows * stretch.run;
                narrow[unit] |= stretch.rows > 1 && stretch.run < limits_.narrow_run;
            });
        }
        class_of_.resize(num_units_);
        for (const int32_t unit : order_) {
            const int64_t size = plan_.sizes[unit];
            class_of_[unit] = size == 1                                       ? scalar_unit
                              : narrow[unit] || size > limits_.whole_elements ? shared_unit
                                                                              : whole_unit;
        }
    }

    /// By class, then by first mention, so that neighbours in memory have neighbouring ranks even where the caller's
    /// numbers jump about.
    void rank() {
        rank_of_.assign(num_units_, -1);
        plan_.unit_of.reserve(num_units_);
        for (const Class wanted : {scalar_unit, whole_unit, shared_unit}) {
            first_rank_[wanted] = static_cast<int64_t>(plan_.unit_of.size());
            for (const int32_t unit : order_) {
                if (class_of_[unit] != wanted) continue;
                rank_of_[unit] = static_cast<int32_t>(plan_.unit_of.size());
                plan_.unit_of.push_back(unit);
            }
        }
        first_rank_[num_classes] = static_cast<int64_t>(plan_.unit_of.size());
        for (int64_t unit = 0; unit < num_units_; ++unit) {
            if (rank_of_[unit] < 0) plan_.unit_of.push_back(static_cast<int32_t>(unit));
        }
    }

    void find_segments() {
        for (const UnitSlice& slice : slices_) {
            int64_t next = -1;  // the position at which the open segment may go on
            Class open = num_classes;
            for_each_sequence(slice, [&](const Stretch& stretch, int64_t unit, int64_t position, int64_t repeats) {
                const int64_t rank = rank_of_[unit];
                if (position == next && class_of_[unit] == open && segments_.back().stretch.run == stretch.run &&
                    segments_.back().first_rank + segments_.back().count == rank) {
                    ++segments_.back().count;
                } else {
                    segments_.push_back({stretch, rank, 1});
                }
                next = position + repeats;
                open = class_of_[unit];
            });
        }
    }

    /// Cuts the segments of scalar and whole units wherever one of them starts or ends.
    void bundle() {
        std::vector<int64_t> cuts;
        for (const Segment& segment : segments_) {
            if (shared(segment)) continue;
            cuts.push_back(segment.first_rank);
            cuts.push_back(segment.first_rank + segment.count);
        }
        std::sort(cuts.begin(), cuts.end());
        cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
        if (cuts.empty()) return;
        plan_.bundles.resize(cuts.size() - 1);  // every such rank has a segment, so none of them is empty
        const auto for_each_part = [&](const auto& body) {
            for (const Segment& segment : segments_) {
                if (shared(segment)) continue;
                auto index = std::lower_bound(cuts.begin(), cuts.end(), segment.first_rank) - cuts.begin();
                for (; cuts[index] < segment.first_rank + segment.count; ++index) body(segment, plan_.bundles[index]);
            }
        };
        for_each_part([](const Segment&, Bundle& bundle) { ++bundle.num_stretches; });
        int64_t next = 0;
        for (size_t i = 0; i < plan_.bundles.size(); ++i) {
            const int64_t room = plan_.bundles[i].num_stretches;
            plan_.bundles[i] = {cuts[i], cuts[i + 1] - cuts[i], next, 0, first_unit(cuts[i], cuts[i + 1])};
            next += room;
        }
        plan_.stretches.resize(next);
        for_each_part([&](const Segment& segment, Bundle& bundle) {
            Stretch part = segment.stretch;
            part.address += bytes((bundle.first_rank - segment.first_rank) * part.run);
            plan_.stretches[bundle.first_stretch + bundle.num_stretches++] = part;
        });
    }

    /// Of neighbouring ranks, where their units are neighbours as well; else -1.
    int64_t first_unit(int64_t first_rank, int64_t last_rank) const {
        const int32_t* units = plan_.unit_of.data();
        const auto gap = [](int32_t unit, int32_t next) { return next != unit + 1; };
        const bool neighbours = std::adjacent_find(units + first_rank, units + last_rank, gap) == units + last_rank;
        return neighbours ? units[first_rank] : -1;
    }

    void add_items() {
        for (size_t i = 0; i < plan_.bundles.size(); ++i) {
            const Bundle& bundle = plan_.bundles[i];
            const int64_t size = plan_.sizes[plan_.unit_of[bundle.first_rank]];
            const auto kind = bundle.first_rank < first_rank_[whole_unit] ? WorkItem::scalar : WorkItem::whole;
            const int64_t most = std::max(limits_.whole_at_once, limits_.work_elements / size);
            const int64_t count = even_part(bundle.count, most);
            for (int64_t first = 0; first < bundle.count; first += count) {
                plan_.items.push_back({kind, static_cast<int64_t>(i), first, std::min(count, bundle.count - first)});
            }
        }
    }

    /// A wave may end at a rank that no segment contains along with the rank before it.
    void cut_waves() {
        std::vector<Segment> segments;
        std::copy_if(segments_.begin(), segments_.end(), std::back_inserter(segments),
                     [this](const Segment& segment) { return shared(segment); });
        std::stable_sort(segments.begin(), segments.end(),
                         [](const Segment& a, const Segment& b) { return a.first_rank < b.first_rank; });
        int64_t end = first_shared(), elements = limits_.wave_elements;
        for (const Segment& segment : segments) {
            if (segment.first_rank >= end && elements >= limits_.wave_elements) {
                plan_.waves.push_back({static_cast<int64_t>(plan_.tiles.size()), 0, end - first_shared(), 0, 0});
                elements = 0;
            }
            end = std::max(end, segment.first_rank + segment.count);
            elements += segment.count * segment.stretch.rows * segment.stretch.run;
            cut(segment);
            Wave& wave = plan_.waves.back();
            wave.num_tiles = static_cast<int64_t>(plan_.tiles.size()) - wave.first_tile;
            wave.num_shared = end - first_shared() - wave.first_shared;
            wave.num_elements = elements;
        }
    }

    void cut(const Segment& segment) {
        const Stretch& stretch = segment.stretch;
        const bool long_runs = stretch.run > limits_.tile_width;
        const int64_t count = long_runs ? 1 : even_part(segment.count, limits_.tile_width / stretch.run);
        for (int64_t first = 0; first < segment.count; first += count) {
            Tile tile{stretch, segment.first_rank + first, std::min(count, segment.count - first), 0};
            tile.part.address += bytes(first * stretch.run);
            const int64_t rows =
                even_part(stretch.rows, std::max<int64_t>(1, limits_.work_elements / (tile.count * stretch.run)));
            const int64_t run = long_runs && rows == 1 ? even_part(stretch.run, limits_.work_elements) : stretch.run;
            for (int64_t row = 0; row < stretch.rows; row += rows) {
                for (int64_t i = 0; i < stretch.run; i += run) {
                    Tile part = tile;
                    part.part.address += bytes(row * stretch.row_stride + i);
                    part.part.rows = std::min(rows, stretch.rows - row);
                    part.part.run = std::min(run, stretch.run - i);
                    add_tile(part);
                }
            }
        }
    }

    void add_tile(Tile tile) {
        tile.first_slot = num_slots_;
        num_slots_ += tile.count;
        plan_.items.push_back({WorkItem::tile, static_cast<int64_t>(plan_.tiles.size()), 0, tile.count});
        plan_.tiles.push_back(tile);
    }

    /// The partial sums of a unit lie side by side, in the order of its tiles.
    void number_slots() {
        const int64_t num_shared = first_rank_[num_classes] - first_shared();
        plan_.first_slots.assign(num_shared + 1, 0);
        for (const Tile& tile : plan_.tiles) {
            for (int64_t k = 0; k < tile.count; ++k) ++plan_.first_slots[tile.first_rank - first_shared() + k + 1];
        }
        for (int64_t i = 0; i < num_shared; ++i) plan_.first_slots[i + 1] += plan_.first_slots[i];
        std::vector<int64_t> next(plan_.first_slots.begin(), plan_.first_slots.end() - 1);
        plan_.slots.reserve(num_slots_);
        for (const Tile& tile : plan_.tiles) {
            for (int64_t k = 0; k < tile.count; ++k) {
                plan_.slots.push_back(next[tile.first_rank - first_shared() + k]++);
            }
        }
    }

    void count() {
        UnitPlan& counts = plan_.counts;
        counts.num_items = static_cast<int64_t>(plan_.items.size());
        counts.num_tiles = static_cast<int64_t>(plan_.tiles.size());
        counts.num_waves = static_cast<int64_t>(plan_.waves.size());
        counts.first_shared = first_shared();
        counts.num_ranks = first_rank_[num_classes];
        counts.num_units = num_units_;
        counts.num_slots = num_slots_;
        for (const int64_t size : plan_.sizes) counts.num_elements += size;
    }

    uint64_t bytes(int64_t elements) const { return static_cast<uint64_t>(elements * element_size_); }

    const std::vector<UnitSlice>& slices_;
    const int64_t num_units_;
    const int64_t element_size_;
    const PlanLimits limits_;
    std::vector<int32_t> order_;  // units by first mention
    std::vector<Class> class_of_;
    std::vector<int32_t> rank_of_;
    int64_t first_rank_[num_classes + 1] = {};
    std::vector<Segment> segments_;
    int64_t num_slots_ = 0;
    UnitPlanStorage plan_;
};

/// Gives body(array, pointer of the view) for every array of the plan, in the order in which they are packed.
template <class Storage, class Body>
void for_each_array(Storage& plan, UnitPlan& view, const Body& body) {
    body(plan.items, view.items);
    body(plan.bundles, view.bundles);
    body(plan.stretches, view.stretches);
    body(plan.tiles, view.tiles);
    body(plan.waves, view.waves);
    body(plan.slots, view.slots);
    body(plan.first_slots, view.first_slots);
    body(plan.unit_of, view.unit_of);
}

template <class Element>
size_t words(const std::vector<Element>& array) {
    static_assert(std::is_trivially_copyable_v<Element> && alignof(Element) <= sizeof(int64_t));
    return (array.size() * sizeof(Element) + sizeof(int64_t) - 1) / sizeof(int64_t);
}

}  // namespace

UnitPlan UnitPlanStorage::view() const {
    UnitPlan view = counts;
    for_each_array(*this, view, [](const auto& array, auto& pointer) { pointer = array.data(); });
    return view;
}

std::vector<int64_t> UnitPlanStorage::pack() const {
    UnitPlan view{};
    size_t length = 0;
    for_each_array(*this, view, [&](const auto& array, auto&) { length += words(array); });
    std::vector<int64_t> packed(length);
    int64_t* next = packed.data();
    for_each_array(*this, view, [&](const auto& array, auto&) {
        if (!array.empty()) std::memcpy(next, array.data(), array.size() * sizeof(array[0]));
        next += words(array);
    });
    return packed;
}

UnitPlan UnitPlanStorage::view_at(const int64_t* base) const {
    UnitPlan view = counts;
    for_each_array(*this, view, [&](const auto& array, auto& pointer) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base);
        base += words(array);
    });
    return view;
}

UnitPlanStorage plan_units(const std::vector<UnitSlice>& slices, int64_t num_units, int64_t element_size,
                           const PlanLimits& limits) {
    return Builder(slices, num_units, element_size, limits).build();
}

}  // namespace fastprune
