// rexdeploy-bench: times a bundle's network on this machine.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "arguments.hpp"
#include "rexdeploy/classifier.hpp"
#include "text.hpp"

namespace {

constexpr const char* kUsage =
    "Usage: rexdeploy-bench [OPTION]... BUNDLE\n"
    "Times runs of one batch, from memory to memory.\n"
    "  --batch N       images at once [default: 1]\n"
    "  --rounds N      timed runs [default: 100]\n"
    "  --threads N     threads of ONNX Runtime [default: 0, the library's choice]\n"
    "  --backend NAME  auto, tensorrt, tensorrt-rtx or onnxruntime [default: auto]\n";
constexpr int kWarmUps = 5;

/// The sample that a `share` of them lies below; `samples` are sorted.
double percentile(const std::vector<double>& samples, double share) {
    const auto rank = static_cast<std::size_t>(share * static_cast<double>(samples.size()));
    return samples[std::min(rank, samples.size() - 1)];
}

/// Milliseconds of every round, sorted.
template <typename Element>
std::vector<double> time_rounds(const rexdeploy::Classifier& classifier, int batch, int rounds) {
    using Clock = std::chrono::steady_clock;
    const std::size_t size = std::size_t{3} * static_cast<std::size_t>(classifier.height()) *
                             static_cast<std::size_t>(classifier.width());
    std::vector<Element> images(static_cast<std::size_t>(batch) * size);
    std::size_t position = 0;  // values do not matter for speed, but denormals and NaN would
    for (Element& value : images) {
        value = static_cast<Element>(position++ * 7 % 5);
    }
    std::vector<double> samples_ms;
    for (int round = -kWarmUps; round < rounds; ++round) {
        const Clock::time_point start = Clock::now();
        classifier.run(images.data(), batch);
        const std::chrono::duration<double, std::milli> taken = Clock::now() - start;
        if (round >= 0) {
            samples_ms.push_back(taken.count());
        }
    }
    std::sort(samples_ms.begin(), samples_ms.end());
    return samples_ms;
}

void bench(const rexdeploy::Arguments& arguments) {
    if (arguments.positional.size() != 1) {
        throw rexdeploy::Error("expected one bundle's folder; see --help");
    }
    const int batch = arguments.number("--batch", 1, 1, 4096);
    const int rounds = arguments.number("--rounds", 100, 1, 1'000'000);
    rexdeploy::Options options;
    options.backend = arguments.text("--backend", options.backend);
    options.threads = arguments.number("--threads", 0, 0, 1024);
    const rexdeploy::Classifier classifier(arguments.positional[0], options);
    const std::vector<double> samples_ms =
        classifier.input() == rexdeploy::InputType::uint8
            ? time_rounds<std::uint8_t>(classifier, batch, rounds)
            : time_rounds<float>(classifier, batch, rounds);
    if (arguments.is_quiet) {
        return;
    }
    for (const std::string& reason : classifier.passed_over()) {
        std::fprintf(stderr, "passed over: %s\n", rexdeploy::plain(reason).c_str());
    }
    const double median_ms = percentile(samples_ms, 0.5);
    std::printf("%s on %s, batch %d, %d rounds\n", rexdeploy::plain(classifier.title()).c_str(),
                classifier.backend().c_str(), batch, rounds);
    std::printf("median %.2f ms, p90 %.2f ms, p99 %.2f ms, %.1f images/s\n", median_ms,
                percentile(samples_ms, 0.9), percentile(samples_ms, 0.99),
                1000.0 * batch / median_ms);
}

}  // namespace

int main(int argc, char** argv) {
    return rexdeploy::run_program(argc, argv, kUsage,
                                  {"--batch", "--rounds", "--threads", "--backend"}, bench);
}
