// A bundle's folder, read-only: the manifest and the files that it names.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "file.hpp"
#include "manifest.hpp"

namespace rexdeploy {

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

/// The SHA-256 of `data`, in hexadecimal.
std::string sha256(const std::vector<std::uint8_t>& data);

}  // namespace rexdeploy
