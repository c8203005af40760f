// JPEG through libjpeg(-turbo): grey, RGB and CMYK, as Pillow decodes them.
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

constexpr int kMaxScans = 500;  // a small file of many scans over a large image takes minutes
constexpr std::string_view kExif("Exif\0\0", 6);
constexpr std::string_view kXmp("http://ns.adobe.com/xap/1.0/\0", 29);

/// libjpeg's errors come back by longjmp into the function that called it, and leave that as an
/// exception: no frame with a destructor lies between.
struct ErrorState {
    jpeg_error_mgr manager;  // first: libjpeg gives back a pointer to it
    std::jmp_buf jump;
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
    if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > kMaxScans) {
        auto* state = reinterpret_cast<ErrorState*>(info->err);
        std::snprintf(state->message, sizeof state->message, "more than %d scans", kMaxScans);
        std::longjmp(state->jump, 1);
    }
}

class JpegReader {
 public:
    explicit JpegReader(const std::vector<std::uint8_t>& data) {
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
    JpegReader reader(data);
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
