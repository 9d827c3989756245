// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_conv for Python: checks of shapes, pitches and overlap, then the kernel.
#include "fastprune/masked_conv.h"

#include <omp.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "channel_views.h"
#include "masked_conv.h"

namespace py = pybind11;

namespace fastprune {
namespace {

using Optional = std::optional<Tensor>;
using Pair = std::array<int64_t, 2>;

constexpr int64_t largest = int64_t{1} << 31;  // of a size or a step: products of two of them fit into 64 bits

ConvAlgorithm algorithm_of(const std::string& name) {
    if (name == "direct") return ConvAlgorithm::direct;
    if (name == "winograd") return ConvAlgorithm::winograd;
    throw py::value_error("algorithm: got '" + name + "', needs direct or winograd");
}

Instructions instructions_of(const std::string& name) {
    const bool avx512 = name == "avx512";
    if (!avx512 && name != "avx2") throw py::value_error("instructions: got '" + name + "', needs avx2 or avx512");
    const Instructions instructions = avx512 ? Instructions::avx512 : Instructions::avx2;
    if (!cpu::has_instructions(instructions)) {
        throw py::value_error("instructions: got '" + name + "', needs what this processor has");
    }
    return instructions;
}

void check_pair(const char* name, const Pair& pair, int64_t least) {
    for (const int64_t value : pair) {
        if (value < least || value >= largest) {
            throw py::value_error(std::string(name) + ": got " + std::to_string(value) + ", needs at least " +
                                  std::to_string(least) + " and less than 2^31");
        }
    }
}

ConvKernel kernel_of(const std::string& algorithm, const std::string& instructions, const ConvGeometry& geometry) {
    const ConvKernel kernel{algorithm_of(algorithm), instructions_of(instructions)};
    if (!cpu::masked_conv_supports(kernel.algorithm, geometry)) {
        throw py::value_error("algorithm: got 'winograd', needs 'direct' for all but 3x3 kernels of stride 1");
    }
    return kernel;
}

/// Sizes of a weight: rows, channels, kernel.
struct WeightSize {
    int64_t rows, channels;
    ConvGeometry geometry;
};

WeightSize weight_size(const std::array<int64_t, 4>& size) {
    int64_t product = 1;
    for (const int64_t value : size) {
        if (value < 1 || value >= largest || product >= largest) {
            throw py::value_error("weight_size: needs four sizes of at least 1 with a product below 2^31");
        }
        product *= value;
    }
    if (product >= largest) throw py::value_error("weight_size: needs a product below 2^31");
    return {size[0], size[1], {{size[2], size[3]}, {1, 1}, {0, 0}, {1, 1}}};
}

void on_cpu(const Argument& argument) {
    if (!argument.tensor.on_cpu()) {
        throw py::value_error(std::string(argument.name) + ": got a CUDA tensor, needs one on the CPU");
    }
}

void check_packed(const Argument& packed, const ConvKernel& kernel, const WeightSize& size) {
    const int64_t length = cpu::packed_conv_size(kernel, size.geometry, size.rows, size.channels);
    check::vector(packed, DType::float32, length, "packed_conv_size of the weight");
    on_cpu(packed);
}

int64_t packed_conv_size(const std::string& algorithm, const std::string& instructions,
                         const std::array<int64_t, 4>& size) {
    const WeightSize weight = weight_size(size);
    return cpu::packed_conv_size(kernel_of(algorithm, instructions, weight.geometry), weight.geometry, weight.rows,
                                 weight.channels);
}

void pack_masked_conv(const std::string& algorithm, const std::string& instructions, const Tensor& weight,
                      const Optional& scale, bool transposed, const Tensor& packed, int num_threads) {
    check::strided_tensor({"weight", weight}, {DType::float32});
    on_cpu({"weight", weight});
    if (weight.ndim() != 4) throw py::value_error("weight: needs four dimensions, [K, C, R, S]");
    std::array<int64_t, 4> size{}, strides{};
    for (int d = 0; d < 4; ++d) size[d] = weight.size(d), strides[d] = weight.stride(d);
    const float* data = weight.data_as<const float>();
    if (transposed) {  // rows and channels change places, kernels are turned by 180 degrees
        std::swap(size[0], size[1]);
        std::swap(strides[0], strides[1]);
        for (const int d : {2, 3}) {
            data += strides[d] * (size[d] - 1);
            strides[d] = -strides[d];
        }
    }
    const WeightSize of = weight_size(size);
    const ConvKernel kernel = kernel_of(algorithm, instructions, of.geometry);
    check_packed({"packed", packed}, kernel, of);
    check::writable({"packed", packed});
    if (scale) {
        if (transposed) throw py::value_error("scale: got one for a transposed weight, needs None");
        check::vector({"scale", *scale}, DType::float32, of.rows, "one for each row of the weight");
        on_cpu({"scale", *scale});
        check::disjoint({"packed", packed}, {"scale", *scale});
    }
    const float* factors = scale ? scale->data_as<const float>() : nullptr;
    const py::gil_scoped_release release;
    cpu::pack_masked_conv(kernel, of.geometry, of.rows, of.channels, data, strides.data(), factors,
                          packed.data_as<float>(), num_threads > 0 ? num_threads : omp_get_max_threads());
}

/// The pitch of [N, C, H, W] with neighbouring channels.
int64_t pitch_of(const Argument& argument) {
    check::strided_tensor(argument, {DType::float32});
    on_cpu(argument);
    if (argument.tensor.ndim() != 4) {
        throw py::value_error(std::string(argument.name) + ": needs four dimensions, [N, C, H, W]");
    }
    for (int d = 0; d < 4; ++d) {
        if (argument.tensor.size(d) >= largest) {
            throw py::value_error(std::string(argument.name) + ": needs sizes below 2^31");
        }
    }
    if (argument.tensor.numel() == 0) return argument.tensor.size(1);
    const auto pitch = rows_stride(argument.tensor);
    if (!pitch) {
        throw py::value_error(std::string(argument.name) +
                              ": needs channels_last memory, or some neighbouring channels of such");
    }
    return *pitch;
}

void check_size(const Argument& argument, const std::array<int64_t, 4>& size) {
    for (int d = 0; d < 4; ++d) {
        if (argument.tensor.size(d) != size[d]) {
            throw py::value_error(std::string(argument.name) + ": got size " + std::to_string(argument.tensor.size(d)) +
                                  " in dimension " + std::to_string(d) + ", needs " + std::to_string(size[d]));
        }
    }
}

/// First and one-past-last byte.
std::array<const char*, 2> extent(const Tensor& tensor, int64_t pitch) {
    const auto* begin = tensor.data_as<const char>();
    const int64_t pixels = tensor.size(0) * tensor.size(2) * tensor.size(3);
    if (tensor.numel() == 0) return {begin, begin};
    return {begin, begin + ((pixels - 1) * pitch + tensor.size(1)) * static_cast<int64_t>(sizeof(float))};
}

void masked_conv(const std::string& algorithm, const std::string& instructions, const Tensor& x, const Tensor& packed,
                 const std::array<int64_t, 4>& packed_size, const Pair& stride, const Pair& padding,
                 const Pair& dilation, const Optional& shift, const Optional& mask, const Optional& residual,
                 float lowest, float highest, const Optional& y, const Optional& saved, int num_threads) {
    check_pair("stride", stride, 1);
    check_pair("padding", padding, 0);
    check_pair("dilation", dilation, 1);
    WeightSize weight = weight_size(packed_size);
    ConvGeometry& geometry = weight.geometry;
    for (int d = 0; d < 2; ++d) {
        geometry.stride[d] = stride[d], geometry.padding[d] = padding[d], geometry.dilation[d] = dilation[d];
    }
    const ConvKernel kernel = kernel_of(algorithm, instructions, geometry);
    check_packed({"packed", packed}, kernel, weight);

    const int64_t x_pitch = pitch_of({"x", x});
    std::array<int64_t, 4> size{x.size(0), 0, 0, 0};
    for (int d = 0; d < 2; ++d) {
        const int64_t span = geometry.dilation[d] * (geometry.kernel[d] - 1) + 1;
        const int64_t padded = x.size(2 + d) + 2 * geometry.padding[d];
        if (geometry.padding[d] >= span) {
            throw py::value_error("padding: got " + std::to_string(geometry.padding[d]) + ", needs less than " +
                                  std::to_string(span) + ", what the dilated kernel spans");
        }
        size[2 + d] = padded < span ? 0 : (padded - span) / geometry.stride[d] + 1;
    }
    if (x.size(1) < 1 || x.size(1) > weight.channels) {
        throw py::value_error("x: got " + std::to_string(x.size(1)) + " channels, needs 1 to " +
                              std::to_string(weight.channels));
    }
    if (!y && !saved) throw py::value_error("y: got None, needs a tensor unless saved is one");
    const Tensor& result = y ? *y : *saved;
    if (result.ndim() == 4) size[1] = result.size(1);
    if (size[1] < 1 || size[1] > weight.rows) {
        throw py::value_error(std::string(y ? "y" : "saved") + ": needs four dimensions and 1 to " +
                              std::to_string(weight.rows) + " channels");
    }
    std::vector<Argument> inputs{{"x", x}, {"packed", packed}};
    for (const auto& [name, vector] : {std::pair<const char*, const Optional&>{"shift", shift}, {"mask", mask}}) {
        if (!vector) continue;
        check::vector({name, *vector}, DType::float32, size[1], "one for each channel of the result");
        on_cpu({name, *vector});
        inputs.push_back({name, *vector});
    }
    const auto pixels = [&](const char* name, const Optional& tensor) -> int64_t {
        if (!tensor) return 0;
        const int64_t pitch = pitch_of({name, *tensor});
        check_size({name, *tensor}, size);
        return pitch;
    };
    const int64_t residual_pitch = pixels("residual", residual);
    const int64_t y_pitch = pixels("y", y), saved_pitch = pixels("saved", saved);
    if (residual) inputs.push_back({"residual", *residual});
    if (y && saved) inputs.push_back({"saved", *saved});
    const auto bytes = [&](const Tensor& tensor) {
        if (&tensor == &x) return extent(tensor, x_pitch);
        if (residual && &tensor == &*residual) return extent(tensor, residual_pitch);
        if (saved && &tensor == &*saved) return extent(tensor, saved_pitch);
        const auto* begin = tensor.data_as<const char>();
        return std::array<const char*, 2>{begin, begin + tensor.num_bytes()};
    };
    const auto check_output = [&](const char* name, const Tensor& output, int64_t pitch) {
        check::writable({name, output});
        const auto [begin, end] = extent(output, pitch);
        for (const Argument& input : inputs) {
            if (&input.tensor == &output) continue;
            const auto [from, to] = bytes(input.tensor);
            if (begin < to && from < end) {
                throw py::value_error(std::string(name) + ": got memory that overlaps " + input.name +
                                      ", needs memory of its own");
            }
        }
    };
    if (y) check_output("y", *y, y_pitch);
    if (saved) check_output("saved", *saved, saved_pitch);

    const auto data = [](const Optional& tensor) { return tensor ? tensor->data_as<float>() : nullptr; };
    const MaskedConvArgs args{x.size(0),
                              x.size(2),
                              x.size(3),
                              size[2],
                              size[3],
                              x.size(1),
                              weight.channels,
                              size[1],
                              weight.rows,
                              geometry,
                              {x.data_as<const float>(), x_pitch},
                              packed.data_as<const float>(),
                              data(shift),
                              data(mask),
                              {data(residual), residual_pitch},
                              lowest,
                              highest,
                              {data(y), y_pitch},
                              {data(saved), saved_pitch}};
    Status status;
    {
        const py::gil_scoped_release release;
        status = cpu::masked_conv(kernel, args, num_threads > 0 ? num_threads : omp_get_max_threads());
    }
    check::status(status);
}

std::vector<std::string> masked_conv_instructions() {
    std::vector<std::string> names;
    if (cpu::has_instructions(Instructions::avx512)) names.emplace_back("avx512");
    if (cpu::has_instructions(Instructions::avx2)) names.emplace_back("avx2");
    return names;
}

}  // namespace

void bind_masked_conv(py::module_& module) {
    module.def("masked_conv_instructions", &masked_conv_instructions,
               "What masked_conv is written for and this processor has, the widest first; none elsewhere.");
    module.def("packed_conv_size", &packed_conv_size, py::arg("algorithm"), py::arg("instructions"),
               py::arg("weight_size"), "How many floats a weight [K, C, R, S] has when packed.");
    module.def("pack_masked_conv", &pack_masked_conv, py::arg("algorithm"), py::arg("instructions"), py::arg("weight"),
               py::arg("scale").none(true), py::arg("transposed"), py::arg("packed"), py::arg("num_threads") = 0,
               "Packs scale * weight, or the weight of the convolution that is the gradient with respect to x.");
    module.def("masked_conv", &masked_conv, py::arg("algorithm"), py::arg("instructions"), py::arg("x"),
               py::arg("packed"), py::arg("weight_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
               py::arg("shift").none(true), py::arg("mask").none(true), py::arg("residual").none(true),
               py::arg("lowest"), py::arg("highest"), py::arg("y").none(true), py::arg("saved").none(true),
               py::arg("num_threads") = 0,
               "Writes the clamped convolution into `saved` and, times the mask, into `y`; x and the results may have "
               "fewer channels than the packed weight.");
}

}  // namespace fastprune
