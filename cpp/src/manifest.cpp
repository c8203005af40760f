// Reads manifest.json with the checks of rexdeploy/bundle/manifest.py.
#include "manifest.hpp"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <locale>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <tuple>

namespace rexdeploy {
namespace {

using Json = nlohmann::json;

constexpr int kFormat = 1;
constexpr int kMaxClasses = 1'000'000;
constexpr int kMaxBatch = 4096;
constexpr int kMaxImageSize = 4096;
constexpr std::size_t kMaxDepth = 32;
constexpr std::int64_t kMaxNumber = std::int64_t{1} << 53;
constexpr double kMaxDouble = 9007199254740992.0;  // the same

[[noreturn]] void malformed(const std::string& reason) { throw Error(reason); }

/// Refuses, while the document is read, what other readers take for something else: the rules of
/// rexdeploy/bundle/strict_json.py. The rest of them is nlohmann-json's own.
class Strict {
 public:
    void operator()(Json::parse_event_t event, const Json& parsed) {
        using Event = Json::parse_event_t;
        if (event == Event::object_start || event == Event::array_start) {
            if (names_.size() == kMaxDepth) {
                malformed("nested deeper than " + std::to_string(kMaxDepth));
            }
            names_.emplace_back();
        } else if (event == Event::object_end || event == Event::array_end) {
            names_.pop_back();
        } else if (event == Event::key && !names_.back().insert(parsed.get<std::string>()).second) {
            malformed("a name is twice in one object");
        } else if (event == Event::value && is_beyond(parsed)) {
            malformed("a number beyond " + std::to_string(kMaxNumber));
        }
    }

 private:
    static bool is_beyond(const Json& value) {
        if (value.is_number_float()) {
            return std::fabs(value.get<double>()) > kMaxDouble;
        }
        return value.is_number() && (value > kMaxNumber || value < -kMaxNumber);
    }

