// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// From an activation known at run time to one known to the compiler: inside a loop a switch would cost the vectors.
#pragma once

#include "fastprune/activation.h"

namespace fastprune::cpu {

/// Calls body.template operator()<activation>().
template <class Body>
void dispatch_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::identity: return body.template operator()<Activation::identity>();
        case Activation::relu: return body.template operator()<Activation::relu>();
        case Activation::relu6: return body.template operator()<Activation::relu6>();
        case Activation::silu: return body.template operator()<Activation::silu>();
        case Activation::hardswish: return body.template operator()<Activation::hardswish>();
    }
}

}  // namespace fastprune::cpu
