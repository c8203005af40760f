// What rexdeploy-run finds, as `rexdeploy predict --json` writes it.
#pragma once

#include <string>
#include <vector>

#include "rexdeploy/classifier.hpp"

namespace rexdeploy {

/// What became of one image: its classes, or why there are none.
struct Row {
    std::string file;  // as text that can be written
    std::vector<Prediction> predictions{};
    std::string error{};  // empty: none
};

/// Throws Error if `file` cannot be written; call it before the work. "-" is stdout.
void check_json(const std::string& file);

/// Writes the rows as a JSON document to `file`, which is the old one or the new one at any time,
/// or to stdout for "-". Probabilities have all their digits. Throws Error.
void write_json(const std::string& file, const Classifier& classifier,
                const std::vector<Row>& rows);

}  // namespace rexdeploy
