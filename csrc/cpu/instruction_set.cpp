// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "instruction_set.h"

#include <atomic>

namespace fastprune::cpu {
namespace {

InstructionSet widest() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        return InstructionSet::avx512;
    }
    if (__builtin_cpu_supports("avx2")) return InstructionSet::avx2;
#endif
    return InstructionSet::baseline;
}

std::atomic<InstructionSet>& current() {
    static std::atomic<InstructionSet> value = widest();
    return value;
}

}  // namespace

InstructionSet instruction_set() { return current().load(std::memory_order_relaxed); }

bool limit_instruction_set(InstructionSet highest) {
    if (highest > widest()) return false;
    current().store(highest, std::memory_order_relaxed);
    return true;
}

}  // namespace fastprune::cpu
