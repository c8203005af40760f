// A bundle's manifest.json, as rexdeploy/bundle/manifest.py defines it.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rexdeploy/classifier.hpp"

namespace rexdeploy {

enum class Interpolation { bicubic, bilinear };

/// How an image becomes the network's input.
struct Preprocess {
    int height;  // pixels
    int width;   // pixels
    double crop_pct;
    Interpolation interpolation;
    std::array<float, 3> mean;
    std::array<float, 3> std;
};

struct ModelSpec {
    std::string title;
    int num_classes;
    Preprocess preprocess;
    InputType input;
    bool gives_probabilities;  // the graph ends in its softmax; otherwise it gives logits
};

/// 1 <= min <= opt <= max
struct BatchRange {
    int min;
    int opt;
    int max;
};

struct Artifact {
    std::string kind;
    std::string file;  // a plain name inside the bundle's folder
    std::string sha256;
    std::string parent_sha256;        // empty: none
    std::string precision;            // empty: none
    std::optional<BatchRange> batch;  // none: any batch size
    std::string flavor;               // of an engine: "rtx" or "tensorrt"
    bool is_accepted_int8 = false;    // the graph for CPUs that quantize has accepted
    bool needs_int8 = false;          // its sums saturate on x86 without VNNI
    std::string command;              // makes the file again
};

struct Manifest {
    ModelSpec model;
    std::vector<Artifact> artifacts;

    /// The first artifact of the kind, or null.
    const Artifact* find(std::string_view kind) const;
};

/// Reads a manifest strictly; `where` is its path. Throws Error that names the first wrong field.
Manifest parse_manifest(std::string_view json, const std::string& where);

/// Throws Error if the preprocessing that a graph's metadata has written down (JSON) is another one
/// than the manifest's.
void check_preprocess(const std::string& written, const Preprocess& preprocess);

/// The class names in a file of labels, by the rule of rexdeploy/bundle/labels.py; `where` is its path.
/// Throws Error that names the first line that breaks it.
std::vector<std::string> parse_labels(std::string_view text, const std::string& where);

}  // namespace rexdeploy
