// Image sizes that are refused, and orientations in EXIF and XMP.
#include <algorithm>
#include <iterator>
#include <string>

#include "decoders.hpp"

namespace rexdeploy {
namespace {

constexpr std::uint64_t kMaxPixels = 89'478'485;  // PIL.Image.MAX_IMAGE_PIXELS
constexpr std::string_view kPrefix("Exif\0\0", 6);
constexpr std::uint32_t kOrientation = 0x0112;
constexpr std::uint32_t kShort = 3;
constexpr std::uint32_t kLong = 4;

/// Unsigned numbers of a TIFF structure; what lies beyond its end is 0.
class Tiff {
 public:
    explicit Tiff(std::string_view data) : data_(data), is_little_(data.substr(0, 2) == "II") {}

    std::uint32_t number(std::uint64_t position, int size) const {
        std::uint32_t value = 0;
        for (int index = 0; index < size; ++index) {
            const std::uint64_t at = position + (is_little_ ? size - 1 - index : index);
            const auto byte = at < data_.size() ? static_cast<std::uint8_t>(data_[at]) : 0;
            value = value << 8 | byte;
        }
        return value;
    }

 private:
    std::string_view data_;
    bool is_little_;
};

}  // namespace

void check_size(std::uint32_t width, std::uint32_t height) {
    if (std::uint64_t{width} * height > kMaxPixels) {
        throw Error("too large to decode safely (" + std::to_string(width) + " x " +
                    std::to_string(height) + " pixels, limit " + std::to_string(kMaxPixels) + ")");
    }
}

int exif_orientation(std::string_view exif) {
    while (exif.substr(0, kPrefix.size()) == kPrefix) {
        exif.remove_prefix(kPrefix.size());
    }
    constexpr std::string_view kMagics[] = {{"II*\0", 4}, {"II\0*", 4}, {"MM\0*", 4},
                                            {"MM*\0", 4}, {"MM\0+", 4}};  // that Pillow takes
    if (std::find(std::begin(kMagics), std::end(kMagics), exif.substr(0, 4)) == std::end(kMagics)) {
        return 0;
    }
    const Tiff tiff(exif);
    const std::uint64_t directory = tiff.number(4, 4);
    const std::uint32_t entries = tiff.number(directory, 2);
    for (std::uint32_t index = 0; index < entries; ++index) {
        const std::uint64_t entry = directory + 2 + std::uint64_t{12} * index;
        const std::uint32_t type = tiff.number(entry + 2, 2);
        if (tiff.number(entry, 2) == kOrientation && tiff.number(entry + 4, 4) == 1 &&
            (type == kShort || type == kLong)) {
            return static_cast<int>(tiff.number(entry + 8, type == kShort ? 2 : 4));
        }
    }
    return 0;
}

int xmp_orientation(std::string_view xmp) {
    constexpr std::string_view name = "tiff:Orientation";
    for (auto at = xmp.find(name); at != xmp.npos; at = xmp.find(name, at + 1)) {
        std::string_view rest = xmp.substr(at + name.size());
        for (const std::string_view opening : {std::string_view("=\""), std::string_view(">")}) {
            if (rest.substr(0, opening.size()) == opening && rest.size() > opening.size() &&
                rest[opening.size()] >= '0' && rest[opening.size()] <= '9') {
                return rest[opening.size()] - '0';
            }
        }
    }
    return 0;
}

}  // namespace rexdeploy
