"""The command line: parse, call, print, exit code."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rexdeploy.console import (
    check_json,
    emit,
    fail,
    lost_output,
    print_table,
    progress,
    progress_bar,
    say,
    secure_streams,
    write_text,
)
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.machine import bounded
from rexdeploy.show import (
    show_benchmark,
    show_build,
    show_deployment,
    show_export,
    show_inspection,
    show_log_line,
    show_models,
    show_published_table,
    show_results,
    show_row,
    show_runner,
    show_serving,
    show_tuning,
    show_verification,
)
from rexdeploy.text import one_line, printable

if TYPE_CHECKING:
    from rexdeploy.bundle.precision import Precision
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.inference.classifier import Classifier
    from rexdeploy.inference.rows import Results
    from rexdeploy.inference.stream import Row
    from rexdeploy.steps.verify import Verification

EXTRA_OF = {
    "torch": "cpu",
    "onnx": "cpu",
    "onnxscript": "cpu",
    "onnxruntime": "cpu",
    "safetensors": "cpu",
}
"""The extra that brings each package that a command imports when it starts."""

EXIT_INTERRUPTED = 130  # as a shell reports SIGINT

app = typer.Typer(
    name="rexdeploy",
    add_completion=False,
    rich_markup_mode=None,  # rich costs `--help` more than everything else together
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

BundleArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[BUNDLE]",
        help="A bundle's folder or its name under artifacts/ [default: the latest one].",
        show_default=False,
    ),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        metavar="PUBLIC_KEY",
        help="Refuse the bundle unless this key has signed it, and nothing has changed since.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; '-' is stdout."),
]


def main() -> NoReturn:
    """Runs the command line; the only place where exceptions become exit codes."""
    secure_streams()
    signal.signal(signal.SIGINT, _interrupted)
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


def _leave(message: str = "") -> Callable[[int, object], NoReturn]:
    """A handler that leaves at once on Ctrl-C, with a message.

    A KeyboardInterrupt inside torch's exporter (2.15) ends in std::terminate, and what commands
    write survives being killed at any moment, so there is nothing to unwind.
    """

    def leave(signal_number: int, frame: object) -> NoReturn:
        del signal_number, frame
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the spinner had hidden it
        line = f"{show_cursor}error: {one_line(f'interrupted{message}')}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # a stream may be in the middle of another line
        os._exit(EXIT_INTERRUPTED)

    return leave


_interrupted = _leave()
_WRITE_BUNDLES = ("export", "build-trt", "tune-precision", "verify")


@contextlib.contextmanager
def _taken_back_on_ctrl_c() -> Iterator[None]:
    """Within it Ctrl-C unwinds what is under way, where that takes back what it has begun."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; no model is left half written", EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, _interrupted)


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
        signal.signal(signal.SIGINT, _leave("; no bundle is left half written"))
    if version:
        from rexdeploy import __version__

        say(f"rexdeploy {__version__}")
    elif context.invoked_subcommand is None:
        say(*context.get_help().split("\n"))


