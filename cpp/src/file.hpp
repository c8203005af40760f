// Open files, and what is in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <vector>

namespace rexdeploy {

/// A file descriptor that closes itself.
class Descriptor {
 public:
    /// Throws std::system_error with the system's reason.
    Descriptor(const std::filesystem::path& path, int flags);
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    int get() const { return value_; }

 private:
    int value_;
};

/// A regular file's bytes; throws std::system_error with the system's reason, and
/// std::errc::file_too_large where there are more than `most`.
std::vector<std::uint8_t> read_file(const std::filesystem::path& file,
                                    std::size_t most = SIZE_MAX);

}  // namespace rexdeploy
