// Shared libraries that are found when a program runs, not when it is built.
#pragma once

#include <filesystem>
#include <string>

namespace rexdeploy {

/// A loaded library. It stays loaded: the libraries meant here have threads of their own.
class Library {
 public:
    /// Loads `path` if it is given, else what the environment variable `variable` names, else
    /// `name` where the system's loader finds it. Throws Unavailable with the loader's reason.
    Library(const std::filesystem::path& path, const char* variable, const std::string& name);

    /// Its function `symbol`; throws Unavailable.
    template <typename Function>
    Function* function(const char* symbol) const {
        return reinterpret_cast<Function*>(find(symbol));
    }

    /// What was loaded, as it was asked for.
    const std::string& name() const { return name_; }

 private:
    void* find(const char* symbol) const;

    std::string name_;
    void* handle_ = nullptr;
};

}  // namespace rexdeploy
