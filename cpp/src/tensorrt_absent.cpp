// In the place of tensorrt.cpp where TensorRT's headers were not found.
#include "model.hpp"

namespace rexdeploy {

std::unique_ptr<Model> open_tensorrt(const std::vector<std::uint8_t>&, const ModelSpec&, bool,
                                     const std::filesystem::path&) {
    throw Unavailable("this program was built without TensorRT: set TENSORRT_INCLUDE_DIR in CMake");
}

}  // namespace rexdeploy
