// Reads files with the system's reason for what fails.
#include "file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace rexdeploy {
namespace {

[[noreturn]] void throw_errno() { throw std::system_error(errno, std::generic_category()); }

}  // namespace

Descriptor::Descriptor(const std::filesystem::path& path, int flags)
    : value_(::open(path.c_str(), flags | O_CLOEXEC)) {
    if (value_ < 0) {
        throw_errno();
    }
}

Descriptor::~Descriptor() { ::close(value_); }

std::vector<std::uint8_t> read_file(const std::filesystem::path& file, std::size_t most) {
    // Without O_NONBLOCK, opening a named pipe would wait for its writer.
    const Descriptor descriptor(file, O_RDONLY | O_NONBLOCK);
    struct stat status{};
    if (::fstat(descriptor.get(), &status) != 0) {
        throw_errno();
    }
    if (!S_ISREG(status.st_mode)) {
        throw std::system_error(S_ISDIR(status.st_mode) ? EISDIR : EINVAL, std::generic_category());
    }
    if (static_cast<std::size_t>(status.st_size) > most) {
        throw std::system_error(EFBIG, std::generic_category());
    }
    std::vector<std::uint8_t> data(static_cast<std::size_t>(status.st_size));
    std::size_t size = 0;
    while (size < data.size()) {
        const ssize_t count = ::read(descriptor.get(), data.data() + size, data.size() - size);
        if (count < 0 && errno != EINTR) {
            throw_errno();
        }
        if (count == 0) {  // somebody cut it meanwhile
            break;
        }
        size += count > 0 ? static_cast<std::size_t>(count) : 0;
    }
    data.resize(size);
    return data;
}

}  // namespace rexdeploy
