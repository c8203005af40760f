// rexdeploy-run: classifies image files; prints what `rexdeploy predict` prints.
#include <algorithm>
#include <cstdio>
#include <set>
#include <utility>

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

constexpr int kMaxBatch = 64;  // of what an engine may take more of: rows should come soon

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

/// What became of one image: its classes, or why there are none.
struct Row {
    std::string file;
    std::vector<rexdeploy::Prediction> predictions{};
    std::string error{};
};

std::vector<std::uint8_t> load(const rexdeploy::Classifier& classifier, const std::string& file) {
    const rexdeploy::Image image = rexdeploy::load_image(file);
    try {
        return classifier.crop(image.rgb.data(), image.width, image.height);
    } catch (const rexdeploy::Error& error) {
        throw rexdeploy::Error(file + ": " + error.what());
    }
}

/// The rows of one batch of files; one that cannot be read does not spoil the others.
std::vector<Row> classify(const rexdeploy::Classifier& classifier,
                          const std::vector<std::string>& files, int top) {
    std::vector<Row> rows;
    std::vector<std::uint8_t> crops;
    for (const std::string& file : files) {
        rows.push_back({file});
        try {
            const std::vector<std::uint8_t> crop = load(classifier, file);
            crops.insert(crops.end(), crop.begin(), crop.end());
        } catch (const rexdeploy::Error& error) {
            rows.back().error = error.what();
        }
    }
    if (crops.empty()) {
        return rows;
    }
    try {
        auto results = classifier.classify(crops, top);
        auto next = results.begin();
        for (Row& row : rows) {
            if (row.error.empty()) {
                row.predictions = std::move(*next++);
            }
        }
    } catch (const rexdeploy::Error& error) {  // such as NaN, of one of them
        if (files.size() == 1) {
            return {{files[0], {}, files[0] + ": " + error.what()}};
        }
        rows.clear();
        for (const std::string& file : files) {
            rows.push_back(classify(classifier, {file}, top)[0]);
        }
    }
    return rows;
}

/// What runs, and on stderr why nothing better does.
void introduce(const rexdeploy::Classifier& classifier) {
    for (const std::string& reason : classifier.passed_over()) {
        std::fprintf(stderr, "passed over: %s\n", reason.c_str());
    }
    std::printf("%s on %s\n", classifier.title().c_str(), classifier.backend().c_str());
}

void show(const Row& row) {
    std::printf("%s\n", row.file.c_str());
    for (const rexdeploy::Prediction& item : row.predictions) {
        std::printf("  %6.2f%%  %s\n", 100 * item.probability, item.label.c_str());
    }
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
    std::set<std::string> seen;
    for (std::size_t index = 1; index < arguments.positional.size(); ++index) {
        const std::string file = shown(arguments.positional[index]);
        if (seen.insert(file).second) {
            files.push_back(file);
        }
    }
    const auto size = static_cast<std::size_t>(std::min(classifier.max_batch(), kMaxBatch));
    bool is_introduced = false;
    std::size_t errors = 0;
    for (std::size_t start = 0; start < files.size(); start += size) {
        const auto first = files.begin() + static_cast<std::ptrdiff_t>(start);
        const std::size_t count = std::min(size, files.size() - start);
        const std::vector<std::string> batch(first, first + static_cast<std::ptrdiff_t>(count));
        for (const Row& row : classify(classifier, batch, top)) {
            if (!row.error.empty()) {
                ++errors;
                std::fflush(stdout);
                std::fprintf(stderr, "error: %s\n", row.error.c_str());
            } else if (!arguments.is_quiet) {
                if (!std::exchange(is_introduced, true)) {
                    introduce(classifier);
                }
                show(row);
            }
        }
    }
    if (errors > 0) {
        throw rexdeploy::Failed();
    }
}

}  // namespace

int main(int argc, char** argv) {
    return rexdeploy::run_program(argc, argv, kUsage, {"--top", "--backend"}, run);
}
