// Pillow's resampling for 8 bits a channel (src/libImaging/Resample.c), of the centre crop only.
#include "preprocess.hpp"

#include <algorithm>
#include <cmath>
#include <string>

namespace rexdeploy {
namespace {

constexpr int kMaxAspect = 100;
constexpr int kPrecisionBits = 32 - 8 - 2;  // of the fixed-point weights: two bits of headroom
constexpr int kChannels = 3;

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) {
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    }
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

double bilinear(double x) { return std::max(0.0, 1.0 - std::fabs(x)); }

/// Along one axis: which input pixels, with which weights, make each output pixel.
class Axis {
 public:
    struct Window {
        int first;  // input pixel
        int count;
    };

    /// Output pixels `start` to `start + count` of an axis that goes from `in_size` to `out_size`.
    Axis(int in_size, int out_size, int start, int count, Interpolation interpolation) {
        const auto filter = interpolation == Interpolation::bicubic ? bicubic : bilinear;
        const double scale = static_cast<double>(in_size) / out_size;
        const double filter_scale = std::max(scale, 1.0);
        const double support = (interpolation == Interpolation::bicubic ? 2.0 : 1.0) * filter_scale;
        stride_ = static_cast<std::size_t>(std::ceil(support)) * 2 + 1;
        weights_.resize(stride_ * static_cast<std::size_t>(count));
        std::vector<double> exact(stride_);
        for (int index = 0; index < count; ++index) {
            const double centre = (start + index + 0.5) * scale;
            const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
            const int last = std::min(static_cast<int>(centre + support + 0.5), in_size);
            double sum = 0.0;
            for (int x = 0; x < last - first; ++x) {
                exact[x] = filter((x + first - centre + 0.5) * (1.0 / filter_scale));
                sum += exact[x];
            }
            std::int32_t* weights = &weights_[stride_ * static_cast<std::size_t>(index)];
            for (int x = 0; x < last - first; ++x) {
                const double weight = (sum != 0.0 ? exact[x] / sum : exact[x]) *
                                      static_cast<double>(1 << kPrecisionBits);
                weights[x] = static_cast<std::int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
            }
            windows_.push_back({first, last - first});
        }
    }

    int size() const { return static_cast<int>(windows_.size()); }
    const Window& window(int index) const { return windows_[index]; }
    const std::int32_t* weights(int index) const {
        return &weights_[stride_ * static_cast<std::size_t>(index)];
    }
    /// The input pixels that all windows together touch.
    Window span() const {
        const Window& last = windows_.back();
        return {windows_.front().first, last.first + last.count - windows_.front().first};
    }

 private:
    std::size_t stride_;
    std::vector<Window> windows_;
    std::vector<std::int32_t> weights_;
};

/// One output value from `count` inputs that lie `step` bytes apart.
std::uint8_t weigh(const std::uint8_t* input, std::size_t step, const std::int32_t* weights,
                   int count) {
    std::int32_t sum = 1 << (kPrecisionBits - 1);
    for (int k = 0; k < count; ++k) {
        sum += input[static_cast<std::size_t>(k) * step] * weights[k];
    }
    return static_cast<std::uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
}

/// `rows` of an image `[..., width, 3]`, each resampled along its length.
std::vector<std::uint8_t> resample_rows(const std::uint8_t* rgb, int width, Axis::Window rows,
                                        const Axis& axis) {
    const std::size_t in_row = static_cast<std::size_t>(width) * kChannels;
    std::vector<std::uint8_t> output(static_cast<std::size_t>(rows.count) *
                                     static_cast<std::size_t>(axis.size()) * kChannels);
    std::uint8_t* next = output.data();
    for (int y = 0; y < rows.count; ++y) {
        const std::uint8_t* row = rgb + static_cast<std::size_t>(rows.first + y) * in_row;
        for (int x = 0; x < axis.size(); ++x) {
            const Axis::Window& window = axis.window(x);
            const std::uint8_t* first = row + static_cast<std::size_t>(window.first) * kChannels;
            for (int channel = 0; channel < kChannels; ++channel) {
                *next++ = weigh(first + channel, kChannels, axis.weights(x), window.count);
            }
        }
    }
    return output;
}

/// All columns of an image `[..., width, 3]` whose first row is the axis's row `first_row`.
std::vector<std::uint8_t> resample_columns(const std::uint8_t* rgb, int width, int first_row,
                                           const Axis& axis) {
    const std::size_t row = static_cast<std::size_t>(width) * kChannels;
    std::vector<std::uint8_t> output(static_cast<std::size_t>(axis.size()) * row);
    std::uint8_t* next = output.data();
    for (int y = 0; y < axis.size(); ++y) {
        const Axis::Window& window = axis.window(y);
        const std::uint8_t* first = rgb + static_cast<std::size_t>(window.first - first_row) * row;
        for (std::size_t x = 0; x < row; ++x) {
            *next++ = weigh(first + x, row, axis.weights(y), window.count);
        }
    }
    return output;
}

/// Half of a difference >= 0, halves to even: Python's round(difference / 2).
int rounded_half(int difference) {
    const int half = difference / 2;
    return difference % 2 == 0 ? half : half + half % 2;
}

}  // namespace

