// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The arguments of channel_moments, for the kernels and for the emulation.
#pragma once

#include "channel_arguments.h"
#include "fastprune/channel_moments.h"

namespace fastprune {

/// A call, checked when constructed. Borrows the tensors.
struct MomentsCall {
    MomentsCall(const Tensor& x, const Tensor& mean, const Tensor& variance) : mean(mean), variance(variance) {
        place = arguments.add("x", x);
        arguments.add_vector("mean", mean);
        arguments.add_vector("variance", variance);
        arguments.check();
        arguments.check_output_vectors(0);
        if (x.numel() == 0 && x.size(1) > 0) {
            check::refuse("x", "no value", "at least one for each channel");
        }
    }
    template <class Storage>
    ChannelMomentsArgs<Storage> of() const {
        return {arguments.layout(), arguments.view<const Storage>(place), mean.data_as<Real<Storage>>(),
                variance.data_as<Real<Storage>>()};
    }
    ChannelArguments arguments;
    ChannelArguments::Place place;
    const Tensor &mean, &variance;
};

}  // namespace fastprune
