// JPEG through libjpeg(-turbo): grey, RGB and CMYK, as Pillow decodes them.
#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>

#include <jpeglib.h>

#include <jerror.h>

#include "decoders.hpp"

namespace rexdeploy {
namespace {

// As rexdeploy/images/limits.py has them. A small file of many scans over a large image takes
// minutes to decode.
constexpr int kMaxScans = 500;
constexpr std::uint64_t kMaxScanPixels = std::uint64_t{1} << 30;
constexpr int kMaxSegments = 1024;                          // beside the scans
constexpr std::size_t kMaxMetadata = std::size_t{1} << 24;  // bytes before the first scan
constexpr int kMaxExif = 64;                                // parts of it
constexpr std::string_view kExif("Exif\0\0", 6);
constexpr std::string_view kXmp("http://ns.adobe.com/xap/1.0/\0", 29);

/// libjpeg's errors come back by longjmp into the function that called it, and leave that as an
/// exception: no frame with a destructor lies between.
struct ErrorState {
    jpeg_error_mgr manager;  // first: libjpeg gives back a pointer to it
    std::jmp_buf jump;
    int scans;  // that check_jpeg counted
    char message[JMSG_LENGTH_MAX];
};

[[noreturn]] void leave(j_common_ptr info) {
    auto* state = reinterpret_cast<ErrorState*>(info->err);
    info->err->format_message(info, state->message);
    std::longjmp(state->jump, 1);
}

void on_message(j_common_ptr info, int level) {
    // Other warnings are of damaged pixels, which Pillow shows as they are.
    if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) {
        leave(info);
    }
}

void ignore_message(j_common_ptr) {}

void on_progress(j_common_ptr info) {
    auto* state = reinterpret_cast<ErrorState*>(info->err);
    if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > state->scans) {
        std::snprintf(state->message, sizeof state->message, "more scans than were counted");
        std::longjmp(state->jump, 1);
    }
}

[[noreturn]] void refuse(const std::string& reason) { throw Error(reason + "; save it anew"); }

/// Two bytes as a number; beyond the end they are 0.
std::size_t number_at(const std::vector<std::uint8_t>& data, std::size_t position) {
    const auto byte = [&](std::size_t at) { return at < data.size() ? data[at] : 0U; };
    return byte(position) << 8 | byte(position + 1);
}

/// Refuses what would keep libjpeg busy for more than seconds, before it sees any of it; gives the
/// number of scans. As _check_jpeg in rexdeploy/images/limits.py, which says how.
int check_jpeg(const std::vector<std::uint8_t>& data) {
    int scans = 0;
    int segments = 0;
    int parts = 0;  // of EXIF
    std::uint64_t pixels = 0;
    auto at = data.begin() + 2;
    while (true) {
        at = std::find(at, data.end(), 0xFF);
        if (data.end() - at < 2) {
            return scans;
        }
        const int marker = *++at;
        if (marker < 0xC0 || (marker > 0xCF && marker < 0xD8) || (marker > 0xEF && marker != 0xFE)) {
            continue;  // it has no content
        }
        if (marker == 0xD8 || marker == 0xD9) {  // the start of another image, or the end
            return scans;
        }
        const std::size_t start = static_cast<std::size_t>(at - data.begin()) + 1;
        const std::size_t position = start + std::max<std::size_t>(2, number_at(data, start));
        if (marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
            pixels = std::max<std::uint64_t>(
                pixels, number_at(data, start + 3) * std::uint64_t{number_at(data, start + 5)});
        }
        ++(marker == 0xDA ? scans : segments);
        const std::string_view content(reinterpret_cast<const char*>(data.data()), data.size());
        parts += marker == 0xE1 && content.compare(std::min(start + 2, data.size()), kExif.size(),
                                                   kExif) == 0;
        if (scans > kMaxScans) {
            refuse("more than " + std::to_string(kMaxScans) + " scans");
        }
        if (static_cast<std::uint64_t>(scans) * pixels > kMaxScanPixels) {
            refuse("too many scans of " + std::to_string(pixels) + " pixels (limit " +
                   std::to_string(kMaxScanPixels) + " in all)");
        }
        if (segments > kMaxSegments) {
            refuse("more than " + std::to_string(kMaxSegments) + " segments");
        }
        if (parts > kMaxExif) {
            refuse("EXIF in more than " + std::to_string(kMaxExif) + " parts");
        }
        if (scans == 0 && position > kMaxMetadata) {
            refuse("more than " + std::to_string(kMaxMetadata) + " bytes before its pixels");
        }
        if (position >= data.size()) {
            return scans;
        }
        at = data.begin() + static_cast<std::ptrdiff_t>(position);
    }
}

