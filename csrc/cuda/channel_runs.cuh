// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// How device bodies walk a tensor [outer, channels, inner]: each thread has a run of vectors (of 16 bytes where strides
// and addresses allow it) at a fixed distance from each other, all with the same channels.
//
//     rows    inner = 1: a block takes a chunk of rows and a tile of channels; a thread some neighbouring channels of
//             every n-th row, so that coefficients and sums stay in its registers
//     planes  a warp takes a chunk of a plane
//
// Chunks depend on the layout alone: the sums have the same bits on every GPU.
#pragma once

#include <cstdint>

#include "fastprune/channel_layout.h"
#include "fastprune/half.h"
#include "fastprune/portable.h"

namespace fastprune::device {

inline constexpr int64_t least_rows = 32, most_rows = 1024;  // of a chunk; more would be too long a sum in float
inline constexpr int64_t row_partials = 131072;              // 1 MiB of them at most, unless most_rows wants more
inline constexpr int64_t piece_of_plane = 4096;

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline ChannelChunks chunks_of(const ChannelLayout& layout) {
    if (layout.numel() == 0) return {1, 1, 0};
    if (layout.inner == 1) {
        int64_t count = row_partials / layout.channels;
        if (count > ceil_divide(layout.outer, least_rows)) count = ceil_divide(layout.outer, least_rows);
        if (count < ceil_divide(layout.outer, most_rows)) count = ceil_divide(layout.outer, most_rows);
        const int64_t rows = ceil_divide(layout.outer, count < 1 ? 1 : count);
        return {rows, 1, ceil_divide(layout.outer, rows)};
    }
    // Multiples of 16, so that every piece is aligned as well as its plane.
    const int64_t pieces = ceil_divide(layout.inner, piece_of_plane);
    const int64_t inner = ceil_divide(ceil_divide(layout.inner, pieces), 16) * 16;
    return {1, inner, layout.outer * ceil_divide(layout.inner, inner)};
}

/// The work of a call, in tasks of one block each.
struct ChannelTasks {
    ChannelLayout layout;
    ChannelChunks chunks;
    int vector;     // elements that a thread loads at once; divides the channels of rows, the size of planes
    int columns;    // rows: threads side by side, a power of two
    int64_t tiles;  // rows: blocks side by side
    int64_t count;

    static ChannelTasks of(const ChannelLayout& layout, int vector, int num_threads, int warp_size) {
        ChannelTasks tasks{layout, chunks_of(layout), vector, 1, 1, 0};
        if (layout.inner == 1) {
            // At most a warp: 512 bytes in a row, and the other warps take other rows.
            while (tasks.columns < warp_size && tasks.columns * vector < layout.channels) tasks.columns *= 2;
            tasks.tiles = ceil_divide(layout.channels, static_cast<int64_t>(tasks.columns) * vector);
            tasks.count = tasks.chunks.count * tasks.tiles;
        } else {
            tasks.count = ceil_divide(tasks.chunks.count * layout.channels, num_threads / warp_size);
        }
        return tasks;
    }
};

/// The work of one thread in one task: `count` vectors, the k-th at (outer + k outer_step, channel, inner + k
/// inner_step).
struct Run {
    int64_t outer, channel, inner;
    int64_t outer_step, inner_step;
    int64_t count;  // 0: nothing
    int64_t chunk;

    template <class T>
    FASTPRUNE_DEVICE T* first(const ChannelView<T>& view, const ChannelLayout& layout) const {
        return view.data + (outer * view.outer_stride + channel * layout.inner + inner);
    }
    template <class T>
    FASTPRUNE_DEVICE int64_t step(const ChannelView<T>& view) const {
        return outer_step * view.outer_stride + inner_step;
    }
};

template <class Block>
FASTPRUNE_DEVICE Run row_run(const Block& block, const ChannelTasks& tasks, int64_t task) {
    const int64_t chunk = task / tasks.tiles, tile = task % tasks.tiles;
    const int64_t begin = chunk * tasks.chunks.outer, left = tasks.layout.outer - begin;
    const int64_t rows = left < tasks.chunks.outer ? left : tasks.chunks.outer;
    const int64_t channel = (tile * tasks.columns + block.rank() % tasks.columns) * tasks.vector;
    const int64_t row = block.rank() / tasks.columns, step = block.size() / tasks.columns;
    const bool idle = channel >= tasks.layout.channels || row >= rows;
    return {begin + row, channel, 0, step, 0, idle ? 0 : (rows - row + step - 1) / step, chunk};
}

template <class Block>
FASTPRUNE_DEVICE Run plane_run(const Block& block, const ChannelTasks& tasks, int64_t task) {
    const int warps = block.size() / block.warp_size();
    const int64_t piece = task * warps + block.rank() / block.warp_size();
    if (piece >= tasks.chunks.count * tasks.layout.channels) return {0, 0, 0, 0, 0, 0, -1};
    const int64_t pieces = tasks.chunks.count / tasks.layout.outer;
    const int64_t plane = piece / pieces, begin = piece % pieces * tasks.chunks.inner;
    const int64_t outer = plane / tasks.layout.channels, left = tasks.layout.inner - begin;
    const int64_t size = left < tasks.chunks.inner ? left : tasks.chunks.inner;
    const int64_t first = (block.rank() % block.warp_size()) * tasks.vector, step = block.warp_size() * tasks.vector;
    return {outer,
            plane % tasks.layout.channels,
            begin + first,
            0,
            step,
            first < size ? (size - first + step - 1) / step : 0,
            outer * pieces + piece % pieces};
}

/// Some elements that are loaded and stored at once.
template <class Storage, int size>
struct alignas(size * sizeof(Storage)) Vector {
    Storage values[size];
};

template <class Storage>
inline constexpr int widest_vector = 16 / static_cast<int>(sizeof(Storage));

template <class Storage, int size>
FASTPRUNE_DEVICE Vector<Storage, size> load(const Storage* from) {
#if defined(__CUDA_ARCH__)
    // Through an intrinsic: the compiler splits some copies of a struct into its members, and a store of 16 bytes into
    // eight (seen in the PTX).
    if constexpr (sizeof(Vector<Storage, size>) == sizeof(uint4)) {
        const uint4 words = __ldca(reinterpret_cast<const uint4*>(from));
        return bits_as<Vector<Storage, size>>(words);
    }
#endif
    return *reinterpret_cast<const Vector<Storage, size>*>(from);
}

template <class Storage, int size>
FASTPRUNE_DEVICE void store(Storage* to, const Vector<Storage, size>& vector) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Vector<Storage, size>) == sizeof(uint4)) {
        __stwb(reinterpret_cast<uint4*>(to), bits_as<uint4>(vector));
        return;
    }
