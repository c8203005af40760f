// dlopen and dlsym, with the loader's message in ours.
#include "library.hpp"

#include <dlfcn.h>

#include <cstdlib>

#include "model.hpp"

namespace rexdeploy {

Library::Library(const std::filesystem::path& path, const char* variable, const std::string& name)
    : name_(path.string()) {
    const char* from_environment = std::getenv(variable);
    if (name_.empty()) {
        name_ = from_environment != nullptr ? from_environment : "";
    }
    if (name_.empty()) {
        name_ = name;
    }
    handle_ = ::dlopen(name_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) {
        const char* reason = ::dlerror();
        throw Unavailable("the library " + name_ + " cannot be loaded (" +
                          (reason != nullptr ? reason : "no reason given") + "); set " + variable +
                          " to its path");
    }
}

void* Library::find(const char* symbol) const {
    void* const address = ::dlsym(handle_, symbol);
    if (address == nullptr) {
        throw Unavailable("the library " + name_ + " has no function " + symbol);
    }
    return address;
}

}  // namespace rexdeploy