class JpegReader {
 public:
    JpegReader(const std::vector<std::uint8_t>& data, int scans) {
        errors_.scans = scans;
        info_.err = jpeg_std_error(&errors_.manager);
        errors_.manager.error_exit = leave;
        errors_.manager.emit_message = on_message;
        errors_.manager.output_message = ignore_message;
        if (setjmp(errors_.jump) != 0) {
            jpeg_destroy_decompress(&info_);  // the destructor of what was not made does not run
            fail();
        }
        jpeg_create_decompress(&info_);
        progress_.progress_monitor = on_progress;
        info_.progress = &progress_;
        jpeg_mem_src(&info_, data.data(), data.size());
        jpeg_save_markers(&info_, JPEG_APP0 + 1, 0xFFFF);
        jpeg_read_header(&info_, TRUE);
    }
    ~JpegReader() { jpeg_destroy_decompress(&info_); }
    JpegReader(const JpegReader&) = delete;
    JpegReader& operator=(const JpegReader&) = delete;

    int width() const { return static_cast<int>(info_.image_width); }
    int height() const { return static_cast<int>(info_.image_height); }
    /// 1, 3 or 4, or what read() does not know.
    int components() const { return info_.num_components; }

    int orientation() const {
        int from_xmp = 0;
        for (auto* marker = info_.marker_list; marker != nullptr; marker = marker->next) {
            const std::string_view data(reinterpret_cast<const char*>(marker->data),
                                        marker->data_length);
            if (data.substr(0, kExif.size()) == kExif) {
                if (const int orientation = exif_orientation(data)) {
                    return orientation;
                }
            } else if (data.substr(0, kXmp.size()) == kXmp && from_xmp == 0) {
                from_xmp = xmp_orientation(data.substr(kXmp.size()));
            }
        }
        return from_xmp;
    }

    /// Writes every row to `pixels`: inverted CMYK of 4 components, else RGB.
    void read(std::uint8_t* pixels) {
        info_.out_color_space = components() == 4 ? JCS_CMYK : JCS_RGB;
        if (setjmp(errors_.jump) != 0) {
            fail();
        }
        jpeg_start_decompress(&info_);
        const std::size_t row = static_cast<std::size_t>(info_.output_width) *
                                static_cast<std::size_t>(info_.output_components);
        while (info_.output_scanline < info_.output_height) {
            JSAMPROW next = pixels + row * info_.output_scanline;
            jpeg_read_scanlines(&info_, &next, 1);
        }
    }

 private:
    [[noreturn]] void fail() const {
        throw Error(std::string("cannot be decoded as an image (") + errors_.message + ")");
    }

    jpeg_decompress_struct info_{};
    ErrorState errors_{};
    jpeg_progress_mgr progress_{};
};

/// a * b / 255, rounded, as Pillow computes it.
int product(int a, int b) {
    const int value = a * b + 128;
    return ((value >> 8) + value) >> 8;
}

/// CMYK as Adobe's programs store it (inverted) to RGB.
std::vector<std::uint8_t> from_inverted_cmyk(const std::vector<std::uint8_t>& pixels) {
    std::vector<std::uint8_t> rgb;
    rgb.reserve(pixels.size() / 4 * 3);
    for (std::size_t index = 0; index < pixels.size(); index += 4) {
        const int light = pixels[index + 3];
        for (std::size_t channel = 0; channel < 3; ++channel) {
            const int ink = 255 - pixels[index + channel];
            rgb.push_back(static_cast<std::uint8_t>(light - product(ink, light)));
        }
    }
    return rgb;
}

}  // namespace

Oriented decode_jpeg(const std::vector<std::uint8_t>& data) {
    JpegReader reader(data, check_jpeg(data));
    const int components = reader.components();
    check_size(static_cast<std::uint32_t>(reader.width()),
               static_cast<std::uint32_t>(reader.height()));
    if (components != 1 && components != 3 && components != 4) {
        throw Error("cannot be decoded as an image (a JPEG of " + std::to_string(components) +
                    " channels)");
    }
    const std::size_t area =
        static_cast<std::size_t>(reader.width()) * static_cast<std::size_t>(reader.height());
    std::vector<std::uint8_t> pixels(area * (components == 4 ? 4 : 3));
    reader.read(pixels.data());
    if (components == 4) {
        pixels = from_inverted_cmyk(pixels);
    }
    return {{reader.width(), reader.height(), std::move(pixels)}, reader.orientation()};
}

}  // namespace rexdeploy
