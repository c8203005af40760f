"""What a bundle's manifest.json holds: the model, its preprocessing, a chain of hashed files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import msgspec

from rexdeploy.bundle import strict_json
from rexdeploy.bundle.precision import TYPE_NAMES, Precision, PrecisionProof
from rexdeploy.errors import UsageError

FORMAT = 1
DETECTOR_FORMAT = 2
"""Of detectors' bundles: whoever reads only format 1 would take them for classifiers'."""
MANIFEST = "manifest.json"
"""The file itself, in its bundle's folder."""
VERIFICATION = "verify.json"
"""The report of the latest verification of the bundle's own files."""
MAX_CLASSES = 1_000_000
MAX_BATCH = 4096
MAX_IMAGE_SIZE = 4096  # pixels a side; no ReXNet is used at a quarter of it
Kind = Literal["weights", "onnx", "engine", "labels", "report"]
Task = Literal["classify", "detect", "segment"]
TASKS: tuple[Task, ...] = get_args(Task)
DETECTORS: tuple[Task, ...] = ("detect", "segment")
Role = Literal["features", "boxes", "masks"]
"""Which part of a detector a file is; see `models/detector_stages.py`."""
InputForm = Literal["float32", "uint8"]
"""What a model's files take: float32 `[N, 3, H, W]`, normalised, or uint8 RGB `[N, H, W, 3]`."""
OutputForm = Literal["logits", "probabilities"]
"""What a model's files give, float32 `[N, classes]`."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input; defined here and nowhere else.

    Resize so that the crop covers `crop_pct` of the shorter side, crop the centre, scale to
    [0, 1], subtract `mean`, divide by `std` (RGB order). The defaults are those of every
    published ReXNet (timm's `rexnet_*` configurations).
    """

    height: int = 224
    width: int = 224
    crop_pct: float = 0.875
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        sizes_fit = all(1 <= size <= MAX_IMAGE_SIZE for size in (self.height, self.width))
        values_fit = min(self.std) >= 1e-3 and max(map(abs, (*self.mean, *self.std))) <= 1e3
        if not sizes_fit or not 0.1 <= self.crop_pct <= 1 or not values_fit:
            raise ValueError(f"unusable preprocessing {self}")

    def shape(self, form: InputForm) -> tuple[int, int, int]:
        """The shape of one image in that form."""
        size = (self.height, self.width)
        return (*size, 3) if form == "uint8" else (3, *size)


@dataclass(frozen=True)
class WeightsOrigin:
    """Where the weights came from: a file's name, a hub repository, or a seed."""

    source: str
    sha256: str  # of the file that was read; of the bundle's own weights file if untrained
    trained: bool


