// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The block interface of cuda/block.cuh on host threads: a real thread for every rank, a real barrier for every sync. A
// thread sanitizer build therefore finds the missing barrier that a GPU would only sometimes stumble over.
#pragma once

#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace fastprune::emulated {

/// What the threads of one block share.
struct BlockState {
    BlockState(int num_threads, int warp_size)
        : num_threads(num_threads), warp_size(warp_size), all(num_threads), exchange(num_threads) {
        for (int first = 0; first < num_threads; first += warp_size)
            warps.push_back(std::make_unique<std::barrier<>>(warp_size));
    }
    const int num_threads;
    const int warp_size;
    std::barrier<> all;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    std::atomic<bool> vote{false};
    std::vector<uint64_t> exchange;  // what each thread lends to its warp
};

class Block {
   public:
    Block(BlockState& state, int rank) : state_(state), rank_(rank) {}
    int warp_size() const { return state_.warp_size; }
    int rank() const { return rank_; }
    int size() const { return state_.num_threads; }
    void sync() const { state_.all.arrive_and_wait(); }
    void sync_warp() const { state_.warps[rank_ / state_.warp_size]->arrive_and_wait(); }
    void fence() const {}  // blocks run one after the other
    bool any(bool condition) const {
        if (condition) state_.vote = true;
        sync();
        const bool result = state_.vote;
        sync();
        if (rank_ == 0) state_.vote = false;
        sync();
        return result;
    }
    uint32_t fetch_add(uint32_t* counter, uint32_t value) const {
        return std::atomic_ref(*counter).fetch_add(value, std::memory_order_relaxed);
    }
    template <class T>
    T shuffle_xor(T value, int lanes) const {
        static_assert(sizeof(T) <= sizeof(uint64_t));
        std::memcpy(&state_.exchange[rank_], &value, sizeof(T));
        sync_warp();
        T other;
        std::memcpy(&other, &state_.exchange[rank_ ^ lanes], sizeof(T));
        sync_warp();
        return other;
    }

   private:
    BlockState& state_;
    int rank_;
};

/// Runs body(block) on every thread of one block. `num_threads` is a multiple of `warp_size`.
template <class Body>
void run_block(int num_threads, int warp_size, const Body& body) {
    BlockState state(num_threads, warp_size);
    std::vector<std::jthread> threads;
    threads.reserve(num_threads);
    for (int rank = 0; rank < num_threads; ++rank) {
        threads.emplace_back([&state, &body, rank] { body(Block(state, rank)); });
    }
}

}  // namespace fastprune::emulated
