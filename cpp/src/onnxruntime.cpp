// ONNX graphs on the CPU in ONNX Runtime.

// Its headers keep the library's function table in a symbol that is one for the whole process. Under
// a name of our own, a program that uses these headers too keeps its own library beside ours.
#define Ort RexdeployOrt
#define ORT_API_MANUAL_INIT
#include <onnxruntime/onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "library.hpp"
#include "model.hpp"

namespace rexdeploy {
namespace {

/// Loads the library once for the process: its headers keep its function table in a global.
void load_library(const std::filesystem::path& path) {
    static std::mutex mutex;
    static bool is_loaded = false;
    const std::lock_guard<std::mutex> lock(mutex);
    if (is_loaded) {
        return;
    }
    // Since 1.32 the library writes an id to disk and looks up its vendor's server. Only this stops
    // it: DisableTelemetryEvents needs an environment, which has written the id by then. Somebody's
    // own setting stands.
    ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    const Library library(path, "REXDEPLOY_ONNXRUNTIME", "libonnxruntime.so.1");
    const OrtApiBase* base = library.function<const OrtApiBase*()>("OrtGetApiBase")();
    const std::string version = base->GetVersionString();
    // Asked for a version that it lacks, the library would print to stderr: compare first.
    const auto dot = version.find('.');
    const int minor = dot == std::string::npos ? 0 : std::atoi(version.c_str() + dot + 1);
    const OrtApi* api = minor >= ORT_API_VERSION ? base->GetApi(ORT_API_VERSION) : nullptr;
    if (api == nullptr) {
        throw Unavailable("got ONNX Runtime " + version + " (" + library.name() + "), expected 1." +
                          std::to_string(ORT_API_VERSION) + " or later");
    }
    Ort::InitApi(api);
    is_loaded = true;
}

class OnnxRuntimeModel final : public Model {
 public:
    OnnxRuntimeModel(const std::vector<std::uint8_t>& graph, const ModelSpec& spec, int threads)
        : environment_(ORT_LOGGING_LEVEL_ERROR, "rexdeploy"),
          session_(environment_, graph.data(), graph.size(), options(threads)),
          shape_(input_shape(spec)),
          num_classes_(spec.num_classes),
          is_uint8_(spec.input == InputType::uint8) {
        Ort::AllocatorWithDefaultOptions allocator;
        if (session_.GetInputCount() != 1 || session_.GetOutputCount() != 1) {
            throw Error("the graph has " + std::to_string(session_.GetInputCount()) +
                        " inputs and " + std::to_string(session_.GetOutputCount()) +
                        " outputs; expected one of each");
        }
        input_ = session_.GetInputNameAllocated(0, allocator).get();
        output_ = session_.GetOutputNameAllocated(0, allocator).get();
        const Ort::TypeInfo input_type = session_.GetInputTypeInfo(0);
        const Ort::TypeInfo output_type = session_.GetOutputTypeInfo(0);
        if (input_type.GetONNXType() != ONNX_TYPE_TENSOR ||
            output_type.GetONNXType() != ONNX_TYPE_TENSOR) {
            throw Error("the graph's input or output is not a tensor");
        }
        const auto input = input_type.GetTensorTypeAndShapeInfo();
        const auto output = output_type.GetTensorTypeAndShapeInfo();
        const auto wanted =
            is_uint8_ ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        if (input.GetElementType() != wanted ||
            output.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            throw Error("the graph's input or output is of another type than its manifest says");
        }
        check_shapes(input.GetShape(), output.GetShape(), spec);
        const Ort::AllocatedStringPtr written =
            session_.GetModelMetadata().LookupCustomMetadataMapAllocated("rexdeploy.preprocess",
                                                                         allocator);
        if (written != nullptr) {  // somebody's own graph says nothing
            check_preprocess(written.get(), spec.preprocess);
        }
    }

    void run(const void* images, int batch, float* output) override {
        std::vector<std::int64_t> shape = shape_;
        shape[0] = batch;
        std::size_t count = 1;
        for (const std::int64_t size : shape) {
            count *= static_cast<std::size_t>(size);
        }
        const std::int64_t output_shape[] = {batch, num_classes_};
        void* const data = const_cast<void*>(images);  // the API knows no read-only tensors
        try {
            const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
            const Ort::Value input =
                is_uint8_ ? Ort::Value::CreateTensor<std::uint8_t>(
                                memory, static_cast<std::uint8_t*>(data), count, shape.data(),
                                shape.size())
                          : Ort::Value::CreateTensor<float>(memory, static_cast<float*>(data),
                                                            count, shape.data(), shape.size());
            Ort::Value answer = Ort::Value::CreateTensor<float>(
                memory, output, static_cast<std::size_t>(batch) * num_classes_, output_shape, 2);
            const char* input_name = input_.c_str();
            const char* output_name = output_.c_str();
            session_.Run(Ort::RunOptions{nullptr}, &input_name, &input, 1, &output_name, &answer,
                         1);
        } catch (const Ort::Exception& error) {
            throw Error("onnxruntime failed on a batch of " + std::to_string(batch) + " (" +
                        error.what() + ")");
        }
    }

 private:
    static Ort::SessionOptions options(int threads) {
        Ort::SessionOptions options;
        options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
        if (threads > 0) {
            options.SetIntraOpNumThreads(threads);
        }
        return options;
    }

    Ort::Env environment_;
    Ort::Session session_;
    std::vector<std::int64_t> shape_;
    int num_classes_;
    bool is_uint8_;
    std::string input_;
    std::string output_;
};

}  // namespace

std::unique_ptr<Model> open_onnxruntime(const std::vector<std::uint8_t>& graph,
                                        const ModelSpec& spec, int threads,
                                        const std::filesystem::path& library) {
    load_library(library);
    try {
        return std::make_unique<OnnxRuntimeModel>(graph, spec, threads);
    } catch (const Ort::Exception& error) {
        throw Error(std::string("not an ONNX model that onnxruntime can load (") + error.what() +
                    ")");
    }
}

}  // namespace rexdeploy