#endif
    *reinterpret_cast<Vector<Storage, size>*>(to) = vector;
}

/// Whether vectors of `size` elements of this view are aligned.
template <class T>
bool can_load(const ChannelView<T>& view, int size) {
    return reinterpret_cast<uintptr_t>(view.data) % (size * sizeof(T)) == 0 && view.outer_stride % size == 0;
}

/// Whether runs may consist of vectors of `size` elements, for views that can load them.
inline bool divides(const ChannelLayout& layout, int size) {
    return (layout.inner == 1 ? layout.channels : layout.inner) % size == 0;
}

/// Calls body.template operator()<vector, rows>(), on the host.
template <class Storage, class Body>
auto dispatch_vector(const ChannelTasks& tasks, const Body& body) {
    constexpr int wide = widest_vector<Storage>;
    if (tasks.layout.inner == 1) {
        return tasks.vector == wide ? body.template operator()<wide, true>() : body.template operator()<1, true>();
    }
    return tasks.vector == wide ? body.template operator()<wide, false>() : body.template operator()<1, false>();
}

/// Coefficients of the channels of a run, in registers: one for each element of a vector, or one for all of them.
template <class Real, int count>
struct Coefficients {
    Real values[count];
    FASTPRUNE_DEVICE Coefficients(const Real* vector, Real neutral, const Run& run) {
        FASTPRUNE_UNROLL
        for (int v = 0; v < count; ++v) {
            values[v] = vector != nullptr && run.count > 0 ? vector[run.channel + v] : neutral;
        }
    }
    FASTPRUNE_DEVICE Real operator[](int v) const { return values[count == 1 ? 0 : v]; }
};

/// The sums of all threads of a block with the same channels, as partial sums of the block's chunk. `scratch`: shared
/// memory, one place for each element of every thread's vector.
template <int vector, class Block, class Real>
FASTPRUNE_DEVICE void store_row_sums(const Block& block, const ChannelTasks& tasks, int64_t task, const Real* sums,
                                     Real* scratch, double* partials) {
    FASTPRUNE_UNROLL
    for (int v = 0; v < vector; ++v) scratch[block.rank() * vector + v] = sums[v];
    block.sync();
    const int width = tasks.columns * vector, rows = block.size() / tasks.columns;
    const int64_t first = task % tasks.tiles * width, chunk = task / tasks.tiles;
    for (int c = block.rank(); c < width && first + c < tasks.layout.channels; c += block.size()) {
        double total = 0;
        for (int row = 0; row < rows; ++row) total += static_cast<double>(scratch[row * width + c]);
        partials[chunk * tasks.layout.channels + first + c] = total;
    }
    block.sync();
}

/// The same for a warp, which has one channel.
template <class Block, class Real>
FASTPRUNE_DEVICE void store_plane_sum(const Block& block, const ChannelTasks& tasks, const Run& run, Real sum,
                                      double* partials) {
    for (int lanes = block.warp_size() / 2; lanes > 0; lanes /= 2) sum += block.shuffle_xor(sum, lanes);
    if (run.chunk >= 0 && block.rank() % block.warp_size() == 0) {
        partials[run.chunk * tasks.layout.channels + run.channel] = static_cast<double>(sum);
    }
}

inline constexpr int combined_channels = 8;  // of one block: 64 neighbouring bytes of partial sums

/// The partial sums [chunks, channels] of `combined_channels` channels, added up in an order of their own. For
/// block.size() a multiple of combined_channels. `scratch`: shared memory, a double for every thread. What is returned
/// holds for threads below combined_channels.
template <class Block>
FASTPRUNE_DEVICE double combined_partials(const Block& block, const double* partials, int64_t num_chunks,
                                          int64_t num_channels, int64_t task, double* scratch) {
    const int column = block.rank() % combined_channels, lanes = block.size() / combined_channels;
    const int64_t channel = task * combined_channels + column;
    double sum = 0;
    if (channel < num_channels) {
        for (int64_t chunk = block.rank() / combined_channels; chunk < num_chunks; chunk += lanes) {
            sum += partials[chunk * num_channels + channel];
        }
    }
    scratch[block.rank()] = sum;
    block.sync();
    double total = 0;
    if (block.rank() < combined_channels) {
        for (int lane = 0; lane < lanes; ++lane) total += scratch[lane * combined_channels + column];
    }
    block.sync();
    return total;
}

}  // namespace fastprune::device
