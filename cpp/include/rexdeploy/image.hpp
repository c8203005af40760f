// Decoded images, and decoding JPEG and PNG files (of the library rexdeploy_image).
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "rexdeploy/error.hpp"
#include "rexdeploy/export.hpp"

namespace rexdeploy {

/// 8-bit RGB, `[height, width, 3]`, row by row.
struct Image {
    int width = 0;
    int height = 0;
    std::vector<std::uint8_t> rgb{};
};

/// Decodes a JPEG or PNG file to RGB, upright by its EXIF orientation, as Pillow's convert("RGB")
/// does: alpha and transparency are dropped, of an animation the first frame is taken, 16 bits
/// become 8. Throws Error for everything else, for damaged files, and above 89478485 pixels.
REXDEPLOY_EXPORT Image load_image(const std::filesystem::path& file);

/// The same of a file's bytes.
REXDEPLOY_EXPORT Image decode_image(const std::vector<std::uint8_t>& data);

}  // namespace rexdeploy
