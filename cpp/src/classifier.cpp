// Opens the best file of a bundle that runs here, as rexdeploy/inference/classifier.py does, and runs it.
#include "rexdeploy/classifier.hpp"

#include <algorithm>
#include <climits>
#include <cmath>
#include <numeric>
#include <utility>

#include "bundle.hpp"
#include "model.hpp"
#include "preprocess.hpp"

namespace rexdeploy {
namespace {

constexpr int kChunk = 16;  // images at once where the model takes any number

struct Choice {
    std::string backend;
    const Artifact* artifact;
};

int rank(const Artifact& engine) {
    return engine.precision == "fp16" ? 0 : engine.precision == "bf16" ? 1 : 2;
}

/// Whether the processor sums products of 8 bits in 32: x86 with VNNI, or any other kind.
bool sums_in_32_bits() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512vnni") != 0 || __builtin_cpu_supports("avxvnni") != 0;
#else
    return true;
#endif
}

/// Backends with the file each would run, best first.
std::vector<Choice> choices(const Manifest& manifest, const std::string& backend) {
    std::vector<Choice> choices;
    const auto add = [&](const char* name, const Artifact& artifact) {
        if (backend == "auto" || backend == name) {
            choices.push_back({name, &artifact});
        }
    };
    for (const int wanted : {0, 1, 2}) {
        for (const Artifact& artifact : manifest.artifacts) {
            if (artifact.kind == "engine" && rank(artifact) == wanted) {
                add(artifact.flavor == "rtx" ? "tensorrt-rtx" : "tensorrt", artifact);
            }
        }
    }
    for (const Artifact& artifact : manifest.artifacts) {
        if (artifact.is_accepted_int8 && (!artifact.needs_int8 || sums_in_32_bits())) {
            add("onnxruntime", artifact);
        }
    }
    if (const Artifact* graph = manifest.find("onnx")) {
        add("onnxruntime", *graph);
    }
    return choices;
}

void check(const Options& options) {
    bool is_known = false;
    for (const char* name : {"auto", "tensorrt", "tensorrt-rtx", "onnxruntime"}) {
        is_known = is_known || options.backend == name;
    }
    if (!is_known) {
        throw Error("backend: got '" + options.backend +
                    "', expected one of auto, tensorrt, tensorrt-rtx, onnxruntime");
    }
    if (options.threads < 0) {
        throw Error("threads: got " + std::to_string(options.threads) + ", expected 0 or more");
    }
}

std::vector<std::string> read_labels(const Bundle& bundle) {
    const auto count = static_cast<std::size_t>(bundle.manifest().model.num_classes);
    const Artifact* artifact = bundle.manifest().find("labels");
    std::vector<std::string> labels;
    if (artifact == nullptr) {
        for (std::size_t index = 0; index < count; ++index) {
            labels.push_back("class " + std::to_string(index));
        }
        return labels;
    }
    const std::vector<std::uint8_t> data = bundle.read(*artifact);
    const std::string name = (bundle.path() / artifact->file).string();
    labels = parse_labels({reinterpret_cast<const char*>(data.data()), data.size()}, name);
    if (labels.size() != count) {
        throw Error(name + ": got " + std::to_string(labels.size()) + " labels, expected " +
                    std::to_string(count) + "; export again with --labels");
    }
    return labels;
}

/// In double precision, as the Python side does.
std::vector<double> softmax(const float* logits, int count) {
    const double largest = *std::max_element(logits, logits + count);
    std::vector<double> probabilities(logits, logits + count);
    double sum = 0;
    for (double& value : probabilities) {
        value = std::exp(value - largest);
        sum += value;
    }
    for (double& value : probabilities) {
        value /= sum;
    }
    return probabilities;
}

}  // namespace

