"""Networks to time a bundle against: its own as published, timm's, and any other timm model."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rexdeploy.backends import ONNX_BACKENDS
from rexdeploy.bundle.manifest import ModelSpec, Preprocess, WeightsOrigin
from rexdeploy.errors import BackendUnavailable, UsageError
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.from_torch import MIN_OPSET, export_graph, simplify
from rexdeploy.models.align import AUTO_MULTIPLE, align
from rexdeploy.models.rexnet import CONFIGS, Family, LinearBottleneck, RexNet
from rexdeploy.timing.model_file import ModelFile

if TYPE_CHECKING:
    from onnx import ModelProto

OWN_FORMS = ("plain", "published", "timm", "8", "16", "int8")
"""Forms of a bundle's own network: `plain` is our graph without alignment; `published` adds the
shortcut in place, as the published code does; `timm` is timm's model and what it exports to; a
number is the multiple that channels are padded to; `int8` is the bundle's own INT8 graph."""


@dataclass(frozen=True)
class OtherNetwork:
    """A PyTorch network in evaluation mode, exported when an ONNX backend asks for its graph."""

    name: str  # such as "rexnet_1.0", "efficientnet_b0"
    form: str  # one of OWN_FORMS, or a multiple that channels are padded to
    spec: ModelSpec
    module: nn.Module
    exported: nn.Module | None = None  # what the graph is made from, if not from `module`

    @cached_property
    def _graph(self) -> ModelProto:
        module = self.exported or self.module
        return simplify(export_graph(module, self.spec, batch=None, opset=MIN_OPSET))

    def file(self, backend: str, fp16: bool) -> ModelFile | None:
        """Its simplified ONNX graph, of any batch size."""
        if backend not in ONNX_BACKENDS:
            return None
        graph = to_precision(self._graph, "fp16") if fp16 else self._graph
        precision = "fp16" if fp16 else "fp32"
        return ModelFile(f"{self.name} exported", graph.SerializeToString(), precision, None)


def own_network(form: str, name: str, model: RexNet, spec: ModelSpec) -> OtherNetwork:
    """The bundle's network in another form; raises UsageError where there is no such form."""
    if form == "plain":
        return OtherNetwork(name, form, spec, model)
    if form.isdigit():
        return OtherNetwork(name, form, spec, model, exported=align(model, int(form)))
    if form == "published":
        return OtherNetwork(name, form, spec, _with_published_shortcuts(model))
    if spec.family != "rexnet" or spec.width is None:
        raise UsageError("timm has no ReXNet-lite")
    timm = _timm()
    module = timm.models.rexnet.RexNet(width_mult=spec.width, num_classes=spec.num_classes)
    return OtherNetwork(name, form, spec, module.eval())


def rexnet_network(family: Family, width: float) -> OtherNetwork:
    """A fresh network of ours, exported with its channels padded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = RexNet(CONFIGS[family](width, 1000)).eval()
    name = f"{family}_{width:.1f}"
    spec = _spec(name, 1000, Preprocess())
    return OtherNetwork(
        name, str(AUTO_MULTIPLE), spec, module, exported=align(module, AUTO_MULTIPLE)
    )


def timm_network(name: str, size: int | None = None) -> OtherNetwork:
    """A timm model with fresh weights at `size` pixels, or at its own size.

    Raises UsageError, with near matches, for a name that timm does not have.
    """
    timm = _timm()
    if name not in timm.list_models():
        near = difflib.get_close_matches(name, [*OWN_FORMS, *timm.list_models()], n=3)
        hint = f"near: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise UsageError(
            f"compare: got '{name}', expected {', '.join(OWN_FORMS)} or a model of timm "
            f"{timm.__version__}; {hint}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = cast(nn.Module, timm.create_model(name)).eval()
    config: dict[str, Any] = module.default_cfg  # type: ignore[assignment]
    size = size or config["input_size"][1]
    spec = _spec(name, config["num_classes"], Preprocess(height=size, width=size))
    return OtherNetwork(name, "timm", spec, module)


def _spec(name: str, num_classes: int, preprocess: Preprocess) -> ModelSpec:
    return ModelSpec(
        family="onnx",  # nobody rebuilds it from this
        width=None,
        num_classes=num_classes,
        input_name="input",
        output_name="logits",
        preprocess=preprocess,
        weights=WeightsOrigin(name, "", trained=False),
    )


def _with_published_shortcuts(model: RexNet) -> nn.Module:
    model = copy.deepcopy(model)
    for index, block in enumerate(model.features):
        if isinstance(block, LinearBottleneck) and block.block.has_shortcut:
            model.features[index] = _PublishedBottleneck(block.out, block.block.in_channels)
    return model


class _PublishedBottleneck(nn.Module):
    def __init__(self, layers: nn.Module, shared: int) -> None:
        super().__init__()
        self.out = layers
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x)
        out[:, : self.shared] += x
        return out


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise BackendUnavailable("comparing with timm needs it: pip install timm") from None
    return timm
