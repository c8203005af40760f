// The two engines behind a Classifier, and what they share.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace rexdeploy {

/// This machine cannot run a file (a library, a driver or a GPU is missing, or its version is
/// another): the next one may be tried.
class Unavailable : public Error {
    using Error::Error;
};

/// A loaded network. Thread-safe.
class Model {
 public:
    virtual ~Model() = default;

    /// Runs `batch` images, in the form and layout of the model's input, and writes
    /// `[batch, num_classes]` to `output`. Throws Error.
    virtual void run(const void* images, int batch, float* output) = 0;
};

/// Loads an ONNX graph. `library`: a path, or empty for the default. Throws Unavailable where
/// there is no usable ONNX Runtime, Error for a graph that it cannot run.
std::unique_ptr<Model> open_onnxruntime(const std::vector<std::uint8_t>& graph,
                                        const ModelSpec& spec, int threads,
                                        const std::filesystem::path& library);

/// Loads an engine of TensorRT, or of TensorRT-RTX (`is_rtx`). `library` as above. Throws
/// Unavailable where this machine cannot run it, Error for a damaged engine.
std::unique_ptr<Model> open_tensorrt(const std::vector<std::uint8_t>& plan, const ModelSpec& spec,
                                     bool is_rtx, const std::filesystem::path& library);

/// Dimensions, where -1 is open, as "[-1, 3, 224, 224]".
std::string to_text(const std::vector<std::int64_t>& shape);

/// The shape of the spec's input for any batch size, the batch as -1.
std::vector<std::int64_t> input_shape(const ModelSpec& spec);

/// Throws Error unless the shapes (of the batch's and other open dimensions -1) are the spec's.
void check_shapes(const std::vector<std::int64_t>& input, const std::vector<std::int64_t>& output,
                  const ModelSpec& spec);

}  // namespace rexdeploy