class Classifier::Impl {
 public:
    Impl(const Bundle& bundle, const Options& options)
        : spec(bundle.manifest().model), labels(read_labels(bundle)) {
        check(options);
        for (const Choice& choice : choices(bundle.manifest(), options.backend)) {
            const std::vector<std::uint8_t> file = bundle.read(*choice.artifact);
            try {
                model = open(choice.backend, file, options);
            } catch (const Unavailable& error) {
                passed_over.push_back(choice.artifact->file + " on " + choice.backend + ": " +
                                      error.what());
                continue;
            } catch (const Error& error) {
                throw Error((bundle.path() / choice.artifact->file).string() + ": " + error.what());
            }
            backend = choice.backend;
            batch = choice.artifact->batch.value_or(BatchRange{1, kChunk, kChunk});
            return;
        }
        std::string reasons;
        for (const std::string& reason : passed_over) {
            reasons += (reasons.empty() ? "" : "; ") + reason;
        }
        throw Error(reasons.empty()
                        ? bundle.path().string() + " holds no file for backend " + options.backend +
                              ": 'rexdeploy build-trt' makes an engine, 'rexdeploy export' a graph"
                        : "nothing in the bundle can run here: " + reasons);
    }

    /// Runs images of any number in batches that the model takes.
    template <typename Element>
    std::vector<float> run(const Element* images, int count) const {
        if (images == nullptr || count < 1) {
            throw Error("images: got " + std::to_string(count) + " images, expected 1 or more");
        }
        const auto classes = static_cast<std::size_t>(spec.num_classes);
        const std::size_t size = image_size();
        std::vector<float> output(static_cast<std::size_t>(count) * classes);
        for (int start = 0; start < count; start += batch.max) {
            const int length = std::min(batch.max, count - start);
            const Element* first = images + static_cast<std::size_t>(start) * size;
            float* const answer = output.data() + static_cast<std::size_t>(start) * classes;
            if (length >= batch.min) {
                model->run(first, length, answer);
                continue;
            }
            // Filled by repeating its images.
            std::vector<Element> filled;
            for (int index = 0; index < batch.min; ++index) {
                const Element* image = first + static_cast<std::size_t>(index % length) * size;
                filled.insert(filled.end(), image, image + size);
            }
            std::vector<float> answers(static_cast<std::size_t>(batch.min) * classes);
            model->run(filled.data(), batch.min, answers.data());
            std::copy_n(answers.data(), static_cast<std::size_t>(length) * classes, answer);
        }
        if (!std::all_of(output.begin(), output.end(), [](float x) { return std::isfinite(x); })) {
            throw Error(backend + " gave " +
                        (spec.gives_probabilities ? "probabilities" : "logits") +
                        " that are NaN or infinite; see 'rexdeploy verify'");
        }
        return output;
    }

    /// Values of one image.
    std::size_t image_size() const {
        return std::size_t{3} * static_cast<std::size_t>(spec.preprocess.height) *
               static_cast<std::size_t>(spec.preprocess.width);
    }

    std::vector<Prediction> best(const float* row, int top) const {
        std::vector<double> probabilities(row, row + spec.num_classes);
        if (!spec.gives_probabilities) {
            probabilities = softmax(row, spec.num_classes);
        }
        std::vector<int> order(probabilities.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int left, int right) {
            return probabilities[left] > probabilities[right];
        });
        order.resize(std::min(order.size(), static_cast<std::size_t>(top)));
        std::vector<Prediction> predictions;
        for (const int index : order) {
            predictions.push_back({index, labels[index], probabilities[index]});
        }
        return predictions;
    }

    ModelSpec spec;
    std::vector<std::string> labels;
    std::vector<std::string> passed_over;
    std::string backend;
    BatchRange batch{};
    std::unique_ptr<Model> model;

 private:
    std::unique_ptr<Model> open(const std::string& name, const std::vector<std::uint8_t>& file,
                                const Options& options) const {
        if (name == "onnxruntime") {
            return open_onnxruntime(file, spec, options.threads, options.onnxruntime);
        }
        return open_tensorrt(file, spec, name == "tensorrt-rtx", options.tensorrt);
    }
};

Classifier::Classifier(const std::filesystem::path& bundle, const Options& options)
    : impl_(std::make_unique<Impl>(Bundle(bundle), options)) {}
