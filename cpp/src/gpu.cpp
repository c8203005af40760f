// CUDA's driver API, loaded when it is first needed.
#include "gpu.hpp"

#include "model.hpp"

namespace rexdeploy {

// The names are those that cuda.h's macros stand for.
Gpu::Driver::Driver()
    : library({}, "REXDEPLOY_CUDA", "libcuda.so.1"),
      init(library.function<decltype(cuInit)>("cuInit")),
      error_name(library.function<decltype(cuGetErrorName)>("cuGetErrorName")),
      device(library.function<decltype(cuDeviceGet)>("cuDeviceGet")),
      retain(library.function<decltype(cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain")),
      release(
          library.function<decltype(cuDevicePrimaryCtxRelease)>("cuDevicePrimaryCtxRelease_v2")),
      set_current(library.function<decltype(cuCtxSetCurrent)>("cuCtxSetCurrent")),
      create_stream(library.function<decltype(cuStreamCreate)>("cuStreamCreate")),
      destroy_stream(library.function<decltype(cuStreamDestroy)>("cuStreamDestroy_v2")),
      synchronize(library.function<decltype(cuStreamSynchronize)>("cuStreamSynchronize")),
      allocate(library.function<decltype(cuMemAlloc)>("cuMemAlloc_v2")),
      free(library.function<decltype(cuMemFree)>("cuMemFree_v2")),
      upload(library.function<decltype(cuMemcpyHtoDAsync)>("cuMemcpyHtoDAsync_v2")),
      download(library.function<decltype(cuMemcpyDtoHAsync)>("cuMemcpyDtoHAsync_v2")) {}

Gpu::Gpu() {
    check(driver_.init(0), "cuInit");
    check(driver_.device(&device_, 0), "cuDeviceGet");
    check(driver_.retain(&context_, device_), "cuDevicePrimaryCtxRetain");
    try {
        activate();
        check(driver_.create_stream(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    } catch (...) {
        driver_.release(device_);
        throw;
    }
}

Gpu::~Gpu() {
    // Nothing can be done about a failure here; the process's end frees all of it.
    driver_.set_current(context_);
    for (const CUdeviceptr pointer : memory_) {
        driver_.free(pointer);
    }
    driver_.destroy_stream(stream_);
    driver_.release(device_);
}

void Gpu::activate() const { check(driver_.set_current(context_), "cuCtxSetCurrent"); }

CUdeviceptr Gpu::allocate(std::size_t size_bytes) {
    memory_.reserve(memory_.size() + 1);  // what is allocated below must not be lost
    CUdeviceptr pointer = 0;
    check(driver_.allocate(&pointer, size_bytes), "cuMemAlloc");
    memory_.push_back(pointer);
    return pointer;
}

void Gpu::upload(CUdeviceptr to, const void* from, std::size_t size_bytes) const {
    check(driver_.upload(to, from, size_bytes, stream_), "cuMemcpyHtoDAsync");
}

void Gpu::download(void* to, CUdeviceptr from, std::size_t size_bytes) const {
    check(driver_.download(to, from, size_bytes, stream_), "cuMemcpyDtoHAsync");
    check(driver_.synchronize(stream_), "cuStreamSynchronize");
}

void Gpu::check(CUresult result, const char* what) const {
    if (result != CUDA_SUCCESS) {
        const char* name = nullptr;
        driver_.error_name(result, &name);
        throw Unavailable(std::string(what) +
                          " failed: " + (name != nullptr ? name : std::to_string(result)));
    }
}

}  // namespace rexdeploy
