// Engines of TensorRT and TensorRT-RTX on the first NVIDIA GPU, as backends/trt.py runs them.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "gpu.hpp"
#include "library.hpp"
#include "model.hpp"

namespace rexdeploy {
namespace {

using nvinfer1::DataType;
using nvinfer1::OptProfileSelector;

// Observed in engines of TensorRT-RTX 1.7: see rexdeploy/backends/tensorrt_api.py.
constexpr std::size_t kRtxHeaderBytes = 64;
constexpr std::size_t kSizeAt = 16;
constexpr std::size_t kVersionAt = 24;

/// Keeps the first error, which names the cause; later ones are its echoes. TensorRT keeps the
/// first logger that it sees for the whole process: this is the only one.
class Logger final : public nvinfer1::ILogger {
 public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) {
            return;
        }
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (first_error_.empty()) {
                first_error_ = message;
            }
        } catch (const std::exception&) {
            // Without memory for the message there is none: nothing may leave this function.
        }
    }

    void clear() {
        const std::lock_guard<std::mutex> lock(mutex_);
        first_error_.clear();
    }

    std::string first_error() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return first_error_.empty() ? "TensorRT gave no reason" : first_error_;
    }

 private:
    std::mutex mutex_;
    std::string first_error_;
};

Logger& logger() {
    // Never destroyed: the library may log when the process ends.
    static Logger* const instance = new Logger;
    return *instance;
}

struct Version {
    int major;
    int minor;
    int patch;
    int build;

    std::string text() const {
        return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch) +
               "." + std::to_string(build);
    }
};

Version library_version(const Library& library) {
    const auto part = [&](const char* name) {
        return static_cast<int>(library.function<std::int32_t()>(name)());
    };
    return {part("getInferLibMajorVersion"), part("getInferLibMinorVersion"),
            part("getInferLibPatchVersion"), part("getInferLibBuildVersion")};
}

/// The library checks no version: with the headers of another major one, the first virtual call
/// would crash. TensorRT-RTX counts its versions on its own, and 1.7's classes are TensorRT 11's.
void check_version(const Version& version, bool is_rtx) {
    const bool is_same = version.major == NV_TENSORRT_MAJOR;
    const bool is_alike =
        is_rtx && NV_TENSORRT_MAJOR == 11 && version.major == 1 && version.minor >= 7;
    if (!is_same && !is_alike) {
        throw Unavailable("got the library " + version.text() +
                          ", expected one that fits the headers of TensorRT " +
                          std::to_string(NV_TENSORRT_MAJOR) +
                          " that this program was built with; set TENSORRT_INCLUDE_DIR in CMake "
                          "to the library's own headers");
    }
}

/// What can be told of an engine before TensorRT is asked.
void check_header(const std::vector<std::uint8_t>& plan, const Version& library) {
    if (plan.size() < 4 || std::memcmp(plan.data(), "vtrt", 4) != 0) {
        return;  // not of RTX: TensorRT itself says whether it can be read
    }
    std::uint64_t size = kRtxHeaderBytes;  // at least
    if (plan.size() >= kRtxHeaderBytes) {
        size = 0;
        for (std::size_t byte = 8; byte-- > 0;) {
            size = size << 8 | plan[kSizeAt + byte];
        }
    }
    if (plan.size() != size) {
        throw Error("a truncated TensorRT-RTX engine: got " + std::to_string(plan.size()) +
                    " bytes, expected " + std::to_string(size) + "; copy or build it again");
    }
    const std::uint8_t* bytes = &plan[kVersionAt];
    const std::string version = Version{bytes[0], bytes[1], bytes[2], bytes[3]}.text();
    if (version != library.text()) {
        throw Unavailable("the engine was built by TensorRT-RTX " + version +
                          " and this machine has " + library.text() +
                          "; build it again: rexdeploy build-trt");
    }
}

std::vector<std::int64_t> to_vector(const nvinfer1::Dims& dimensions) {
    return {dimensions.d, dimensions.d + std::max(dimensions.nbDims, 0)};
}

