// The command lines of the two programs.
#pragma once

#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace rexdeploy {

struct Arguments {
    std::vector<std::string> positional;
    std::map<std::string, std::string> options;  // by name, without the dashes
    bool is_quiet = false;

    std::string text(const std::string& option, const std::string& otherwise) const;
    /// A whole number from `low` to `high`; throws Error.
    int number(const std::string& option, int otherwise, int low, int high) const;
};

/// Ends a program with exit code 2 that has said already what is wrong.
class Failed : public std::exception {};

/// Reads `--option VALUE`, `--option=VALUE`, `-q`/`--quiet` and `--help`, which prints `usage` and
/// leaves; calls `command`. Returns the exit code: 0, 2 after one line on stderr for an Error, 1
/// for a bug.
int run_program(int argc, char** argv, const char* usage, const std::vector<std::string>& known,
                const std::function<void(const Arguments&)>& command);

}  // namespace rexdeploy
