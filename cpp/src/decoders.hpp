// What the two decoders give: pixels as they are stored, and how the image is to be turned.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "rexdeploy/image.hpp"

namespace rexdeploy {

struct Oriented {
    Image image{};
    int orientation = 1;  // EXIF's, 1 to 8
};

Oriented decode_jpeg(const std::vector<std::uint8_t>& data);
Oriented decode_png(const std::vector<std::uint8_t>& data);

/// Throws Error above the number of pixels that Pillow takes without a warning.
void check_size(std::uint32_t width, std::uint32_t height);

/// The orientation in an EXIF block (a TIFF header and its first directory, after JPEG's "Exif\0\0"
/// or without); 0 if there is none.
int exif_orientation(std::string_view exif);

/// The orientation in an XMP packet, as Pillow searches for it; 0 if there is none.
int xmp_orientation(std::string_view xmp);

}  // namespace rexdeploy
