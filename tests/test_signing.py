"""Signed bundles: what is accepted, what is refused, and that a change takes the signature away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rexdeploy.bundle import signing
from rexdeploy.bundle.manifest import Artifact, to_json
from rexdeploy.bundle.store import SIGNATURE, Bundle, sha256
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.inference.classifier import load
from rexdeploy.steps.verify import Verification
from tests.helpers import assert_refused, folder_state, run_cli, run_python

verifying = pytest.importorskip("model_signing.verifying", reason="the extra sign is missing")

from cryptography.hazmat.primitives import serialization  # noqa: E402 - of the same extra
from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: E402


def _write_key(key: Any, file: Path, passphrase: bytes | None = None) -> Path:
    """A private key and, beside it, its public one; returns the private one's path."""
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase)
            if passphrase
            else serialization.NoEncryption(),
        )
    )
    file.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return file


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path
    other: Path  # somebody else's public key


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    private = _write_key(ec.generate_private_key(ec.SECP256R1()), folder / "own.pem")
    other = _write_key(ec.generate_private_key(ec.SECP256R1()), folder / "other.pem")
    return Keys(private, private.with_suffix(".pub"), other.with_suffix(".pub"))


@pytest.fixture
def signed(small_lite: Bundle, keys: Keys) -> Bundle:
    signing.sign(small_lite.path, private_key=keys.private)
    return small_lite


def test_a_signed_bundle_answers_as_an_unsigned_one(
    small_lite: Bundle, keys: Keys, photos: Path, tmp_path: Path
) -> None:
    photo = photos / "flower.png"
    with load(small_lite, "onnxruntime") as classifier:
        expected = classifier.classify([photo])
    before = folder_state(small_lite.path)
    result = run_cli("sign", "small_lite", "--private-key", keys.private, cwd=tmp_path)
    assert result.code == 0, result.err
    assert f"{len(small_lite.manifest.artifacts) + 1} files" in result.out
    after = folder_state(small_lite.path)
    assert after.pop(SIGNATURE) != b""
    assert after == before
    with load(small_lite.path, "onnxruntime", require_signature=keys.public) as classifier:
        assert classifier.classify([photo]) == expected
    shown = run_cli("predict", photo, "--require-signature", keys.public, cwd=tmp_path)
    assert shown.code == 0, shown.err


def test_model_signing_itself_accepts_it(signed: Bundle, keys: Keys) -> None:
    config = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    config.verify(signed.path, signed.path / SIGNATURE)
    (signed.path / "fp32.onnx").write_bytes(b"other")
    with pytest.raises(ValueError, match="Hash mismatch"):
        config.verify(signed.path, signed.path / SIGNATURE)


def _replaced_with_its_manifest(bundle: Bundle) -> None:
    """What the hashes alone do not see: another graph, and a manifest that vouches for it."""
    graph = bundle.manifest.find("onnx")
    assert graph is not None
    forged = (bundle.path / graph.file).read_bytes() + b"\x1a\x00"
    (bundle.path / graph.file).write_bytes(forged)
    manifest = to_json(bundle.manifest).replace(graph.sha256.encode(), sha256(forged).encode())
    (bundle.path / "manifest.json").write_bytes(manifest)
    assert Bundle.open(bundle.path).manifest.find("onnx", sha256=sha256(forged)) is not None


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _as_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_replaced_with_its_manifest, "changed: fp32.onnx, manifest.json"),
        (lambda bundle: _flip(bundle.path / "fp32.onnx"), "changed: fp32.onnx"),
        (lambda bundle: (bundle.path / "fp32.onnx").unlink(), "missing: fp32.onnx"),
        (lambda bundle: (bundle.path / "more.txt").write_text("?"), "not its own: more.txt"),
        (lambda bundle: (bundle.path / SIGNATURE).unlink(), "is not signed"),
        (lambda bundle: (bundle.path / SIGNATURE).write_text("{}"), "is not a signature"),
        (lambda bundle: (bundle.path / SIGNATURE).write_bytes(b"\xff" * 9), "is not a signature"),
        (lambda bundle: _flip(bundle.path / SIGNATURE), SIGNATURE),
        (lambda bundle: _as_fifo(bundle.path / SIGNATURE), "no plain file"),
    ],
)  # fmt: skip
def test_what_was_not_signed_is_refused(
    signed: Bundle, keys: Keys, tmp_path: Path, change: Callable[[Bundle], object], said: str
) -> None:
    change(signed)
    refused = run_cli("verify", "--require-signature", keys.public, cwd=tmp_path)
    assert_refused(refused, said)
    with pytest.raises(UsageError):
        load(signed.path, require_signature=keys.public)


def test_files_that_begin_with_a_dot_are_not_the_bundles(signed: Bundle, keys: Keys) -> None:
    (signed.path / ".nfs0001").write_bytes(b"a deleted file that somebody still reads")
    assert signing.check(signed.path, keys.public).manifest == signed.manifest


def test_a_file_replaced_after_the_check_is_refused(signed: Bundle, keys: Keys) -> None:
    checked = signing.check(signed.path, keys.public)
    _replaced_with_its_manifest(signed)
    graph = checked.manifest.find("onnx")
    assert graph is not None
    with pytest.raises(UsageError):
        checked.read(graph)


