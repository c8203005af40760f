// Text that somebody else wrote (file names, labels, libraries' messages), made fit to print.
#pragma once

#include <string>
#include <string_view>

namespace rexdeploy {

/// A file's name as Python holds it, which is what it sorts by: bytes that are not UTF-8 as 0xdcNN.
std::u32string decoded(std::string_view name);

/// A file's name as text that can be written: bytes that are not UTF-8 as `\udcNN`.
std::string printable(std::string_view name);

/// The same, fit for a terminal: control characters, and what turns the direction of text, as
/// escapes such as `\x1b`.
std::string plain(std::string_view text);

}  // namespace rexdeploy
