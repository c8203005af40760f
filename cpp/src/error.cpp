// Error's text is one line.
#include "rexdeploy/error.hpp"

#include <string>

namespace rexdeploy {
namespace {

std::string one_line(std::string_view text) {
    std::string line;
    for (const char character : text) {
        const bool is_blank = static_cast<unsigned char>(character) <= ' ' || character == '\x7f';
        if (!is_blank) {
            line += character;
        } else if (!line.empty() && line.back() != ' ') {
            line += ' ';
        }
    }
    if (!line.empty() && line.back() == ' ') {
        line.pop_back();
    }
    return line;
}

}  // namespace

Error::Error(std::string_view text) : std::runtime_error(one_line(text)) {}

}  // namespace rexdeploy
