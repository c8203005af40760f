// Parses arguments; turns exceptions into exit codes.
#include "arguments.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "rexdeploy/error.hpp"
#include "text.hpp"

namespace rexdeploy {
namespace {

Arguments parse(int argc, char** argv, const std::vector<std::string>& known) {
    Arguments arguments;
    bool only_positional = false;
    for (int index = 1; index < argc; ++index) {
        const std::string argument = argv[index];
        if (only_positional || argument.size() < 2 || argument[0] != '-') {
            arguments.positional.push_back(argument);
        } else if (argument == "--") {
            only_positional = true;
        } else if (argument == "-q" || argument == "--quiet") {
            arguments.is_quiet = true;
        } else {
            const auto equals = argument.find('=');
            const std::string name = argument.substr(0, equals);
            if (std::find(known.begin(), known.end(), name) == known.end()) {
                throw Error("no such option: " + name + "; see --help");
            }
            if (equals == std::string::npos && index + 1 == argc) {
                throw Error("option " + name + " needs a value; see --help");
            }
            arguments.options[name] =
                equals == std::string::npos ? argv[++index] : argument.substr(equals + 1);
        }
    }
    return arguments;
}

}  // namespace

std::string Arguments::text(const std::string& option, const std::string& otherwise) const {
    const auto found = options.find(option);
    return found == options.end() ? otherwise : found->second;
}

int Arguments::number(const std::string& option, int otherwise, int low, int high) const {
    const std::string got = text(option, std::to_string(otherwise));
    const bool is_number =
        !got.empty() && got.size() <= 7 && got.find_first_not_of("0123456789") == std::string::npos;
    const long value = is_number ? std::strtol(got.c_str(), nullptr, 10) : -1;
    if (value < low || value > high) {
        throw Error(option + ": got '" + got + "', expected a number from " + std::to_string(low) +
                    " to " + std::to_string(high));
    }
    return static_cast<int>(value);
}

int run_program(int argc, char** argv, const char* usage, const std::vector<std::string>& known,
                const std::function<void(const Arguments&)>& command) {
    for (int index = 1; index < argc; ++index) {
        const std::string argument = argv[index];
        if (argument == "--") {
            break;
        }
        if (argument == "--help" || argument == "-h") {
            std::fputs(usage, stdout);
            return 0;
        }
    }
    try {
        int code = 0;
        try {
            command(parse(argc, argv, known));
        } catch (const Failed&) {
            code = 2;
        }
        if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
            throw Error("the output cannot be written");
        }
        return code;
    } catch (const Error& error) {
        std::fprintf(stderr, "error: %s\n", plain(error.what()).c_str());
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: unexpected: %s\n", error.what());
        return 1;
    }
}

}  // namespace rexdeploy