    std::vector<std::set<std::string>> names_;  // of every object and list that is open
};

Json parse_strictly(std::string_view json) {
    if (json.substr(0, 3) == "\xef\xbb\xbf") {
        malformed("it begins with a byte order mark");
    }
    if (json.find('\0') != json.npos) {  // the library takes it for the end
        malformed("it holds a NUL byte");
    }
    Strict strict;
    return Json::parse(json, [&](int, Json::parse_event_t event, const Json& parsed) {
        strict(event, parsed);
        return true;
    });
}

const Json& member(const Json& object, const char* key) {
    if (!object.is_object()) {
        malformed(std::string("expected an object with the field '") + key + "'");
    }
    const auto found = object.find(key);
    if (found == object.end()) {
        malformed(std::string("the field '") + key + "' is missing");
    }
    return *found;
}

/// The field, or null where it is absent.
const Json* optional_member(const Json& object, const char* key) {
    const auto found = object.find(key);
    return found == object.end() ? nullptr : &*found;
}

/// The field, or null where it is absent or JSON's null.
const Json* nullable_member(const Json& object, const char* key) {
    const Json* value = optional_member(object, key);
    return value == nullptr || value->is_null() ? nullptr : value;
}

std::string text(const Json& value, const char* key) {
    if (!value.is_string()) {
        malformed(std::string("the field '") + key + "' is not a text");
    }
    return value.get<std::string>();
}

std::string text_in(const Json& object, const char* key) { return text(member(object, key), key); }

std::string optional_text(const Json& object, const char* key, const char* otherwise = "") {
    const Json* value = optional_member(object, key);
    return value == nullptr ? otherwise : text(*value, key);
}

/// The text if it is one of `known`.
std::string one_of(const std::string& value, const char* key,
                   std::initializer_list<const char*> known) {
    if (std::find(known.begin(), known.end(), value) == known.end()) {
        malformed(std::string("the field '") + key + "' has the unknown value '" + value + "'");
    }
    return value;
}

int integer(const Json& value, const char* key, int low, int high) {
    // Unsigned numbers beyond int64 are told apart by the library; both comparisons are exact.
    if (!value.is_number_integer() || value < low || value > high) {
        malformed(std::string("the field '") + key + "' is not a whole number from " +
                  std::to_string(low) + " to " + std::to_string(high));
    }
    return value.get<int>();
}

int integer_in(const Json& object, const char* key, int low, int high) {
    return integer(member(object, key), key, low, high);
}

double number(const Json& value, const char* key, double low, double high) {
    const double got = value.is_number() ? value.get<double>() : NAN;
    if (!(got >= low && got <= high)) {
        malformed(std::string("the field '") + key + "' is not a usable number");
    }
    return got;
}

bool boolean_in(const Json& object, const char* key) {
    const Json& value = member(object, key);
    if (!value.is_boolean()) {
        malformed(std::string("the field '") + key + "' is neither true nor false");
    }
    return value.get<bool>();
}

std::array<float, 3> channels(const Json& value, const char* key, double low) {
    if (!value.is_array() || value.size() != 3) {
        malformed(std::string("the field '") + key + "' is not a list of three numbers");
    }
    std::array<float, 3> numbers{};
    std::transform(value.begin(), value.end(), numbers.begin(), [&](const Json& item) {
        return static_cast<float>(number(item, key, low, 1e3));
    });
    return numbers;
}

/// What is absent is as in every published ReXNet.
Preprocess read_preprocess(const Json& json) {
    if (!json.is_object()) {
        malformed("the field 'preprocess' is not an object");
    }
    Preprocess preprocess{
        224, 224, 0.875, Interpolation::bicubic, {0.485F, 0.456F, 0.406F}, {0.229F, 0.224F, 0.225F}};
    if (const Json* height = optional_member(json, "height")) {
        preprocess.height = integer(*height, "height", 1, kMaxImageSize);
    }
    if (const Json* width = optional_member(json, "width")) {
        preprocess.width = integer(*width, "width", 1, kMaxImageSize);
    }
    if (const Json* crop_pct = optional_member(json, "crop_pct")) {
        preprocess.crop_pct = number(*crop_pct, "crop_pct", 0.1, 1);
    }
    const std::string interpolation = one_of(optional_text(json, "interpolation", "bicubic"),
                                             "interpolation", {"bicubic", "bilinear"});
    preprocess.interpolation =
        interpolation == "bicubic" ? Interpolation::bicubic : Interpolation::bilinear;
    if (const Json* mean = optional_member(json, "mean")) {
        preprocess.mean = channels(*mean, "mean", -1e3);
    }
    if (const Json* std = optional_member(json, "std")) {
        preprocess.std = channels(*std, "std", 1e-3);
    }
    return preprocess;
}

/// As ModelSpec.title in Python.
std::string read_title(const Json& model) {
    const std::string family =
        one_of(text_in(model, "family"), "family", {"rexnet", "rexnet_lite", "onnx"});
    const Json& weights = member(model, "weights");
    const Json& width = member(model, "width");
    std::string title = text_in(weights, "source");
    text_in(weights, "sha256");
    if (width.is_null() != (family == "onnx")) {
        malformed("the fields 'family' and 'width' contradict each other");
    }
    if (family != "onnx") {
        std::ostringstream digits;
        digits.imbue(std::locale::classic());  // "1.5" in a program of any locale
        digits << number(width, "width", -kMaxDouble, kMaxDouble);
        title = family + " " + digits.str();
    }
    return boolean_in(weights, "trained") ? title : title + " (untrained weights)";
}

ModelSpec read_model(const Json& json) {
    ModelSpec model{};
    model.title = read_title(json);
    model.num_classes = integer_in(json, "num_classes", 1, kMaxClasses);
    model.preprocess = read_preprocess(member(json, "preprocess"));
    text_in(json, "input_name");
    text_in(json, "output_name");
    // Absent in manifests of before there was a choice.
    const std::string input = optional_text(json, "input", "float32");
    const std::string output = optional_text(json, "output", "logits");
    one_of(input, "input", {"float32", "uint8"});
    one_of(output, "output", {"logits", "probabilities"});
    const std::string task = optional_text(json, "task", "classify");
    if (one_of(task, "task", {"classify", "detect", "segment"}) != "classify") {
        malformed("a " + task + " network in a manifest of format " + std::to_string(kFormat));
    }
    model.input = input == "uint8" ? InputType::uint8 : InputType::float32;
    model.gives_probabilities = output == "probabilities";
    return model;
}

bool is_plain_name(const std::string& file) {
    const auto is_letter = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
               c == '_' || c == '+';
    };
    return !file.empty() && is_letter(file[0]) && file != "manifest.json" &&
           std::all_of(file.begin(), file.end(),
                       [&](char c) { return is_letter(c) || c == '.' || c == '-'; });
}

bool is_sha256(const std::string& digest) {
    return digest.size() == 64 && digest.find_first_not_of("0123456789abcdef") == std::string::npos;
}

/// What Python's readers need of an engine's proof, of which nothing is used here.
void check_proof(const Json& proof) {
    const Json& wanted = member(proof, "wanted");
    if (!wanted.is_null()) {
        text(wanted, "wanted");
    }
    member(proof, "layers");
    for (const char* key : {"layers", "macs"}) {
        const Json* counts = optional_member(proof, key);
        if (counts == nullptr) {
            continue;
        }
        if (!counts->is_object()) {
            malformed(std::string("the field '") + key + "' is not an object");
        }
        for (const auto& item : counts->items()) {
            one_of(item.key(), key, {"Int8", "Half", "BFloat16", "Float"});
            if (!item.value().is_number_integer() || item.value() < 0) {
                malformed(std::string("the field '") + key + "' holds what is no count");
            }
        }
    }
    for (const char* key : {"differing", "not_found"}) {
        if (const Json* names = optional_member(proof, key)) {
            if (!names->is_array()) {
                malformed(std::string("the field '") + key + "' is not a list");
            }
            for (const Json& name : *names) {
                text(name, key);
            }
        }
    }
}

Artifact read_artifact(const Json& json) {
    Artifact artifact{};
    artifact.file = text_in(json, "file");
    if (!is_plain_name(artifact.file)) {
        malformed("file '" + artifact.file + "' is not a plain name inside the bundle's folder");
    }
    artifact.kind =
        one_of(text_in(json, "kind"), "kind", {"weights", "onnx", "engine", "labels", "report"});
    artifact.sha256 = text_in(json, "sha256");
    if (!is_sha256(artifact.sha256)) {
        malformed("sha256 of '" + artifact.file + "' is not 64 hexadecimal digits");
    }
    if (const Json* precision = nullable_member(json, "precision")) {
        artifact.precision =
            one_of(text(*precision, "precision"), "precision", {"fp32", "fp16", "bf16", "int8"});
    }
    if (const Json* parent = nullable_member(json, "parent_sha256")) {
        artifact.parent_sha256 = text(*parent, "parent_sha256");
        if (artifact.parent_sha256.empty()) {
            malformed("what " + artifact.file + " was made from is not in the bundle");
        }
        if (artifact.parent_sha256 == artifact.sha256) {
            malformed(artifact.file + " is said to be made from itself");
        }
    }
    artifact.command = optional_text(json, "command");
    if (const Json* batch = nullable_member(json, "batch")) {
        const int min = integer_in(*batch, "min", 1, kMaxBatch);
        const int opt = integer_in(*batch, "opt", min, kMaxBatch);
        artifact.batch = BatchRange{min, opt, integer_in(*batch, "max", opt, kMaxBatch)};
    }
    if (const Json* built_with = optional_member(json, "built_with")) {
        if (!built_with->is_object()) {
            malformed("the field 'built_with' is not an object");
        }
        for (const auto& item : built_with->items()) {
            text(item.value(), item.key().c_str());
        }
        artifact.flavor = optional_text(*built_with, "flavor");
        artifact.needs_int8 = optional_text(*built_with, "weight_bits") != "7";
        artifact.is_accepted_int8 = artifact.kind == "onnx" && artifact.file == "int8.onnx" &&
                                    !built_with->contains("refused");
    }
    if (const Json* proof = nullable_member(json, "proof")) {
        check_proof(*proof);
    }
    if (const Json* role = nullable_member(json, "role")) {
        one_of(text(*role, "role"), "role", {"features", "boxes", "masks"});
    }
    return artifact;
}

/// The hashes that a chain of parents leads from to a file without one; and the empty one.
std::set<std::string> with_a_beginning(const std::vector<Artifact>& artifacts) {
    std::multimap<std::string, std::string> children;
    for (const Artifact& artifact : artifacts) {
        children.emplace(artifact.parent_sha256, artifact.sha256);
    }
    std::set<std::string> found{""};
    std::vector<std::string> waiting{""};
    while (!waiting.empty()) {
        const auto [first, last] = children.equal_range(waiting.back());
        waiting.pop_back();
        for (auto child = first; child != last; ++child) {
            if (found.insert(child->second).second) {
                waiting.push_back(child->second);
            }
        }
    }
    return found;
}

Manifest read_manifest(const Json& json) {
    Manifest manifest{};
    manifest.model = read_model(member(json, "model"));
    const Json& artifacts = member(json, "artifacts");
    if (!artifacts.is_array()) {
        malformed("the field 'artifacts' is not a list");
    }
    text_in(json, "name");
    optional_text(json, "updated_at");
    std::set<std::string> names;
    std::set<std::string> hashes{""};  // the empty one: made from nothing in the bundle
    for (const Json& item : artifacts) {
        manifest.artifacts.push_back(read_artifact(item));
        hashes.insert(manifest.artifacts.back().sha256);
        if (!names.insert(manifest.artifacts.back().file).second) {
            malformed("two artifacts have the same file name");
        }
    }
    for (const Artifact& artifact : manifest.artifacts) {
        if (hashes.count(artifact.parent_sha256) == 0) {
            malformed("what " + artifact.file + " was made from is not in the bundle");
        }
    }
    const std::set<std::string> begun = with_a_beginning(manifest.artifacts);
    for (const Artifact& artifact : manifest.artifacts) {
        if (begun.count(artifact.parent_sha256) == 0) {
            malformed("what " + artifact.file + " was made from is made from it in a circle");
        }
    }
    return manifest;
}

bool is_utf8(std::string_view text) {
    try {
        Json(std::string(text)).dump();
    } catch (const Json::type_error&) {
        return false;
    }
    return true;
}

/// The control character that UTF-8 text begins with, as its code point; -1 if it does not. Those
/// of STEERING in rexdeploy/text.py.
int control_character(std::string_view text) {
    const auto byte = [&](std::size_t index) {
        return index < text.size() ? static_cast<unsigned char>(text[index]) : 0;
    };
    int point = byte(0);
    if (point == 0xC2) {
        point = byte(1);
    } else if ((point & 0xF0) == 0xE0) {
        point = (point & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    } else if (point >= 0x80) {
        return -1;
    }
    const bool is_one = point < 0x20 || (point >= 0x7F && point <= 0x9F) ||
                        (point >= 0x2028 && point <= 0x202E) ||
                        (point >= 0x2066 && point <= 0x2069) || point == 0xFEFF;
    return is_one ? point : -1;
}

}  // namespace

const Artifact* Manifest::find(std::string_view kind) const {
    const auto found = std::find_if(artifacts.begin(), artifacts.end(),
                                    [&](const Artifact& item) { return item.kind == kind; });
    return found == artifacts.end() ? nullptr : &*found;
}

Manifest parse_manifest(std::string_view json, const std::string& where) {
    const auto unreadable = [&](const std::exception& error) {
        return Error(where + " is not a readable manifest (" + error.what() +
                     "); remove the folder and make it anew with 'rexdeploy export'");
    };
    int format = kFormat;
    try {
        const Json document = parse_strictly(json);
        format = integer_in(document, "format", 0, 1'000'000);
        if (format == kFormat) {
            return read_manifest(document);
        }
    } catch (const Error& error) {
        throw unreadable(error);
    } catch (const Json::exception& error) {
        throw unreadable(error);
    }
    throw Error(where + ": got manifest format " + std::to_string(format) +
                ", this program reads " + std::to_string(kFormat) +
                "; use the rexdeploy that wrote it, or export again");
}

void check_preprocess(const std::string& written, const Preprocess& preprocess) {
    Preprocess told{};
    try {
        told = read_preprocess(Json::parse(written));
    } catch (const std::exception& error) {
        throw Error(std::string("its metadata rexdeploy.preprocess is damaged (") + error.what() +
                    "); export it again");
    }
    const auto all = [](const Preprocess& item) {
        return std::tie(item.height, item.width, item.crop_pct, item.interpolation, item.mean,
                        item.std);
    };
    if (all(told) != all(preprocess)) {
        throw Error(
            "the manifest's preprocessing is not that of the graph; make it again: rexdeploy "
            "export");
    }
}

std::vector<std::string> parse_labels(std::string_view text, const std::string& where) {
    constexpr std::string_view kMark = "\xEF\xBB\xBF";
    if (!is_utf8(text)) {
        throw Error(where + " is not UTF-8 text; save it as that");
    }
    if (text.substr(0, kMark.size()) == kMark) {
        text.remove_prefix(kMark.size());
    }
    if (text.empty()) {
        throw Error(where + " is empty, expected one class name a line");
    }
    std::vector<std::string> labels;
    while (!text.empty()) {
        const std::size_t end = std::min(text.find('\n'), text.size());
        std::string_view line = text.substr(0, end);
        if (end < text.size() && !line.empty() && line.back() == '\r') {
            line.remove_suffix(1);
        }
        const std::string place = where + ": line " + std::to_string(labels.size() + 1);
        if (line.find_first_not_of(' ') == std::string_view::npos) {
            throw Error(place + " is blank, expected one class name a line");
        }
        for (std::size_t index = 0; index < line.size(); ++index) {
            const int point = control_character(line.substr(index));
            if (point >= 0) {
                std::ostringstream digits;
                digits.imbue(std::locale::classic());
                digits << std::hex << std::uppercase << std::setw(4) << std::setfill('0') << point;
                throw Error(place + " holds the control character U+" + digits.str() +
                            ", expected class names without any; take it out");
            }
        }
        labels.emplace_back(line);
        text.remove_prefix(std::min(end + 1, text.size()));
    }
    return labels;
}

}  // namespace rexdeploy