@app.command()
def export(
    width: Annotated[
        float | None,
        typer.Option(help="Width multiplier [default: the checkpoint's, or 1.0].", metavar="FLOAT"),
    ] = None,
    lite: Annotated[bool, typer.Option("--lite", help="ReXNet-lite: ReLU6, no SE.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A .pth, .pt or .safetensors checkpoint, or 'pretrained' for timm's published "
            "weights [default: an untrained network].",
            metavar="FILE",
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes [default: the checkpoint's, or 1000].")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Height and width of the input, pixels.")] = 224,
    batch: Annotated[str, typer.Option(help="'dynamic', or one fixed batch size.")] = "dynamic",
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    no_simplify: Annotated[bool, typer.Option("--no-simplify", help="Do not run onnxsim.")] = False,
    align: Annotated[
        str,
        typer.Option(
            help="Zero-pad channels to a multiple, for speed and equal logits: auto, off, 8 or 16."
        ),
    ] = "auto",
    input: Annotated[  # noqa: A002 - the option's name
        str,
        typer.Option(help="float32 (normalised, NCHW), or uint8: RGB pixels, NHWC."),
    ] = "float32",
    output: Annotated[
        str, typer.Option(help="logits, or probabilities: their softmax.")
    ] = "logits",
    labels: Annotated[
        Path | None,
        typer.Option(help="Text file, one class name a line [default: ImageNet's for 1000]."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the bundle [default: such as rexnet_1.5].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write the bundle in.")] = Path("artifacts"),
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Export a checkpoint to a bundle with a checked ONNX graph.

    The graph is simplified, and its logits are compared with PyTorch's, before anything is
    written.

    \b
    Example:
    rexdeploy export --weights rexnetv1_1.5.pth
    rexdeploy export --weights pretrained --width 2.0
    """
    check_json(json)
    from rexdeploy.models.rexnet import check_width

    if width is not None:
        check_width(width)
    from rexdeploy.steps.export import ExportOptions
    from rexdeploy.steps.export import export as run

    options = ExportOptions(
        width=width,
        lite=lite,
        weights=weights,
        num_classes=num_classes,
        image_size=image_size,
        batch=_fixed_batch(batch),
        opset=opset,
        simplify=not no_simplify,
        align=align,
        input=input,
        output=output,
        labels=labels,
        name=name,
        out=out,
        command=_command(),
    )
    with bounded(), progress(quiet) as report:
        result = run(options, report)
    emit(
        json,
        lambda: {
            "bundle": printable(str(result.bundle.path)),
            "manifest": result.bundle.manifest,
            "comparisons": result.comparisons,
        },
    )
    if not quiet and json != Path("-"):
        show_export(result)


@app.command("build-trt")
def build_trt(
    bundle: BundleArgument = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in float16, and prove it.")] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16, and prove it.")
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(metavar="MIN:OPT:MAX", help="Batch sizes to accept [default: 1:8:64]."),
    ] = None,
    flavor: Annotated[
        str,
        typer.Option(
            help="auto, tensorrt (for this machine's GPU) or rtx (TensorRT-RTX, needs no GPU)."
        ),
    ] = "auto",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="RTX: compute capability to build for, such as sm89; repeatable "
            "[default: sm80 and newer].",
            show_default=False,
        ),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(metavar="MIB", help="Scratch memory limit.")
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Build somebody's own ONNX classifier (ImageNet preprocessing)."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of bundles, for --onnx and to find the latest in.")
    ] = Path("artifacts"),
    force: Annotated[bool, typer.Option("--force", help="Build even if nothing changed.")] = False,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Build a TensorRT engine and prove its precision.

    The proof is the built engine's own layer report: an --fp16 or --bf16 engine with a
    convolution in float32 is an error.

    \b
    Example:
    rexdeploy build-trt --fp16 --batch 1:8:32
    rexdeploy build-trt artifacts/rexnet_1.5 --fp16 --target sm86 --target sm89
    """
    check_json(json)
    from rexdeploy.bundle.manifest import BatchRange
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.steps.build import BuildOptions
    from rexdeploy.steps.build import build as run
    from rexdeploy.steps.import_onnx import import_onnx

    if onnx is not None and bundle is not None:
        raise UsageError("got a bundle and --onnx, expected one of them")
    options = BuildOptions(
        fp16=fp16,
        bf16=bf16,
        batch=BatchRange.parse(batch) if batch is not None else None,
        flavor=flavor,
        targets=tuple(target or ()),
        workspace_mib=workspace,
        force=force,
        command=_command(),
    )
    with bounded(), progress(quiet) as report:
        source = import_onnx(onnx, out, options) if onnx else Bundle.find(bundle, out)
        result = run(source, options, report)
    emit(
        json,
        lambda: {
            "bundle": printable(str(result.bundle.path)),
            "engine": result.engine,
            "reused": result.reused,
        },
    )
    if not quiet and json != Path("-"):
        show_build(result)


@app.command()
def verify(
    bundle: BundleArgument = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to compare over [default: synthetic ones]."),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many images at the most.")] = 16,
    candidate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Judge this ONNX or engine instead of the bundle's."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="Use only this backend (onnxruntime, onnxruntime-cuda, openvino, tensorrt, "
            "tensorrt-rtx); "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Fail if this backend cannot run; repeatable.", show_default=False),
    ] = None,
    localize: Annotated[
        bool,
        typer.Option(
            "--localize",
            help="Print every block's own error, and walk the 16-bit graphs' blocks, too.",
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="With --candidate: fp32, fp16 or bf16, where it does not tell [default: judged "
            "as fp32].",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the walk's errors; a .png or .svg."),
    ] = None,
    require_signature: RequireSignature = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Compare the logits of every file with the network's.

    Errors are in units of signal: the spread of the reference's logits over the images; their
    limits follow what rounding does in this network. Exit code 3 names the broken edge. What
    cannot run here is 'skipped', which is not a pass.

    \b
    Example:
    rexdeploy verify --images photos/ --require tensorrt
    rexdeploy verify --candidate other.onnx --localize
    """
    check_json(json)
    if plot is not None:
        from rexdeploy.plot import check_plot, plot_localizations

        check_plot(plot)
        if not localize:
            raise UsageError("--plot draws what --localize finds: give both")
    from rexdeploy.errors import VerificationFailed
    from rexdeploy.steps.verify import VerifyOptions
    from rexdeploy.steps.verify import verify as run

    opened = _find(bundle, require_signature)
    options = VerifyOptions(
        images=images,
        samples=samples,
        candidate=candidate,
        backends=tuple(backend or ()),
        require=tuple(require or ()),
        localize=localize,
        precision=_precision(precision, candidate),
    )
    with bounded(), progress(quiet) as report:
        result = run(opened, options, report)
    if not quiet and json != Path("-"):
        show_verification(opened, result, every_block=localize)
    if candidate is None and require_signature is None:  # storing drops the signature
        _store(opened, result)
    with _only_warned_of(bool(result.failures)):
        emit(json, lambda: result)
        if plot is not None:
            plot_localizations(result.localizations, plot)
    if result.failures:
        raise VerificationFailed("; ".join(result.failures))


@app.command("tune-precision")
def tune_precision(
    bundle: BundleArgument = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to tune over [default: synthetic ones]."),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many images at the most.")] = 16,
    max_blocks: Annotated[int, typer.Option(help="How many blocks may stay float32.")] = 6,
    backend: Annotated[
        str,
        typer.Option(
            help="What runs the trials: onnxruntime, or on a GPU tensorrt or tensorrt-rtx."
        ),
    ] = "onnxruntime",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Find the few blocks, and nodes in them, that must stay in float32.

    For a network whose FP16 graph overflows or leaves its limit. The mixed graph takes the place
    of the bundle's fp16.onnx, and build-trt --fp16 builds it. Interrupted, the same command goes
    on where it was. Exit code 3: no set of so few blocks is enough.

    \b
    Example:
    rexdeploy tune-precision rexnet_1.5 --images photos/
    """
    check_json(json)
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.errors import VerificationFailed
    from rexdeploy.steps.tune import TuneOptions, tune

    options = TuneOptions(images, samples, max_blocks, backend, _command())
    opened = Bundle.find(bundle)
    with bounded(), progress(quiet) as report:
        result = tune(opened, options, report)
    if not quiet and json != Path("-"):
        show_tuning(result)
    with _only_warned_of(not result.healed):
        emit(
            json,
            lambda: {
                "bundle": printable(str(result.bundle.path)),
                "images": result.images,
                "healed": result.healed,
                "limits": result.limits,
                "plain": result.plain,
                "best": result.best,
                "written": result.written,
                "ranges": result.ranges,
            },
        )
    if not result.healed:
        raise VerificationFailed(
            f"no {max_blocks} blocks in float32 bring the FP16 graph within its limits (error "
            f"{result.limits.error:.2g}, root mean square {result.limits.rms:.2g}); the best "
            f"found: {', '.join(result.best.float32)}, {result.best.rank:.2g} times its limit; "
            f"{result.overflowing} blocks hold values beyond float16; "
            "nothing was written: try more --max-blocks, or build-trt --bf16"
        )


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX graph or an engine.")],
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Show what a graph or an engine is, in which types it computes, and what can run it here.

    Needs no GPU. Exit code 3: it does not compute in the precision that its bundle says.

    \b
    Example:
    rexdeploy inspect artifacts/rexnet_1.5/fp16.onnx
    """
    check_json(json)
    from rexdeploy.errors import VerificationFailed
    from rexdeploy.steps.inspection import inspect as run

    with bounded(), progress(quiet) as report:
        result = run(file, report)
    emit(json, lambda: result)
    if not quiet and json != Path("-"):
        show_inspection(result)
    if result.proof is not None and not result.proof.holds:
        raise VerificationFailed(f"{file}: not in the precision asked for: {result.proof.summary}")
    for runner in result.runners:
        if runner.conflict:
            raise RexdeployError(f"{file}: {runner.reason}")


@app.command()
def predict(
    image: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.")
    ],
    bundle: Annotated[
        Path | None,
        typer.Option(help="A bundle's folder or name [default: the latest].", metavar="BUNDLE"),
    ] = None,
    top: Annotated[int, typer.Option(help="Classes to give for an image.", min=1)] = 5,
    backend: Annotated[
        str,
        typer.Option(
            help="auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime, openvino or pytorch."
        ),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a row for each image: .csv, .jsonl or .parquet."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace --out's file, or another command's unfinished rows for it."
        ),
    ] = False,
    require_signature: RequireSignature = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Classify images with the best backend present.

    An image that cannot be read does not stop the others: it is a line on stderr, and the exit
    code is 2. With --out it is a row with its error, and the exit code is 0.

    --out writes the columns file, error, class_1, label_1, probability_1, class_2 and so on; in
    .jsonl a line has file, error and a list of predictions. Until all are there, the rows are in
    FILE.partial: interrupted or killed, the same command goes on where it was. It takes in images
    that are new in a folder, and does not read again what has its row.

    \b
    Example:
    rexdeploy predict cat.jpg --bundle rexnet_1.5
    rexdeploy predict photos/ --out results.csv
    """
    check_json(json)
    if force and out is None:
        raise UsageError("--force is about the file that --out names: give both")
    from rexdeploy.inference.classifier import load
    from rexdeploy.inference.rows import Header, Results, check_out
    from rexdeploy.inference.stream import classify_files, expand

    if out is not None:
        check_out(out)
    # Pillow's remarks on odd files would stand between ours; what it cannot read is an error.
    warnings.filterwarnings("ignore", module="PIL")
    files = expand(image)
    silent = quiet or json == Path("-")
    with load(_find(bundle, require_signature), backend) as classifier:
        answer: dict[str, object] = {
            "model": classifier.title,
            "backend": classifier.backend,
            "passed_over": classifier.passed_over,
        }
        if out is not None:
            show_runner(classifier, quiet, silent)
            header = Header.of(classifier, image, top)
            with Results(out, header, force) as results:
                _classify_into(results, classifier, files, quiet)
            emit(
                json,
                lambda: (
                    answer
                    | {"out": printable(str(out)), "rows": results.rows, "errors": results.errors}
                ),
            )
            if not silent:
                show_results(results)
            return
        told = False
        kept: list[Row] = []
        errors = 0
        for row in chain.from_iterable(classify_files(classifier, files, top)):
            if row.error is None and not told:
                told = True
                show_runner(classifier, quiet, silent)
            show_row(row, silent)
            errors += row.error is not None
            if json is not None:
                kept.append(row)
    emit(json, lambda: answer | {"images": kept})
    if errors:
        raise typer.Exit(UsageError.exit_code)


@app.command()
def bench(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BUNDLE]...",
            help="Bundles' folders or names [default: the latest one].",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        list[str],
        typer.Option(
            help="pytorch, pytorch-compile, onnxruntime, openvino; on a GPU pytorch-cuda, "
            "pytorch-cuda-compile, onnxruntime-cuda, tensorrt, tensorrt-rtx; repeatable."
        ),
    ] = ["onnxruntime"],  # noqa: B006 - typer's form of a repeatable option
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also time the bundles' networks as 'plain' (not aligned), '8' or '16' (aligned), "
            "'published' (its in-place shortcut) or 'timm' (its own model), or any model of timm, "
            "such as efficientnet_b0; repeatable.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N[,N]", help="Batch sizes.")] = "1",
    threads: Annotated[str, typer.Option(metavar="N[,N]", help="Threads on a CPU.")] = "1",
    rounds: Annotated[int, typer.Option(help="Timed runs of each competitor.")] = 30,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Graphs and PyTorch in float16 (engines are as built).")
    ] = False,
    table: Annotated[
        str | None,
        typer.Option(
            metavar="paper",
            help="'paper': time the networks of the published comparison tables instead, one "
            "image on a CPU and 64 on a GPU, and print them in the published layout.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the result: .png, .svg or .pdf.")
    ] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Time networks side by side on this machine.

    All competitors take turns in every round, so that a drifting machine hits them alike. The
    ratio is the time of the network's first row, at equal batch size and threads, by the row's:
    the median over the rounds, with its 95 % interval from 6 rounds on. The share is of the
    machine's own matrix rate, timed in the same rounds, for the network's published arithmetic.

    \b
    Example:
    rexdeploy bench --compare plain --compare efficientnet_b0 --batch 1,16 --threads 1,2
    rexdeploy bench --table paper --backend pytorch --backend onnxruntime
    """
    check_json(json)
    from rexdeploy.bench.competitors import BenchOptions
    from rexdeploy.bench.harness import bench as run
    from rexdeploy.bench.harness import bench_published_table
    from rexdeploy.bench.networks import compared
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.errors import VerificationFailed

    if table not in (None, "paper"):
        raise UsageError(f"table: got '{table}', expected paper")
    if table and (bundles or compare or batch != "1"):
        raise UsageError(
            "--table paper times its own networks at their own batch sizes: leave out bundles, "
            "--compare and --batch"
        )
    if plot is not None and plot == json:
        raise UsageError(f"got {plot} for --plot and --json, expected two files")
    if plot is not None:
        from rexdeploy.plot import check_plot

        check_plot(plot)
    options = BenchOptions(
        tuple(backend), _numbers("batch", batch), _numbers("threads", threads), rounds, fp16
    )
    # Here Ctrl-C ends the rounds, and what was measured is printed.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with progress(quiet) as report:
            if table:
                result = bench_published_table(options, report)
            else:
                opened = [Bundle.find(path) for path in bundles] if bundles else [Bundle.find(None)]
                result = run(compared(opened, compare or ()), options, report)
    except KeyboardInterrupt:
        fail("interrupted before the first round was complete", EXIT_INTERRUPTED)
    signal.signal(signal.SIGINT, _interrupted)
    if not quiet and json != Path("-"):
        if table:
            from rexdeploy.models.zoo import paper_rows

            show_published_table(result, paper_rows())
        else:
            show_benchmark(result)
    with _only_warned_of(bool(result.failures)):
        emit(json, lambda: result)
        if plot is not None:
            from rexdeploy.plot import plot_benchmark

            plot_benchmark(result, plot)
    if result.failures:
        raise VerificationFailed("; ".join(result.failures))
    if result.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command()
def triton(
    bundle: BundleArgument = None,
    repository: Annotated[
        Path, typer.Option(metavar="DIR", help="Model repository to add it to.")
    ] = Path("artifacts/triton"),
    backend: Annotated[
        str,
        typer.Option(
            help="tensorrt, onnxruntime or python; auto: what the model has there, else what this "
            "machine's tritonserver can run, else the bundle's TensorRT engine or its graph."
        ),
    ] = "auto",
    name: Annotated[
        str | None, typer.Option(help="Name of the model [default: the bundle's].")
    ] = None,
    kserve: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a KServe InferenceService, as YAML."),
    ] = None,
    storage_uri: Annotated[
        str, typer.Option(help="Where the cluster will find the repository.")
    ] = "pvc://models",
    image: Annotated[
        str, typer.Option(help="Container image of the cluster's Triton, with rexdeploy in it.")
    ] = "tritonserver-rexdeploy",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Add a bundle to a model repository of NVIDIA's Triton Inference Server.

    Three models: the network (NAME), the decoding of image files (NAME_preprocess), and both in a
    row (NAME_image). A changed bundle becomes the next version, in one atomic step, which a server
    that polls, as 'rexdeploy serve' does, takes up without a pause.

    \b
    Example:
    rexdeploy triton rexnet_1.5
    """
    check_json(json)
    check_json(kserve)
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.errors import BackendUnavailable
    from rexdeploy.serving.deploy import backend_here, check_place, deploy, inference_service
    from rexdeploy.serving.processes import Binary, find_server

    check_place(storage_uri, image)
    opened = Bundle.find(bundle)
    try:
        server: Binary | str = find_server()
    except BackendUnavailable as error:
        server = str(error)
    # A cluster's server is another one.
    here = server if isinstance(server, Binary) and kserve is None else None
    with _taken_back_on_ctrl_c():
        chosen, why = backend_here(backend, repository, name or opened.manifest.name, here)
        result = deploy(opened, repository, chosen, name, why=why)
    if kserve is not None:
        write_text(kserve, inference_service(result.name, result.backend, storage_uri, image))
    emit(
        json,
        lambda: {
            "repository": printable(str(result.repository)),
            "network": result.name,
            "ensemble": result.image_name,
            "version": result.version,
            "added": result.added,
            "backend": result.backend,
            "batch": result.batch,
        },
    )
    if not quiet and Path("-") not in (json, kserve):
        show_deployment(opened.manifest.model.title, result, server)


@app.command()
def serve(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="A bundle to add first, as 'rexdeploy triton' does [default: none; to an empty "
            "repository the latest one].",
            show_default=False,
        ),
    ] = None,
    repository: Annotated[
        Path, typer.Option(metavar="DIR", help="Model repository to serve.")
    ] = Path("artifacts/triton"),
    backend: Annotated[
        str,
        typer.Option(help="Of the bundle: tensorrt, onnxruntime or python; auto: as in triton."),
    ] = "auto",
    tritonserver: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The server [default: the one on PATH, or nvidia-pytriton's, of the extra serve].",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP; gRPC and metrics take the next two.")] = 8000,
    max_request: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            help="Largest request [default: 16, or a full batch of tensors if that is more].",
        ),
    ] = None,
    open_api: Annotated[
        list[str] | None,
        typer.Option(
            "--open",
            metavar="API",
            help="Let every client use shared-memory, model-repository, trace or logging.",
        ),
    ] = None,
    show_log: Annotated[bool, typer.Option("--log", help="Show all of Triton's log.")] = False,
    require_signature: RequireSignature = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model repository with a real Triton Inference Server, until Ctrl-C or SIGTERM.

    New versions and models that 'rexdeploy triton' adds to the repository are taken up within
    seconds. A server that fails is started again. An asked-for end is exit code 0, and what is in
    flight is answered first; a second Ctrl-C ends at once.

    \b
    Example:
    rexdeploy serve
    rexdeploy serve rexnet_1.5 --port 9000
    """
    from rexdeploy.serving.deploy import backend_here, deploy, servable
    from rexdeploy.serving.processes import choose_backend, find_server, workplace
    from rexdeploy.serving.server import (
        Address,
        Guard,
        check_ports,
        request_bytes,
        running,
        stop_signals,
    )

    server = find_server(tritonserver)
    address = Address(host, port)
    check_ports(address)
    apis = tuple(open_api or ())
    Guard(opened=apis)  # before anything is written
    request_bytes(max_request, [])
    models = servable(repository, server)
    if bundle is None and not models and repository.is_dir() and any(repository.iterdir()):
        raise UsageError(f"{repository} holds no model of rexdeploy's; name a bundle to add to it")
    if bundle is None and models:
        if backend != "auto" or require_signature is not None:
            option = "--backend" if backend != "auto" else "--require-signature"
            raise UsageError(f"{option} is for a bundle that is added: name one")
        served = models[0]
        title = f"{served.name}, version {served.version}, in {repository}"
    else:
        opened = _find(bundle, require_signature)
        chosen, why = backend_here(backend, repository, opened.manifest.name, server)
        if chosen != "auto":
            choose_backend(server, chosen)  # raises for one that the server lacks
        with _taken_back_on_ctrl_c():
            result = deploy(opened, repository, chosen, why=why)
        models = servable(repository, server)
        served = next(model for model in models if model.name == result.name)
        title = (
            f"{opened.manifest.model.title}, version {result.version}, {result.backend} backend "
            f"({result.reason})"
        )
    limit = request_bytes(max_request, [model.tensor_bytes for model in models])
    guard = Guard(limit, apis)
    with (
        stop_signals() as stop,
        workplace() as place,
        running(
            server, repository, address, show_log_line, show_log, guard, place, stop
        ) as process,
    ):
        with progress(quiet) as report:
            report("starting tritonserver")
            ready = process.wait_until_ready(
                [name for model in models for name in (model.name, model.image_name)]
            )
        if ready and not quiet:
            others = [model for model in models if model != served]
            show_serving(title, served, others, server, address, guard)
        process.wait(served.image_name)


@app.command("tune-serving")
def tune_serving(
    p99: Annotated[
        float,
        typer.Option("--p99", metavar="MS", help="Milliseconds within which 99 of 100 answer."),
    ],
    bundle: BundleArgument = None,
    repository: Annotated[
        Path, typer.Option(metavar="DIR", help="Model repository to keep it in.")
    ] = Path("artifacts/triton"),
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Image files to send [default: synthetic photographs]."),
    ] = None,
    tritonserver: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The server [default: as in serve].", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the result: .png, .svg or .pdf.")
    ] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Find how to batch requests: the most images a second within a latency.

    Starts servers of its own, one for each way to put requests together (none, batches of two
    sizes, with and without waiting for more, one copy of the network and several), and sends image
    files from more and more connections. The best way goes into the repository with the bundle, as
    'rexdeploy triton' adds it, and later versions keep it. The machine should have nothing else to
    do. Exit code 3: none is within the latency, and nothing was changed.

    \b
    Example:
    rexdeploy tune-serving rexnet_1.5 --p99 50
    """
    check_json(json)
    if plot is not None:
        from rexdeploy.plot import check_plot, plot_sweep

        check_plot(plot)
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.errors import VerificationFailed
    from rexdeploy.serving.processes import find_server
    from rexdeploy.serving.tuning import SweepOptions
    from rexdeploy.serving.tuning import tune_serving as run
    from rexdeploy.show_serving import show_sweep

    opened = Bundle.find(bundle)
    server = find_server(tritonserver)
    with _taken_back_on_ctrl_c(), progress(quiet) as report:
        result = run(opened, repository, server, SweepOptions(p99, images), report)
    if not quiet and json != Path("-"):
        show_sweep(opened.manifest.model.title, result)
    with _only_warned_of(result.kept is None):
        emit(json, lambda: result)
        if plot is not None:
            plot_sweep(result, plot)
    if result.kept is None:
        nearest = min(load.p99_ms for row in result.rows for load in row.loads)
        raise VerificationFailed(
            f"no way of serving answers 99 of 100 requests within {p99:g} ms; the nearest took "
            f"{nearest:.3g} ms; nothing was changed: give a larger --p99, or take a smaller network"
        )


