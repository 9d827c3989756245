// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fastprune::cuda {

/// Devices that the CUDA runtime sees; 0 without a driver.
int device_count();

}  // namespace fastprune::cuda
