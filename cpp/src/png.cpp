// PNG through libpng, unpacked as Pillow does: 16 bits to 8, alpha and transparency dropped.
#include <png.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstring>
#include <new>
#include <string>
#include <string_view>

#include "decoders.hpp"

namespace rexdeploy {
namespace {

// As in rexdeploy/images/limits.py: each of these may unpack to eight megabytes (in Pillow, to one).
constexpr int kMaxPacked = 32;
constexpr int kMaxTexts = 1000;  // kept of a file: libpng copies all for every eighth

/// Refuses what would keep libpng busy for more than seconds, before it sees any of it.
void check_png(const std::vector<std::uint8_t>& data) {
    int packed = 0;
    std::size_t position = 8;
    while (position + 8 <= data.size()) {
        std::size_t size = 0;
        for (std::size_t index = 0; index < 4; ++index) {
            size = size << 8 | data[position + index];
        }
        const std::string_view kind(reinterpret_cast<const char*>(&data[position + 4]), 4);
        position += 12 + size;
        if (kind == "IEND") {
            return;
        }
        packed += kind == "zTXt" || kind == "iTXt" || kind == "iCCP";
        if (packed > kMaxPacked) {
            throw Error("more than " + std::to_string(kMaxPacked) +
                        " compressed texts and profiles; save it anew");
        }
    }
}

/// The bytes of an ImageMagick profile: hexadecimal digits in lines, after three other lines.
std::string from_raw_profile(std::string_view text) {
    for (int line = 0; line < 3; ++line) {
        const auto end = text.find('\n');
        text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    }
    std::string bytes;
    std::size_t digits = 0;
    for (const char character : text) {
        const auto value = std::string_view("0123456789abcdef").find(character);
        if (value == std::string_view::npos) {
            continue;
        }
        if (digits++ % 2 == 0) {
            bytes += static_cast<char>(value << 4);
        } else {
            bytes.back() = static_cast<char>(bytes.back() | static_cast<char>(value));
        }
    }
    return bytes;
}

class PngReader {
 public:
    explicit PngReader(const std::vector<std::uint8_t>& data) : data_(data) {
        png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, on_error, on_warning);
        info_ = png_ != nullptr ? png_create_info_struct(png_) : nullptr;
        if (info_ == nullptr) {
            png_destroy_read_struct(&png_, &info_, nullptr);
            throw std::bad_alloc();
        }
        // libpng's errors come back here by longjmp; no frame with a destructor lies between.
        if (setjmp(png_jmpbuf(png_)) != 0) {
            png_destroy_read_struct(&png_, &info_, nullptr);
            fail();
        }
        png_set_chunk_cache_max(png_, kMaxTexts + 2);
        png_set_read_fn(png_, this, on_read);
        png_read_info(png_, info_);
        png_set_packing(png_);  // 1, 2 and 4 bits to a byte each, not scaled
        interlace_passes_ = png_set_interlace_handling(png_);
        colours_ = png_get_color_type(png_, info_);
        bits_ = png_get_bit_depth(png_, info_);
    }
    ~PngReader() { png_destroy_read_struct(&png_, &info_, nullptr); }
    PngReader(const PngReader&) = delete;
    PngReader& operator=(const PngReader&) = delete;

    std::uint32_t width() const { return png_get_image_width(png_, info_); }
    std::uint32_t height() const { return png_get_image_height(png_, info_); }
    int bits() const { return bits_; }
    bool is_palette() const { return colours_ == PNG_COLOR_TYPE_PALETTE; }
    bool is_grey() const { return (colours_ & PNG_COLOR_MASK_COLOR) == 0; }
    bool has_alpha() const { return (colours_ & PNG_COLOR_MASK_ALPHA) != 0; }
    std::size_t channels() const { return png_get_channels(png_, info_); }

    /// Writes every row to `samples`, `row_bytes` each: one byte a sample, or two of 16 bits.
    void read(std::uint8_t* samples, std::size_t row_bytes) {
        if (setjmp(png_jmpbuf(png_)) != 0) {
            fail();
        }
        png_read_update_info(png_, info_);
        for (int pass = 0; pass < interlace_passes_; ++pass) {
            for (std::uint32_t y = 0; y < height(); ++y) {
                png_read_row(png_, samples + y * row_bytes, nullptr);
            }
        }
        if (setjmp(png_jmpbuf(png_)) != 0) {
            return;  // what is damaged behind the pixels is not missed, as in Pillow
        }
        png_read_end(png_, info_);  // EXIF may stand there
    }

