"""The published results as data, and what our own network computes beside them."""

from __future__ import annotations

import csv
import logging
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rexdeploy.errors import BackendUnavailable, UsageError, first_line
from rexdeploy.files import sha256_of
from rexdeploy.models.detector import COCO_CLASSES, FPN_CHANNELS, Body, stage_ends
from rexdeploy.models.layers import layers
from rexdeploy.models.rexnet import CONFIGS, Family, RexNet
from rexdeploy.progress import Result

PRETRAINED = {
    1.0: "timm/rexnet_100.nav_in1k",
    1.3: "timm/rexnet_130.nav_in1k",
    1.5: "timm/rexnet_150.nav_in1k",
    2.0: "timm/rexnet_200.nav_in1k",
    3.0: "timm/rexnet_300.nav_in1k",
}
"""Hugging Face hub repositories of timm's copies of the published V1 weights, by width."""


DETECTOR_SIZE = (800, 1280)
"""Height and width at which the published costs of detectors are; their table says 1200 x 800."""
DETECTOR_BOXES = 1000  # proposals


@dataclass(frozen=True)
class Published:
    """A row of the published tables."""

    family: Family
    width: float
    top1: float | None  # percent, ImageNet-1k validation
    top5: float | None
    gmacs: float  # billions of multiply-accumulates, which the tables call FLOPs
    params_m: float  # millions
    decimals: tuple[int, int]  # printed digits after the point of gmacs and params_m


@dataclass(frozen=True)
class PaperRow:
    """A row of the published comparison tables, ReXNets and EfficientNets, as printed."""

    family: Literal["rexnet", "rexnet_lite", "efficientnet", "efficientnet_lite"]
    variant: str  # "1.0", "b0", "lite0"
    resolution: int  # height and width in pixels
    top1: float  # percent, ImageNet-1k validation
    top5: str
    gmacs: str
    params_m: str
    cpu_ms: float  # one image, Xeon E5-2630 v4
    gpu_ms: float  # 64 images; a V100 for ReXNet and EfficientNet, two M40 for the lites

    @property
    def network(self) -> str:
        """`rexnet_1.0`, or timm's name: `efficientnet_b0`."""
        return f"{self.family.removesuffix('_lite' * ('lite' in self.variant))}_{self.variant}"


def paper_rows() -> list[PaperRow]:
    """The rows of both published comparison tables, each table from small to large."""
    text = resources.files("rexdeploy").joinpath("data/published.csv").read_text()
    rows = [
        PaperRow(
            family=cast(Any, row["family"]),
            variant=row["width"],
            resolution=int(row["resolution"]),
            top1=float(row["top1"]),
            top5=row["top5"] or "-",
            gmacs=row["gmacs"],
            params_m=row["params_m"],
            cpu_ms=float(row["cpu_ms_xeon_e5_2630v4_bs1"]),
            gpu_ms=float(row["gpu_ms_v100_bs64"] or row["gpu_ms_2xm40"]),
        )
        for row in csv.DictReader(text.splitlines())
        if row["cpu_ms_xeon_e5_2630v4_bs1"]
    ]
    return sorted(rows, key=lambda row: ("lite" in row.family, row.top1))


@dataclass(frozen=True)
class PublishedDetector:
    """A row of the published tables of detectors: COCO val2017, 1280 x 800."""

    detector: Literal["faster_rcnn", "mask_rcnn"]
    family: Family
    width: float
    box_ap: float  # percent, as the two below: mean over IoU 0.5 to 0.95, at 0.5, at 0.75
    box_ap50: float
    box_ap75: float
    mask_ap: float | None  # of a Mask R-CNN
    mask_ap50: float | None
    mask_ap75: float | None
    gmacs: float  # without the mask head, with 1000 proposals
    params_m: float
    decimals: tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """What a network computes for one image."""

    parameters: int  # trained ones: a detector's batch norms are frozen, and count none
    macs: int  # multiply-accumulates of convolutions and matrix products


