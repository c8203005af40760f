// From RGB bytes to the network's input, with Pillow's resampler.
#pragma once

#include <cstdint>
#include <vector>

#include "manifest.hpp"

namespace rexdeploy {

/// The resized centre crop `[spec.height, spec.width, 3]` of RGB bytes `[height, width, 3]`.
/// Equal to rexdeploy/images/decode.py's with Pillow 13.0 or later, byte for byte. Throws Error for sides
/// below 1 and for images thinner than 1:100.
std::vector<std::uint8_t> crop(const std::uint8_t* rgb, int width, int height,
                               const Preprocess& spec);

/// RGB bytes `[spec.height, spec.width, 3]` to float32 `[3, spec.height, spec.width]` at `output`.
/// Equal to rexdeploy/images/decode.py's, bit for bit.
void normalise(const std::uint8_t* pixels, const Preprocess& spec, float* output);

}  // namespace rexdeploy
