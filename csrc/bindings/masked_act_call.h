// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The arguments of masked_act and masked_act_backward, for the kernels and for the emulation.
#pragma once

#include <string>

#include "channel_arguments.h"
#include "fastprune/masked_act.h"

namespace fastprune {

/// A forward call, checked when constructed. Borrows the tensors.
struct MaskedActCall {
    MaskedActCall(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& mask,
                  const std::string& activation_name, const Optional& y, const Optional& saved,
                  const Optional& residual)
        : activation(check::activation(activation_name)), scale(scale), shift(shift), mask(mask) {
        x_place = arguments.add("x", x);
        residual_place = arguments.add("residual", residual);
        y_place = arguments.add("y", y);
        saved_place = arguments.add("saved", saved);
        arguments.add_vector("scale", scale);
        arguments.add_vector("shift", shift);
        arguments.add_vector("mask", mask);
        arguments.check();
        if (!y && !saved) check::refuse("y", "None", "a tensor here or in saved");
        arguments.check_output(y_place, 1);
        arguments.check_output(saved_place, 1);
    }
    template <class Storage>
    MaskedActArgs<Storage> of() const {
        return {arguments.layout(),
                activation,
                arguments.view<const Storage>(x_place),
                arguments.view<const Storage>(residual_place),
                data_of<const Real<Storage>>(scale),
                data_of<const Real<Storage>>(shift),
                data_of<const Real<Storage>>(mask),
                arguments.view<Storage>(y_place),
                arguments.view<Storage>(saved_place)};
    }
    ChannelArguments arguments;
    Activation activation;
    const Optional &scale, &shift, &mask;
    ChannelArguments::Place x_place, residual_place, y_place, saved_place;
};

/// A backward call, checked when constructed. Borrows the tensors.
struct MaskedActBackwardCall {
    MaskedActBackwardCall(const Tensor& dy, const Tensor& saved, const Optional& x, const Optional& mask,
                          const Optional& scale, const Optional& centre, const Optional& slope, const Optional& offset,
                          const std::string& activation_name, const Optional& dx, const Optional& dmask,
                          const Optional& dshift, const Optional& dscale, const Optional& others)
        : activation(check::activation(activation_name)),
          mask(mask),
          scale(scale),
          centre(centre),
          slope(slope),
          offset(offset),
          dmask(dmask),
          dshift(dshift),
          dscale(dscale) {
        dy_place = arguments.add("dy", dy);
        saved_place = arguments.add("saved", saved);
        x_place = arguments.add("x", x);
        others_place = arguments.add("others", others);
        dx_place = arguments.add("dx", dx);
        arguments.add_vector("mask", mask);
        arguments.add_vector("scale", scale);
        arguments.add_vector("centre", centre);
        arguments.add_vector("slope", slope);
        arguments.add_vector("offset", offset);
        const size_t num_inputs = arguments.num_vectors();
        arguments.add_vector("dmask", dmask);
        arguments.add_vector("dshift", dshift);
        arguments.add_vector("dscale", dscale);
        arguments.check();
        if (!dx && !dmask && !dshift && !dscale) {
            check::refuse("dx", "None", "a tensor here or in dmask, dshift or dscale");
        }
        if (slope.has_value() != offset.has_value()) {
            check::refuse(slope ? "offset" : "slope", "None",
                          std::string("a vector beside ") + (slope ? "slope" : "offset"));
        }
        if (!x && (dscale || slope)) {
            check::refuse("x", "None", std::string("a tensor for ") + (dscale ? "dscale" : "slope"));
        }
        if (others && (dshift || dscale || slope)) {
            check::refuse("others", "a tensor", "None beside dshift, dscale and slope");
        }
        arguments.check_output(dx_place, dx_place.value_or(0));
        arguments.check_output_vectors(num_inputs);
    }
    template <class Storage>
    MaskedActBackwardArgs<Storage> of() const {
        using Value = Real<Storage>;
        return {arguments.layout(),
                activation,
                arguments.view<const Storage>(dy_place),
                arguments.view<const Storage>(saved_place),
                arguments.view<const Storage>(x_place),
                arguments.view<const Storage>(others_place),
                data_of<const Value>(mask),
                data_of<const Value>(scale),
                data_of<const Value>(centre),
                data_of<const Value>(slope),
                data_of<const Value>(offset),
                arguments.view<Storage>(dx_place),
                data_of<Value>(dmask),
                data_of<Value>(dshift),
                data_of<Value>(dscale)};
    }
    int num_sums() const { return dmask.has_value() + dshift.has_value() + dscale.has_value(); }

    ChannelArguments arguments;
    Activation activation;
    const Optional &mask, &scale, &centre, &slope, &offset, &dmask, &dshift, &dscale;
    ChannelArguments::Place dy_place, saved_place, x_place, others_place, dx_place;
};

}  // namespace fastprune
