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

#include "../cpu/instruction_set.h"
#include "bind.h"
#include "channel_views.h"
#include "checks.h"

namespace py = pybind11;

namespace fastprune {
namespace {

using Optional = std::optional<Tensor>;
using Pair = std::array<int64_t, 2>;

constexpr int64_t largest = int64_t{1} << 31;  // of a size or a step: products of two of them fit into 64 bits

ConvAlgorithm algorithm_of(const std::string& name) {
    if (name == "direct") return ConvAlgorithm::direct;
    if (name == "winograd") return ConvAlgorithm::winograd;
    if (name == "depthwise") return ConvAlgorithm::depthwise;
    throw py::value_error("algorithm: got '" + name + "', needs direct, winograd or depthwise");
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

/// 0 and less: as many as OpenMP would take. Its runtime ends the process when it cannot start as many as it is told.
int threads_of(int num_threads) {
    constexpr int most = 1024;
    if (num_threads > most) {
        throw py::value_error("num_threads: got " + std::to_string(num_threads) + ", needs at most " +
                              std::to_string(most));
    }
    return num_threads > 0 ? num_threads : omp_get_max_threads();
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
            throw py::value_error(std::string(name) + ": got " + std::to_string(value) +
                                  " as one of its sizes, needs "
                                  "sizes of at least 1 with a product below 2^31");
        }
    }
    return {size[0], size[1], {{size[2], size[3]}, {1, 1}, {0, 0}, {1, 1}}};
}

ConvKernel kernel_of(const std::string& algorithm, const std::string& instructions, const WeightSize& size) {
    const ConvKernel kernel{algorithm_of(algorithm), instructions_of(instructions)};
    const bool depthwise = kernel.algorithm == ConvAlgorithm::depthwise;
    if (!cpu::masked_conv_supports(kernel.algorithm, size.geometry) || (depthwise && size.channels != 1)) {
        throw py::value_error("algorithm: got '" + algorithm + "', needs 'direct' for all but " +
                              (depthwise ? "[K, 1, R, S] weights of up to " + std::to_string(depthwise_taps) + " taps"
                                         : "3x3 kernels of stride 1"));
    }
    return kernel;
}

void on_cpu(const Argument& argument) {
    if (!argument.tensor.on_cpu()) {
        throw py::value_error(std::string(argument.name) + ": got a CUDA tensor, needs one on the CPU");
    }
}

void four_dimensions(const Argument& argument, const char* meaning) {
    if (argument.tensor.ndim() != 4) {
        throw py::value_error(std::string(argument.name) + ": got " + std::to_string(argument.tensor.ndim()) +
                              " dimensions, needs four, " + meaning);
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
            throw py::value_error(std::string(output.name) + ": got memory that overlaps " + other.name +
                                  ", needs memory of its own");
        }
    }
}

void check_packed(const Argument& packed, const ConvKernel& kernel, const WeightSize& size) {
    const int64_t length = cpu::packed_conv_size(kernel, size.geometry, size.rows, size.channels);
    check::vector(packed, DType::float32, length, "packed_conv_size of the weight");
    on_cpu(packed);
}

int64_t packed_conv_size(const std::string& algorithm, const std::string& instructions,
                         const std::array<int64_t, 4>& size) {
    const WeightSize weight = weight_size("weight_size", size);
    return cpu::packed_conv_size(kernel_of(algorithm, instructions, weight), weight.geometry, weight.rows,
                                 weight.channels);
}

void pack_masked_conv(const std::string& algorithm, const std::string& instructions, const Tensor& weight,
                      const Optional& scale, bool transposed, const Tensor& packed, int num_threads) {
    check::strided_tensor({"weight", weight}, {DType::float32});
    on_cpu({"weight", weight});
    four_dimensions({"weight", weight}, "[K, C, R, S]");
    std::array<int64_t, 4> size{}, strides{};
    for (int d = 0; d < 4; ++d) size[d] = weight.size(d), strides[d] = weight.stride(d);
    const float* data = weight.data_as<const float>();
    if (transposed && scale) throw py::value_error("scale: got one for a transposed weight, needs None");
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
        on_cpu({"scale", *scale});
        check::disjoint({"packed", packed}, {"scale", *scale});
    }
    const int threads = threads_of(num_threads);
    const float* factors = scale ? scale->data_as<const float>() : nullptr;
    const py::gil_scoped_release release;
    cpu::pack_masked_conv(kernel, of.geometry, of.rows, of.channels, data, strides.data(), factors,
                          packed.data_as<float>(), threads);
}

