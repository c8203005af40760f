// A bundle's classifier: preprocessing, the network, its classes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "rexdeploy/error.hpp"
#include "rexdeploy/export.hpp"

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

/// The classes of one or more images, most probable first. Of a temporary, an image's classes are
/// a copy, so that a loop over `classifier.classify(crop)[0]` is right.
class Answers {
 public:
    REXDEPLOY_EXPORT explicit Answers(std::vector<std::vector<Prediction>> images);

    REXDEPLOY_EXPORT std::size_t size() const;  ///< images
    /// The classes of an image; throws Error past the last one.
    REXDEPLOY_EXPORT const std::vector<Prediction>& operator[](std::size_t image) const&;
    REXDEPLOY_EXPORT std::vector<Prediction> operator[](std::size_t image) const&&;

    REXDEPLOY_EXPORT std::vector<std::vector<Prediction>>::const_iterator begin() const&;
    REXDEPLOY_EXPORT std::vector<std::vector<Prediction>>::const_iterator end() const&;
    void begin() const&& = delete;  // it would point into what is gone
    void end() const&& = delete;

 private:
    std::vector<std::vector<Prediction>> images_;
};

/// A loaded bundle. Its const functions may be called from several threads at once; moving and
/// destroying it may not overlap with them. Every failure throws Error, but for a lack of memory,
/// which is std::bad_alloc.
class Classifier {
 public:
    /// Opens the bundle in the folder `bundle`: reads its manifest, checks the hash of the file
    /// that is to run and, for engines, the versions, and loads it.
    REXDEPLOY_EXPORT explicit Classifier(const std::filesystem::path& bundle,
                                         const Options& options = {});
    REXDEPLOY_EXPORT ~Classifier();
    REXDEPLOY_EXPORT Classifier(Classifier&&) noexcept;
    REXDEPLOY_EXPORT Classifier& operator=(Classifier&&) noexcept;

    /// Output `[batch, num_classes]` (float32, row by row) of normalised images
    /// `[batch, 3, height, width]`. Batches of any size >= 1: larger ones than the model takes are
    /// cut, smaller ones filled. Throws Error where input() is uint8.
    REXDEPLOY_EXPORT std::vector<float> run(const float* images, int batch) const;
    /// The same of RGB bytes `[batch, height, width, 3]`. Throws Error where input() is float32.
    REXDEPLOY_EXPORT std::vector<float> run(const std::uint8_t* images, int batch) const;

    /// The resized centre crop `[height, width, 3]` of RGB bytes `[image_height, image_width, 3]`:
    /// what a uint8 network takes. Equal to Pillow's (13.0 or later), byte for byte.
    REXDEPLOY_EXPORT std::vector<std::uint8_t> crop(const std::uint8_t* rgb, int image_width,
                                                    int image_height) const;
    /// The same crop, normalised, `[3, height, width]`: what a float32 network takes. Equal to
    /// Python's, bit for bit.
    REXDEPLOY_EXPORT std::vector<float> preprocess(const std::uint8_t* rgb, int image_width,
                                                   int image_height) const;

    /// The `top` (>= 1) most probable classes of every image, most probable first. `crops`: one or
    /// more images as crop() gives them, one after another, whatever input() is.
    REXDEPLOY_EXPORT Answers classify(const std::vector<std::uint8_t>& crops, int top = 5) const;

    REXDEPLOY_EXPORT InputType input() const;
    /// Images that the model runs at once; run() takes any number.
    REXDEPLOY_EXPORT int max_batch() const;
    REXDEPLOY_EXPORT int num_classes() const;
    REXDEPLOY_EXPORT int height() const;  ///< of the network's input, pixels
    REXDEPLOY_EXPORT int width() const;   ///< of the network's input, pixels
    /// Such as "rexnet 1.5".
    REXDEPLOY_EXPORT std::string title() const;
    /// What runs it: "tensorrt", "tensorrt-rtx" or "onnxruntime".
    REXDEPLOY_EXPORT std::string backend() const;
    /// Why better files of the bundle are not used, one line each.
    REXDEPLOY_EXPORT std::vector<std::string> passed_over() const;

 private:
    class Impl;
    const Impl& impl() const;
    std::unique_ptr<Impl> impl_;
};

}  // namespace rexdeploy