Classifier::~Classifier() = default;
Classifier::Classifier(Classifier&&) noexcept = default;
Classifier& Classifier::operator=(Classifier&&) noexcept = default;

const Classifier::Impl& Classifier::impl() const {
    if (impl_ == nullptr) {
        throw Error("this Classifier was moved from: use the one that it was moved to");
    }
    return *impl_;
}

std::vector<float> Classifier::run(const float* images, int batch) const {
    if (impl().spec.input != InputType::float32) {
        throw Error("images: got float32, expected uint8 [N, height, width, 3], see crop()");
    }
    return impl().run(images, batch);
}

std::vector<float> Classifier::run(const std::uint8_t* images, int batch) const {
    if (impl().spec.input != InputType::uint8) {
        throw Error(
            "images: got uint8, expected normalised float32 [N, 3, height, width], see "
            "preprocess()");
    }
    return impl().run(images, batch);
}

std::vector<std::uint8_t> Classifier::crop(const std::uint8_t* rgb, int image_width,
                                           int image_height) const {
    return rexdeploy::crop(rgb, image_width, image_height, impl().spec.preprocess);
}

std::vector<float> Classifier::preprocess(const std::uint8_t* rgb, int image_width,
                                          int image_height) const {
    std::vector<float> normalised(impl().image_size());
    normalise(crop(rgb, image_width, image_height).data(), impl().spec.preprocess,
              normalised.data());
    return normalised;
}

Answers Classifier::classify(const std::vector<std::uint8_t>& crops, int top) const {
    const std::size_t size = impl().image_size();
    const std::size_t count = crops.size() / size;
    if (count < 1 || crops.size() % size != 0 || count > std::size_t{INT_MAX} || top < 1) {
        throw Error("got " + std::to_string(crops.size()) + " bytes and top " +
                    std::to_string(top) + ", expected one or more crops of " +
                    std::to_string(size) + " bytes and a top of 1 or more");
    }
    std::vector<float> output;
    if (input() == InputType::uint8) {
        output = run(crops.data(), static_cast<int>(count));
    } else {
        std::vector<float> images(crops.size());
        for (std::size_t start = 0; start < crops.size(); start += size) {
            normalise(crops.data() + start, impl().spec.preprocess, images.data() + start);
        }
        output = run(images.data(), static_cast<int>(count));
    }
    std::vector<std::vector<Prediction>> predictions;
    for (std::size_t index = 0; index < count; ++index) {
        predictions.push_back(
            impl().best(output.data() + index * static_cast<std::size_t>(num_classes()), top));
    }
    return Answers(std::move(predictions));
}

InputType Classifier::input() const { return impl().spec.input; }
int Classifier::max_batch() const { return impl().batch.max; }
int Classifier::num_classes() const { return impl().spec.num_classes; }
int Classifier::height() const { return impl().spec.preprocess.height; }
int Classifier::width() const { return impl().spec.preprocess.width; }
std::string Classifier::title() const { return impl().spec.title; }
std::string Classifier::backend() const { return impl().backend; }
std::vector<std::string> Classifier::passed_over() const { return impl().passed_over; }

Answers::Answers(std::vector<std::vector<Prediction>> images) : images_(std::move(images)) {}

std::size_t Answers::size() const { return images_.size(); }

const std::vector<Prediction>& Answers::operator[](std::size_t image) const& {
    if (image >= images_.size()) {
        throw Error("got image " + std::to_string(image) + ", expected one of the " +
                    std::to_string(images_.size()) + " classified, counted from 0");
    }
    return images_[image];
}

std::vector<Prediction> Answers::operator[](std::size_t image) const&& {
    const Answers& kept = *this;
    return kept[image];
}

std::vector<std::vector<Prediction>>::const_iterator Answers::begin() const& {
    return images_.begin();
}

std::vector<std::vector<Prediction>>::const_iterator Answers::end() const& { return images_.end(); }

}  // namespace rexdeploy
