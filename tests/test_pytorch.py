"""PyTorch as a backend to time: whole batches, compiled, in the layout it likes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rexdeploy.backends.pytorch import PyTorchBackend, TorchOptions
from rexdeploy.errors import BackendUnavailable

IMAGES = np.random.default_rng(0).standard_normal((11, 3, 8, 8)).astype(np.float32)


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


def test_every_way_to_run_a_module_gives_its_logits() -> None:
    module = _module()
    with torch.inference_mode():
        expected = module(torch.from_numpy(IMAGES)).numpy()
    for options in (
        TorchOptions(),
        TorchOptions(channels_last=True, threads=1, chunk=None),
        TorchOptions(chunk=3),
    ):
        np.testing.assert_allclose(PyTorchBackend(module, options).run(IMAGES), expected, atol=1e-6)
    half = PyTorchBackend(_module(), TorchOptions(fp16=True)).run(IMAGES)
    assert 1e-6 < np.abs(half - expected).max() < 1e-2


def test_a_batch_is_cut_into_chunks_only_where_asked() -> None:
    sizes: list[int] = []
    module = _module()
    module.register_forward_hook(lambda m, inputs, output: sizes.append(len(inputs[0])))
    PyTorchBackend(module, TorchOptions(chunk=4)).run(IMAGES)
    PyTorchBackend(module, TorchOptions(chunk=None)).run(IMAGES)
    assert sizes == [4, 4, 3, 11]


@pytest.mark.slow
def test_torch_compile_runs_or_says_why_not() -> None:
    module = _module()
    with torch.inference_mode():
        expected = module(torch.from_numpy(IMAGES)).numpy()
    backend = PyTorchBackend(module, TorchOptions(compiled=True, chunk=None))
    assert backend.name == "pytorch-compile"
    try:
        logits = backend.run(IMAGES)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_compiler_that_is_missing_is_a_reason_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/such/compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    backend = PyTorchBackend(_module(), TorchOptions(compiled=True))
    with pytest.raises(BackendUnavailable, match="torch.compile failed"):
        backend.run(IMAGES)
    torch.compiler.reset()