@dataclass(frozen=True)
class ModelSpec:
    """Enough to build the reference again from the bundle alone."""

    family: Literal["rexnet", "rexnet_lite", "onnx"]  # "onnx": somebody's own graph, no torch code
    width: float | None  # None for somebody's own graph
    num_classes: int
    input_name: str
    output_name: str
    preprocess: Preprocess
    weights: WeightsOrigin
    input: InputForm = "float32"
    output: OutputForm = "logits"
    task: Task = "classify"

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= MAX_CLASSES or (self.width is None) != (
            self.family == "onnx"
        ):
            raise ValueError(f"impossible model: {self.family} {self.width}, {self.num_classes}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one image as the model's files take it."""
        return self.preprocess.shape(self.input)

    @property
    def core(self) -> ModelSpec:
        """The same model between its interface: float32 images to logits (`graphs/wrapper.py`)."""
        return replace(self, input="float32", output="logits")

    @property
    def title(self) -> str:
        """`rexnet 1.5`, with `(untrained weights)` where a person must see it."""
        name = self.weights.source if self.width is None else f"{self.family} {self.width:g}"
        if self.task != "classify":
            name = f"{'Mask' if self.task == 'segment' else 'Faster'} R-CNN over {name}"
        return name if self.weights.trained else f"{name} (untrained weights)"


@dataclass(frozen=True)
class BatchRange:
    """The batch sizes an engine accepts, and the one it is tuned for: 1 <= min <= opt <= max."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max <= MAX_BATCH:
            raise ValueError(f"batch range {self} is not 1 <= min <= opt <= max <= {MAX_BATCH}")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Reads `1:8:64` (min:opt:max) or `8` (exactly 8); raises UsageError."""
        parts = text.split(":")
        try:
            numbers = [int(part[:10]) for part in parts]
            if len(numbers) == 1:
                numbers *= 3
            return cls(*numbers)
        except (TypeError, ValueError):
            raise UsageError(
                f"batch range: got '{text}', expected min:opt:max with 1 <= min <= opt <= max "
                f"<= {MAX_BATCH}, such as 1:8:64, or one number"
            ) from None

    def samples(self) -> list[int]:
        """The sizes worth verifying: minimum, optimum, maximum and an odd one between."""
        odd = [size for size in (5, 3, self.min | 1) if self.min <= size <= self.max]
        return sorted({self.min, self.opt, self.max, *odd[:1]})


DEFAULT_BATCH = BatchRange(1, 8, 64)


REVISION, KEPT, REFUSED, SPEED = "revision", "float32", "refused", "speed"  # of built_with
WEIGHT_BITS, BIASES, CHANNELS = "weight_bits", "biases", "channels"
INT8, INT8_TRT = "int8.onnx", "int8.tensorrt.onnx"  # what quantize writes, by its target


@dataclass(frozen=True)
class Artifact:
    """One file of a bundle, and where it came from."""

    kind: Kind
    file: str  # a name inside the bundle's folder
    sha256: str
    parent_sha256: str | None = None
    precision: Precision | None = None
    batch: BatchRange | None = None  # None: any batch size
    built_with: dict[str, str] = field(default_factory=dict)
    command: str = ""  # makes the file again
    proof: PrecisionProof | None = None  # of an engine: what its build reported of its layers
    role: Role | None = None  # of a detector's graphs and engines

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.file) or self.file == MANIFEST:
            raise ValueError(f"file '{self.file}' is not a plain name inside the bundle's folder")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 of '{self.file}' is not 64 hexadecimal digits")
        if self.parent_sha256 == self.sha256:
            raise ValueError(f"{self.file} is said to be made from itself")

    # What of `built_with` steers the program is read here and nowhere else: the rest is provenance.

    @property
    def multiple(self) -> int:
        """What an exported graph's channels are padded to; 0: they are as published."""
        text = self.built_with.get("align", "off")
        return int(text) if text.isdecimal() else 0

    @property
    def flavor(self) -> str | None:
        """The runtime of an engine, "rtx" or "tensorrt"; None for other files."""
        return self.built_with.get("flavor")

    @property
    def targets(self) -> str:
        """The compute capabilities that an engine was built for, such as "sm86 sm89"."""
        return self.built_with.get("targets", "")

    @property
    def revision(self) -> str | None:
        """Which revision of its pass made the file; None: one before they were counted."""
        return self.built_with.get(REVISION)

    @property
    def refused(self) -> str | None:
        """Why quantize has not accepted an INT8 graph that was kept all the same; None: it has."""
        return self.built_with.get(REFUSED)

    @property
    def is_int8(self) -> bool:
        """Whether it computes in int8, wholly or but for a few blocks."""
        return self.precision == "int8" or self.file in (INT8, INT8_TRT)

    @property
    def needs_int8(self) -> bool:
        """Whether an x86 processor without VNNI computes it wrong: its sums would saturate."""
        return self.is_int8 and self.built_with.get(WEIGHT_BITS) != "7"

    @property
    def is_equalized(self) -> bool:
        """Whether it is its parent with channels scaled by powers of two, as quantize makes it."""
        return self.built_with.get(CHANNELS) == "equalised"

    @property
    def has_own_biases(self) -> bool:
        """Whether the biases of an INT8 graph are corrected ones, not its parent's."""
        return self.built_with.get(BIASES) == "corrected"

    @property
    def kept_in_float32(self) -> str | None:
        """The blocks that tune-precision or quantize has left in float32, if there are any."""
        return self.built_with.get(KEPT)

    @property
    def proof_fault(self) -> str | None:
        """Why its proof does not show the precision that is claimed here; None where it does.

        The one rule for whoever reads an engine's entry. A claim of no precision is one of a mixed
        graph, in whose own types each product has to be.
        """
        wanted = TYPE_NAMES[self.precision] if self.precision else None
        claimed = self.precision or "a mixed graph's types"
        if self.proof is None:
            return f"the manifest holds no proof that it is in {claimed}"
        if self.proof.wanted != wanted:
            proven = self.proof.wanted or "a mixed graph's types"
            return f"the manifest claims {claimed}, and its proof is of {proven}"
        if not self.proof.holds:
            return f"its proof does not show {claimed}: {self.proof.summary}"
        return None