    /// 256 colours, black where the file has none.
    std::vector<std::uint8_t> palette() const {
        std::vector<std::uint8_t> colours(3 * 256);
        png_colorp entries = nullptr;
        int count = 0;
        png_get_PLTE(png_, info_, &entries, &count);
        for (int index = 0; index < count; ++index) {
            colours[3 * index] = entries[index].red;
            colours[3 * index + 1] = entries[index].green;
            colours[3 * index + 2] = entries[index].blue;
        }
        return colours;
    }

    int orientation() {
        png_bytep exif = nullptr;
        png_uint_32 size = 0;
        if (png_get_eXIf_1(png_, info_, &size, &exif) != 0) {
            if (const int orientation =
                    exif_orientation({reinterpret_cast<const char*>(exif), size})) {
                return orientation;
            }
        }
        int from_xmp = 0;
        png_textp texts = nullptr;
        const int count = png_get_text(png_, info_, &texts, nullptr);
        for (int index = 0; index < count; ++index) {
            const std::string_view key(texts[index].key);
            const std::string_view text(texts[index].text != nullptr ? texts[index].text : "");
            if (key == "Raw profile type exif") {
                if (const int orientation = exif_orientation(from_raw_profile(text))) {
                    return orientation;
                }
            } else if (key == "XML:com.adobe.xmp" && from_xmp == 0) {
                from_xmp = xmp_orientation(text);
            }
        }
        return from_xmp;
    }

 private:
    static void on_error(png_structp png, png_const_charp message) {
        auto* reader = static_cast<PngReader*>(png_get_error_ptr(png));
        std::strncpy(reader->message_, message, sizeof message_ - 1);
        png_longjmp(png, 1);
    }

    static void on_warning(png_structp, png_const_charp) {}

    static void on_read(png_structp png, png_bytep out, std::size_t size) {
        auto* reader = static_cast<PngReader*>(png_get_io_ptr(png));
        if (size > reader->data_.size() - reader->position_) {
            png_error(png, "the file is truncated");
        }
        std::memcpy(out, reader->data_.data() + reader->position_, size);
        reader->position_ += size;
    }

    [[noreturn]] void fail() const {
        throw Error(std::string("cannot be decoded as an image (") + message_ + ")");
    }

    const std::vector<std::uint8_t>& data_;
    std::size_t position_ = 0;
    char message_[256] = "";
    png_structp png_ = nullptr;
    png_infop info_ = nullptr;
    int interlace_passes_ = 1;
    int colours_ = 0;
    int bits_ = 0;
};

/// One grey sample as 8 bits.
std::uint8_t grey(const PngReader& reader, const std::uint8_t* sample) {
    if (reader.bits() < 8) {
        return static_cast<std::uint8_t>(*sample * (255 / ((1 << reader.bits()) - 1)));
    }
    if (reader.bits() == 16 && !reader.has_alpha()) {
        // As images.py scales it; everything else of 16 bits is cut to its high byte by Pillow.
        return static_cast<std::uint8_t>(((sample[0] << 8 | sample[1]) + 128) / 257);
    }
    return *sample;
}

}  // namespace

Oriented decode_png(const std::vector<std::uint8_t>& data) {
    check_png(data);
    PngReader reader(data);
    check_size(reader.width(), reader.height());
    const std::size_t area = std::size_t{reader.width()} * reader.height();
    const std::size_t sample_bytes = reader.bits() == 16 ? 2 : 1;
    const std::size_t pixel_bytes = reader.channels() * sample_bytes;
    std::vector<std::uint8_t> samples(area * pixel_bytes);
    reader.read(samples.data(), reader.width() * pixel_bytes);
    const std::vector<std::uint8_t> palette = reader.palette();
    Image image{static_cast<int>(reader.width()), static_cast<int>(reader.height()), {}};
    image.rgb.resize(3 * area);
    for (std::size_t index = 0; index < area; ++index) {
        const std::uint8_t* sample = &samples[index * pixel_bytes];
        std::uint8_t* const pixel = &image.rgb[3 * index];
        if (reader.is_palette()) {
            std::memcpy(pixel, &palette[3 * std::size_t{*sample}], 3);
        } else if (reader.is_grey()) {
            std::fill_n(pixel, 3, grey(reader, sample));
        } else {
            for (std::size_t channel = 0; channel < 3; ++channel) {
                pixel[channel] = sample[channel * sample_bytes];
            }
        }
    }
    return {std::move(image), reader.orientation()};
}

}  // namespace rexdeploy
