// The files that a command line names, as rexdeploy/images/decode.py and rexdeploy/inference/stream.py do it.
#pragma once

#include <string>
#include <vector>

namespace rexdeploy {

/// The files to classify, each once: a folder stands for the image files in it and below, by name.
/// Links to folders inside are not followed. Paths are as Python's pathlib prints them: without "."
/// and doubled slashes. Throws Error for a folder without images, or that cannot be listed.
std::vector<std::string> expand(const std::vector<std::string>& paths);

}  // namespace rexdeploy
