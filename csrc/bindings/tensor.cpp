// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

namespace py = pybind11;

namespace fastprune {
namespace {

constexpr uint32_t dlpack_major = 1;

/// Returns the exchange table of the object's type, or null. Looks it up every time: a cache could go stale.
const dlpack::ExchangeApi* exchange_api_of(py::handle object) {
    static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    py::object capsule =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), name));
    if (!capsule || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
        PyErr_Clear();
        return nullptr;
    }
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api != nullptr && api->version.major != dlpack_major) api = api->previous;
    return api != nullptr && api->borrow_from_object != nullptr ? api : nullptr;
}

std::string type_name_of(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

/// "BufferError: first line": torch appends a C++ backtrace, which helps nobody who passed a wrong tensor.
std::string first_line_of(const py::error_already_set& error) {
    const std::string text = error.what();
    return text.substr(0, text.find('\n'));
}

/// torch negates lazily: a tensor with the negative bit holds the opposite of its values, and its exchange table does
/// not say so. torch.ops never passes one to a kernel; a direct caller can.
bool has_negative_bit(py::handle object) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    const py::object answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), name));
    if (!answer) {
        PyErr_Clear();
        return false;
    }
    return answer.ptr() == Py_True;
}

}  // namespace

Tensor Tensor::borrow(py::handle object) {
    Tensor tensor;
    try {
        tensor.api_ = exchange_api_of(object);
        if (tensor.api_ != nullptr) {
            tensor.borrow_through_exchange_api(object);
        } else {
            tensor.borrow_through_capsule(object);
        }
    } catch (const py::error_already_set& error) {
        tensor.problem_ = "a " + type_name_of(object) + " that does not lend its memory (" + first_line_of(error) + ")";
    }
    if (tensor.problem_.empty() && tensor.view_.data == nullptr && tensor.numel() > 0) {
        tensor.problem_ = "a " + type_name_of(object) + " without memory";
    }
    if (!tensor.problem_.empty()) tensor.view_ = {};  // a producer that fails may have filled half of it
    return tensor;
}

void Tensor::borrow_through_exchange_api(py::handle object) {
    if (api_->borrow_from_object(object.ptr(), &view_) != 0) throw py::error_already_set();
    if (has_negative_bit(object)) problem_ = "a tensor with the negative bit set; call .resolve_neg()";
}

void Tensor::borrow_through_capsule(py::handle object) {
    if (!py::hasattr(object, "__dlpack__")) {
        problem_ = "an object of type " + type_name_of(object);
        return;
    }
    const py::object export_tensor = object.attr("__dlpack__");
    try {
        capsule_ = export_tensor(py::arg("max_version") = py::make_tuple(dlpack_major, 0));
    } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) throw;
        capsule_ = export_tensor();  // a producer older than DLPack 1.0
    }
    // The capsule keeps its name, hence its destructor frees the export when we let go of it.
    if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned")) {
        const auto* managed =
            static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
        if (managed->version.major != dlpack_major) {
            problem_ = "a " + type_name_of(object) + " of DLPack version " + std::to_string(managed->version.major);
            return;
        }
        view_ = managed->tensor;
        read_only_ = (managed->flags & dlpack::flag_read_only) != 0;
    } else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor")) {
        view_ = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"))->tensor;
    } else {
        problem_ = "a " + type_name_of(object) + " whose __dlpack__() returns no DLPack capsule";
    }
}

int64_t Tensor::stride(int dim) const {
    if (view_.strides != nullptr) return view_.strides[dim];
    int64_t stride = 1;
    for (int d = dim + 1; d < view_.ndim; ++d) stride *= view_.shape[d];
    return stride;
}

int64_t Tensor::numel() const {
    int64_t count = 1;
    for (int d = 0; d < view_.ndim; ++d) count *= view_.shape[d];
    return count;
}

bool Tensor::contiguous() const {
    if (view_.strides == nullptr) return true;
    int64_t expected = 1;
    for (int d = view_.ndim - 1; d >= 0; --d) {
        if (view_.shape[d] == 0) return true;
        if (view_.shape[d] != 1 && view_.strides[d] != expected) return false;
        expected *= view_.shape[d];
    }
    return true;
}

void* Tensor::current_stream() const {
    void* stream = nullptr;
    if (api_ != nullptr && api_->current_work_stream != nullptr &&
        api_->current_work_stream(view_.device.type, view_.device.id, &stream) != 0) {
        throw py::error_already_set();
    }
    return stream;
}

}  // namespace fastprune
