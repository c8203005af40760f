// The one exception that the library throws on purpose.
#pragma once

#include <stdexcept>
#include <string_view>

#include "rexdeploy/export.hpp"

namespace rexdeploy {

/// An expected failure. Its text is one line: what was got, what was expected, what to do.
class REXDEPLOY_EXPORT Error : public std::runtime_error {
 public:
    /// Line breaks and runs of blanks in `text` (which may quote a library) become one blank.
    explicit Error(std::string_view text);
};

}  // namespace rexdeploy
