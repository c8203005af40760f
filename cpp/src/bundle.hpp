// A bundle's folder, read-only: the manifest and the files that it names.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "manifest.hpp"

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

/// An open bundle. Holds a shared lock on the folder: no command changes it meanwhile.
class Bundle {
 public:
    /// Throws Error if there is none at `path`, if it is damaged, or if the work of a killed
    /// command has to be finished first.
    explicit Bundle(const std::filesystem::path& path);

    const std::filesystem::path& path() const { return path_; }
    const Manifest& manifest() const { return manifest_; }

    /// An artifact's bytes, checked against its hash; throws Error.
    std::vector<std::uint8_t> read(const Artifact& artifact) const;

 private:
    std::filesystem::path path_;
    std::unique_ptr<Descriptor> lock_;
    Manifest manifest_;
};

/// A regular file's bytes; throws std::system_error with the system's reason, and
/// std::errc::file_too_large where there are more than `most`.
std::vector<std::uint8_t> read_file(const std::filesystem::path& file,
                                    std::size_t most = SIZE_MAX);

/// The SHA-256 of `data`, in hexadecimal.
std::string sha256(const std::vector<std::uint8_t>& data);

}  // namespace rexdeploy
