// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// topk_mask for one group by one thread block: what the GPU runs, and what emulated/topk_mask.cpp runs on the host.
//
// A group that fits into shared memory is sorted there (bitonic: no data-dependent step, so no input is slow). In a
// larger one only the ranks inside the window are sorted, as many at a time as fit; radix selection finds which.
#pragma once

#include <cstdint>

#include "fastprune/ordered_key.h"
#include "fastprune/portable.h"
#include "fastprune/soft_rank.h"
#include "fastprune/topk_mask.h"

namespace fastprune::device {

/// A channel under the order of the ranks: descending score, then ascending index. No two are equal, so every sorting
/// network gives one result, and items may be gathered in any order.
template <class Score>
struct Item {
    typename OrderedKey<Score>::Unsigned key;
    uint32_t index;

    static FASTPRUNE_DEVICE Item of(const Score* scores, int64_t i) {
        return {OrderedKey<Score>::unsigned_of(scores[i]), static_cast<uint32_t>(i)};
    }
    /// Behind every channel: no score but a NaN has this key.
    static FASTPRUNE_DEVICE Item behind_all() { return {static_cast<decltype(key)>(~decltype(key){0}), ~uint32_t{0}}; }
    FASTPRUNE_DEVICE bool operator<(const Item& other) const {
        return key < other.key || (key == other.key && index < other.index);
    }
};

inline constexpr int digit_bits = 8;
inline constexpr int num_digits = 1 << digit_bits;

/// Shared memory of the block.
template <class Score>
struct TopkScratch {
    Item<Score>* items;   // [capacity]
    int64_t capacity;     // a power of two
    uint32_t* histogram;  // [num_digits]
    uint32_t* selected;   // [2]: the digit, how many items precede it; also the counter of gathered items

