"""Networks that a benchmark compares with: the same arithmetic in another form."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from rexdeploy.backends import open_backend
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.graphs.products import precision_of
from rexdeploy.images import sets
from rexdeploy.models.rexnet import RexNet
from rexdeploy.parity.compare import Signal
from rexdeploy.timing.networks import BundleNetwork, compared
from rexdeploy.timing.other_networks import own_network, timm_network
from tests.helpers import nodes_of


def _network(bundle: Bundle) -> RexNet:
    module = BundleNetwork(bundle).module
    assert isinstance(module, RexNet)
    return module


@pytest.mark.slow
def test_the_published_form_is_the_network_bit_for_bit_and_exports_its_scatters(
    small_v1_original: Bundle,
) -> None:
    network, spec = _network(small_v1_original), small_v1_original.manifest.model
    subject = own_network("published", "v1", network, spec)
    pool = sets.synthetic(3, spec.preprocess, seed=5)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pool))
        assert torch.equal(subject.module(torch.from_numpy(pool)), expected)
    file = subject.file("onnxruntime", fp16=False)
    assert file is not None
    graph = onnx.load_from_string(file.data)
    # Fact: 22 in the published code's export; two of its shortcuts here are plain adds.
    assert len(nodes_of(graph, "ScatterND")) >= 11
    backend = open_backend("onnxruntime", file.data, spec)
    signal = Signal.of(expected.numpy()).size
    assert np.abs(backend.run(pool) - expected.numpy()).max() < 1e-3 * signal
    half = subject.file("onnxruntime-cuda", fp16=True)
    assert half is not None
    assert precision_of(onnx.load_from_string(half.data)) == half.precision == "fp16"


def test_timms_form_has_the_networks_cost_and_lite_has_none(
    small_v1_original: Bundle, small_lite_original: Bundle
) -> None:
    network, spec = _network(small_v1_original), small_v1_original.manifest.model
    peer = own_network("timm", "v1", network, spec)
    ours, theirs = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (network, peer.module)
    )
    assert ours == theirs
    with pytest.raises(UsageError, match="timm has no ReXNet-lite"):
        compared([small_lite_original], ["timm"])


def test_a_timm_network_is_timed_at_its_own_size_or_at_the_one_given() -> None:
    assert timm_network("mobilenetv2_035").spec.preprocess.height == 224
    peer = timm_network("efficientnet_lite0", size=64)
    assert (peer.spec.preprocess.height, peer.spec.num_classes) == (64, 1000)
    with torch.inference_mode():
        logits = peer.module(torch.zeros(1, 3, 64, 64))
    assert np.isfinite(logits.numpy()).all()
