"""What a benchmark times: a bundle's own files, or another network that is exported on demand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from rexdeploy.backends import ONNX_BACKENDS, engine_backend
from rexdeploy.bundle.manifest import INT8, ModelSpec
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable, UsageError
from rexdeploy.timing.model_file import ModelFile

if TYPE_CHECKING:
    from torch import nn


class Network(Protocol):
    """A network to time, in one form."""

    @property
    def name(self) -> str:
        """The bundle's name, or that of another network."""

    @property
    def form(self) -> str:
        """A multiple that channels are padded to, or plain, published, timm, own."""

    @property
    def spec(self) -> ModelSpec:
        """Its input and output."""

    @property
    def module(self) -> nn.Module | None:
        """The PyTorch network, in evaluation mode; None where there is no code for it."""

    def file(self, backend: str, fp16: bool) -> ModelFile | None:
        """What an ONNX or engine backend would open; None where there is none."""


class BundleNetwork:
    """A bundle's own files."""

    def __init__(self, bundle: Bundle, name: str | None = None) -> None:
        self.bundle = bundle
        self.name = name or bundle.path.name
        self.spec = bundle.manifest.model
        graph = bundle.manifest.graph
        plain = "own" if self.spec.family == "onnx" else "plain"
        self.form = str(graph.multiple) if graph and graph.multiple else plain

    @cached_property
    def module(self) -> nn.Module | None:
        artifact = self.bundle.manifest.find("weights")
        if artifact is None:
            return None
        from rexdeploy.backends.pytorch import reference

        return reference(self.bundle.read(artifact), self.spec)

    def file(self, backend: str, fp16: bool) -> ModelFile | None:
        manifest = self.bundle.manifest
        if backend in ONNX_BACKENDS:
            artifact = manifest.find_file("fp16.onnx") if fp16 else manifest.graph
        else:
            engines = [
                artifact
                for artifact in manifest.artifacts
                if artifact.kind == "engine" and engine_backend(artifact) == backend
            ]
            proven = [engine for engine in engines if engine.proof_fault is None]
            if engines and not proven:
                raise BackendUnavailable(
                    f"{engines[0].file}: {engines[0].proof_fault}; "
                    "build it again: rexdeploy build-trt"
                )
            artifact = min(proven, key=lambda engine: engine.precision != "fp16", default=None)
        if artifact is None:
            return None
        data = self.bundle.read(artifact)
        return ModelFile(artifact.file, data, artifact.precision or "mixed", artifact.batch)


class Int8Network(BundleNetwork):
    """A bundle's INT8 graph for CPUs, accepted or not, beside its float32 one."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        super().__init__(bundle, name)
        self.form = "int8"
        if bundle.manifest.find_file(INT8) is None:
            raise UsageError(f"compare: {bundle.path} holds no {INT8}; run 'rexdeploy quantize'")

    def file(self, backend: str, fp16: bool) -> ModelFile | None:
        del fp16
        artifact = self.bundle.manifest.find_file(INT8)
        if artifact is None or backend not in ("onnxruntime", "openvino"):
            return None
        return ModelFile(artifact.file, self.bundle.read(artifact), "int8", artifact.batch)


def compared(bundles: Sequence[Bundle], names: Sequence[str]) -> list[Network]:
    """The bundles, each followed by other forms of its own network, and then by networks of timm.

    `names` are forms of the bundles' own networks (plain, published, timm, 8, 16, int8) or names of
    timm models. Raises UsageError for an unknown name, or where a bundle has no such form, and
    BackendUnavailable where timm is missing.
    """
    paths = [bundle.path.name for bundle in bundles]
    owns = [
        BundleNetwork(bundle, name if paths.count(name) == 1 else str(bundle.path))
        for bundle, name in zip(bundles, paths, strict=True)
    ]
    if not names:
        return list(owns)
    from rexdeploy.models.rexnet import RexNet
    from rexdeploy.timing.other_networks import OWN_FORMS, own_network, timm_network

    others = [timm_network(name) for name in names if name not in OWN_FORMS]
    networks: list[Network] = []
    for own in owns:
        networks.append(own)
        for name in dict.fromkeys(names):
            if name not in OWN_FORMS or name == own.form:
                continue
            if name == "int8":
                networks.append(Int8Network(own.bundle, own.name))
                continue
            if not isinstance(own.module, RexNet):
                raise UsageError(
                    f"compare: {own.name} holds somebody's own ONNX graph, which has no "
                    f"form '{name}'; name a timm model"
                )
            networks.append(own_network(name, own.name, own.module, own.spec))
    return [*networks, *others]


def published_table() -> list[Network]:
    """Every network of the published comparison tables, untrained, ReXNets in our aligned form.

    Raises BackendUnavailable where timm, which has the EfficientNets, is missing.
    """
    from rexdeploy.models.zoo import paper_rows
    from rexdeploy.timing.other_networks import rexnet_network, timm_network

    networks: list[Network] = []
    for row in paper_rows():
        if row.family == "rexnet" or row.family == "rexnet_lite":
            networks.append(rexnet_network(row.family, float(row.variant)))
        else:
            networks.append(timm_network(row.network, row.resolution))
    return networks