    static constexpr int64_t bytes(int64_t capacity) {
        return capacity * static_cast<int64_t>(sizeof(Item<Score>)) +
               (num_digits + 2) * static_cast<int64_t>(sizeof(uint32_t));
    }
    static FASTPRUNE_DEVICE TopkScratch of(void* memory, int64_t capacity) {
        auto* items = static_cast<Item<Score>*>(memory);
        auto* counters = reinterpret_cast<uint32_t*>(items + capacity);
        return {items, capacity, counters, counters + num_digits};
    }
};

template <class Score>
FASTPRUNE_DEVICE Score not_a_number() {
    return static_cast<Score>(__builtin_nanf(""));
}

/// Sorts items[0, size), size a power of two.
template <class Block, class Score>
FASTPRUNE_DEVICE void bitonic_sort(const Block& block, Item<Score>* items, int64_t size) {
    for (int64_t span = 2; span <= size; span *= 2) {
        for (int64_t stride = span / 2; stride > 0; stride /= 2) {
            for (int64_t pair = block.rank(); pair < size / 2; pair += block.size()) {
                const int64_t low = 2 * pair - (pair & (stride - 1));
                const Item<Score> a = items[low], b = items[low + stride];
                if ((b < a) == ((low & span) == 0)) {
                    items[low] = b;
                    items[low + stride] = a;
                }
            }
            // Strides up to a warp's size keep each warp on its own stretch of 2 * warp_size items.
            const int64_t next_stride = stride > 1 ? stride / 2 : span;
            if (stride <= block.warp_size() && next_stride <= block.warp_size()) {
                block.sync_warp();
            } else {
                block.sync();
            }
        }
    }
    block.sync();
}

/// Pads items[0, count) to a power of two, sorts them and writes the masks of ranks first_rank, first_rank + 1, ...
template <class Block, class Score>
FASTPRUNE_DEVICE void write_ranks(const Block& block, const TopkScratch<Score>& scratch, int64_t count,
                                  int64_t first_rank, const SoftRank& soft, Score* mask) {
    int64_t padded = 1;
    while (padded < count) padded *= 2;
    for (int64_t i = count + block.rank(); i < padded; i += block.size()) scratch.items[i] = Item<Score>::behind_all();
    block.sync();
    bitonic_sort(block, scratch.items, padded);
    for (int64_t i = block.rank(); i < count; i += block.size()) {
        mask[scratch.items[i].index] = static_cast<Score>(soft(first_rank + i));
    }
    block.sync();  // the items are free again
}

/// One digit of a radix selection: among the items that `digit_of` gives a digit (not -1), finds the digit of the one
/// that `rank` others precede, and lowers `rank` by the items of smaller digits.
template <class Block, class Score, class DigitOf>
FASTPRUNE_DEVICE uint32_t select_digit(const Block& block, const TopkScratch<Score>& scratch, int64_t size,
                                       uint32_t& rank, const DigitOf& digit_of) {
    for (int d = block.rank(); d < num_digits; d += block.size()) scratch.histogram[d] = 0;
    block.sync();
    for (int64_t i = block.rank(); i < size; i += block.size()) {
        const int digit = digit_of(i);
        if (digit >= 0) block.fetch_add(&scratch.histogram[digit], 1);
    }
    block.sync();
    for (int d = block.rank(); d < num_digits; d += block.size()) {
        uint32_t before = 0;
        for (int smaller = 0; smaller < d; ++smaller) before += scratch.histogram[smaller];
        if (before <= rank && rank < before + scratch.histogram[d]) {
            scratch.selected[0] = static_cast<uint32_t>(d);
            scratch.selected[1] = before;
        }
    }
    block.sync();
    const uint32_t digit = scratch.selected[0];
    rank -= scratch.selected[1];
    block.sync();
    return digit;
}

/// The item that exactly `rank` items of the group precede.
template <class Block, class Score>
FASTPRUNE_DEVICE Item<Score> item_at(const Block& block, const TopkScratch<Score>& scratch, const Score* scores,
                                     int64_t size, int64_t rank) {
    using Key = OrderedKey<Score>;
    if (rank >= size) return Item<Score>::behind_all();
    auto remaining = static_cast<uint32_t>(rank);
    Item<Score> found{0, 0};
    typename Key::Unsigned known = 0;  // the bits of `found.key` selected so far
    for (int shift = Key::bits - digit_bits; shift >= 0; shift -= digit_bits) {
        const uint32_t digit = select_digit(block, scratch, size, remaining, [&](int64_t i) {
            const auto key = Key::unsigned_of(scores[i]);
            return (key & known) == found.key ? static_cast<int>((key >> shift) & (num_digits - 1)) : -1;
        });
        found.key |= static_cast<typename Key::Unsigned>(digit) << shift;
        known |= static_cast<typename Key::Unsigned>(num_digits - 1) << shift;
    }
    // Among equal scores the index decides; with none of them to skip, index 0 precedes them all just as well.
    if (remaining == 0) return found;
    uint32_t known_index = 0;
    for (int shift = 32 - digit_bits; shift >= 0; shift -= digit_bits) {
        const uint32_t digit = select_digit(block, scratch, size, remaining, [&](int64_t i) {
            const bool candidate =
                Key::unsigned_of(scores[i]) == found.key && (static_cast<uint32_t>(i) & known_index) == found.index;
            return candidate ? static_cast<int>((static_cast<uint32_t>(i) >> shift) & (num_digits - 1)) : -1;
        });
        found.index |= digit << shift;
        known_index |= static_cast<uint32_t>(num_digits - 1) << shift;
    }
    return found;
}

/// A group that does not fit into shared memory.
template <class Block, class Score>
FASTPRUNE_DEVICE void mask_in_rounds(const Block& block, const TopkScratch<Score>& scratch, const Score* scores,
                                     int64_t size, const SoftRank& soft, Score* mask) {
    Item<Score> from = item_at(block, scratch, scores, size, soft.first);
    for (int64_t i = block.rank(); i < size; i += block.size()) {
        mask[i] = Item<Score>::of(scores, i) < from ? Score{1} : Score{0};
    }
    for (int64_t first = soft.first; first < soft.last; first += scratch.capacity) {
        const int64_t next = first + scratch.capacity < soft.last ? first + scratch.capacity : soft.last;
        const Item<Score> to = item_at(block, scratch, scores, size, next);
        if (block.rank() == 0) scratch.selected[0] = 0;
        block.sync();  // also orders the settled masks above before the windowed ones of write_ranks
        for (int64_t i = block.rank(); i < size; i += block.size()) {
            const Item<Score> item = Item<Score>::of(scores, i);
            if (!(item < from) && item < to) scratch.items[block.fetch_add(&scratch.selected[0], 1)] = item;
        }
        write_ranks(block, scratch, next - first, first, soft, mask);
        from = to;
    }
}

/// Offsets that do not ascend from 0 to U could lead out of bounds: every block looks at all of them before the first
/// access. They are few, and every block comes to the same verdict.
template <class Block, class Score>
FASTPRUNE_DEVICE bool offsets_are_malformed(const Block& block, const TopkMaskArgs<Score>& args) {
    bool bad = false;
    for (int64_t g = block.rank(); g < args.num_groups; g += block.size()) {
        bad |= args.offsets[g + 1] < args.offsets[g];
        bad |= g == 0 && args.offsets[0] != 0;
        bad |= g == args.num_groups - 1 && args.offsets[g + 1] != args.num_units;
    }
    return block.any(bad);
}

template <class Block, class Score>
FASTPRUNE_DEVICE void topk_mask(const Block& block, const TopkMaskArgs<Score>& args, int64_t group,
                                const TopkScratch<Score>& scratch) {
    if (offsets_are_malformed(block, args)) {
        for (int64_t i = group * block.size() + block.rank(); i < args.num_units; i += args.num_groups * block.size()) {
            args.mask[i] = not_a_number<Score>();
        }
        return;
    }
    const int64_t begin = args.offsets[group], size = args.offsets[group + 1] - begin;
    const Score* scores = args.scores + begin;
    Score* mask = args.mask + begin;
    const Score keep = args.keep[group];
    const Score window = args.window != nullptr ? args.window[group] : Score{0};

    const bool fits = size <= scratch.capacity;
    bool bad = !(keep >= 0 && keep <= 1 && window >= 0);
    for (int64_t i = block.rank(); i < size; i += block.size()) {
        bad |= OrderedKey<Score>::is_nan(OrderedKey<Score>::of(scores[i]));
        if (fits) scratch.items[i] = Item<Score>::of(scores, i);
    }
    if (block.any(bad)) {
        for (int64_t i = block.rank(); i < size; i += block.size()) mask[i] = not_a_number<Score>();
        return;
    }
    const SoftRank soft(size, keep, window);
    if (fits) {
        write_ranks(block, scratch, size, 0, soft, mask);
    } else {
        mask_in_rounds(block, scratch, scores, size, soft, mask);
    }
}

}  // namespace fastprune::device