@dataclass(frozen=True, repr=False)
class Model(Result):
    """A published network, and what our own computes."""

    published: Published | PublishedDetector
    computed: Cost

    @property
    def agrees(self) -> bool:
        """Whether both published costs are within one unit of their last digit of the computed.

        The tables round some figures (7.557 to 7.6), cut others (34.7 to 34) and raise one (6.748
        to 6.8), so half a unit would refuse figures that are the network's.
        """
        row = self.published
        pairs = (
            (row.gmacs, self.computed.macs / 1e9),
            (row.params_m, self.computed.parameters / 1e6),
        )
        return all(
            abs(printed - exact) < 10.0**-digits
            for (printed, exact), digits in zip(pairs, row.decimals, strict=True)
        )

    def __repr__(self) -> str:
        row, verdict = self.published, "agrees" if self.agrees else "DIFFERS"
        costs = f"{row.gmacs:g} GMACs, {row.params_m:g} M parameters"
        if isinstance(row, Published):
            name, result = f"{row.family} {row.width:.1f}", f"top-1 {row.top1 or '-'}"
        else:
            name, result = f"{row.detector} {row.width:.1f}", f"box AP {row.box_ap}"
        return f"<Model {name}: {result}, {costs}: {verdict}>"


def published_models() -> list[Model]:
    """The published classifiers, then detectors, beside what our own cost.

    Example: `all(model.agrees for model in rexdeploy.published_models())`
    """
    classifiers = [Model(row, cost(row.family, row.width)) for row in published()]
    return [*classifiers, *(Model(row, detector_cost(row)) for row in published_detectors())]


def published() -> list[Published]:
    """The published ReXNets, V1 before lite, by width; 2.2 stands in by its two misplaced figures.

    The comparison table prints "ReXNet 2.0, 1.8B / 19M"; those are the costs of width 2.2 (19.5M;
    2.0 has 16.4M, as the model table says). Accuracies of 2.2 are not published.
    """
    text = resources.files("rexdeploy").joinpath("data/published.csv").read_text()
    rows = [_row(row) for row in csv.DictReader(text.splitlines()) if row["family"] in CONFIGS]
    misplaced = Published("rexnet", 2.2, None, None, 1.8, 19, (1, 0))
    return sorted([*rows, misplaced], key=lambda row: (row.family, row.width))


def cost(family: Family, width: float, size: int = 224) -> Cost:
    """Parameters and multiply-accumulates at `size` x `size`, counted on the network itself."""
    with torch.device("meta"):
        model = RexNet(CONFIGS[family](width, 1000)).eval()
        macs = sum(layer.macs for layer in layers(model, size))
    return Cost(sum(parameter.numel() for parameter in model.parameters()), macs)


def published_detectors() -> list[PublishedDetector]:
    """The published rows of Faster and Mask R-CNN over a ReXNet."""
    text = resources.files("rexdeploy").joinpath("data/published_detectors.csv").read_text()
    return [
        PublishedDetector(
            detector=cast(Any, row["detector"]),
            family="rexnet",
            width=float(row["width"]),
            box_ap=float(row["box_ap"]),
            box_ap50=float(row["box_ap50"]),
            box_ap75=float(row["box_ap75"]),
            mask_ap=float(row["mask_ap"]) if row["mask_ap"] else None,
            mask_ap50=float(row["mask_ap50"]) if row["mask_ap50"] else None,
            mask_ap75=float(row["mask_ap75"]) if row["mask_ap75"] else None,
            gmacs=float(row["gmacs"]),
            params_m=float(row["params_m"]),
            decimals=(_decimals(row["gmacs"]), _decimals(row["params_m"])),
        )
        for row in csv.DictReader(text.splitlines())
    ]


