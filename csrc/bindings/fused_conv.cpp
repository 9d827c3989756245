// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// fused_conv for Python: checks, and the list of candidates.
#include "fastprune/fused_conv.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "bind.h"
#include "checks.h"
#include "fastprune/build.h"

namespace py = pybind11;

namespace fastprune {
namespace {

using check::refuse;

constexpr int64_t largest_step = 1 << 15;  // of strides, paddings and dilations: products of two stay small

std::string text(const std::initializer_list<int64_t>& sizes) {
    std::string list;
    for (const int64_t size : sizes) list += (list.empty() ? "" : ", ") + std::to_string(size);
    return "[" + list + "]";
}

const char* name_of(ConvType type) {
    switch (type) {
        case ConvType::float16: return "float16";
        case ConvType::bfloat16: return "bfloat16";
        case ConvType::tf32: return "float32";
    }
    return "";
}

std::optional<ConvType> type_of(const Tensor& tensor) {
    const auto [code, bits, lanes] = tensor.dtype();
    if (lanes != 1) return {};
    if (code == dlpack::code_float && bits == 16) return ConvType::float16;
    if (code == dlpack::code_bfloat && bits == 16) return ConvType::bfloat16;
    if (code == dlpack::code_float && bits == 32) return ConvType::tf32;
    return {};
}

/// Memory from the first to the last element of a view [N, C, H, W].
struct Span {
    const char* begin;
    int64_t bytes;  // 0 where there is no element
};

struct Image {
    const Tensor& tensor;
    int64_t n, c, h, w, pitch;

