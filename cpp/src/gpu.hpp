// The first NVIDIA GPU, through the driver's own library: nothing of CUDA is linked.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <string>
#include <vector>

#include "library.hpp"

namespace rexdeploy {

/// The GPU's primary context (which TensorRT uses too), one stream, and the memory taken from it.
/// Every failure throws Unavailable with the driver's name for it.
class Gpu {
 public:
    Gpu();
    ~Gpu();
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;

    CUstream stream() const { return stream_; }
    /// Makes the context current in the calling thread.
    void activate() const;
    /// Device memory, freed with this object.
    CUdeviceptr allocate(std::size_t size_bytes);
    /// Enqueues a copy to the device.
    void upload(CUdeviceptr to, const void* from, std::size_t size_bytes) const;
    /// Copies from the device after everything enqueued before, and waits for it.
    void download(void* to, CUdeviceptr from, std::size_t size_bytes) const;

 private:
    struct Driver {
        Driver();
        Library library;
        decltype(cuInit)* init;
        decltype(cuGetErrorName)* error_name;
        decltype(cuDeviceGet)* device;
        decltype(cuDevicePrimaryCtxRetain)* retain;
        decltype(cuDevicePrimaryCtxRelease)* release;
        decltype(cuCtxSetCurrent)* set_current;
        decltype(cuStreamCreate)* create_stream;
        decltype(cuStreamDestroy)* destroy_stream;
        decltype(cuStreamSynchronize)* synchronize;
        decltype(cuMemAlloc)* allocate;
        decltype(cuMemFree)* free;
        decltype(cuMemcpyHtoDAsync)* upload;
        decltype(cuMemcpyDtoHAsync)* download;
    };

    void check(CUresult result, const char* what) const;

    Driver driver_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    CUstream stream_ = nullptr;
    std::vector<CUdeviceptr> memory_;
};

}  // namespace rexdeploy