def detector_cost(row: PublishedDetector) -> Cost:
    """A detector's cost at the published size, without torchvision: the body runs on "meta".

    The rest is torchvision's defaults, whose layers are listed here by their sizes.
    """
    config = CONFIGS[row.family](row.width, 1)
    with torch.device("meta"):
        body = Body(config).eval()
        macs = sum(layer.macs for layer in layers(body, DETECTOR_SIZE))
    frozen = {
        id(p) for m in body.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    }
    parameters = sum(p.numel() for p in body.parameters() if id(p) not in frozen)
    height, width = DETECTOR_SIZE
    places = [(height // stride) * (width // stride) for stride in (4, 8, 16, 32)]
    places.append(-(-height // 64) * -(-width // 64))
    channels = [config.blocks[index].out_channels for index in stage_ends(config)]
    conv = 9 * FPN_CHANNELS  # inputs of a 3x3 convolution
    # Inputs of each output value, output channels, and how often the layer runs.
    listed = [(count, FPN_CHANNELS, place) for count, place in zip(channels, places, strict=False)]
    listed += [(conv, FPN_CHANNELS, place) for place in places[:4]]
    listed += [(conv, FPN_CHANNELS, sum(places)), (FPN_CHANNELS, 3 * 5, sum(places))]
    listed += [(49 * FPN_CHANNELS, 1024, DETECTOR_BOXES), (1024, 1024, DETECTOR_BOXES)]
    listed += [(1024, 5 * COCO_CLASSES, DETECTOR_BOXES)]
    if row.detector == "mask_rcnn":
        listed += [(conv, FPN_CHANNELS, 0)] * 4
        listed += [(4 * FPN_CHANNELS, FPN_CHANNELS, 0), (FPN_CHANNELS, COCO_CLASSES, 0)]
    parameters += sum((inputs + 1) * outputs for inputs, outputs, _ in listed)
    macs += sum(inputs * outputs * times for inputs, outputs, times in listed)
    return Cost(parameters, macs)


def fetch_pretrained(family: Family, width: float) -> tuple[Path, str]:
    """Downloads timm's published weights; returns the file, and `repository@commit`.

    The commit is the one that the hub resolved. No file's hash is published beside the hub, which
    states one with each (an LFS file's ETag): the file must be the one that it states. Raises
    UsageError where none were published or the file is another, BackendUnavailable where the hub
    cannot be reached.
    """
    repository = PRETRAINED.get(width) if family == "rexnet" else None
    if repository is None:
        widths = ", ".join(f"{known:g}" for known in PRETRAINED)
        raise UsageError(
            f"no pretrained weights are published for {family} {width:g} on the Hugging Face hub, "
            f"only for rexnet {widths}; give a checkpoint file with --weights"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise BackendUnavailable(
            "--weights pretrained needs huggingface_hub: pip install 'rexdeploy[cpu]'"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not its every retry
    try:
        path = Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # httpx, requests and hub errors share no base class
        raise BackendUnavailable(
            f"the Hugging Face hub did not give {repository} ({first_line(error)}); check the "
            "network or HF_ENDPOINT, or download model.safetensors elsewhere and give it with "
            "--weights"
        ) from None
    return path, _origin(repository, path)


def _origin(repository: str, path: Path) -> str:
    """`repository@commit` of a file in the hub's cache; raises UsageError if it was changed.

    The cache keeps `snapshots/<commit>/<name>`, a link to `blobs/<ETag>`: what the hub said.
    """
    stated = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", stated):
        found = sha256_of(path)
        if found != stated:
            raise UsageError(
                f"{path} is not what the hub gave as {repository}: got sha256 {found[:12]}, "
                f"expected {stated[:12]}; remove the file and download it again"
            )
    commit = path.parent.name
    return f"{repository}@{commit}" if re.fullmatch(r"[0-9a-f]{40}", commit) else repository


def _row(row: dict[str, str]) -> Published:
    family: Family = "rexnet_lite" if row["family"] == "rexnet_lite" else "rexnet"
    return Published(
        family=family,
        width=float(row["width"]),
        top1=float(row["top1"]),
        top5=float(row["top5"]),
        gmacs=float(row["gmacs"]),
        params_m=float(row["params_m"]),
        decimals=(_decimals(row["gmacs"]), _decimals(row["params_m"])),
    )


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])
