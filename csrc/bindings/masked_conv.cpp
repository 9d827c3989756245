// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// masked_conv for Python: checks of shapes, pitches and overlap, then the kernel.
#include "fastprune/masked_conv.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "bind.h"
#include "channel_views.h"
#include "checks.h"

namespace py = pybind11;

namespace fastprune {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t largest = int64_t{1} << 31;  // of a size or a step: products of two of them fit into 64 bits

ConvAlgorithm algorithm_of(const std::string& name) {
    if (name == "direct") return ConvAlgorithm::direct;
    if (name == "winograd") return ConvAlgorithm::winograd;
    if (name == "depthwise") return ConvAlgorithm::depthwise;
    check::refuse("algorithm", "'" + name + "'", "direct, winograd or depthwise");
}

InstructionSet instructions_of(const std::string& name) {
    const bool avx512 = name == "avx512";
    if (!avx512 && name != "avx2") check::refuse("instructions", "'" + name + "'", "avx2 or avx512");
    const InstructionSet instructions = avx512 ? InstructionSet::avx512 : InstructionSet::avx2;
    if (!cpu::has_instruction_set(instructions)) {
        check::refuse("instructions", "'" + name + "'", "what this processor has");
    }
    return instructions;
}

/// Sizes of a weight: rows, channels, kernel.
struct WeightSize {
    int64_t rows, channels;
    ConvGeometry geometry;
};

WeightSize weight_size(const char* name, const std::array<int64_t, 4>& size) {
    int64_t product = 1;
    for (const int64_t value : size) {
        const bool fits = value >= 1 && value < largest;
        if (fits) product *= value;
        if (!fits || product >= largest) {
            check::refuse(name, std::to_string(value) + " as one of its sizes",
                          "sizes of at least 1 with a product below 2^31");
        }
    }
    return {size[0], size[1], {{size[2], size[3]}, {1, 1}, {0, 0}, {1, 1}}};
}

ConvKernel kernel_of(const std::string& algorithm, const std::string& instructions, const WeightSize& size) {
    const ConvKernel kernel{algorithm_of(algorithm), instructions_of(instructions)};
    const bool depthwise = kernel.algorithm == ConvAlgorithm::depthwise;
    if (!cpu::masked_conv_supports(kernel.algorithm, size.geometry) || (depthwise && size.channels != 1)) {
        check::refuse("algorithm", "'" + algorithm + "'",
                      "'direct' for all but " +
                          (depthwise ? "[K, 1, R, S] weights of up to " + std::to_string(depthwise_taps) + " taps"
                                     : std::string("3x3 kernels of stride 1")));
    }
    return kernel;
}

void four_dimensions(const Argument& argument, const char* meaning) {
    if (argument.tensor.ndim() != 4) {
        check::refuse(argument.name, std::to_string(argument.tensor.ndim()) + " dimensions",
                      std::string("four, ") + meaning);
    }
}

/// First and one-past-last byte of an argument.
struct Region {
    const char* name;
    const char *begin, *end;
};

Region vector_region(const Argument& vector) {
    const auto* begin = vector.tensor.data_as<const char>();
    return {vector.name, begin, begin + vector.tensor.num_bytes()};
}

Region weight_region(const Argument& weight) {
    constexpr auto size = static_cast<int64_t>(sizeof(float));
    const auto* begin = weight.tensor.data_as<const char>();
    Region region{weight.name, begin, begin + size};
    for (int d = 0; d < 4; ++d) {
        const int64_t way = (weight.tensor.size(d) - 1) * weight.tensor.stride(d) * size;
        (way < 0 ? region.begin : region.end) += way;
    }
    return region;
}

Region pixels_region(const Argument& pixels, int64_t pitch) {
    const Tensor& tensor = pixels.tensor;
    const auto* begin = tensor.data_as<const char>();
    if (tensor.numel() == 0) return {pixels.name, begin, begin};
    const int64_t count = tensor.size(0) * tensor.size(2) * tensor.size(3);
    return {pixels.name, begin, begin + ((count - 1) * pitch + tensor.size(1)) * static_cast<int64_t>(sizeof(float))};
}

void check_disjoint(const Region& output, const std::vector<Region>& others) {
    for (const Region& other : others) {
        if (output.begin < other.end && other.begin < output.end) {
            check::refuse(output.name, std::string("memory that overlaps ") + other.name, "memory of its own");
        }
    }
}

void check_packed(const Argument& packed, const ConvKernel& kernel, const WeightSize& size) {
    const int64_t length = cpu::masked_conv_packed_size(kernel, size.geometry, size.rows, size.channels);
    check::vector(packed, DType::float32, length, "masked_conv_packed_size of the weight");
    check::on_cpu(packed);
}

int64_t masked_conv_packed_size(const std::string& algorithm, const std::string& instructions,
                                const std::array<int64_t, 4>& size) {
    const WeightSize weight = weight_size("weight_size", size);
    return cpu::masked_conv_packed_size(kernel_of(algorithm, instructions, weight), weight.geometry, weight.rows,
                                        weight.channels);
}

void masked_conv_pack(const std::string& algorithm, const std::string& instructions, const Tensor& weight,
                      const Optional& scale, bool transposed, const Tensor& packed, int num_threads) {
    check::strided_tensor({"weight", weight}, {DType::float32});
    check::on_cpu({"weight", weight});
    four_dimensions({"weight", weight}, "[K, C, R, S]");
    std::array<int64_t, 4> size{}, strides{};
    for (int d = 0; d < 4; ++d) size[d] = weight.size(d), strides[d] = weight.stride(d);
    const float* data = weight.data_as<const float>();
    if (transposed && scale) check::refuse("scale", "one for a transposed weight", "None");
    if (transposed) {  // rows and channels change places, kernels are turned by 180 degrees
        if (algorithm_of(algorithm) != ConvAlgorithm::depthwise) {
            std::swap(size[0], size[1]);
            std::swap(strides[0], strides[1]);
        }
        for (const int d : {2, 3}) {
            data += strides[d] * (size[d] - 1);
            strides[d] = -strides[d];
        }
    }
    const WeightSize of = weight_size("weight", size);
    const ConvKernel kernel = kernel_of(algorithm, instructions, of);
    check_packed({"packed", packed}, kernel, of);
    check::writable({"packed", packed});
    check_disjoint(vector_region({"packed", packed}), {weight_region({"weight", weight})});
    if (scale) {
        check::vector({"scale", *scale}, DType::float32, of.rows, "one for each row of the weight");
        check::on_cpu({"scale", *scale});
        check::disjoint({"packed", packed}, {"scale", *scale});
    }
    const int threads = check::threads_of(num_threads);
    const float* factors = scale ? scale->data_as<const float>() : nullptr;
    const py::gil_scoped_release release;
    cpu::masked_conv_pack(kernel, of.geometry, of.rows, of.channels, data, strides.data(), factors,
                          packed.data_as<float>(), threads);
}

/// Checks a tensor [N, C, H, W] with neighbouring channels, and returns its pitch.
int64_t pitch_of(const Argument& argument) {
    check::strided_tensor(argument, {DType::float32});
    check::on_cpu(argument);
    four_dimensions(argument, "[N, C, H, W]");
    for (int d = 0; d < 4; ++d) {
        if (argument.tensor.size(d) >= largest) {
            check::refuse(argument.name,
                          "size " + std::to_string(argument.tensor.size(d)) + " in dimension " + std::to_string(d),
                          "sizes below 2^31");
        }
    }
    if (argument.tensor.numel() == 0) return argument.tensor.size(1);
    const auto pitch = rows_stride(argument.tensor);
    if (!pitch) {
        check::refuse(argument.name, "other strides", "channels_last memory, or some neighbouring channels of such");
    }
    return *pitch;
}

void check_size(const Argument& argument, const std::array<int64_t, 4>& size) {
    for (int d = 0; d < 4; ++d) {
        if (argument.tensor.size(d) != size[d]) {
            check::refuse(argument.name,
                          "size " + std::to_string(argument.tensor.size(d)) + " in dimension " + std::to_string(d),
                          std::to_string(size[d]));
        }
    }
}

/// Returns P or Q: the number of outputs in direction d.
int64_t output_size(const Tensor& x, const ConvGeometry& geometry, int d) {
    const int64_t span = geometry.dilation[d] * (geometry.kernel[d] - 1) + 1;
    const int64_t padding = geometry.padding[d], padded = x.size(2 + d) + 2 * padding;
    if (padding >= span) {
        check::refuse("padding", std::to_string(padding),
                      "less than " + std::to_string(span) + ", what the dilated kernel spans");
    }
    return padded < span ? 0 : (padded - span) / geometry.stride[d] + 1;
}

/// Checks the number of channels, at most those of the weight, of a tensor that pitch_of has checked; returns it.
int64_t channels_of(const Argument& argument, int64_t most) {
    const int64_t channels = argument.tensor.size(1);
    if (channels < 1 || channels > most) {
        check::refuse(argument.name, std::to_string(channels) + " channels", "1 to " + std::to_string(most));
    }
    return channels;
}

/// Checks an optional shift or mask and adds its memory to `inputs`. Returns null for none.
const float* vector_of(const char* name, const Optional& vector, int64_t length, std::vector<Region>& inputs) {
    if (!vector) return nullptr;
    check::vector({name, *vector}, DType::float32, length, "one for each channel of the result");
    check::on_cpu({name, *vector});
    inputs.push_back(vector_region({name, *vector}));
    return vector->data_as<const float>();
}

/// Checks an optional operand of the size of the result and adds its memory to `inputs`.
Pixels pixels_of(const char* name, const Optional& operand, const std::array<int64_t, 4>& size,
                 std::vector<Region>& inputs) {
    if (!operand) return {nullptr, 0};
    const int64_t pitch = pitch_of({name, *operand});
    check_size({name, *operand}, size);
    inputs.push_back(pixels_region({name, *operand}, pitch));
    return {operand->data_as<const float>(), pitch};
}

/// Checks an optional result and adds its memory to `regions`.
MutablePixels result_of(const char* name, const Optional& result, const std::array<int64_t, 4>& size,
                        std::vector<Region>& regions) {
    if (!result) return {nullptr, 0};
    const int64_t pitch = pitch_of({name, *result});
    check_size({name, *result}, size);
    check::writable({name, *result});
    const Region region = pixels_region({name, *result}, pitch);
    check_disjoint(region, regions);
    regions.push_back(region);
    return {result->data_as<float>(), pitch};
}

void masked_conv(const std::string& algorithm, const std::string& instructions, const Tensor& x, const Tensor& packed,
                 const std::array<int64_t, 4>& packed_size, const Pair& stride, const Pair& padding,
                 const Pair& dilation, const Optional& shift, const Optional& mask, const Optional& residual,
                 float lowest, float highest, const Optional& y, const Optional& saved, int num_threads,
                 const Optional& previous, const Optional& dmask) {
    check::pair("stride", stride, 1, largest - 1);
    check::pair("padding", padding, 0, largest - 1);
    check::pair("dilation", dilation, 1, largest - 1);
    WeightSize weight = weight_size("weight_size", packed_size);
    for (int d = 0; d < 2; ++d) {
        weight.geometry.stride[d] = stride[d];
        weight.geometry.padding[d] = padding[d];
        weight.geometry.dilation[d] = dilation[d];
    }
    const ConvKernel kernel = kernel_of(algorithm, instructions, weight);
    check_packed({"packed", packed}, kernel, weight);
    const int threads = check::threads_of(num_threads);
    if (!(lowest <= highest)) {
        check::refuse("lowest", std::to_string(lowest), "at most highest, " + std::to_string(highest));
    }
    if (!y && !saved) check::refuse("y", "None", "a tensor unless saved is one");
    if (previous && shift) check::refuse("shift", "a tensor beside previous", "None");
    if (previous && saved) check::refuse("saved", "a tensor beside previous", "None");
    if (dmask && !previous) check::refuse("dmask", "a tensor without previous", "None");

    const int64_t x_pitch = pitch_of({"x", x});
    const bool depthwise = kernel.algorithm == ConvAlgorithm::depthwise;
    const int64_t channels = channels_of({"x", x}, depthwise ? weight.rows : weight.channels);
    const Argument output{y ? "y" : "saved", y ? *y : *saved};
    pitch_of(output);
    const int64_t rows = channels_of(output, weight.rows);
    const std::array<int64_t, 4> size{x.size(0), rows, output_size(x, weight.geometry, 0),
                                      output_size(x, weight.geometry, 1)};
    std::vector<Region> regions{pixels_region({"x", x}, x_pitch), vector_region({"packed", packed})};
    const float* const shifts = vector_of("shift", shift, rows, regions);
    const float* const factors = vector_of("mask", mask, rows, regions);
    const Pixels addend = pixels_of("residual", residual, size, regions);
    const Pixels r = pixels_of("previous", previous, size, regions);
    const MutablePixels result = result_of("y", y, size, regions), before = result_of("saved", saved, size, regions);
    if (dmask) {
        vector_of("dmask", dmask, rows, regions);
        check::writable({"dmask", *dmask});
        check_disjoint(regions.back(), {regions.begin(), regions.end() - 1});
    }

    const MaskedConvArgs args{
        x.size(0),
        x.size(2),
        x.size(3),
        size[2],
        size[3],
        channels,
        weight.channels,
        rows,
        weight.rows,
        weight.geometry,
        {x.data_as<const float>(), x_pitch},
        packed.data_as<const float>(),
        shifts,
        factors,
        addend,
        lowest,
        highest,
        result,
        before,
        r,
        dmask ? dmask->data_as<float>() : nullptr,
    };
    const py::gil_scoped_release release;
    cpu::masked_conv(kernel, args, threads);
}

std::vector<std::string> masked_conv_instructions() {
    const InstructionSet widest = cpu::instruction_set();
    if (widest == InstructionSet::avx512) return {"avx512", "avx2"};
    if (widest == InstructionSet::avx2) return {"avx2"};
    return {};
}

}  // namespace

