"""The published table, and fetching published weights from a hub that is there, and is not."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from rexdeploy.errors import UsageError
from rexdeploy.models import zoo
from rexdeploy.models.detector import DetectorConfig, build_detector
from rexdeploy.models.detector_stages import FeatureStage
from rexdeploy.models.layers import layers
from tests.helpers import run_python

# huggingface_hub waits for 23 s between its five further tries.
EXPORT = (
    "import sys, time; time.sleep = lambda seconds: None; "
    "sys.argv[1:1] = ['export', '--weights', 'pretrained']; "
    "from rexdeploy.cli import main; main()"
)


@pytest.mark.parametrize("row", zoo.published(), ids=lambda row: f"{row.family}-{row.width}")
def test_computed_costs_agree_with_the_published_rounding(row: zoo.Published) -> None:
    assert zoo.Model(row, zoo.cost(row.family, row.width)).agrees


def test_all_eleven_networks_are_in_the_table_and_the_slip_is_width_2_2() -> None:
    rows = {(row.family, row.width): row for row in zoo.published()}
    assert len(rows) == 11
    misplaced = rows["rexnet", 2.2]
    assert (misplaced.gmacs, misplaced.params_m) == (1.8, 19)
    # What the comparison table prints for 2.0 is not what 2.0 costs.
    assert not zoo.Model(misplaced, zoo.cost("rexnet", 2.0)).agrees
    assert zoo.cost("rexnet", 2.0).parameters == 16_366_620


def test_a_wrong_figure_would_be_noticed() -> None:
    row = zoo.published()[0]
    cost = zoo.cost(row.family, row.width)
    assert not zoo.Model(row, zoo.Cost(cost.parameters, cost.macs + 20_000_000)).agrees
    assert not zoo.Model(row, zoo.Cost(cost.parameters + 200_000, cost.macs)).agrees


@pytest.mark.parametrize("row", zoo.published_detectors(), ids=lambda row: row.detector)
def test_a_detectors_cost_is_the_networks_and_the_published(row: zoo.PublishedDetector) -> None:
    cost = zoo.detector_cost(row)
    assert zoo.Model(row, cost).agrees
    assert cost.macs / 1e9 == pytest.approx(row.gmacs, rel=1e-3)
    with torch.device("meta"):
        model: Any = build_detector(DetectorConfig(row.width, masks=row.detector == "mask_rcnn"))
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        frozen = sum(p.numel() for norm in norms for p in norm.parameters())
        assert cost.parameters == sum(p.numel() for p in model.parameters()) - frozen
        features = sum(layer.macs for layer in layers(FeatureStage(model), zoo.DETECTOR_SIZE))
    boxes = (49 * 256 + 1024) * 1024 + 1024 * 5 * 91
    assert cost.macs == features + zoo.DETECTOR_BOXES * boxes


def test_all_six_detectors_are_in_the_table() -> None:
    rows = [(row.detector, row.width, row.mask_ap) for row in zoo.published_detectors()]
    assert rows == [
        *(("faster_rcnn", width, None) for width in (0.9, 1.0, 2.2)),
        *(("mask_rcnn", width, ap) for width, ap in ((0.9, 35.2), (1.0, 35.4), (2.2, 37.8))),
    ]


@pytest.mark.parametrize(("family", "width"), [("rexnet_lite", 1.0), ("rexnet", 0.9)])
def test_weights_that_were_never_published_are_said_to_be_none(family: str, width: float) -> None:
    with pytest.raises(UsageError, match=f"no pretrained weights are published for {family}"):
        zoo.fetch_pretrained(family, width)  # type: ignore[arg-type]


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download of one file needs."""

    def __init__(self, content: bytes, *arguments: object) -> None:
        self.content = content
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        if self._head():
            self.wfile.write(self.content)

    def _head(self) -> bool:
        known = self.path == "/timm/rexnet_100.nav_in1k/resolve/main/model.safetensors"
        self.send_response(200 if known else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("Content-Length", str(len(self.content) if known else 0))
        self.end_headers()
        return known

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """A hub on loopback that has rexnet_100's weights, and those weights."""
    torch.manual_seed(4)
    state = timm.create_model("rexnet_100").state_dict()
    handler = partial(_Hub, safetensors.torch.save(state))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", state
        server.shutdown()


def test_pretrained_weights_come_from_the_hub(
    hub: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    address, state = hub
    code = (
        "from rexdeploy.models import zoo, checkpoints\n"
        "path, source = zoo.fetch_pretrained('rexnet', 1.0)\n"
        "state = checkpoints.load_checkpoint(path).state_dict\n"
        "print(source, state['features.0.weight'].sum().item())"
    )
    env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    answer = run_python(code, env=env)
    expected = f"timm/rexnet_100.nav_in1k@{'0' * 40} {state['stem.conv.weight'].sum().item()}"
    assert answer.stdout.strip() == expected, answer.stderr
    # A file in the cache that is not what the hub stated is refused.
    (cached,) = tmp_path.glob("hub/models--*/snapshots/*/model.safetensors")
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.resolve().write_bytes(data)
    refused = run_python(code, env=env)
    assert refused.returncode != 0
    assert "is not what the hub gave as timm/rexnet_100.nav_in1k: got sha256" in refused.stderr


def test_a_hub_out_of_reach_is_one_clear_line(tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    answer = run_python(EXPORT, "--width", "1.5", "--out", tmp_path / "out", env=env)
    errors = [line for line in answer.stderr.splitlines() if not line.endswith(" ...")]
    assert answer.returncode == 2
    assert len(errors) == 1, answer.stderr
    assert "the Hugging Face hub did not give timm/rexnet_150.nav_in1k" in errors[0]
    assert not list((tmp_path / "out").iterdir())
