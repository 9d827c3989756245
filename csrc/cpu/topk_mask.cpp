// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// topk_mask on the CPU. Only the ranks inside the window need an order, so a group is not sorted: one radix digit,
// scaled to the range of its keys, settles every channel whose bucket lies outside of the window; the rest (a tenth of
// the group for DDNP's window) is radix sorted. Every step is linear in the size of the group, whatever the scores.
#include "fastprune/topk_mask.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <memory>
#include <vector>

#include "fastprune/ordered_key.h"
#include "fastprune/soft_rank.h"
#include "parallel.h"

namespace fastprune::cpu {
namespace {

constexpr int64_t chunk_units = 16384;  // a group above it is shared by the threads in chunks; one below has one thread
constexpr int64_t thread_grain = 4096;  // fewer units are faster on one thread than the wake-up of a second
constexpr int bucket_bits = 11;         // 2^11 counters of 4 bytes fit the L1 cache beside the scores
constexpr int64_t radix_limit = 32;     // up to here std::sort takes less time than to clear and add up 256 counters

template <class Score>
struct Candidate {
    typename OrderedKey<Score>::Unsigned key;  // relative to the first bucket of the window
    uint32_t index;

    bool operator<(const Candidate& other) const {
        return key < other.key || (key == other.key && index < other.index);
    }
};

/// What one thread knows about its stretch of a group.
template <class Score>
struct Chunk {
    typename OrderedKey<Score>::Signed lowest, highest;
    int64_t first_candidate;
    uint32_t histogram[1 << bucket_bits];
};

/// The buckets that the window of ranks touches.
template <class Score>
struct Selection {
    typename OrderedKey<Score>::Unsigned base;  // smallest key of the group
    int shift;                                  // bucket = (key - base) >> shift
    int num_buckets;
    uint32_t first_bucket, last_bucket;  // both inside
    int64_t first_rank;                  // rank of the first candidate = how many channels precede first_bucket
};

template <class Score>
void find_range(const Score* scores, int64_t size, Chunk<Score>& chunk) {
    using Key = OrderedKey<Score>;
    auto lowest = std::numeric_limits<typename Key::Signed>::max();
    auto highest = std::numeric_limits<typename Key::Signed>::min();
    for (int64_t i = 0; i < size; ++i) {
        const auto key = Key::of(scores[i]);
        lowest = key < lowest ? key : lowest;
        highest = key > highest ? key : highest;
    }
    chunk.lowest = lowest;
    chunk.highest = highest;
}

template <class Score>
uint32_t bucket_of(Score score, const Selection<Score>& selection) {
    using Unsigned = typename OrderedKey<Score>::Unsigned;
    return static_cast<uint32_t>((static_cast<Unsigned>(OrderedKey<Score>::of(score)) - selection.base) >>
                                 selection.shift);
}

template <class Score>
void count_buckets(const Score* scores, int64_t size, const Selection<Score>& selection, Chunk<Score>& chunk) {
    std::fill_n(chunk.histogram, selection.num_buckets, 0u);
    for (int64_t i = 0; i < size; ++i) ++chunk.histogram[bucket_of(scores[i], selection)];
}

/// Finds the buckets of ranks soft.first and soft.last - 1, and where each chunk puts its candidates.
/// Needs soft.first < soft.last. Returns the number of candidates.
template <class Score>
int64_t select_buckets(const SoftRank& soft, std::vector<Chunk<Score>>& chunks, Selection<Score>& selection) {
    int64_t below = 0;
    bool opened = false;
    int64_t candidates = 0;
    for (int bucket = 0; below < soft.last; ++bucket) {
        int64_t count = 0;
        for (const auto& chunk : chunks) count += chunk.histogram[bucket];
        if (!opened && below + count > soft.first) {
            opened = true;
            selection.first_bucket = static_cast<uint32_t>(bucket);
            selection.first_rank = below;
        }
        if (opened) {
            candidates += count;
            selection.last_bucket = static_cast<uint32_t>(bucket);
        }
        below += count;
    }
    int64_t first = 0;
    for (auto& chunk : chunks) {
        chunk.first_candidate = first;
        for (uint32_t b = selection.first_bucket; b <= selection.last_bucket; ++b) first += chunk.histogram[b];
    }
    return candidates;
}

/// Writes the settled 1s and 0s, and lists the candidates in the order of their indices.
template <class Score>
void settle(const Score* scores, int64_t begin, int64_t end, const Selection<Score>& selection, Score* mask,
            Candidate<Score>* candidates) {
    using Key = OrderedKey<Score>;
    using Unsigned = typename Key::Unsigned;
    const Unsigned window_base = selection.base + (static_cast<Unsigned>(selection.first_bucket) << selection.shift);
    const auto window_start = static_cast<typename Key::Signed>(window_base);
    const uint32_t span = selection.last_bucket - selection.first_bucket;
    // Nothing here branches on a score: random ones would be mispredicted, at four times the cost. The spare slot that
    // an append without a branch needs is in `appended`, since the next chunk's candidates begin right behind these.
    constexpr int64_t stretch = 256;
    Candidate<Score> appended[stretch + 1];
    for (; begin < end; begin += stretch) {
        const int64_t stop = std::min(begin + stretch, end);
        for (int64_t i = begin; i < stop; ++i) mask[i] = static_cast<Score>(Key::of(scores[i]) < window_start);
        int64_t count = 0;
        for (int64_t i = begin; i < stop; ++i) {
            const Unsigned key = static_cast<Unsigned>(Key::of(scores[i])) - window_base;  // earlier ones wrap around
            appended[count] = {key, static_cast<uint32_t>(i)};
            count += static_cast<uint32_t>(key >> selection.shift) <= span;
        }
        candidates = std::copy_n(appended, count, candidates);
    }
}

/// Sorts the candidates, which arrive in the order of their indices: the passes of the radix sort keep that order among
/// equal scores. Returns where the sorted items are, in `items` or in `spare`.
template <class Score>
Candidate<Score>* sort(Candidate<Score>* items, Candidate<Score>* spare, int64_t size, int key_bits) {
    if (size <= radix_limit) {
        std::sort(items, items + size);
        return items;
    }
    for (int shift = 0; shift < key_bits; shift += 8) {
        uint32_t slots[256] = {};
        for (int64_t i = 0; i < size; ++i) ++slots[(items[i].key >> shift) & 255];
        uint32_t next = 0;
        for (uint32_t& slot : slots) {
            const uint32_t count = slot;
            slot = next;
            next += count;
        }
        for (int64_t i = 0; i < size; ++i) spare[slots[(items[i].key >> shift) & 255]++] = items[i];
        std::swap(items, spare);
    }
    return items;
}

/// One group. `candidates` has room for two times `size`. Returns false if a score is NaN.
template <class Score>
bool mask_group(const Score* scores, int64_t size, const SoftRank& soft, Score* mask, std::vector<Chunk<Score>>& chunks,
                Candidate<Score>* candidates, int num_threads) {
    using Key = OrderedKey<Score>;
    const auto num_chunks = static_cast<int64_t>(chunks.size());
    const auto for_each_chunk = [&](const auto& body) {
        parallel_for(num_chunks, num_threads,
                     [&](int64_t c, int) { body(chunks[c], c * size / num_chunks, (c + 1) * size / num_chunks); });
    };

    for_each_chunk([&](auto& chunk, int64_t begin, int64_t end) { find_range(scores + begin, end - begin, chunk); });
    auto lowest = chunks[0].lowest, highest = chunks[0].highest;
    for (const auto& chunk : chunks) {
        lowest = std::min(lowest, chunk.lowest);
        highest = std::max(highest, chunk.highest);
    }
    if (Key::is_nan(lowest) || Key::is_nan(highest)) return false;

    Selection<Score> selection{};
    selection.base = static_cast<typename Key::Unsigned>(lowest);
    const auto range = static_cast<typename Key::Unsigned>(highest) - selection.base;
    const int digit_bits = std::min<int>(bucket_bits, std::bit_width(static_cast<uint64_t>(size)));
    selection.shift = std::max(0, static_cast<int>(std::bit_width(range)) - digit_bits);
    selection.num_buckets = static_cast<int>(range >> selection.shift) + 1;
    for_each_chunk(
        [&](auto& chunk, int64_t begin, int64_t end) { count_buckets(scores + begin, end - begin, selection, chunk); });
    const int64_t num_candidates = select_buckets(soft, chunks, selection);
    for_each_chunk([&](auto& chunk, int64_t begin, int64_t end) {
        settle(scores, begin, end, selection, mask, candidates + chunk.first_candidate);
    });

    const int key_bits = selection.shift + std::bit_width(selection.last_bucket - selection.first_bucket);
    const Candidate<Score>* sorted = sort(candidates, candidates + size, num_candidates, key_bits);
    for (int64_t i = 0; i < num_candidates; ++i) {
        mask[sorted[i].index] = static_cast<Score>(soft(selection.first_rank + i));
    }
    return true;
}

template <class Score>
Status check_values(const TopkMaskArgs<Score>& args) {
    const int64_t* offsets = args.offsets;
    if (offsets[0] != 0)
        return Status::refused("offsets", 0, static_cast<double>(offsets[0]), "0: groups start at the first unit");
    for (int64_t g = 0; g < args.num_groups; ++g) {
        if (offsets[g + 1] < offsets[g]) {
            return Status::refused("offsets", g + 1, static_cast<double>(offsets[g + 1]), "ascending offsets");
        }
        const double keep = args.keep[g];
        if (!(keep >= 0 && keep <= 1)) return Status::refused("keep", g, keep, "a fraction in [0, 1]");
        if (args.window != nullptr && !(args.window[g] >= 0)) {
            return Status::refused("window", g, args.window[g], "a number of channels >= 0");
        }
    }
    if (offsets[args.num_groups] != args.num_units) {
        return Status::refused("offsets", args.num_groups, static_cast<double>(offsets[args.num_groups]),
                               "the number of scores as last offset");
    }
    return {};
}

template <class Score>
SoftRank soft_rank_of(const TopkMaskArgs<Score>& args, int64_t group) {
    return SoftRank(args.offsets[group + 1] - args.offsets[group], args.keep[group],
                    args.window != nullptr ? args.window[group] : Score{0});
}

/// Groups of one chunk: a thread each. Their scratch is allocated here, since no exception may leave a parallel region.
template <class Score>
bool mask_small_groups(const TopkMaskArgs<Score>& args, int num_threads) {
    std::vector<int64_t> groups;
    int64_t largest = 0, units = 0;
    for (int64_t g = 0; g < args.num_groups; ++g) {
        const int64_t size = args.offsets[g + 1] - args.offsets[g];
        if (size == 0 || size > chunk_units) continue;
        groups.push_back(g);
        largest = std::max(largest, size);
        units += size;
    }
    const int threads = threads_for(units, thread_grain, num_threads);
    std::vector<std::vector<Chunk<Score>>> chunks(threads, std::vector<Chunk<Score>>(1));
    const auto candidates = std::make_unique_for_overwrite<Candidate<Score>[]>(2 * largest * threads);
    std::vector<char> finite(groups.size());
    parallel_for(static_cast<int64_t>(groups.size()), threads, [&](int64_t i, int worker) {
        const int64_t begin = args.offsets[groups[i]], size = args.offsets[groups[i] + 1] - begin;
        finite[i] = mask_group(args.scores + begin, size, soft_rank_of(args, groups[i]), args.mask + begin,
                               chunks[worker], candidates.get() + 2 * largest * worker, 1);
    });
    return std::find(finite.begin(), finite.end(), 0) == finite.end();
}

/// Groups of many chunks: one after the other, each by all threads, so that one dominating group keeps them all busy.
template <class Score>
bool mask_large_groups(const TopkMaskArgs<Score>& args, int num_threads) {
    bool finite = true;
    for (int64_t g = 0; g < args.num_groups; ++g) {
        const int64_t begin = args.offsets[g], size = args.offsets[g + 1] - begin;
        if (size <= chunk_units) continue;
        std::vector<Chunk<Score>> chunks((size + chunk_units - 1) / chunk_units);
        const auto candidates = std::make_unique_for_overwrite<Candidate<Score>[]>(2 * size);
        finite &= mask_group(args.scores + begin, size, soft_rank_of(args, g), args.mask + begin, chunks,
                             candidates.get(), num_threads);
    }
    return finite;
}

}  // namespace

template <class Score>
Status topk_mask(const TopkMaskArgs<Score>& args, int num_threads) {
    const Status status = check_values(args);
    if (!status.ok()) return status;
    const bool small_finite = mask_small_groups(args, num_threads), large_finite = mask_large_groups(args, num_threads);
    if (small_finite && large_finite) return {};
    int64_t first = 0;
    while (args.scores[first] == args.scores[first]) ++first;
    return Status::refused("scores", first, args.scores[first], "numbers that can be ranked");
}

template Status topk_mask(const TopkMaskArgs<float>&, int);
template Status topk_mask(const TopkMaskArgs<double>&, int);

}  // namespace fastprune::cpu