@app.command()
def sign(
    private_key: Annotated[
        Path, typer.Option(metavar="FILE", help="An EC key (P-256, P-384 or P-521), PEM.")
    ],
    bundle: BundleArgument = None,
    quiet: Quiet = False,
) -> None:
    """Sign a bundle: its manifest and every file that it names.

    Whatever changes the bundle afterwards drops the signature ('verify' stores its result in it):
    sign last. --require-signature of predict, serve and verify then takes the public key.

    \b
    Example:
    rexdeploy sign rexnet_1.5 --private-key key.pem
    rexdeploy predict cat.jpg --bundle rexnet_1.5 --require-signature key.pub
    """
    from rexdeploy.bundle.signing import sign as run
    from rexdeploy.bundle.store import SIGNATURE, Bundle

    opened = Bundle.find(bundle)
    count = run(opened.path, private_key)
    if not quiet:
        say(f"{opened.path / SIGNATURE}: of {count} files; whatever changes the bundle drops it")


@app.command()
def models(json: Json = None) -> None:
    """Print the published networks and what they cost.

    \b
    Example:
    rexdeploy models
    """
    check_json(json)
    from rexdeploy.models import zoo

    rows = [(row, zoo.cost(row.family, row.width)) for row in zoo.published()]
    emit(json, lambda: [{"published": row, "computed": cost} for row, cost in rows])
    if json == Path("-"):
        return
    show_models([(row, cost, zoo.agrees(row, cost)) for row, cost in rows])


