// rexdeploy-run: classifies image files; prints what `rexdeploy predict` prints.
#include <algorithm>
#include <cstdio>
#include <utility>

#include "arguments.hpp"
#include "files.hpp"
#include "rexdeploy/classifier.hpp"
#include "rexdeploy/image.hpp"
#include "rows.hpp"
#include "text.hpp"

namespace {

constexpr const char* kUsage =
    "Usage: rexdeploy-run [OPTION]... BUNDLE IMAGE...\n"
    "Classifies JPEG and PNG files, and folders of them, with the best backend present.\n"
    "  --json FILE     write the result as JSON; - for the output, which has nothing else then\n"
    "  --top N         classes to print for an image [default: 5]\n"
    "  --backend NAME  auto, tensorrt, tensorrt-rtx or onnxruntime [default: auto]\n"
    "  -q, --quiet     print errors only\n"
    "Libraries that the system's loader does not find are named by REXDEPLOY_ONNXRUNTIME,\n"
    "REXDEPLOY_TENSORRT and REXDEPLOY_TENSORRT_RTX.\n";

constexpr int kMaxBatch = 64;  // of what an engine may take more of: rows should come soon

using rexdeploy::Row;

/// Why there is no row of classes for `file`: an error's text without the file's name.
std::string reason(const rexdeploy::Error& error, const std::string& file) {
    const std::string text = error.what();
    const std::string name = rexdeploy::Error(file + ":").what();  // its blanks are fewer, too
    return text.substr(text.compare(0, name.size(), name) == 0 ? name.size() + 1 : 0);
}

std::vector<std::uint8_t> load(const rexdeploy::Classifier& classifier, const std::string& file) {
    const rexdeploy::Image image = rexdeploy::load_image(file);
    return classifier.crop(image.rgb.data(), image.width, image.height);
}

/// The rows of one batch of files; one that cannot be read does not spoil the others.
std::vector<Row> classify(const rexdeploy::Classifier& classifier,
                          const std::vector<std::string>& files, int top) {
    std::vector<Row> rows;
    std::vector<std::uint8_t> crops;
    for (const std::string& file : files) {
        rows.push_back({rexdeploy::printable(file)});
        try {
            const std::vector<std::uint8_t> crop = load(classifier, file);
            crops.insert(crops.end(), crop.begin(), crop.end());
        } catch (const rexdeploy::Error& error) {
            rows.back().error = reason(error, file);
        }
    }
    if (crops.empty()) {
        return rows;
    }
    try {
        const rexdeploy::Answers answers = classifier.classify(crops, top);
        auto next = answers.begin();
        for (Row& row : rows) {
            if (row.error.empty()) {
                row.predictions = *next++;
            }
        }
    } catch (const rexdeploy::Error& error) {  // such as NaN, of one of them
        if (files.size() == 1) {
            return {{rexdeploy::printable(files[0]), {}, error.what()}};
        }
        rows.clear();
        for (const std::string& file : files) {
            rows.push_back(classify(classifier, {file}, top)[0]);
        }
    }
    return rows;
}

/// On stdout what runs, unless `is_silent`, and on stderr, unless `is_quiet`, why nothing better.
void introduce(const rexdeploy::Classifier& classifier, bool is_quiet, bool is_silent) {
    if (!is_quiet) {
        for (const std::string& line : classifier.passed_over()) {
            std::fprintf(stderr, "passed over: %s\n", rexdeploy::plain(line).c_str());
        }
    }
    if (!is_silent) {
        std::printf("%s on %s\n", rexdeploy::plain(classifier.title()).c_str(),
                    classifier.backend().c_str());
    }
}

void show(const Row& row, bool is_silent) {
    if (!row.error.empty()) {
        std::fflush(stdout);
        std::fprintf(stderr, "error: %s: %s\n", rexdeploy::plain(row.file).c_str(),
                     rexdeploy::plain(row.error).c_str());
    } else if (!is_silent) {
        std::printf("%s\n", rexdeploy::plain(row.file).c_str());
        for (const rexdeploy::Prediction& item : row.predictions) {
            std::printf("  %6.2f%%  %s\n", 100 * item.probability,
                        rexdeploy::plain(item.label).c_str());
        }
    }
}

void run(const rexdeploy::Arguments& arguments) {
    if (arguments.positional.size() < 2) {
        throw rexdeploy::Error(
            "expected a bundle's folder and one or more images or folders of them; see --help");
    }
    const int top = arguments.number("--top", 5, 1, 1'000'000);
    const auto json = arguments.options.find("--json");
    const bool with_json = json != arguments.options.end();
    if (with_json) {
        rexdeploy::check_json(json->second);
    }
    rexdeploy::Options options;
    options.backend = arguments.text("--backend", options.backend);
    const std::vector<std::string> files =
        rexdeploy::expand({arguments.positional.begin() + 1, arguments.positional.end()});
    const rexdeploy::Classifier classifier(arguments.positional[0], options);
    const bool is_silent = arguments.is_quiet || (with_json && json->second == "-");
    const auto size = static_cast<std::size_t>(std::min(classifier.max_batch(), kMaxBatch));
    bool is_introduced = false;
    std::size_t errors = 0;
    std::vector<Row> kept;
    for (std::size_t start = 0; start < files.size(); start += size) {
        const auto first = files.begin() + static_cast<std::ptrdiff_t>(start);
        const std::size_t count = std::min(size, files.size() - start);
        const std::vector<std::string> batch(first, first + static_cast<std::ptrdiff_t>(count));
        for (Row& row : classify(classifier, batch, top)) {
            errors += row.error.empty() ? 0 : 1;
            if (row.error.empty() && !std::exchange(is_introduced, true)) {
                introduce(classifier, arguments.is_quiet, is_silent);
            }
            show(row, is_silent);
            if (with_json) {
                kept.push_back(std::move(row));
            }
        }
    }
    if (with_json) {
        rexdeploy::write_json(json->second, classifier, kept);
    }
    if (errors > 0) {
        throw rexdeploy::Failed();
    }
}

}  // namespace

int main(int argc, char** argv) {
    return rexdeploy::run_program(argc, argv, kUsage, {"--top", "--backend", "--json"}, run);
}
