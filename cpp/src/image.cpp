// Decodes JPEG and PNG files to what Pillow's convert("RGB") makes of them.
#include "rexdeploy/image.hpp"

#include <cstring>
#include <new>
#include <string>
#include <system_error>

#include "bundle.hpp"
#include "decoders.hpp"

namespace rexdeploy {
namespace {

/// Calls `place(x, y)` with the source of every pixel (x, y) of an upright image.
template <typename Source>
Image rearrange(const Image& image, int width, int height, Source source) {
    Image upright{width, height, std::vector<std::uint8_t>(image.rgb.size())};
    std::uint8_t* next = upright.rgb.data();
    for (int y = 0; y < height; ++y) {
        for (int x = 0; x < width; ++x) {
            const auto [from_x, from_y] = source(x, y);
            const std::size_t index =
                static_cast<std::size_t>(from_y) * static_cast<std::size_t>(image.width) +
                static_cast<std::size_t>(from_x);
            std::memcpy(next, &image.rgb[3 * index], 3);
            next += 3;
        }
    }
    return upright;
}

/// Turns an image upright by its EXIF orientation, 1 to 8; any other is taken for upright.
Image turn(Image image, int orientation) {
    using Point = std::pair<int, int>;
    const int w = image.width;
    const int h = image.height;
    const int right = w - 1;
    const int bottom = h - 1;
    switch (orientation) {
        case 2:
            return rearrange(image, w, h, [=](int x, int y) { return Point(right - x, y); });
        case 3:
            return rearrange(image, w, h,
                             [=](int x, int y) { return Point(right - x, bottom - y); });
        case 4:
            return rearrange(image, w, h, [=](int x, int y) { return Point(x, bottom - y); });
        case 5:
            return rearrange(image, h, w, [=](int x, int y) { return Point(y, x); });
        case 6:
            return rearrange(image, h, w, [=](int x, int y) { return Point(y, bottom - x); });
        case 7:
            return rearrange(image, h, w,
                             [=](int x, int y) { return Point(right - y, bottom - x); });
        case 8:
            return rearrange(image, h, w, [=](int x, int y) { return Point(right - y, x); });
        default:
            return image;
    }
}

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 30;  // 89 megapixels of 16-bit RGBA fit

bool begins_with(const std::vector<std::uint8_t>& data, const char* magic, std::size_t size) {
    return data.size() >= size && std::memcmp(data.data(), magic, size) == 0;
}

}  // namespace

Image decode_image(const std::vector<std::uint8_t>& data) {
    try {
        Oriented decoded;
        if (begins_with(data, "\xff\xd8\xff", 3)) {
            decoded = decode_jpeg(data);
        } else if (begins_with(data, "\x89PNG\r\n\x1a\n", 8)) {
            decoded = decode_png(data);
        } else {
            throw Error("not an image that this program can read; give JPEG or PNG");
        }
        return turn(std::move(decoded.image), decoded.orientation);
    } catch (const std::bad_alloc&) {  // other images are smaller
        throw Error("cannot be decoded as an image (too little memory)");
    }
}

Image load_image(const std::filesystem::path& file) {
    std::vector<std::uint8_t> data;
    try {
        data = read_file(file, kMaxFileBytes);
    } catch (const std::system_error& error) {
        if (error.code() == std::errc::no_such_file_or_directory) {
            throw Error(file.string() + ": no such file");
        }
        if (error.code() == std::errc::file_too_large) {
            throw Error(file.string() + ": too large to decode safely (limit " +
                        std::to_string(kMaxFileBytes) + " bytes)");
        }
        throw Error(file.string() + ": cannot be read (" + error.code().message() + ")");
    }
    try {
        return decode_image(data);
    } catch (const Error& error) {
        throw Error(file.string() + ": " + error.what());
    }
}

}  // namespace rexdeploy
