// The shapes that a bundle's graph or engine must have.
#include "model.hpp"

namespace rexdeploy {
namespace {

bool fits(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& wanted) {
    bool result = shape.size() == wanted.size();
    for (std::size_t index = 0; result && index < wanted.size(); ++index) {
        result = shape[index] < 0 || wanted[index] < 0 || shape[index] == wanted[index];
    }
    return result;
}

}  // namespace

std::string to_text(const std::vector<std::int64_t>& shape) {
    std::string text;
    for (const std::int64_t size : shape) {
        text += (text.empty() ? "" : ", ") + std::to_string(size);
    }
    return "[" + text + "]";
}

std::vector<std::int64_t> input_shape(const ModelSpec& spec) {
    const std::int64_t height = spec.preprocess.height;
    const std::int64_t width = spec.preprocess.width;
    if (spec.input == InputType::uint8) {
        return {-1, height, width, 3};
    }
    return {-1, 3, height, width};
}

void check_shapes(const std::vector<std::int64_t>& input, const std::vector<std::int64_t>& output,
                  const ModelSpec& spec) {
    const std::vector<std::int64_t> wanted_output{-1, spec.num_classes};
    if (!fits(input, input_shape(spec)) || !fits(output, wanted_output)) {
        throw Error("the model maps " + to_text(input) + " to " + to_text(output) + "; expected " +
                    to_text(input_shape(spec)) + " to " + to_text(wanted_output) +
                    " (-1: any number)");
    }
}

}  // namespace rexdeploy
