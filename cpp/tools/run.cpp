// rexdeploy-run: classifies image files; prints what `rexdeploy predict` prints.
#include <cstdio>

#include "arguments.hpp"
#include "rexdeploy/classifier.hpp"
#include "rexdeploy/image.hpp"

namespace {

constexpr const char* kUsage =
    "Usage: rexdeploy-run [OPTION]... BUNDLE IMAGE...\n"
    "Classifies JPEG and PNG files with the best backend present.\n"
    "  --top N         classes to print for an image [default: 5]\n"
    "  --backend NAME  auto, tensorrt, tensorrt-rtx or onnxruntime [default: auto]\n"
    "  -q, --quiet     print errors only\n"
    "Libraries that the system's loader does not find are named by REXDEPLOY_ONNXRUNTIME,\n"
    "REXDEPLOY_TENSORRT and REXDEPLOY_TENSORRT_RTX.\n";

/// The path as Python's pathlib prints it: without "." and doubled slashes.
std::string shown(const std::string& path) {
    std::filesystem::path result;
    for (const std::filesystem::path& part : std::filesystem::path(path)) {
        if (part != "." && !part.empty()) {
            result /= part;
        }
    }
    return result.empty() ? "." : result.string();
}

void run(const rexdeploy::Arguments& arguments) {
    if (arguments.positional.size() < 2) {
        throw rexdeploy::Error("expected a bundle's folder and one or more images; see --help");
    }
    const int top = arguments.number("--top", 5, 1, 1'000'000);
    rexdeploy::Options options;
    options.backend = arguments.text("--backend", options.backend);
    const rexdeploy::Classifier classifier(arguments.positional[0], options);
    std::vector<std::string> files;
    std::vector<std::uint8_t> crops;
    for (std::size_t index = 1; index < arguments.positional.size(); ++index) {
        files.push_back(shown(arguments.positional[index]));
        const rexdeploy::Image image = rexdeploy::load_image(files.back());
        std::vector<std::uint8_t> crop;
        try {
            crop = classifier.crop(image.rgb.data(), image.width, image.height);
        } catch (const rexdeploy::Error& error) {
            throw rexdeploy::Error(files.back() + ": " + error.what());
        }
        crops.insert(crops.end(), crop.begin(), crop.end());
    }
    const auto results = classifier.classify(crops, top);
    if (arguments.is_quiet) {
        return;
    }
    for (const std::string& reason : classifier.passed_over()) {
        std::fprintf(stderr, "passed over: %s\n", reason.c_str());
    }
    std::printf("%s on %s\n", classifier.title().c_str(), classifier.backend().c_str());
    for (std::size_t index = 0; index < results.size(); ++index) {
        std::printf("%s\n", files[index].c_str());
        for (const rexdeploy::Prediction& item : results[index]) {
            std::printf("  %6.2f%%  %s\n", 100 * item.probability, item.label.c_str());
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    return rexdeploy::run_program(argc, argv, kUsage, {"--top", "--backend"}, run);
}