def test_keys_that_are_none_are_one_line(
    signed: Bundle, keys: Keys, photos: Path, tmp_path: Path
) -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    encrypted = _write_key(curve, tmp_path / "encrypted.pem", b"secret")
    odd = _write_key(ec.generate_private_key(ec.SECP256K1()), tmp_path / "odd.pem")
    other = _write_key(rsa.generate_private_key(65537, 1024), tmp_path / "rsa.pem")
    noise = tmp_path / "noise.pem"
    noise.write_bytes(bytes(range(256)))
    before = folder_state(signed.path)
    for key, said in (
        (encrypted, "an encrypted key"),
        (odd, "P-256"),
        (other, "P-256"),
        (noise, "P-256"),
        (keys.public, "P-256"),
        (tmp_path / "absent.pem", "cannot be read"),
        (tmp_path, "no plain file"),
    ):
        result = run_cli("sign", "small_lite", "--private-key", key, cwd=tmp_path)
        assert_refused(result, key.name, said)
    assert folder_state(signed.path) == before
    photo = photos / "flower.png"
    for key, said in (
        (keys.other, "is not by the key"),
        (keys.private, "the public half"),
        (other.with_suffix(".pub"), "P-256"),
        (noise, "P-256"),
        (tmp_path / "absent.pub", "cannot be read"),
    ):
        serve = ["serve", "--tritonserver", shutil.which("true") or ""]  # it is never started
        for command in (["predict", photo], ["verify"], serve):
            assert_refused(
                run_cli(*command, "--require-signature", key, cwd=tmp_path), key.name, said
            )


@pytest.mark.parametrize("damage", ["changed", "missing", "not its own"])
def test_a_bundle_that_is_not_whole_is_not_signed(
    small_lite: Bundle, keys: Keys, tmp_path: Path, damage: str
) -> None:
    file = small_lite.path / "fp32.onnx"
    if damage == "changed":
        _flip(file)
    elif damage == "missing":
        file.unlink()
    else:
        (small_lite.path / "notes.txt").write_text("mine")
    result = run_cli("sign", "small_lite", "--private-key", keys.private, cwd=tmp_path)
    assert_refused(result, f"{damage}: ", "notes.txt" if damage == "not its own" else "fp32.onnx")
    assert not (small_lite.path / SIGNATURE).exists()


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it, nothing is tidied up."""


def test_a_change_takes_the_signature_away_in_the_same_step(
    small_lite_original: Bundle,
    keys: Keys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before any rename, deletion or sync: the old state with it, or the new one without."""
    data = b"new"
    added = Artifact("labels", "labels.txt", sha256(data))
    source = tmp_path / "signed"
    shutil.copytree(small_lite_original.path, source)
    signing.sign(source, private_key=keys.private)
    left = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*arguments, **named)

        return step

    outcomes = []
    for steps in range(20):
        path = tmp_path / str(steps)
        shutil.copytree(source, path)
        opened = Bundle.open(path)
        left = steps
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            killed = True
            try:
                opened.update(added, files={added.file: data})
                killed = False
            except Killed:
                pass
        is_new = Bundle.open(path).manifest.find_file(added.file) == added
        assert (path / SIGNATURE).exists() != is_new
        if is_new:
            with pytest.raises(UsageError, match="is not signed"):
                signing.check(path, keys.public)
        else:
            assert signing.check(path, keys.public).manifest == small_lite_original.manifest
        outcomes.append(is_new)
        if not killed:
            break
    assert not killed
    assert {False, True} == set(outcomes)
    assert len(outcomes) > 6


def test_a_disk_that_is_full_leaves_no_signature(
    small_lite: Bundle, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_state(small_lite.path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RexdeployError, match="No space left"):
        signing.sign(small_lite.path, private_key=keys.private)
    assert folder_state(small_lite.path) == before


def test_verify_keeps_a_signature_that_it_requires(
    signed: Bundle, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does with its result; how it comes to one takes long, and is tested elsewhere."""
    result = Verification(
        "a model", {}, "logits", "none", (1,), 1.0, {}, (), (), (), (), (), (), (), ()
    )
    monkeypatch.setattr("rexdeploy.steps.verify.verify", lambda *arguments, **options: result)
    before = folder_state(signed.path)
    required = run_cli("verify", "-q", "--require-signature", keys.public, cwd=tmp_path)
    assert required.code == 0, required.err
    assert folder_state(signed.path) == before
    stored = run_cli("verify", "-q", cwd=tmp_path)
    assert stored.code == 0, stored.err
    assert f"{SIGNATURE} is dropped" in stored.err
    assert not (signed.path / SIGNATURE).exists()


def test_nothing_of_it_is_imported_without_the_option(signed: Bundle, keys: Keys) -> None:
    code = (
        "import sys; import rexdeploy\n"
        "rexdeploy.load(sys.argv[1], 'onnxruntime').close()\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'model_signing', 'sigstore', 'cryptography'}, loaded\n"
        "sys.modules['model_signing'] = None\n"
        "try:\n"
        "    rexdeploy.load(sys.argv[1], require_signature=sys.argv[2])\n"
        "except rexdeploy.errors.BackendUnavailable as error:\n"
        "    print(error)\n"
    )
    done = run_python(code, signed.path, keys.public)
    assert done.returncode == 0, done.stderr
    assert "pip install 'rexdeploy[sign]'" in done.stdout
    assert len(done.stdout.splitlines()) == 1