    bool empty() const { return n == 0 || c == 0 || h == 0 || w == 0; }
    Span span() const {
        // The product of the sizes fits where check_image has seen a pitch, that is, where there is an element.
        const int64_t elements = empty() ? 0 : (n * h * w - 1) * pitch + c;
        return {tensor.data_as<const char>(), elements * (tensor.dtype().bits / 8)};
    }
};

void check_memory(const char* name, const Tensor& tensor) {
    if (!tensor.problem().empty())
        throw py::type_error(std::string(name) + ": got " + tensor.problem() + ", needs a tensor with memory (DLPack)");
    if (!type_of(tensor))
        throw py::type_error(std::string(name) + ": got another dtype, needs float16, bfloat16 or float32");
    if (tensor.ndim() != 4)
        refuse(name, std::to_string(tensor.ndim()) + " dimensions", "four: [N, C, H, W] or [K, C, R, S]");
    for (int d = 0; d < 4; ++d) {
        if (tensor.size(d) < 0 || tensor.size(d) >= max_conv_bytes)
            refuse(name, "a size of " + std::to_string(tensor.size(d)), "sizes below 2^31");
    }
    if (reinterpret_cast<uintptr_t>(tensor.data()) % (tensor.dtype().bits / 8) != 0)
        refuse(name, "unaligned memory", "elements at multiples of their size");
}

/// A channels_last tensor, or a view of the first channels of one. Strides of dimensions of size 1 say nothing.
Image check_image(const char* name, const Tensor& tensor) {
    check_memory(name, tensor);
    Image image{tensor, tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3), tensor.size(1)};
    if (image.empty()) return image;
    const auto& [_, n, c, h, w, pitch] = image;
    image.pitch = w > 1 ? tensor.stride(3) : h > 1 ? tensor.stride(2) : n > 1 ? tensor.stride(0) : c;
    if (pitch < c || pitch >= max_conv_bytes || (c > 1 && tensor.stride(1) != 1) ||
        (h > 1 && tensor.stride(2) != pitch * w) || (n > 1 && tensor.stride(0) != pitch * w * h)) {
        refuse(name,
               "strides " + text({tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}) +
                   " for sizes " + text({n, c, h, w}),
               "a channels_last tensor or its first channels");
    }
    // In floating point: the product of four sizes below 2^31 may not fit into 64 bits.
    const double bytes = static_cast<double>(n) * static_cast<double>(h) * static_cast<double>(w) *
                         static_cast<double>(pitch) * (tensor.dtype().bits / 8);
    if (bytes >= static_cast<double>(max_conv_bytes))
        refuse(name, std::to_string(bytes / (1 << 20)) + " MiB", "fewer than 2048: indices have 32 bits");
    return image;
}

void check_same_type(const char* name, const Tensor& tensor, ConvType type) {
    if (*type_of(tensor) != type) {
        throw py::type_error(std::string(name) + ": got dtype " + name_of(*type_of(tensor)) + ", needs " +
                             name_of(type) + ", the dtype of x");
    }
}

void check_disjoint(const char* name, const Span& output, const char* other, const Span& input) {
    if (output.begin < input.begin + input.bytes && input.begin < output.begin + output.bytes)
        refuse(name, std::string("memory that overlaps ") + other, "memory of its own");
}

Image check_output(const char* name, const Tensor& tensor, const Image& x, const Image& weight, const Pair& size) {
    const Image output = check_image(name, tensor);
    check_same_type(name, tensor, *type_of(x.tensor));
    if (output.n != x.n || output.c != weight.n || output.h != size[0] || output.w != size[1]) {
        refuse(name, "shape " + text({output.n, output.c, output.h, output.w}),
               "shape " + text({x.n, weight.n, size[0], size[1]}));
    }
    check::writable({name, tensor});
    check::same_device({name, tensor}, {"x", x.tensor});
    check_disjoint(name, output.span(), "x", x.span());
    check_disjoint(name, output.span(), "weight", weight.span());
    return output;
}

/// Checks and returns what shapes and memory determine: everything but scale, shift, mask and activation.
FusedConvArgs check_convolution(const Tensor& x_tensor, const Tensor& weight_tensor, const Tensor& y_tensor,
                                const std::optional<Tensor>& saved_tensor, const Pair& stride, const Pair& padding,
                                const Pair& dilation) {
    const Image x = check_image("x", x_tensor);
    const Image weight = check_image("weight", weight_tensor);
    const ConvType type = *type_of(x_tensor);
    check_same_type("weight", weight_tensor, type);
    check::same_device({"weight", weight_tensor}, {"x", x_tensor});
    if (x.c == 0 || x.h == 0 || x.w == 0) refuse("x", "no channel or no pixel", "at least one");
    if (weight.c != x.c)
        refuse("weight", std::to_string(weight.c) + " input channels", std::to_string(x.c) + ", as many as x has");
    check::pair("stride", stride, 1, largest_step);
    check::pair("padding", padding, 0, largest_step);
    check::pair("dilation", dilation, 1, largest_step);
    const Pair size = {conv_output_size(x.h, weight.h, stride[0], padding[0], dilation[0]),
                       conv_output_size(x.w, weight.w, stride[1], padding[1], dilation[1])};
    if (weight.h < 1 || weight.w < 1 || size[0] < 1 || size[1] < 1) {
        refuse("weight", "a window of " + text({weight.h, weight.w}),
               "one that fits into the padded image of " + text({x.h + 2 * padding[0], x.w + 2 * padding[1]}));
    }
    const Image y = check_output("y", y_tensor, x, weight, size);
    std::optional<Image> saved;
    if (saved_tensor) {
        saved.emplace(check_output("saved", *saved_tensor, x, weight, size));
        check_disjoint("saved", saved->span(), "y", y.span());
    }
    const auto pair = [](const Pair& values, int32_t (&into)[2]) {
        into[0] = static_cast<int32_t>(values[0]);
        into[1] = static_cast<int32_t>(values[1]);
    };
    FusedConvArgs args{};
    args.type = type;
    args.x = x_tensor.data();
    args.weight = weight_tensor.data();
    args.y = y_tensor.data();
    args.saved = saved ? saved_tensor->data() : nullptr;
    args.n = x.n, args.h = x.h, args.w = x.w, args.c = x.c;
    args.k = weight.n, args.r = weight.h, args.s = weight.w, args.p = size[0], args.q = size[1];
    args.x_pitch = x.pitch, args.weight_pitch = weight.pitch, args.y_pitch = y.pitch;
    args.saved_pitch = saved ? saved->pitch : 0;
    pair(stride, args.stride);
    pair(padding, args.padding);
    pair(dilation, args.dilation);
    return args;
}

int num_candidates() {
    if constexpr (build::has_cuda) return cuda::fused_conv_candidates();
    return 0;
}

void check_candidate(int64_t candidate) {
    if (num_candidates() == 0)
        refuse("candidate", std::to_string(candidate),
               "a build of fastprune with CUTLASS; this one has no CUTLASS kernels");
    if (candidate < 0 || candidate >= num_candidates())
        refuse("candidate", std::to_string(candidate), "an index below " + std::to_string(num_candidates()));
}

bool supports(const FusedConvArgs& args, int candidate) {
    if constexpr (build::has_cuda) {
        // An empty convolution needs no alignment, and CUTLASS would divide by its sizes.
        const bool empty = args.n == 0 || args.k == 0;
        return empty || cuda::fused_conv_candidate(candidate).supports(args);
    }
    return false;
}

size_t workspace_bytes(const FusedConvArgs& args, int candidate) {
    if constexpr (build::has_cuda) {
        if (args.n != 0 && args.k != 0) return cuda::fused_conv_candidate(candidate).workspace(args);
    }
    return 0;
}

std::optional<size_t> fused_conv_workspace(const Tensor& x, const Tensor& weight, const Tensor& y,
                                           const std::optional<Tensor>& saved, const Pair& stride, const Pair& padding,
                                           const Pair& dilation, int64_t candidate) {
    const FusedConvArgs args = check_convolution(x, weight, y, saved, stride, padding, dilation);
    check_candidate(candidate);
    const auto index = static_cast<int>(candidate);
    if (!supports(args, index)) return {};
    return workspace_bytes(args, index);
}

/// The outputs, y and saved. No other argument may overlap them.
struct Outputs {
    Image y;
    std::optional<Image> saved;

