// Shows the library's parts to tests/test_cpp.py: raw results in files, one line each on stdout.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <future>
#include <string>

#include "bundle.hpp"
#include "preprocess.hpp"
#include "rexdeploy/classifier.hpp"
#include "rexdeploy/image.hpp"

namespace {

using rexdeploy::Classifier;
using rexdeploy::Image;
using rexdeploy::Manifest;

template <typename Element>
void write(const std::string& file, const std::vector<Element>& values) {
    std::ofstream out(file, std::ios::binary);
    out.write(reinterpret_cast<const char*>(values.data()),
              static_cast<std::streamsize>(values.size() * sizeof(Element)));
    if (!out.flush()) {
        throw rexdeploy::Error("cannot write " + file);
    }
}

Manifest read_manifest(const std::string& file) {
    const std::vector<std::uint8_t> data = rexdeploy::read_file(file);
    return rexdeploy::parse_manifest({reinterpret_cast<const char*>(data.data()), data.size()},
                                     file);
}

/// decode OUT IMAGE: RGB bytes; "width height"
void decode(char** arguments) {
    const Image image = rexdeploy::load_image(arguments[1]);
    write(arguments[0], image.rgb);
    std::printf("%d %d\n", image.width, image.height);
}

/// preprocess OUT MANIFEST IMAGE: float32 [3, height, width]
void preprocess(char** arguments) {
    const rexdeploy::Preprocess spec = read_manifest(arguments[1]).model.preprocess;
    const Image image = rexdeploy::load_image(arguments[2]);
    const auto pixels = rexdeploy::crop(image.rgb.data(), image.width, image.height, spec);
    std::vector<float> normalised(pixels.size());
    rexdeploy::normalise(pixels.data(), spec, normalised.data());
    write(arguments[0], normalised);
    std::printf("ok\n");
}

/// "x" and the bytes in hexadecimal digits.
template <typename Bytes>
std::string hex(const Bytes* bytes, std::size_t size) {
    std::string digits = "x";
    for (std::size_t index = 0; index < size; ++index) {
        char byte[3];
        std::snprintf(byte, sizeof byte, "%02x", static_cast<unsigned char>(bytes[index]));
        digits += byte;
    }
    return digits;
}

std::string hex(const std::string& text) { return hex(text.data(), text.size()); }

/// manifest FILE: everything that was read, as tests/test_one_meaning.py spells it
void manifest(char** arguments) {
    const Manifest read = read_manifest(arguments[0]);
    const rexdeploy::Preprocess& spec = read.model.preprocess;
    const auto bytes = [](const auto& value) {
        return hex(reinterpret_cast<const unsigned char*>(&value), sizeof value);
    };
    std::printf("%s %d %d %d %s %d %s %s %d %d", hex(read.model.title).c_str(),
                read.model.num_classes, spec.height, spec.width, bytes(spec.crop_pct).c_str(),
                spec.interpolation == rexdeploy::Interpolation::bicubic, bytes(spec.mean).c_str(),
                bytes(spec.std).c_str(), read.model.input == rexdeploy::InputType::uint8,
                read.model.gives_probabilities);
    for (const rexdeploy::Artifact& item : read.artifacts) {
        const rexdeploy::BatchRange batch = item.batch.value_or(rexdeploy::BatchRange{0, 0, 0});
        std::printf(" | %s %s %s %s %s %d:%d:%d %s %s", item.kind.c_str(), item.file.c_str(),
                    item.sha256.c_str(), hex(item.parent_sha256).c_str(),
                    hex(item.precision).c_str(), batch.min, batch.opt, batch.max,
                    hex(item.flavor).c_str(), hex(item.command).c_str());
    }
    std::printf("\n");
}

/// Runs the images, then again in several threads at once, which must give the same.
template <typename Element>
std::vector<float> run(const Classifier& classifier, const std::vector<std::uint8_t>& data) {
    std::vector<Element> images(data.size() / sizeof(Element));
    std::memcpy(images.data(), data.data(), images.size() * sizeof(Element));
    const std::size_t size = std::size_t{3} * static_cast<std::size_t>(classifier.height()) *
                             static_cast<std::size_t>(classifier.width());
    const int count = static_cast<int>(images.size() / size);
    const std::vector<float> outputs = classifier.run(images.data(), count);
    std::vector<std::future<std::vector<float>>> answers;
    for (int thread = 0; thread < 3; ++thread) {
        answers.push_back(
            std::async(std::launch::async, [&] { return classifier.run(images.data(), count); }));
    }
    for (auto& answer : answers) {
        if (answer.get() != outputs) {
            throw rexdeploy::Error("another thread got other outputs");
        }
    }
    return outputs;
}

/// outputs OUT BUNDLE THREADS IMAGES: float32 [N, num_classes] of raw images
void outputs(char** arguments) {
    rexdeploy::Options options;
    options.threads = std::atoi(arguments[2]);
    Classifier moved(arguments[1], options);
    const Classifier classifier(std::move(moved));
    try {
        moved.run(static_cast<const float*>(nullptr), 1);
        throw std::logic_error("what was moved from ran");
    } catch (const rexdeploy::Error&) {
    }
    const std::vector<std::uint8_t> data = rexdeploy::read_file(arguments[3]);
    write(arguments[0], classifier.input() == rexdeploy::InputType::uint8
                            ? run<std::uint8_t>(classifier, data)
                            : run<float>(classifier, data));
    std::printf("%s\n", classifier.backend().c_str());
}

struct Command {
    const char* name;
    int arguments;
    void (*run)(char** arguments);
};

constexpr Command kCommands[] = {
    {"decode", 2, decode},
    {"preprocess", 3, preprocess},
    {"manifest", 1, manifest},
    {"outputs", 4, outputs},
};

}  // namespace

/// COMMAND ARGUMENT..., where several calls of one command may follow each other.
int main(int argc, char** argv) {
    for (const Command& command : kCommands) {
        if (argc < 2 || std::strcmp(argv[1], command.name) != 0) {
            continue;
        }
        for (int index = 2; index + command.arguments <= argc; index += command.arguments) {
            try {
                command.run(argv + index);
            } catch (const rexdeploy::Error& error) {
                std::printf("error: %s\n", error.what());
            }
        }
        return 0;
    }
    std::fprintf(stderr, "expected a command; see tests/probe.cpp\n");
    return 1;
}
