"""Signed bundles: who made one, where its hashes say only that it is whole.

`bundle.sig` beside the manifest is a signature of the OpenSSF's model-signing over the manifest and
every file that it names. Files of the folder that begin with a dot are not a part of the bundle.
model-signing is not imported unless a signature is asked for.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rexdeploy.bundle.manifest import MANIFEST, TASKS, Task, decode
from rexdeploy.bundle.store import SIGNATURE, Bundle, attach_signature, readable, sha256
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError, first_line
from rexdeploy.files import MAX_TEXT_BYTES, read_plain

_KEY = "an EC key of the curve P-256, P-384 or P-521 as PEM"
_LARGEST = 2**20  # bytes of a key or a signature; a bundle of a hundred files has 20 KB


def sign(bundle: Bundle | Path | str | None = None, *, private_key: Path | str) -> int:
    """Signs a bundle, in one rename, and returns how many files that covers.

    `bundle` is one, its folder, its name in artifacts/, or None: the latest one there.
    `private_key` is an EC key's PEM file. Raises UsageError for a key that cannot be used, and for
    a bundle with files that are changed, missing or not its own; BackendUnavailable without
    model-signing.

    Example: `rexdeploy.sign("rexnet_1.5", private_key="key.pem")`
    """
    path, private_key = Bundle.find(bundle, tasks=TASKS).path, Path(private_key)
    signing, _, hashing = _library()
    config = _with_key(
        private_key,
        f"{_KEY}, without a passphrase: openssl ecparam -name prime256v1 -genkey -noout -out KEY",
        lambda: signing.Config().use_elliptic_key_signer(private_key=private_key),
    )
    signed: dict[str, str] = {}

    def make() -> bytes:
        manifest = read_plain(path / MANIFEST, MAX_TEXT_BYTES)
        wanted = _named(manifest, path / MANIFEST)
        config.set_hashing_config(_hashing(hashing, path))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / SIGNATURE
            try:
                config.sign(path, file)
            except ValueError as error:  # a link, or what is no file
                raise UsageError(f"{path} cannot be signed ({first_line(error)})") from None
            data = file.read_bytes()
        signed.update(_digests(data))
        difference = _difference(wanted, signed)
        if difference:
            raise UsageError(
                f"{path} cannot be signed: its manifest and its files differ ({difference}); "
                "make them again, or remove what is not the bundle's"
            )
        return data

    attach_signature(path, make)
    return len(signed)


def find(
    bundle: Bundle | Path | str | None,
    public_key: Path | str | None,
    tasks: Sequence[Task] = ("classify",),
) -> Bundle:
    """The bundle that `Bundle.find` finds; with a key, only if it is signed by it (`check`)."""
    found = Bundle.find(bundle, tasks=tasks)
    return found if public_key is None else check(found.path, Path(public_key))


def check(path: Path, public_key: Path) -> Bundle:
    """The bundle at `path`, if its signature is by the key and of just what is there.

    What the bundle's own `read` gives later is checked against the manifest that was signed, so
    nothing can be replaced in between. Raises UsageError otherwise, BackendUnavailable without
    model-signing.
    """
    _, verifying, hashing = _library()
    config = _with_key(
        public_key,
        f"the public half of {_KEY}: openssl ec -in PRIVATE_KEY -pubout -out KEY",
        lambda: verifying.Config().use_elliptic_key_verifier(public_key=public_key),
    )
    file = path / SIGNATURE
    with readable(path):
        if not file.exists():
            raise UsageError(
                f"{path} is not signed, and a signature by {public_key} is required: "
                "'rexdeploy sign' makes one, and whatever changes the bundle afterwards drops it"
            )
        data = _read_small(file)
        manifest = read_plain(path / MANIFEST, MAX_TEXT_BYTES)
        config.set_hashing_config(_hashing(hashing, path))
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / SIGNATURE  # of the bytes that are read below
            copy.write_bytes(data)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning there
                    config.verify(path, copy)
                signed = _digests(data)
            except Exception as error:  # many types, of several libraries
                raise _refusal(error, path, public_key, data) from None
    if signed.get(MANIFEST) != sha256(manifest):
        raise UsageError(f"{path / MANIFEST} was changed while its signature was checked")
    return Bundle(path, decode(manifest, str(path / MANIFEST)))


def _library() -> tuple[Any, Any, Any]:
    """model_signing's modules signing, verifying and hashing."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise BackendUnavailable(
            f"signatures need model-signing ({error}): pip install 'rexdeploy[sign]'"
        ) from None
    return signing, verifying, hashing


