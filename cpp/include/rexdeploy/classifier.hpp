// A bundle's classifier: preprocessing, the network, its classes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "rexdeploy/error.hpp"

namespace rexdeploy {

/// What the network takes: the float32 form leaves normalising to the caller.
enum class InputType {
    float32,  ///< `[N, 3, height, width]`, normalised: see Classifier::preprocess
    uint8,    ///< `[N, height, width, 3]`, RGB bytes: see Classifier::crop
};

struct Options {
    /// "auto", "tensorrt", "tensorrt-rtx" or "onnxruntime". "auto" takes the first that works:
    /// engines (float16 first), then ONNX Runtime.
    std::string backend = "auto";
    /// Threads of ONNX Runtime; 0 leaves it to the library.
    int threads = 0;
    /// ONNX Runtime's shared library. Empty: $REXDEPLOY_ONNXRUNTIME, or libonnxruntime.so.1 where
    /// the system's loader finds it. A process loads it once.
    std::filesystem::path onnxruntime{};
    /// TensorRT's shared library, of the flavour of the engine that is to run. Empty:
    /// $REXDEPLOY_TENSORRT or $REXDEPLOY_TENSORRT_RTX, or where the system's loader finds it.
    std::filesystem::path tensorrt{};
};

/// One class of one image.
struct Prediction {
    int index;           ///< 0 to num_classes - 1
    std::string label;   ///< "class 7" where the bundle has no labels
    double probability;  ///< 0 to 1
};

/// A loaded bundle. Its const functions may be called from several threads at once; moving and
/// destroying it may not overlap with them. Every failure throws Error, but for a lack of memory,
/// which is std::bad_alloc.
class Classifier {
 public:
    /// Opens the bundle in the folder `bundle`: reads its manifest, checks the hash of the file
    /// that is to run and, for engines, the versions, and loads it.
    explicit Classifier(const std::filesystem::path& bundle, const Options& options = {});
    ~Classifier();
    Classifier(Classifier&&) noexcept;
    Classifier& operator=(Classifier&&) noexcept;

    /// Output `[batch, num_classes]` (float32, row by row) of normalised images
    /// `[batch, 3, height, width]`. Batches of any size >= 1: larger ones than the model takes are
    /// cut, smaller ones filled. Throws Error where input() is uint8.
    std::vector<float> run(const float* images, int batch) const;
    /// The same of RGB bytes `[batch, height, width, 3]`. Throws Error where input() is float32.
    std::vector<float> run(const std::uint8_t* images, int batch) const;

    /// The resized centre crop `[height, width, 3]` of RGB bytes `[image_height, image_width, 3]`:
    /// what a uint8 network takes. Equal to Pillow's (13.0 or later), byte for byte.
    std::vector<std::uint8_t> crop(const std::uint8_t* rgb, int image_width,
                                   int image_height) const;
    /// The same crop, normalised, `[3, height, width]`: what a float32 network takes. Equal to
    /// Python's, bit for bit.
    std::vector<float> preprocess(const std::uint8_t* rgb, int image_width, int image_height) const;

    /// The `top` (>= 1) most probable classes of every image, most probable first. `crops`: one or
    /// more images as crop() gives them, one after another, whatever input() is.
    std::vector<std::vector<Prediction>> classify(const std::vector<std::uint8_t>& crops,
                                                  int top = 5) const;

    InputType input() const;
    int max_batch() const;  ///< images that the model runs at once; run() takes any number
    int num_classes() const;
    int height() const;  ///< of the network's input, pixels
    int width() const;   ///< of the network's input, pixels
    /// Such as "rexnet 1.5".
    const std::string& title() const;
    /// What runs it: "tensorrt", "tensorrt-rtx" or "onnxruntime".
    const std::string& backend() const;
    /// Why better files of the bundle are not used, one line each.
    const std::vector<std::string>& passed_over() const;

 private:
    class Impl;
    const Impl& impl() const;
    std::unique_ptr<Impl> impl_;
};

}  // namespace rexdeploy
