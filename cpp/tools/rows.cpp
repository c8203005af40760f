// Rows as one JSON document, in a file that is there whole or not at all.
#include "rows.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "rexdeploy/error.hpp"

namespace rexdeploy {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

std::string to_json(const Classifier& classifier, const std::vector<Row>& rows) {
    Json images = Json::array();
    for (const Row& row : rows) {
        Json predictions = Json::array();
        for (const Prediction& item : row.predictions) {
            predictions.push_back({{"index", item.index},
                                   {"label", item.label},
                                   {"probability", item.probability}});
        }
        images.push_back({{"file", row.file},
                          {"error", row.error.empty() ? Json() : Json(row.error)},
                          {"predictions", std::move(predictions)}});
    }
    const Json document{{"model", classifier.title()},
                        {"backend", classifier.backend()},
                        {"passed_over", classifier.passed_over()},
                        {"images", std::move(images)}};
    // In ASCII: labels and names of files may hold what steers a terminal.
    return document.dump(2, ' ', true, Json::error_handler_t::replace) + "\n";
}

/// Something that can be written to and not replaced, such as /dev/null.
bool is_stream(const fs::path& file) {
    std::error_code ignored;
    const fs::file_status status = fs::status(file, ignored);
    return fs::exists(status) && !fs::is_regular_file(status) && !fs::is_directory(status);
}

bool write_all(int descriptor, const std::string& text) {
    std::size_t size = 0;
    while (size < text.size()) {
        const ssize_t count = ::write(descriptor, text.data() + size, text.size() - size);
        if (count < 0 && errno != EINTR) {
            return false;
        }
        size += count > 0 ? static_cast<std::size_t>(count) : 0;
    }
    return true;
}

/// Whether it was written; otherwise errno says why not.
bool write_stream(const fs::path& file, const std::string& text) {
    // Without O_NONBLOCK, opening a named pipe would wait for somebody who reads it.
    const int descriptor = ::open(file.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    if (descriptor < 0) {
        return false;
    }
    const bool is_written = ::fcntl(descriptor, F_SETFL, 0) == 0 && write_all(descriptor, text);
    return ::close(descriptor) == 0 && is_written;
}

/// The same, through a new file beside it.
bool replace(const fs::path& file, const std::string& text) {
    std::error_code error;
    const fs::path target = fs::weakly_canonical(file, error);  // where a link leads
    const fs::path staged = target.parent_path() / ("." + target.filename().string() + "." +
                                                    std::to_string(::getpid()) + ".staged");
    const int flags = O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC;
    const int descriptor = ::open(staged.c_str(), flags, 0666);
    if (descriptor < 0) {
        return false;
    }
    bool is_written = write_all(descriptor, text) && ::fsync(descriptor) == 0;
    int reason = errno;
    if (::close(descriptor) != 0 && is_written) {
        is_written = false;
        reason = errno;
    }
    if (is_written && std::rename(staged.c_str(), target.c_str()) != 0) {
        is_written = false;
        reason = errno;
    }
    if (!is_written) {
        ::unlink(staged.c_str());
        errno = reason;
    }
    return is_written;
}

}  // namespace

void check_json(const std::string& file) {
    if (file == "-") {
        return;
    }
    std::error_code ignored;
    const fs::path parent = fs::path(file).parent_path();
    const fs::path written = is_stream(file) ? fs::path(file) : parent.empty() ? "." : parent;
    if (file.empty() || fs::is_directory(file, ignored) || ::access(written.c_str(), W_OK) != 0) {
        throw Error("cannot write " + file +
                    ": expected a file in a folder that can be written, or - for the output");
    }
}

void write_json(const std::string& file, const Classifier& classifier,
                const std::vector<Row>& rows) {
    const std::string text = to_json(classifier, rows);
    if (file == "-") {
        std::fwrite(text.data(), 1, text.size(), stdout);  // run_program sees if that fails
        return;
    }
    if (!(is_stream(file) ? write_stream(file, text) : replace(file, text))) {
        throw Error("cannot write " + file + " (" + std::generic_category().message(errno) + ")");
    }
}

}  // namespace rexdeploy
