// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "fastprune/instruction_set.h"

#include <atomic>
#include <initializer_list>

namespace fastprune::cpu {
namespace {

InstructionSet widest() {
    for (const InstructionSet set : {InstructionSet::avx512, InstructionSet::avx2}) {
        if (has_instruction_set(set)) return set;
    }
    return InstructionSet::baseline;
}

std::atomic<InstructionSet>& current() {
    static std::atomic<InstructionSet> value = widest();
    return value;
}

}  // namespace

bool has_instruction_set(InstructionSet set) {
#if defined(__x86_64__) && defined(__GNUC__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    switch (set) {
        case InstructionSet::avx512:
            return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        case InstructionSet::avx2: return avx2;
        case InstructionSet::baseline: break;
    }
#endif
    return set == InstructionSet::baseline;
}

InstructionSet instruction_set() { return current().load(std::memory_order_relaxed); }

bool limit_instruction_set(InstructionSet highest) {
    if (!has_instruction_set(highest)) return false;
    current().store(highest, std::memory_order_relaxed);
    return true;
}

}  // namespace fastprune::cpu
