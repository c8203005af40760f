"""What a benchmark times: a bundle's own files, or a peer that is exported on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from rexdeploy.backends import ONNX_BACKENDS, engine_backend
from rexdeploy.bundle.manifest import BatchRange, ModelSpec
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from torch import nn

    from rexdeploy.timing.other_networks import Peer


@dataclass(frozen=True)
class ModelFile:
    """Bytes that a backend can open, and what they are."""

    name: str
    data: bytes
    precision: str
    batch: BatchRange | None  # the batch sizes it takes; None: any


class Subject(Protocol):
    """A network to time, in one form."""

    @property
    def network(self) -> str:
        """The bundle's or the peer's name."""

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


class BundleSubject:
    """A bundle's own files."""

    def __init__(self, bundle: Bundle, network: str | None = None) -> None:
        self.bundle = bundle
        self.network = network or bundle.path.name
        self.spec = bundle.manifest.model
        graph = bundle.manifest.find("onnx")
        padded = graph.built_with.get("align", "off") if graph else "off"
        plain = "own" if self.spec.family == "onnx" else "plain"
        self.form = plain if padded == "off" else padded

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
            artifact = manifest.find_file("fp16.onnx") if fp16 else manifest.find("onnx")
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


class PeerSubject:
    """A PyTorch network that is exported when an ONNX backend asks for it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.network, self.form, self.spec = peer.network, peer.form, peer.spec
        self.module: nn.Module | None = peer.module

    @cached_property
    def _graph(self) -> bytes:
        return self.peer.export()

    def file(self, backend: str, fp16: bool) -> ModelFile | None:
        if backend not in ONNX_BACKENDS:
            return None
        name = f"{self.network} exported"
        if not fp16:
            return ModelFile(name, self._graph, "fp32", None)
        from rexdeploy.graphs.cast import to_precision
        from rexdeploy.graphs.read import parse

        data = to_precision(parse(self._graph, name), "fp16").SerializeToString()
        return ModelFile(name, data, "fp16", None)


def compared(bundles: Sequence[Bundle], names: Sequence[str]) -> list[Subject]:
    """The bundles, each followed by its own peers, and then by other networks of timm.

    `names` are forms of the bundles' own networks (plain, published, timm, 8, 16) or names of timm
    models. Raises UsageError for an unknown name, or where a bundle has no such form, and
    BackendUnavailable where timm is missing.
    """
    paths = [bundle.path.name for bundle in bundles]
    owns = [
        BundleSubject(bundle, name if paths.count(name) == 1 else str(bundle.path))
        for bundle, name in zip(bundles, paths, strict=True)
    ]
    if not names:
        return list(owns)
    from rexdeploy.models.rexnet import RexNet
    from rexdeploy.timing.other_networks import OWN_FORMS, own_peer, timm_peer

    others = [PeerSubject(timm_peer(name)) for name in names if name not in OWN_FORMS]
    subjects: list[Subject] = []
    for own in owns:
        subjects.append(own)
        for name in dict.fromkeys(names):
            if name not in OWN_FORMS or name == own.form:
                continue
            if not isinstance(own.module, RexNet):
                raise UsageError(
                    f"compare: {own.network} holds somebody's own ONNX graph, which has no "
                    f"form '{name}'; name a timm model"
                )
            subjects.append(PeerSubject(own_peer(name, own.network, own.module, own.spec)))
    return [*subjects, *others]


def published_table() -> list[PeerSubject]:
    """Every network of the published comparison tables, untrained, ReXNets in our aligned form.

    Raises BackendUnavailable where timm, which has the EfficientNets, is missing.
    """
    from rexdeploy.models.zoo import paper_rows
    from rexdeploy.timing.other_networks import rexnet_peer, timm_peer

    subjects = []
    for row in paper_rows():
        if row.family == "rexnet" or row.family == "rexnet_lite":
            peer = rexnet_peer(row.family, float(row.variant))
        else:
            peer = timm_peer(row.network, row.resolution)
        subjects.append(PeerSubject(peer))
    return subjects
