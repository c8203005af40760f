// What needs no bundle: manifests, errors, resampling by hand, orientations.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define DOCTEST_CONFIG_SUPER_FAST_ASSERTS
#include <doctest/doctest.h>

#include <type_traits>
#include <utility>

#include "decoders.hpp"
#include "manifest.hpp"
#include "preprocess.hpp"

using namespace rexdeploy;

namespace {

const std::string kModel =
    R"("model": {"family": "rexnet", "width": 1.5, "num_classes": 3, "input_name": "input",
    "output_name": "logits", "preprocess": {"height": 2, "width": 2, "crop_pct": 1.0,
    "interpolation": "bilinear", "mean": [0, 0, 0], "std": [1, 1, 1]},
    "weights": {"source": "a.pth", "sha256": "", "trained": true}})";

std::string manifest_with(const std::string& artifacts) {
    return R"({"format": 1, "name": "x", )" + kModel + R"(, "artifacts": [)" + artifacts + "]}";
}

std::string artifact(const std::string& file) {
    return R"({"kind": "onnx", "file": ")" + file + R"(", "sha256": ")" + std::string(64, 'a') +
           R"("})";
}

std::string refusal(const std::string& json) {
    try {
        parse_manifest(json, "m");
    } catch (const Error& error) {
        return error.what();
    }
    return "accepted";
}

template <typename Type, typename = void>
constexpr bool kHasBegin = false;
template <typename Type>
constexpr bool kHasBegin<Type, std::void_t<decltype(std::declval<Type>().begin())>> = true;

}  // namespace

static_assert(!std::is_copy_constructible_v<Classifier>);
static_assert(std::is_nothrow_move_constructible_v<Classifier>);
static_assert(std::is_nothrow_move_assignable_v<Classifier>);
// Nothing that a temporary gives points into it.
static_assert(std::is_same_v<decltype(std::declval<Answers>()[0]), std::vector<Prediction>>);
static_assert(std::is_same_v<decltype(std::declval<const Answers>()[0]), std::vector<Prediction>>);
static_assert(!std::is_reference_v<decltype(std::declval<Classifier>().passed_over())>);
static_assert(kHasBegin<Answers&> && !kHasBegin<Answers>);

TEST_CASE("answers are an image's classes, also of a temporary") {
    const std::vector<std::vector<Prediction>> images{{{0, "cat", 0.75}, {1, "dog", 0.25}}, {}};
    const auto answers = [&] { return Answers(images); };
    std::string labels;
    for (const Prediction& item : answers()[0]) {
        labels += item.label;
    }
    CHECK(labels == "catdog");
    std::size_t classes = 0;
    for (const std::vector<Prediction>& image : answers()) {
        classes += image.size();
    }
    CHECK(classes == 2);
    const Answers kept = answers();
    CHECK(kept.size() == 2);
    CHECK(&kept[0] == &*kept.begin());
    CHECK_THROWS_WITH_AS(kept[2], "got image 2, expected one of the 2 classified, counted from 0",
                         Error);
    CHECK_THROWS_AS(answers()[2], Error);
}

TEST_CASE("an error's text is one line") {
    CHECK(std::string(Error(" a\n\tb \x1b[0m\r\n").what()) == "a b [0m");
}

TEST_CASE("a manifest is read, with defaults for what older ones lack") {
    const Manifest manifest = parse_manifest(manifest_with(artifact("a.onnx")), "m");
    CHECK(manifest.model.title == "rexnet 1.5");
    CHECK(manifest.model.input == InputType::float32);
    CHECK_FALSE(manifest.model.gives_probabilities);
    REQUIRE(manifest.find("onnx") != nullptr);
    CHECK_FALSE(manifest.find("onnx")->batch.has_value());
    CHECK(manifest.find("engine") == nullptr);
}

TEST_CASE("file names stay in the folder") {
    for (const char* name : {"../a", "/a", ".a", "a/b", "", "manifest.json", "-a", "a\\u0000b"}) {
        CHECK(refusal(manifest_with(artifact(name))).find("plain name") != std::string::npos);
    }
    CHECK(refusal(manifest_with(artifact("a") + "," + artifact("a"))).find("same file name") !=
          std::string::npos);
}

TEST_CASE("a whole number is one") {
    for (const char* wrong : {"0", "-1", "1.5", "true", "\"3\"", "1e3", "1000001"}) {
        std::string json = manifest_with("");
        const std::string right = R"("num_classes": 3)";
        json.replace(json.find(right), right.size(), R"("num_classes": )" + std::string(wrong));
        CHECK_MESSAGE(refusal(json).find("num_classes") != std::string::npos, wrong);
    }
}

TEST_CASE("what readers make different things of is refused, also where nobody looks") {
    const auto with = [](const std::string& unknown) {
        std::string json = manifest_with("");
        return json.replace(1, 0, "\"unknown\": " + unknown + ", ");
    };
    CHECK(refusal(with("9007199254740992")) == "accepted");
    CHECK(refusal(with("9007199254740993")).find("a number beyond") != std::string::npos);
    CHECK(refusal(with("1e300")).find("a number beyond") != std::string::npos);
    CHECK(refusal(with("{\"a\": 1, \"a\": 1}")).find("twice") != std::string::npos);
    CHECK(refusal(with("\"\\ud800\"")) != "accepted");
    CHECK(refusal("\xef\xbb\xbf" + manifest_with("")).find("byte order") != std::string::npos);
    CHECK(refusal(manifest_with("") + std::string(1, '\0')).find("NUL") != std::string::npos);
}

TEST_CASE("deep nesting does not overflow the stack") {
    CHECK(refusal(std::string(200'000, '[')) != "accepted");
    CHECK(refusal(std::string(200'000, '[') + std::string(200'000, ']')) != "accepted");
}

TEST_CASE("a bilinear half is the mean of two pixels, rounded") {
    Preprocess spec{1, 1, 1.0, Interpolation::bilinear, {}, {1, 1, 1}};
    const std::vector<std::uint8_t> rgb{10, 0, 255, 20, 1, 255, 10, 0, 255, 20, 1, 255};
    CHECK(crop(rgb.data(), 2, 2, spec) == std::vector<std::uint8_t>{15, 1, 255});
    CHECK_THROWS_AS(crop(rgb.data(), 0, 2, spec), Error);
    CHECK_THROWS_AS(crop(rgb.data(), 1, 101, spec), Error);
}

TEST_CASE("orientations: both byte orders, and nothing read beyond the end") {
    const std::string_view little("II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0", 22);
    const std::string_view big("MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0", 22);
    CHECK(exif_orientation(little) == 6);
    CHECK(exif_orientation(big) == 8);
    CHECK(exif_orientation(std::string("Exif\0\0", 6) += little) == 6);
    CHECK(exif_orientation("MM") == 0);
    CHECK(exif_orientation(std::string("MMx*") += big.substr(4)) == 0);
    CHECK(exif_orientation(std::string("II+\0", 4) += little.substr(4)) == 0);
    CHECK(exif_orientation("II*\0\xff\xff\xff\xff") == 0);
    CHECK(exif_orientation("") == 0);
    CHECK(xmp_orientation("<x tiff:Orientation=\"3\">") == 3);
    CHECK(xmp_orientation("<tiff:Orientation>5<") == 5);
    CHECK(xmp_orientation("tiff:Orientation") == 0);
}
