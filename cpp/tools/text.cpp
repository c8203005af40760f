// UTF-8 as Python reads it, and what of it may be printed.
#include "text.hpp"

#include <algorithm>
#include <cstdio>

namespace rexdeploy {
namespace {

constexpr char32_t kEscape = 0xdc00;  // plus a byte that is not UTF-8: Python's surrogateescape

bool is_escaped_byte(char32_t value) { return value >= kEscape && value < kEscape + 0x100; }

/// The length of the UTF-8 character that `text` begins with, 0 if it is none; not empty.
std::size_t character_length(std::string_view text) {
    const auto byte = [&](std::size_t index) {
        return index < text.size() ? static_cast<unsigned char>(text[index]) : 0U;
    };
    const unsigned first = byte(0);
    if (first < 0x80) {
        return 1;
    }
    const std::size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    // Longer than they need to be, surrogates, and what is beyond Unicode.
    const unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    const unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    bool is_valid = first >= 0xc2 && first <= 0xf4 && byte(1) >= low && byte(1) <= high;
    for (std::size_t index = 2; index < length; ++index) {
        is_valid = is_valid && byte(index) >= 0x80 && byte(index) <= 0xbf;
    }
    return is_valid ? length : 0;
}

/// What moves a cursor, changes colours, ends a line or turns the direction of the text.
bool is_steering(char32_t value) {
    return value < 0x20 || (value >= 0x7f && value < 0xa0) || value == 0xfeff ||
           (value >= 0x2028 && value <= 0x202e) || (value >= 0x2066 && value <= 0x2069);
}

/// As Python's unicode_escape.
std::string escape(char32_t value) {
    if (value == '\t' || value == '\n' || value == '\r') {
        return value == '\t' ? "\\t" : value == '\n' ? "\\n" : "\\r";
    }
    char text[8];
    std::snprintf(text, sizeof text, value < 0x100 ? "\\x%02x" : "\\u%04x",
                  static_cast<unsigned>(value));
    return text;
}

/// `text` with escapes for what is not UTF-8 and, if `is_plain`, for what steers a terminal.
std::string written(std::string_view text, bool is_plain) {
    std::string result;
    while (!text.empty()) {
        const std::size_t length = std::max<std::size_t>(character_length(text), 1);
        const char32_t value = decoded(text.substr(0, length))[0];
        if (is_escaped_byte(value) || (is_plain && is_steering(value))) {
            result += escape(value);
        } else {
            result += text.substr(0, length);
        }
        text.remove_prefix(length);
    }
    return result;
}

}  // namespace

std::u32string decoded(std::string_view name) {
    std::u32string text;
    while (!name.empty()) {
        const std::size_t length = character_length(name);
        auto value = static_cast<char32_t>(static_cast<unsigned char>(name[0]));
        if (length == 0) {
            value += kEscape;
        } else if (length > 1) {
            value &= 0x7fU >> length;
            for (const char next : name.substr(1, length - 1)) {
                value = value << 6 | (static_cast<unsigned char>(next) & 0x3fU);
            }
        }
        text += value;
        name.remove_prefix(std::max<std::size_t>(length, 1));
    }
    return text;
}

std::string printable(std::string_view name) { return written(name, false); }

std::string plain(std::string_view text) { return written(text, true); }

}  // namespace rexdeploy
