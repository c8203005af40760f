// Opens a bundle under its lock and reads hashed files; what rexdeploy/bundle/store.py does to read.
#include "bundle.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/file.h>

#include <array>
#include <cerrno>
#include <system_error>

namespace rexdeploy {
namespace {

constexpr const char* kManifest = "manifest.json";
constexpr const char* kJournal = ".manifest.commit";

std::unique_ptr<Descriptor> lock(const std::filesystem::path& folder) {
    auto descriptor = std::make_unique<Descriptor>(folder, O_RDONLY | O_DIRECTORY);
    while (::flock(descriptor->get(), LOCK_SH) != 0) {
        if (errno != EINTR) {
            throw std::system_error(errno, std::generic_category());
        }
    }
    return descriptor;
}

bool is_there(const std::filesystem::path& path) {
    std::error_code ignored;
    return std::filesystem::exists(path, ignored);
}

std::string reason(const std::system_error& error) { return error.code().message(); }

}  // namespace

Bundle::Bundle(const std::filesystem::path& path) : path_(path) {
    if (!is_there(path / kManifest) && !is_there(path / kJournal)) {
        throw Error(path.string() +
                    " is not a bundle: expected a folder with a manifest.json; 'rexdeploy export' "
                    "makes one");
    }
    try {
        lock_ = lock(path);
        if (is_there(path / kJournal)) {
            throw Error(path.string() +
                        " holds the unfinished work of a killed command: finish it with any "
                        "rexdeploy command, such as 'rexdeploy verify " +
                        path.string() + "'");
        }
        const std::vector<std::uint8_t> json = read_file(path / kManifest);
        manifest_ = parse_manifest({reinterpret_cast<const char*>(json.data()), json.size()},
                                   (path / kManifest).string());
    } catch (const std::system_error& error) {
        throw Error("the bundle " + path.string() + " cannot be opened (" + reason(error) + ")");
    }
}

std::vector<std::uint8_t> Bundle::read(const Artifact& artifact) const {
    const std::string file = (path_ / artifact.file).string();
    const std::string again =
        "; make it again: " + (artifact.command.empty() ? "rexdeploy export" : artifact.command);
    std::vector<std::uint8_t> data;
    try {
        data = read_file(file);
    } catch (const std::system_error& error) {
        throw Error(file + " cannot be read (" + reason(error) + ")" + again);
    }
    const std::string found = sha256(data);
    if (found != artifact.sha256) {
        throw Error(file + " is not the file the manifest describes: got sha256 " +
                    found.substr(0, 12) + ", expected " + artifact.sha256.substr(0, 12) + again);
    }
    return data;
}

std::string sha256(const std::vector<std::uint8_t>& data) {
    std::array<unsigned char, 32> digest{};
    if (EVP_Digest(data.data(), data.size(), digest.data(), nullptr, EVP_sha256(), nullptr) != 1) {
        throw Error("libcrypto cannot compute a SHA-256");
    }
    std::string text;
    for (const unsigned char byte : digest) {
        constexpr const char* kDigits = "0123456789abcdef";
        text += kDigits[byte >> 4];
        text += kDigits[byte & 15];
    }
    return text;
}

}  // namespace rexdeploy
