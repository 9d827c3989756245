// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The instruction sets that CPU kernels are compiled for beside the one that every machine has. The kernels choose when
// they run, so that one module fits all machines. Contraction is off in all of them: the instruction set changes the
// speed and not one bit.
#pragma once

#include <cstdint>

namespace fastprune {

/// avx2 comes with FMA, avx512 is F, DQ, BW and VL.
enum class InstructionSet : int32_t { baseline, avx2, avx512 };

namespace cpu {

/// Whether this machine has the set, whatever limit_instruction_set allows.
bool has_instruction_set(InstructionSet set);

/// The widest set that this machine has and limit_instruction_set allows.
InstructionSet instruction_set();

/// Allows `highest` and what is narrower, for tests. Returns whether this machine has it; if not, nothing changes.
bool limit_instruction_set(InstructionSet highest);

}  // namespace cpu
}  // namespace fastprune
