// Copyright 2026 the fastprune authors. SPDX-License-Identifier: Apache-2.0
//
// The part of the DLPack 1.x ABI that we read, declared from its specification (https://dmlc.github.io/dlpack).
// Layouts are the contract here: nothing may be reordered.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastprune::dlpack {

struct Version {
    uint32_t major, minor;
};

enum DeviceType : int32_t { cpu = 1, cuda = 2, cuda_host = 3, cuda_managed = 13 };

struct Device {
    int32_t type;
    int32_t id;
};

enum TypeCode : uint8_t {
    code_int = 0,
    code_uint = 1,
    code_float = 2,
    code_bfloat = 4,
    code_complex = 5,
    code_bool = 6
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null: row-major contiguous
    uint64_t byte_offset;
};
static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24));

/// Behind a capsule named "dltensor".
struct ManagedTensor {
    Tensor tensor;
    void* manager;
    void (*deleter)(ManagedTensor*);
};

inline constexpr uint64_t flag_read_only = 1;

/// Behind a capsule named "dltensor_versioned".
struct ManagedTensorVersioned {
    Version version;
    void* manager;
    void (*deleter)(ManagedTensorVersioned*);
    uint64_t flags;
    Tensor tensor;
};

/// Behind the capsule "dlpack_exchange_api", an attribute of the tensor's type. Tables of other major versions are
/// chained through `previous`. Functions return 0, or -1 with a Python error set.
struct ExchangeApi {
    Version version;
    ExchangeApi* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*borrow_from_object)(void* object, Tensor* out);  // may be null; `out` lives as long as the object
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};
static_assert(sizeof(void*) != 8 || sizeof(ExchangeApi) == 56);

}  // namespace fastprune::dlpack