/// The pitch of [N, C, H, W] with neighbouring channels.
int64_t pitch_of(const Argument& argument) {
    check::strided_tensor(argument, {DType::float32});
    on_cpu(argument);
    four_dimensions(argument, "[N, C, H, W]");
    for (int d = 0; d < 4; ++d) {
        if (argument.tensor.size(d) >= largest) {
            throw py::value_error(std::string(argument.name) + ": got size " + std::to_string(argument.tensor.size(d)) +
                                  " in dimension " + std::to_string(d) + ", needs sizes below 2^31");
        }
    }
    if (argument.tensor.numel() == 0) return argument.tensor.size(1);
    const auto pitch = rows_stride(argument.tensor);
    if (!pitch) {
        throw py::value_error(std::string(argument.name) +
                              ": got other strides, needs channels_last memory, or some neighbouring channels of such");
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

/// P or Q: how many outputs there are in direction d.
int64_t output_size(const Tensor& x, const ConvGeometry& geometry, int d) {
    const int64_t span = geometry.dilation[d] * (geometry.kernel[d] - 1) + 1;
    const int64_t padding = geometry.padding[d], padded = x.size(2 + d) + 2 * padding;
    if (padding >= span) {
        throw py::value_error("padding: got " + std::to_string(padding) + ", needs less than " + std::to_string(span) +
                              ", what the dilated kernel spans");
    }
    return padded < span ? 0 : (padded - span) / geometry.stride[d] + 1;
}

/// How many channels a tensor has: some of those that the weight has.
int64_t channels_of(const Argument& argument, int64_t most) {
    four_dimensions(argument, "[N, C, H, W]");
    const int64_t channels = argument.tensor.size(1);
    if (channels < 1 || channels > most) {
        throw py::value_error(std::string(argument.name) + ": got " + std::to_string(channels) +
                              " channels, needs 1 to " + std::to_string(most));
    }
    return channels;
}

/// shift or mask; null if there is none. `inputs` gets where it lies.
const float* vector_of(const char* name, const Optional& vector, int64_t length, std::vector<Region>& inputs) {
    if (!vector) return nullptr;
    check::vector({name, *vector}, DType::float32, length, "one for each channel of the result");
    on_cpu({name, *vector});
    inputs.push_back(vector_region({name, *vector}));
    return vector->data_as<const float>();
}

/// An optional operand like the result; `inputs` gets where it lies.
Pixels pixels_of(const char* name, const Optional& operand, const std::array<int64_t, 4>& size,
                 std::vector<Region>& inputs) {
    if (!operand) return {nullptr, 0};
    const int64_t pitch = pitch_of({name, *operand});
    check_size({name, *operand}, size);
    inputs.push_back(pixels_region({name, *operand}, pitch));
    return {operand->data_as<const float>(), pitch};
}

/// An optional result; `regions` gets where it lies.
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
    check_pair("stride", stride, 1);
    check_pair("padding", padding, 0);
    check_pair("dilation", dilation, 1);
    WeightSize weight = weight_size("weight_size", packed_size);
    for (int d = 0; d < 2; ++d) {
        weight.geometry.stride[d] = stride[d];
        weight.geometry.padding[d] = padding[d];
        weight.geometry.dilation[d] = dilation[d];
    }
    const ConvKernel kernel = kernel_of(algorithm, instructions, weight);
    check_packed({"packed", packed}, kernel, weight);
    const int threads = threads_of(num_threads);
    if (!(lowest <= highest)) {
        throw py::value_error("lowest: got " + std::to_string(lowest) + ", needs at most highest, " +
                              std::to_string(highest));
    }
    if (!y && !saved) throw py::value_error("y: got None, needs a tensor unless saved is one");
    if (previous && shift) throw py::value_error("shift: got a tensor beside previous, needs None");
    if (previous && saved) throw py::value_error("saved: got a tensor beside previous, needs None");
    if (dmask && !previous) throw py::value_error("dmask: got a tensor without previous, needs None");

    const int64_t x_pitch = pitch_of({"x", x});
    const bool depthwise = kernel.algorithm == ConvAlgorithm::depthwise;
    const int64_t channels = channels_of({"x", x}, depthwise ? weight.rows : weight.channels);
    const int64_t rows = y ? channels_of({"y", *y}, weight.rows) : channels_of({"saved", *saved}, weight.rows);
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
    const cpu::InstructionSet widest = cpu::instruction_set();
    if (widest == cpu::InstructionSet::avx512) return {"avx512", "avx2"};
    if (widest == cpu::InstructionSet::avx2) return {"avx2"};
    return {};
}

}  // namespace

void bind_masked_conv(py::module_& module) {
    module.def(
        "masked_conv_instructions", &masked_conv_instructions,
        "What masked_conv is written for, this processor has and limit_instruction_set allows, the widest first.");
    module.attr("depthwise_taps") = depthwise_taps;
    module.def("packed_conv_size", &packed_conv_size, py::arg("algorithm"), py::arg("instructions"),
               py::arg("weight_size"), "How many floats a weight [K, C, R, S] has when packed.");
    module.def("pack_masked_conv", &pack_masked_conv, py::arg("algorithm"), py::arg("instructions"), py::arg("weight"),
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
