// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The result of every kernel: success, the argument value that it refuses, or the failure of the device. Kernels know
// nothing of Python; the bindings turn a Status into an exception.
#pragma once

#include <cstdint>

namespace fastprune {

struct Status {
    const char* argument = nullptr;  ///< name of the refused argument, as the caller wrote it; null if none was refused
    int64_t index = 0;               ///< which element of it
    double value = 0;                ///< what that element holds
    const char* needs = nullptr;     ///< what it has to be
    const char* failure = nullptr;   ///< what the device runtime reported (static storage); null if it did not fail

    bool ok() const { return argument == nullptr && failure == nullptr; }

    static Status refused(const char* argument, int64_t index, double value, const char* needs) {
        return {argument, index, value, needs, nullptr};
    }
    static Status failed(const char* failure) { return {nullptr, 0, 0, nullptr, failure}; }
};

}  // namespace fastprune