    Outputs(const Tensor& y, const std::optional<Tensor>& saved) : y(check_image("y", y)) {
        if (saved) this->saved.emplace(check_image("saved", *saved));
    }
    void check_disjoint_from(const char* name, const Tensor& vector) const {
        const Span span{vector.data_as<const char>(), vector.num_bytes()};
        check_disjoint("y", y.span(), name, span);
        if (saved) check_disjoint("saved", saved->span(), name, span);
    }
};

const float* check_channels(const char* name, const std::optional<Tensor>& vector, const Tensor& x,
                            const Outputs& outputs, int64_t filters) {
    if (!vector) return nullptr;
    check::vector({name, *vector}, DType::float32, filters, "one number for each filter of weight");
    check::same_device({name, *vector}, {"x", x});
    outputs.check_disjoint_from(name, *vector);
    return vector->data_as<const float>();
}

// Without CUTLASS there is no kernel to give it to.
[[maybe_unused]] void* check_workspace(const std::optional<Tensor>& workspace, const Tensor& x, size_t bytes) {
    if (bytes == 0) return nullptr;
    if (!workspace || !workspace->problem().empty()) refuse("workspace", "none", std::to_string(bytes) + " bytes");
    check::same_device({"workspace", *workspace}, {"x", x});
    check::writable({"workspace", *workspace});
    const bool fits = workspace->contiguous() && workspace->num_bytes() >= static_cast<int64_t>(bytes) &&
                      reinterpret_cast<uintptr_t>(workspace->data()) % 256 == 0;
    if (!fits) {
        refuse("workspace", std::to_string(workspace->num_bytes()) + " bytes",
               std::to_string(bytes) + " contiguous ones, aligned to 256");
    }
    return workspace->data();
}

void fused_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& shift, const std::optional<Tensor>& mask, const Tensor& y,
                const std::optional<Tensor>& saved, const Pair& stride, const Pair& padding, const Pair& dilation,
                const std::string& activation, int64_t candidate, const std::optional<Tensor>& workspace) {
    FusedConvArgs args = check_convolution(x, weight, y, saved, stride, padding, dilation);
    const Outputs outputs(y, saved);
    args.scale = check_channels("scale", scale, x, outputs, args.k);
    args.shift = check_channels("shift", shift, x, outputs, args.k);
    args.mask = check_channels("mask", mask, x, outputs, args.k);
    args.activation = check::activation(activation);
    check_candidate(candidate);
    if constexpr (build::has_cuda) {
        const auto index = static_cast<int>(candidate);
        if (!x.on_cuda()) refuse("x", "a tensor on the CPU", "one on CUDA: CUTLASS has no other kernels");
        if (!supports(args, index)) {
            refuse("candidate", std::string("'") + cuda::fused_conv_candidate(index).name + "'",
                   "one that supports these arguments (see fused_conv_workspace)");
        }
        void* scratch = check_workspace(workspace, x, workspace_bytes(args, index));
        if (scratch != nullptr) outputs.check_disjoint_from("workspace", *workspace);
        void* stream = x.current_stream();
        const int device = x.device().id;
        Status status;
        {
            const py::gil_scoped_release release;
            status = cuda::fused_conv(args, index, scratch, device, stream);
        }
        check::status(status);
    }
}

py::list fused_conv_candidates() {
    py::list list;
    if constexpr (build::has_cuda) {
        for (int i = 0; i < cuda::fused_conv_candidates(); ++i) {
            const cuda::ConvCandidate& candidate = cuda::fused_conv_candidate(i);
            py::dict entry;
            entry["name"] = candidate.name;
            entry["dtype"] = name_of(candidate.type);
            entry["capabilities"] = py::make_tuple(candidate.first_capability, candidate.last_capability);
            list.append(entry);
        }
    }
    return list;
}

}  // namespace

void bind_fused_conv(py::module_& module) {
    module.def("fused_conv_candidates", &fused_conv_candidates,
               "Kernels of this build: name, dtype, and the first and last compute capability (10 major + minor) with "
               "code. Their places in the list are the numbers that the other functions take.");
    module.def("fused_conv_workspace", &fused_conv_workspace, py::arg("x"), py::arg("weight"), py::arg("y"),
               py::arg("saved").none(true), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
               py::arg("candidate"),
               "Bytes of workspace that the candidate needs for these tensors, or None if it does not support them.");
    module.def("fused_conv", &fused_conv, py::arg("x"), py::arg("weight"), py::arg("scale").none(true),
               py::arg("shift").none(true), py::arg("mask").none(true), py::arg("y"), py::arg("saved").none(true),
               py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("activation"), py::arg("candidate"),
               py::arg("workspace").none(true) = py::none(),
               "Writes mask * activation(scale * conv(x, weight) + shift) into `y` with one candidate.");
}

}  // namespace fastprune
