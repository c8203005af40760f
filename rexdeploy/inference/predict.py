"""Classifies image files and folders of them, into a result or into a file of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rexdeploy.bundle.signing import find
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.inference.classifier import Classifier, load
from rexdeploy.inference.results_file import Header, Results, check_out
from rexdeploy.inference.stream import Row, classify_files, expand
from rexdeploy.progress import Result, several
from rexdeploy.text import printable


@dataclass(frozen=True, repr=False)
class Predictions(Result):
    """What became of some images."""

    model: str
    backend: str
    passed_over: tuple[str, ...]  # why better backends are not used
    images: tuple[Row, ...] | None  # in their order; None: they are in the file `out`
    out: str | None
    rows: int  # of all runs for `out`
    errors: int  # rows too: images that could not be read or classified
    before: int = 0  # the rows of an earlier run for `out`

    def __repr__(self) -> str:
        where = f" in {self.out}" if self.out is not None else ""
        what = f"{self.rows} images{where}, {self.errors} errors"
        return f"<Predictions of {self.model} on {self.backend}: {what}>"

    def _document(self) -> dict[str, Any]:
        names = ["images"] if self.out is None else ["out", "rows", "errors"]
        names = ["model", "backend", "passed_over", *names]
        return {name: getattr(self, name) for name in names}


def predict(
    image: Path | str | Sequence[Path | str],
    bundle: Bundle | Path | str | None = None,
    *,
    top: int = 5,
    backend: str = "auto",
    out: Path | str | None = None,
    force: bool = False,
    require_signature: Path | str | None = None,
    began: Callable[[Classifier], None] | None = None,
    each: Callable[[Row], None] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Classifies image files, and those in folders, with the best backend present.

    `bundle` is one, its folder, its name in artifacts/, or None: the latest one there. `top`
    classes are given for an image. `backend` and `require_signature` are as of `load`. With `out`
    (.csv, .jsonl or .parquet) the rows go there, and an interrupted run goes on where it was;
    `force` replaces the file, or another run's unfinished rows for it.

    `began` is told what runs. `each` takes every row instead of the result, which without it holds
    them all in memory. `report` is told of how many of how many images the rows are in `out`.

    An image that cannot be read is a row with its error. Raises UsageError, BackendUnavailable
    where nothing can run, and RexdeployError where the model fails or `out` cannot be written.

    Example: `rexdeploy.predict(["cat.jpg", "photos"], "rexnet_1.5", top=1)`
    """
    if force and out is None:
        raise UsageError("--force is about the file that --out names: give both")
    if top < 1:
        raise UsageError(f"top: got {top}, expected 1 or more")
    if out is not None:
        out = Path(out)
        check_out(out)
    images = [Path(one) for one in several(image)]
    files = expand(images)
    kept: list[Row] = []
    rows = errors = before = 0
    with load(find(bundle, require_signature), backend) as classifier:
        if began is not None:
            began(classifier)
        if out is None:
            for batch in classify_files(classifier, files, top):
                for row in batch:
                    rows, errors = rows + 1, errors + (row.error is not None)
                    (each or kept.append)(row)
        else:
            with Results(out, Header.of(classifier, images, top), force) as results:
                left = [file for file in files if printable(file) not in results.done]
                before, total = len(results.done), results.rows + len(left)
                told = report or (lambda *_: None)
                told(results.rows, total)
                for batch in classify_files(classifier, left, results.top):
                    results.append(batch)
                    told(results.rows, total)
                results.finish()
                rows, errors = results.rows, results.errors
    return Predictions(
        model=classifier.title,
        backend=classifier.backend,
        passed_over=classifier.passed_over,
        images=tuple(kept) if out is None else None,
        out=None if out is None else printable(str(out)),
        rows=rows,
        errors=errors,
        before=before,
    )
