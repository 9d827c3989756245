// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// From an activation known at run time to one known to the compiler: a switch inside a loop would cost the vectors.
#pragma once

#include "fastprune/activation.h"

namespace fastprune::cpu {

/// Returns body.template operator()<activation>().
template <class Body>
auto with_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::identity: break;
        case Activation::relu: return body.template operator()<Activation::relu>();
        case Activation::relu6: return body.template operator()<Activation::relu6>();
        case Activation::silu: return body.template operator()<Activation::silu>();
        case Activation::hardswish: return body.template operator()<Activation::hardswish>();
    }
    return body.template operator()<Activation::identity>();
}

}  // namespace fastprune::cpu