std::vector<std::uint8_t> crop(const std::uint8_t* rgb, int width, int height,
                               const Preprocess& spec) {
    if (rgb == nullptr || width < 1 || height < 1) {
        throw Error("image: got " + std::to_string(width) + " x " + std::to_string(height) +
                    " pixels, expected RGB bytes of at least 1 x 1");
    }
    if (std::max(width, height) > std::int64_t{kMaxAspect} * std::min(width, height)) {
        throw Error("an image of " + std::to_string(width) + " x " + std::to_string(height) +
                    " pixels is too thin: expected sides at most " + std::to_string(kMaxAspect) +
                    " times as long as each other");
    }
    const int covered_w = static_cast<int>(std::floor(spec.width / spec.crop_pct));
    const int covered_h = static_cast<int>(std::floor(spec.height / spec.crop_pct));
    int resized_w = covered_w;
    int resized_h = covered_h;
    if (std::int64_t{covered_w} * height >= std::int64_t{covered_h} * width) {
        const double exact = static_cast<double>(std::int64_t{covered_w} * height) / width;
        resized_h = std::max(covered_h, static_cast<int>(exact));
    } else {
        const double exact = static_cast<double>(std::int64_t{covered_h} * width) / height;
        resized_w = std::max(covered_w, static_cast<int>(exact));
    }
    const int left = rounded_half(resized_w - spec.width);
    const int top = rounded_half(resized_h - spec.height);
    const Axis horizontal(width, resized_w, left, spec.width, spec.interpolation);
    const Axis vertical(height, resized_h, top, spec.height, spec.interpolation);
    // Pillow's order since 13.0; before, rows always came first. What lies between is rounded to 8
    // bits, so the order shows.
    const std::int64_t lost_rows = std::int64_t{height} - resized_h;
    const std::int64_t lost_columns = std::int64_t{width} - resized_w;
    if (lost_rows > 0 && lost_rows > 2 * lost_columns) {
        const auto shortened = resample_columns(rgb, width, 0, vertical);
        return resample_rows(shortened.data(), width, {0, spec.height}, horizontal);
    }
    const Axis::Window rows = vertical.span();
    const auto narrowed = resample_rows(rgb, width, rows, horizontal);
    return resample_columns(narrowed.data(), spec.width, rows.first, vertical);
}

void normalise(const std::uint8_t* pixels, const Preprocess& spec, float* output) {
    const std::size_t area =
        static_cast<std::size_t>(spec.height) * static_cast<std::size_t>(spec.width);
    for (std::size_t channel = 0; channel < kChannels; ++channel) {
        for (std::size_t index = 0; index < area; ++index) {
            const float scaled = static_cast<float>(pixels[index * kChannels + channel]) / 255.0F;
            *output++ = (scaled - spec.mean[channel]) / spec.std[channel];
        }
    }
}

}  // namespace rexdeploy