def _with_key(key: Path, expected: str, use: Callable[[], Any]) -> Any:
    """What `use` makes of the key file; raises UsageError that says what was expected."""
    _read_small(key)
    try:
        return use()
    except Exception as error:  # ValueError, TypeError, AttributeError: whatever the file holds
        encrypted = "private key is encrypted" in str(error)
        got = "an encrypted key" if encrypted else "something else"
        raise UsageError(f"{key}: got {got}, expected {expected}") from None


def _read_small(file: Path) -> bytes:
    """The bytes of a key or a signature; raises UsageError for what can be neither."""
    try:
        return read_plain(file, _LARGEST)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EISDIR, errno.EFBIG):  # of `read_plain`
            raise UsageError(f"{file} cannot be read ({error.strerror})") from None
    raise UsageError(f"{file}: got no plain file of at most 1 MiB, expected a key or a signature")


def _hashing(hashing: Any, path: Path) -> Any:
    """How a bundle's files are hashed: all but the signature and names that begin with a dot."""
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    hidden = [item.name for item in path.iterdir() if item.name.startswith(".")]
    return config.set_ignored_paths(paths=[SIGNATURE, *hidden])


def _digests(signature: bytes) -> dict[str, str]:
    """SHA-256 by file name, of the files that a signature is of: its DSSE envelope's payload."""
    envelope = json.loads(signature)["dsseEnvelope"]
    payload = json.loads(base64.b64decode(envelope["payload"]))
    return {item["name"]: item["digest"] for item in payload["predicate"]["resources"]}


def _named(manifest: bytes, where: Path) -> dict[str, str]:
    """SHA-256 by file name, of the manifest itself and of what it names."""
    artifacts = decode(manifest, str(where)).artifacts
    return {MANIFEST: sha256(manifest)} | {item.file: item.sha256 for item in artifacts}


def _difference(wanted: dict[str, str], found: dict[str, str]) -> str:
    """Which files are missing, extra or changed, in words; empty where none is."""
    kinds = {
        "changed": [name for name in wanted if found.get(name, wanted[name]) != wanted[name]],
        "missing": [name for name in wanted if name not in found],
        "not its own": [name for name in found if name not in wanted],
    }
    return "; ".join(
        f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names
    )


def _refusal(error: Exception, path: Path, key: Path, signature: bytes) -> RexdeployError:
    """What it means that model-signing does not verify the bundle."""
    reason = first_line(error)
    if type(error).__name__ == "InvalidSignature" or "Key mismatch" in reason:
        return UsageError(
            f"{path / SIGNATURE} is not by the key {key}; nothing of the bundle was used: "
            "get it from whom you trust, or give their key"
        )
    if not reason.startswith("Signature mismatch"):
        return UsageError(
            f"{path / SIGNATURE} is not a signature that a bare key can check ({reason}); "
            "sign the bundle again with 'rexdeploy sign'"
        )
    found = {
        str(file.relative_to(path)): sha256(file.read_bytes())
        for file in path.rglob("*")
        if file.is_file() and file != path / SIGNATURE
        if not file.relative_to(path).parts[0].startswith(".")
    }
    return UsageError(
        f"{path} is not what was signed ({_difference(_digests(signature), found)}); nothing of it "
        "was used: get it from whom you trust"
    )
