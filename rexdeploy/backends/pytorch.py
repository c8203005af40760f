"""The reference: our PyTorch network, rebuilt from a bundle's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from rexdeploy.errors import BackendUnavailable, UsageError
from rexdeploy.manifest import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

Float32 = npt.NDArray[np.float32]

_CHUNK = 8  # images at once: more is no faster on a CPU and takes memory


class PyTorchBackend:
    """Runs the network in float32 on the CPU, in evaluation mode."""

    name = "pytorch"

    def __init__(self, weights: bytes, spec: ModelSpec, threads: int | None = None) -> None:
        try:
            import safetensors.torch
            import torch
        except ImportError:
            raise BackendUnavailable(
                "the PyTorch reference needs torch: pip install 'rexdeploy[cpu]'"
            ) from None
        from rexdeploy.models.rexnet import CONFIGS, RexNet

        if spec.family == "onnx" or spec.width is None:
            raise UsageError("this bundle holds somebody's own ONNX graph: it has no PyTorch code")
        self._torch = torch
        self._threads = threads
        model: RexNet = RexNet(CONFIGS[spec.family](spec.width, spec.num_classes))
        try:
            model.load_state_dict(safetensors.torch.load(weights))
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise UsageError(
                f"the bundle's weights do not fit {spec.title} ({str(error).splitlines()[0]}); "
                "run 'rexdeploy export' again"
            ) from None
        self._model: torch.nn.Module = model.eval()
        layers = list(model.features)
        head = torch.nn.Sequential(model.pool, *model.output, torch.nn.Flatten())
        self._blocks = [
            torch.nn.Sequential(*layers[:3]),
            *layers[3:-3],
            torch.nn.Sequential(*layers[-3:]),
            head,
        ]

    def run(self, images: Float32) -> Float32:
        torch = self._torch
        if self._threads is not None:  # of the whole process, so it is set for each run
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            chunks = [
                self._model(torch.from_numpy(images[start : start + _CHUNK])).numpy()
                for start in range(0, len(images), _CHUNK)
            ]
        return cast(Float32, np.concatenate(chunks))

    def block_outputs(self, images: Float32) -> list[Float32]:
        """The outputs of stem, every bottleneck, head and classifier: float32, in order."""
        outputs = []
        x = self._torch.from_numpy(images)
        with self._torch.inference_mode():
            for block in self._blocks:
                x = block(x)
                outputs.append(x.numpy())
        return outputs

    def inside_block(self, index: int, x: Float32) -> list[Float32]:
        """The outputs of every module of one block that is given `x`, in order of running."""
        seen: list[Float32] = []

        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            del module, inputs
            seen.append(output.numpy().copy())  # activations work in place

        block = self._blocks[index]
        hooks = [module.register_forward_hook(keep) for module in block.modules()]
        try:
            with self._torch.inference_mode():
                block(self._torch.from_numpy(x.copy()))
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def close(self) -> None:
        self._model = self._torch.nn.Identity()
        self._blocks = []
