// Walks folders in the order of Python's sorted names.
#include "files.hpp"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "rexdeploy/error.hpp"
#include "text.hpp"

namespace rexdeploy {
namespace {

namespace fs = std::filesystem;

/// The path as Python's pathlib prints it.
std::string shown(const fs::path& path) {
    fs::path result;
    for (const fs::path& part : path) {
        if (part != "." && !part.empty()) {
            result /= part;
        }
    }
    return result.empty() ? "." : result.string();
}

/// What is in a folder, the first by name at the end.
std::vector<fs::directory_entry> entries(const fs::path& folder) {
    std::vector<std::pair<std::u32string, fs::directory_entry>> found;
    std::error_code error;
    fs::directory_iterator entry(folder, error);
    while (!error && entry != fs::directory_iterator()) {
        found.emplace_back(decoded(entry->path().filename().native()), *entry);
        entry.increment(error);
    }
    if (error) {
        throw Error(shown(folder) + ": " + error.message());
    }
    std::sort(found.begin(), found.end(),
              [](const auto& left, const auto& right) { return left.first > right.first; });
    std::vector<fs::directory_entry> sorted;
    for (auto& [name, item] : found) {
        sorted.push_back(std::move(item));
    }
    return sorted;
}

bool is_image(const fs::path& file) {
    std::string extension = file.extension().string();
    for (char& character : extension) {
        character = character >= 'A' && character <= 'Z' ? static_cast<char>(character | ' ')
                                                         : character;
    }
    // rexdeploy/images/decode.py's, also those that only Python reads: a row says so.
    for (const char* known :
         {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}) {
        if (extension == known) {
            return file.filename().native()[0] != '.';
        }
    }
    return false;
}

/// The image files in a folder and below.
std::vector<std::string> walk(const fs::path& folder) {
    std::vector<std::string> files;
    std::vector<fs::directory_entry> stack = entries(folder);
    while (!stack.empty()) {
        const fs::directory_entry entry = std::move(stack.back());
        stack.pop_back();
        std::error_code ignored;  // what may not be looked at is neither
        if (entry.symlink_status(ignored).type() == fs::file_type::directory) {
            for (fs::directory_entry& item : entries(entry.path())) {
                stack.push_back(std::move(item));
            }
        } else if (is_image(entry.path()) && entry.is_regular_file(ignored)) {
            files.push_back(shown(entry.path()));
        }
    }
    if (files.empty()) {
        throw Error("no images in " + shown(folder) + ": expected files such as .jpg or .png");
    }
    return files;
}

}  // namespace

std::vector<std::string> expand(const std::vector<std::string>& paths) {
    std::vector<std::string> files;
    std::set<std::string> seen;
    const auto add = [&](std::string file) {
        if (seen.insert(file).second) {
            files.push_back(std::move(file));
        }
    };
    for (const std::string& path : paths) {
        std::error_code ignored;  // such as a name too long: that is one image's error
        if (!fs::is_directory(path, ignored)) {
            add(shown(path));
            continue;
        }
        for (std::string& file : walk(path)) {
            add(std::move(file));
        }
    }
    return files;
}

}  // namespace rexdeploy