class TensorRTModel final : public Model {
 public:
    TensorRTModel(const std::vector<std::uint8_t>& plan, const ModelSpec& spec, bool is_rtx,
                  const std::filesystem::path& path)
        : library_(is_rtx ? Library(path, "REXDEPLOY_TENSORRT_RTX", "libtensorrt_rtx.so.1")
                          : Library(path, "REXDEPLOY_TENSORRT",
                                    "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR))) {
        const Version version = library_version(library_);
        check_version(version, is_rtx);
        check_header(plan, version);
        logger().clear();
        runtime_.reset(
            static_cast<nvinfer1::IRuntime*>(library_.function<void*(void*, std::int32_t)>(
                "createInferRuntime_INTERNAL")(static_cast<nvinfer1::ILogger*>(&logger()),
                                               NV_TENSORRT_VERSION)));
        if (runtime_ == nullptr) {
            throw Unavailable("TensorRT cannot start here: " + logger().first_error());
        }
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (engine_ == nullptr) {
            const std::string reason = logger().first_error();
            // cudaErrorInsufficientDriver; it also stands for a driver that is not there at all.
            const bool no_driver = reason.find("cudaError 35") != std::string::npos;
            throw Unavailable((no_driver ? "no NVIDIA GPU driver, or too old a one: "
                                         : "the engine cannot be loaded: ") +
                              reason);
        }
        gpu_ = std::make_unique<Gpu>();
        // TensorRT-RTX's engines are built with kREQUIRE_USER_ALLOCATION: the memory is ours to give.
        context_.reset(engine_->createExecutionContext(
            is_rtx ? nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED
                   : nvinfer1::ExecutionContextAllocationStrategy::kSTATIC));
        if (context_ == nullptr) {
            throw Unavailable("the engine cannot be started: " + logger().first_error());
        }
        if (is_rtx) {
            const std::int64_t size = std::max<std::int64_t>(engine_->getDeviceMemorySizeV2(), 1);
            const CUdeviceptr memory = gpu_->allocate(static_cast<std::size_t>(size));
            context_->setDeviceMemoryV2(reinterpret_cast<void*>(memory), size);
        }
        bind(spec);
    }

    void run(const void* images, int batch, float* output) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        logger().clear();
        gpu_->activate();
        nvinfer1::Dims shape = input_shape_;
        shape.d[0] = batch;
        if (!context_->setInputShape(input_.c_str(), shape)) {
            throw Error("the engine refuses a batch of " + std::to_string(batch) + ": " +
                        logger().first_error());
        }
        const auto count = static_cast<std::size_t>(batch);
        gpu_->upload(device_input_, images, count * image_bytes_);
        if (!context_->enqueueV3(gpu_->stream())) {
            throw Error("the engine failed: " + logger().first_error());
        }
        gpu_->download(output, device_output_, count * output_bytes_);
    }

 private:
    /// Checks the engine's input and output against the spec, and gives them device memory.
    void bind(const ModelSpec& spec) {
        if (engine_->getNbIOTensors() != 2) {
            throw Error("the engine has " + std::to_string(engine_->getNbIOTensors()) +
                        " inputs and outputs; expected one of each");
        }
        input_ = engine_->getIOTensorName(0);
        std::string output = engine_->getIOTensorName(1);
        if (engine_->getTensorIOMode(input_.c_str()) != nvinfer1::TensorIOMode::kINPUT) {
            std::swap(input_, output);
        }
        input_shape_ = engine_->getTensorShape(input_.c_str());
        check_shapes(to_vector(input_shape_), to_vector(engine_->getTensorShape(output.c_str())),
                     spec);
        const bool is_uint8 = spec.input == InputType::uint8;
        if (engine_->getTensorDataType(input_.c_str()) !=
                (is_uint8 ? DataType::kUINT8 : DataType::kFLOAT) ||
            engine_->getTensorDataType(output.c_str()) != DataType::kFLOAT) {
            throw Error("the engine's input or output is of another type than its manifest says");
        }
        std::int64_t most = input_shape_.d[0];
        if (most < 0) {
            most = engine_->getProfileShape(input_.c_str(), 0, OptProfileSelector::kMAX).d[0];
        }
        image_bytes_ = is_uint8 ? 1 : sizeof(float);
        const std::vector<std::int64_t> wanted = input_shape(spec);
        for (int index = 1; index < input_shape_.nbDims; ++index) {
            input_shape_.d[index] = wanted[index];  // where it is open in the engine
            image_bytes_ *= static_cast<std::size_t>(wanted[index]);
        }
        output_bytes_ = static_cast<std::size_t>(spec.num_classes) * sizeof(float);
        device_input_ = gpu_->allocate(static_cast<std::size_t>(most) * image_bytes_);
        device_output_ = gpu_->allocate(static_cast<std::size_t>(most) * output_bytes_);
        for (const auto& [name, pointer] :
             {std::pair(input_, device_input_), std::pair(output, device_output_)}) {
            if (!context_->setTensorAddress(name.c_str(), reinterpret_cast<void*>(pointer))) {
                throw Error("the engine refuses a buffer for its tensor " + name);
            }
        }
    }

    // Destroyed from the last to the first: the context before its engine, that before its
    // runtime, and the memory that they use after them.
    Library library_;
    std::unique_ptr<Gpu> gpu_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::mutex mutex_;
    std::string input_;
    nvinfer1::Dims input_shape_{};
    std::size_t image_bytes_ = 0;
    std::size_t output_bytes_ = 0;  // of one image
    CUdeviceptr device_input_ = 0;
    CUdeviceptr device_output_ = 0;
};

}  // namespace

std::unique_ptr<Model> open_tensorrt(const std::vector<std::uint8_t>& plan, const ModelSpec& spec,
                                     bool is_rtx, const std::filesystem::path& library) {
    return std::make_unique<TensorRTModel>(plan, spec, is_rtx, library);
}

}  // namespace rexdeploy