@app.command()
def doctor(json: Json = None) -> None:
    """Show what is installed, and how to get the rest.

    \b
    Example:
    rexdeploy doctor
    """
    check_json(json)
    from rexdeploy.steps.doctor import examine

    findings = examine()
    emit(json, lambda: findings)
    if json == Path("-"):
        return
    lines = [(finding.item, finding.status, finding.detail, finding.fix) for finding in findings]
    print_table(("", "status", "found", "to get it"), lines, wrap=True)
    conflicts = [finding for finding in findings if finding.status == "conflict"]
    if conflicts:
        raise RexdeployError(f"{conflicts[0].item}: {conflicts[0].detail}; {conflicts[0].fix}")


def _classify_into(
    results: Results, classifier: Classifier, files: Sequence[str], quiet: bool
) -> None:
    """Adds the rows of the files that have none yet; Ctrl-C leaves at once, with what is done."""
    from rexdeploy.inference.stream import classify_files

    signal.signal(
        signal.SIGINT,
        _leave(f"; {results.path} keeps what is done, and the same command goes on"),
    )
    left = [file for file in files if printable(file) not in results.done]
    with progress_bar(quiet, "classifying", results.rows, results.rows + len(left)) as show:
        for rows in classify_files(classifier, left, results.top):
            results.append(rows)
            show(results.rows)
        results.finish()
    signal.signal(signal.SIGINT, _interrupted)