void bind_masked_conv(py::module_& module) {
    module.def(
        "masked_conv_instructions", &masked_conv_instructions,
        "What masked_conv is written for, this processor has and limit_instruction_set allows, the widest first.");
    module.attr("depthwise_taps") = depthwise_taps;
    module.def("masked_conv_packed_size", &masked_conv_packed_size, py::arg("algorithm"), py::arg("instructions"),
               py::arg("weight_size"), "How many floats a weight [K, C, R, S] has when packed.");
    module.def("masked_conv_pack", &masked_conv_pack, py::arg("algorithm"), py::arg("instructions"), py::arg("weight"),
               py::arg("scale").none(true), py::arg("transposed"), py::arg("packed"), py::arg("num_threads") = 0,
               "Packs scale * weight, or the weight of the convolution that is the gradient with respect to x.");
    module.def("masked_conv", &masked_conv, py::arg("algorithm"), py::arg("instructions"), py::arg("x"),
               py::arg("packed"), py::arg("weight_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
               py::arg("shift").none(true), py::arg("mask").none(true), py::arg("residual").none(true),
               py::arg("lowest"), py::arg("highest"), py::arg("y").none(true), py::arg("saved").none(true),
               py::arg("num_threads") = 0, py::arg("previous") = py::none(), py::arg("dmask") = py::none(),
               "Writes the clamped convolution into `saved` and, times the mask, into `y`, or with `previous` the "
               "gradient of the layer that computed that, and of its mask; x and the results may have fewer channels "
               "than the packed weight.");
}

}  // namespace fastprune
