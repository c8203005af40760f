"""PyTorch: the reference, rebuilt from a bundle's weights, and any other module to time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rexdeploy.arrays import Float32, Images
from rexdeploy.backends import Resident
from rexdeploy.bundle.manifest import ModelSpec
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError, first_line

if TYPE_CHECKING:
    import torch


_CHUNK = 8  # images at once: more is no faster on a CPU and takes memory


def reference(weights: bytes, spec: ModelSpec) -> torch.nn.Module:
    """The bundle's network in evaluation mode; raises UsageError if the weights do not fit."""
    try:
        import safetensors.torch
    except ImportError:
        raise BackendUnavailable(_NO_TORCH) from None
    from rexdeploy.models.rexnet import CONFIGS, RexNet

    if spec.family == "onnx" or spec.width is None:
        raise UsageError("this bundle holds somebody's own ONNX graph: it has no PyTorch code")
    model = RexNet(CONFIGS[spec.family](spec.width, spec.num_classes))
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UsageError(
            f"the bundle's weights do not fit {spec.title} ({str(error).splitlines()[0]}); "
            "run 'rexdeploy export' again"
        ) from None
    return model.eval()


@dataclass(frozen=True)
class TorchOptions:
    """How PyTorch runs a module."""

    cuda: bool = False
    compiled: bool = False  # by torch.compile, anew for each batch size
    fp16: bool = False
    channels_last: bool = False  # the faster layout for convolutions, as PyTorch recommends
    threads: int | None = None  # on a CPU
    chunk: int | None = _CHUNK  # images at once; None takes every batch whole


class PyTorchBackend:
    """Runs a module in evaluation mode; on a CPU in float32 unless asked otherwise."""

    def __init__(self, model: torch.nn.Module, options: TorchOptions | None = None) -> None:
        try:
            import torch
        except ImportError:
            raise BackendUnavailable(_NO_TORCH) from None
        options = options or TorchOptions()
        self.name = "pytorch" + "-cuda" * options.cuda + "-compile" * options.compiled
        if options.cuda:
            use_cuda(torch)
        self._torch, self._options = torch, options
        self._type = torch.float16 if options.fp16 else torch.float32
        if options.cuda or options.fp16 or options.channels_last:
            model = copy.deepcopy(model)  # the caller's stays as and where it is
        with self._named_errors():
            model = model.to("cuda" if options.cuda else "cpu", self._type)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self._model: Callable[[torch.Tensor], torch.Tensor] = model
        if options.compiled:
            self._model = torch.compile(model, dynamic=False)

    def run(self, images: Images) -> Float32:
        torch, options = self._torch, self._options
        if options.threads is not None:  # of the whole process, so it is set for each run
            torch.set_num_threads(options.threads)
        step = options.chunk or len(images)
        with self._named_errors():
            chunks = [
                self._call(self._upload(images[start : start + step])).float().cpu().numpy()
                for start in range(0, len(images), step)
            ]
        return cast(Float32, np.concatenate(chunks))

    def resident(self, images: Images, cuda_graph: bool) -> Resident:
        """How to run the images from device memory, without copies; only with CUDA.

        Raises RexdeployError where they cannot be run so.
        """
        torch = self._torch
        with self._named_errors():
            inputs = self._upload(images)
            last = [torch.full((), float("nan"))]

            def launch() -> None:
                last[0] = self._call(inputs)

            if cuda_graph:
                launch = self._recorded(launch)
                with torch.inference_mode():  # as the tensor was made
                    last[0].fill_(float("nan"))  # until it is launched

        def run() -> None:
            with self._named_errors():
                launch()
                torch.cuda.synchronize()

        def outputs() -> Float32:
            with self._named_errors():
                return cast(Float32, last[0].float().cpu().numpy())

        return Resident(run, outputs)

    def _recorded(self, launch: Callable[[], None]) -> Callable[[], None]:
        """The same as one launch of a CUDA graph, which writes where it wrote when recorded."""
        torch = self._torch
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):  # cuDNN chooses its kernels before they are recorded
                launch()
        side.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            launch()
        return cast(Callable[[], None], recorded.replay)

    def close(self) -> None:
        self._model = self._torch.nn.Identity()

    def _call(self, inputs: torch.Tensor) -> torch.Tensor:
        with self._torch.inference_mode():
            try:
                return self._model(inputs)
            except Exception as error:
                if not self._options.compiled:
                    raise
                # No C++ compiler, no Triton, a version it does not know: it compiles when called.
                raise BackendUnavailable(f"torch.compile failed ({first_line(error)})") from None

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Makes RexdeployError of what PyTorch says of the GPU: no memory, no kernels, a crash."""
        try:
            yield
        except (RuntimeError, AssertionError) as error:
            if not self._options.cuda:
                raise
            raise RexdeployError(f"{self.name} failed ({first_line(error)})") from None

    def _upload(self, images: Images) -> torch.Tensor:
        tensor = self._torch.from_numpy(images)
        if self._options.cuda:
            tensor = tensor.pin_memory().cuda()
        tensor = tensor.to(self._type)
        if self._options.channels_last:
            tensor = tensor.contiguous(memory_format=self._torch.channels_last)
        return tensor


def use_cuda(torch: Any) -> None:
    """Settings of this process for honest figures on a GPU (`CUDA_SETTINGS`).

    float32 is float32: by default cuDNN rounds its factors to TF32's 10 bits. And cuDNN tries its
    kernels for each shape, as TensorRT did when it built. Raises BackendUnavailable without a GPU.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailable("PyTorch finds no NVIDIA GPU, or this is its CPU build")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


CUDA_SETTINGS = "TF32 off, cudnn.benchmark on"
_NO_TORCH = "the PyTorch reference needs torch: pip install 'rexdeploy[cpu]'"