@contextlib.contextmanager
def _only_warned_of(is_error: bool) -> Iterator[None]:
    """The writing of a result's files, behind its printing: what was found is never lost to it.

    Where the result itself `is_error`, the exit code is the result's.
    """
    try:
        yield
    except RexdeployError as error:
        if not is_error:
            raise
        say(f"warning: {one_line(str(error))}", to_stderr=True)


def _find(bundle: Path | None, public_key: Path | None) -> Bundle:
    """The bundle that is meant; signed by the key, where there is one."""
    from rexdeploy.bundle.store import Bundle

    opened = Bundle.find(bundle)
    if public_key is None:
        return opened
    from rexdeploy.bundle.signing import check

    return check(opened.path, public_key)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Reads `1,16`."""
    if not all(part.isdecimal() and len(part) < 10 for part in text.split(",")):
        raise UsageError(f"{name}: got '{text}', expected numbers such as 1 or 1,16")
    return tuple(int(part) for part in text.split(","))


def _precision(text: str | None, candidate: Path | None) -> Precision | None:
    from rexdeploy.bundle.precision import TYPE_NAMES

    if text is None:
        return None
    for name in TYPE_NAMES:
        if name == text:
            if candidate is None:
                raise UsageError(
                    f"got --precision {text} without --candidate: a bundle's files are judged by "
                    "their own types"
                )
            return name
    raise UsageError(f"precision: got '{text}', expected one of {', '.join(TYPE_NAMES)}")


def _fixed_batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(f"batch: got '{text}', expected 'dynamic' or a number")
    return int(text)


def _command() -> str:
    """The command line that is running, as a person would type it again."""
    return printable(shlex.join(["rexdeploy", *sys.argv[1:]]))


def _tell(quiet: bool, *lines: str | None, to_stderr: bool = False) -> None:
    if not quiet:
        say(*lines, to_stderr=to_stderr)


def _store(bundle: Bundle, result: Verification) -> None:
    """Keeps the result in the bundle, where it can be written: on a serving machine it may not."""
    from rexdeploy.bundle.store import SIGNATURE
    from rexdeploy.steps.verify import store

    signed = (bundle.path / SIGNATURE).exists()
    try:
        store(bundle, result, _command())
        if signed:
            say(
                f"warning: {SIGNATURE} is dropped, since verify.json is new: sign again; with "
                "--require-signature nothing is stored",
                to_stderr=True,
            )
    except RexdeployError as error:
        say(one_line(f"warning: verify.json is not stored: {error}"), to_stderr=True)