@dataclass(frozen=True)
class Manifest:
    """The only truth about a bundle: a file it does not name does not exist."""

    format: int
    name: str
    model: ModelSpec
    artifacts: tuple[Artifact, ...]
    updated_at: str = ""  # ISO 8601, UTC, with microseconds

    def __post_init__(self) -> None:
        if (self.format == FORMAT) != (self.model.task == "classify"):
            raise ValueError(f"a {self.model.task} network in a manifest of format {self.format}")
        names = [artifact.file for artifact in self.artifacts]
        if len(set(names)) != len(names):
            raise ValueError("two artifacts have the same file name")
        hashes = {artifact.sha256 for artifact in self.artifacts} | {None}
        for artifact in self.artifacts:
            if artifact.parent_sha256 not in hashes:
                raise ValueError(f"what {artifact.file} was made from is not in the bundle")
        begun = _with_a_beginning(self.artifacts)
        for artifact in self.artifacts:
            if artifact.parent_sha256 not in begun:
                raise ValueError(f"what {artifact.file} was made from is made from it in a circle")

    def find(
        self, kind: Kind, precision: Precision | None = None, sha256: str | None = None
    ) -> Artifact | None:
        """The first artifact that fits every argument given, or None."""
        for artifact in self.artifacts:
            if (
                artifact.kind == kind
                and precision in (None, artifact.precision)
                and sha256 in (None, artifact.sha256)
            ):
                return artifact
        return None

    @property
    def graph(self) -> Artifact | None:
        """The graph that all others and the engines are made from: exported, or imported."""
        return self.find("onnx")

    @property
    def int8(self) -> Artifact | None:
        """The INT8 graph for CPUs that quantize has accepted: faster, and as accurate as asked."""
        found = self.find_file(INT8)
        return found if found and found.kind == "onnx" and found.refused is None else None

    def find_file(self, file: str) -> Artifact | None:
        """The artifact of that file name, or None."""
        return next((artifact for artifact in self.artifacts if artifact.file == file), None)

    def with_artifacts(self, *added: Artifact) -> Manifest:
        """A copy in which `added` replace artifacts of the same file name.

        What was derived from a file that is now gone is dropped: an engine of last week's weights
        must not answer for this week's. So is a verification, unless it is among `added`, where a
        file that it could judge is new, changed or gone.
        """
        new_names = {artifact.file for artifact in added}
        kept = [artifact for artifact in self.artifacts if artifact.file not in new_names]
        merged = _parents_first([*kept, *added])
        if VERIFICATION not in new_names and judged(merged) != judged(self.artifacts):
            merged = tuple(artifact for artifact in merged if artifact.file != VERIFICATION)
        return replace(self, artifacts=merged)


class _OfSomeFormat(msgspec.Struct):
    """What manifests of every format have: others may have fields that this one does not know."""

    format: int


def to_json(value: object) -> bytes:
    """Dataclasses and plain values as indented JSON; NaN and infinity become null."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def decode(data: bytes, where: str) -> Manifest:
    """Reads a manifest strictly; raises UsageError that names the first wrong field."""
    try:
        strict_json.check(data)
        found = msgspec.json.decode(data, type=_OfSomeFormat).format
        if found in (FORMAT, DETECTOR_FORMAT):
            return msgspec.json.decode(data, type=Manifest)
    except (ValueError, msgspec.DecodeError) as error:
        reason = " ".join(str(error).split())  # it may quote the file's own line breaks
        raise UsageError(
            f"{where} is not a readable manifest ({reason}); "
            "remove the folder and make it anew with 'rexdeploy export'"
        ) from None
    raise UsageError(
        f"{where}: got manifest format {found}, this rexdeploy reads {FORMAT} and "
        f"{DETECTOR_FORMAT}; use the rexdeploy that wrote it, or export again"
    )


def judged(artifacts: Iterable[Artifact]) -> set[tuple[str, ...]]:
    """What a verification's answer depends on: every model file, and what is claimed of it."""
    return {
        (
            *(item.file, item.sha256, item.parent_sha256 or ""),
            *(item.precision or "", str(item.batch), item.role or ""),
        )
        for item in artifacts
        if item.kind in ("weights", "onnx", "engine")
    }


def _with_a_beginning(artifacts: Iterable[Artifact]) -> set[str | None]:
    """The hashes that a chain of parents leads from to a file without one; and None."""
    children: dict[str | None, list[str]] = {}
    for artifact in artifacts:
        children.setdefault(artifact.parent_sha256, []).append(artifact.sha256)
    found: set[str | None] = {None}
    waiting: list[str | None] = [None]
    while waiting:
        reached = children.pop(waiting.pop(), [])
        found.update(reached)
        waiting += reached
    return found


def _parents_first(artifacts: list[Artifact]) -> tuple[Artifact, ...]:
    """The artifacts whose chain of parents is whole, every parent before its children."""
    ordered: list[Artifact] = []
    hashes: set[str | None] = {None}
    while True:
        ready = [
            artifact
            for artifact in artifacts
            if artifact.parent_sha256 in hashes and artifact not in ordered
        ]
        if not ready:
            return tuple(ordered)
        ordered += ready
        hashes |= {artifact.sha256 for artifact in ready}
