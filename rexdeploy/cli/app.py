"""The command line: parse, call, print, exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from rexdeploy.cli.bench import bench
from rexdeploy.cli.build_trt import build_trt
from rexdeploy.cli.console import fail, lost_output, say, secure_streams
from rexdeploy.cli.doctor import doctor
from rexdeploy.cli.evaluate import evaluate
from rexdeploy.cli.export import export
from rexdeploy.cli.finetune import finetune
from rexdeploy.cli.inspect import inspect
from rexdeploy.cli.models import models
from rexdeploy.cli.predict import predict
from rexdeploy.cli.quantize import quantize
from rexdeploy.cli.serve import serve
from rexdeploy.cli.shared import interrupted, leave_with
from rexdeploy.cli.sign import sign
from rexdeploy.cli.triton import triton
from rexdeploy.cli.tune_precision import tune_precision
from rexdeploy.cli.tune_serving import tune_serving
from rexdeploy.cli.verify import verify
from rexdeploy.errors import RexdeployError, UsageError

EXTRA_OF = {
    "torch": "cpu",
    "onnx": "cpu",
    "onnxscript": "cpu",
    "onnxruntime": "cpu",
    "safetensors": "cpu",
}
"""The extra that brings each package that a command imports when it starts."""

app = typer.Typer(
    name="rexdeploy",
    add_completion=False,
    rich_markup_mode=None,  # rich costs `--help` more than everything else together
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> NoReturn:
    """Runs the command line; the only place where exceptions become exit codes."""
    secure_streams()
    signal.signal(signal.SIGINT, interrupted)
    try:
        _check_not_empty(sys.argv[1:])
        code = app(standalone_mode=False, prog_name="rexdeploy")
    except RexdeployError as error:
        fail(str(error), error.exit_code)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        missing = isinstance(error, ModuleNotFoundError)
        what = "is not installed" if missing else f"cannot be loaded ({error})"
        fail(f"{package} {what}: pip install 'rexdeploy[{EXTRA_OF[package]}]'", 2)
    except OSError as error:  # a folder that cannot be read, a name too long, no working folder
        fail(f"{error.filename or 'output'}: {error.strerror or error}", 2)
    except MemoryError:
        fail("there is not enough memory; give fewer or smaller images, or a smaller model", 2)
    except Exception as error:
        # click's usage errors, without its three-line "Usage:" preface. Anything else is our bug.
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "rexdeploy"
        fail(f"{show().rstrip('.')}; see '{command} --help'", 2)
    code = code if isinstance(code, int) else 0
    if lost_output:
        fail(lost_output[0], code or 2)
    sys.exit(code)


def _check_not_empty(arguments: Sequence[str]) -> None:
    """Raises UsageError for an empty argument: a shell's unset variable, and as a path `.`."""
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if not argument or (argument.startswith("--") and argument.find("=") == len(argument) - 1):
            name = argument[:-1] or (before if before.startswith("-") else "an argument")
            raise UsageError(f"{name}: got '', expected a value; is a variable of the shell unset?")


_WRITE_BUNDLES = ("export", "build-trt", "tune-precision", "quantize", "verify")


@app.callback(invoke_without_command=True)
def rexdeploy(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """ReXNet and ReXNet-lite: from a checkpoint to verified ONNX graphs and TensorRT engines.

    \b
    rexdeploy export --width 1.5       a bundle in artifacts/, with a checked ONNX graph
    rexdeploy build-trt --fp16         a TensorRT engine, proven to be FP16
    rexdeploy verify                   every file's logits against the network's
    """
    if context.invoked_subcommand in _WRITE_BUNDLES:
        signal.signal(signal.SIGINT, leave_with("; no bundle is left half written"))
    if version:
        from rexdeploy import __version__

        say(f"rexdeploy {__version__}")
    elif context.invoked_subcommand is None:
        say(*context.get_help().split("\n"))


COMMANDS = (  # in the order of --help
    finetune,
    export,
    build_trt,
    verify,
    tune_precision,
    quantize,
    inspect,
    evaluate,
    predict,
    bench,
    triton,
    serve,
    tune_serving,
    sign,
    models,
    doctor,
)
for _command in COMMANDS:
    app.command(_command.__name__.replace("_", "-"))(_command)
