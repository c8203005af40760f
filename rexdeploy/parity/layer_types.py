"""In which type a model computes: the share of its layers and of its arithmetic in each.

One proof for a built engine, by its own layer report, and for an ONNX graph, by its types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from rexdeploy.bundle.precision import FLOATING, TYPES, PrecisionProof
from rexdeploy.graphs.products import Product

PROOF_REVISION = "3"
"""Of `prove` and of what a layer's type is read from: raise it with every change of the rule."""


class Layer(Protocol):
    """Something that computes: a layer of an engine, or a node of a graph."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str:
        """The type it computes in, one of TYPES, or another type that counts for nothing."""

    @property
    def onnx_nodes(self) -> tuple[str, ...]:
        """Names of the graph's nodes that it carries out."""

    @property
    def weights_count(self) -> int:
        """How many values its largest constant has; 0 where it has none, or it is not told."""


def prove(
    layers: Sequence[Layer],
    products: Iterable[Product],
    wanted: str | None = None,
    free: Collection[str] | None = None,
) -> PrecisionProof:
    """Counts layers and multiply-accumulates by type, and names those of another type than asked.

    Asked for is `wanted` for every product, or, where that is None, each product's type in its
    graph: TensorRT takes the graph's types literally.

    With `free`, the nodes that may be in any type, every other layer of a floating type that names
    nodes of the graph has to be `wanted`, not the products only: so with our own graphs, whose
    every layer is known. A layer that names none is a copy or a cast that TensorRT put in.
    """
    known = {product.name: product for product in products}
    counted = Counter({wanted: 0} if wanted else {})
    counted.update(layer.precision for layer in layers if layer.precision in TYPES)
    carried: dict[str, str] = {}  # the type of every product that a layer names
    differing = []
    whole = {  # products that some layer has enough weights for
        name
        for layer in layers
        for name in layer.onnx_nodes
        if name in known and 0 < known[name].weights_count <= layer.weights_count
    }
    for layer in layers:
        named = [
            known[name]
            for name in layer.onnx_nodes
            # What only lays out a product's input names it too (TensorRT-RTX 1.7, for uint8).
            if name in known
            and not (name in whole and layer.weights_count < known[name].weights_count)
        ]
        is_odd = (
            free is not None
            and wanted is not None
            and layer.precision in FLOATING
            and layer.precision != wanted
            and bool(layer.onnx_nodes)
            and not set(layer.onnx_nodes) & set(free)
        )
        if is_odd or any(layer.precision != (wanted or product.precision) for product in named):
            differing.append(layer.name)
        for product in named:
            # In two layers at once, the wider type counts: no share may look better than it is.
            kinds = {layer.precision, carried.get(product.name, layer.precision)}
            carried[product.name] = max(kinds, key=_width)
    macs: Counter[str] = Counter()
    for name, kind in carried.items():
        if kind in TYPES:
            macs[kind] += known[name].macs or 0
    is_counted = all(product.macs is not None for product in known.values())
    return PrecisionProof(
        wanted=wanted,
        layers=dict(counted),
        macs=dict(macs) if is_counted else {},
        differing=tuple(differing),
        not_found=tuple(sorted(known.keys() - carried.keys())),
    )


def _width(kind: str) -> int:
    return TYPES.index(kind) if kind in TYPES else len(TYPES)
