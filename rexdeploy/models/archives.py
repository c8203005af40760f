"""What a torch file says of itself, looked through before torch believes it.

`torch.load(weights_only=True)` runs no code of a file. It still trusts the sizes that a file
states, compares no checksum, and calls a few harmless functions as often, and with numbers as
large, as the file asks for.
"""

from __future__ import annotations

import encodings
import encodings.aliases
import io
import pickletools
import struct
import zipfile
from typing import BinaryIO

from rexdeploy.errors import UsageError
from rexdeploy.files import file_size

MAX_OPERATIONS = 2_000_000
"""Of a file's pickles, each of which takes some 200 bytes at the most; a tensor takes about 25."""
MAX_PICKLE_BYTES = 64 << 20  # of an archive's pickle
MAX_DIRECTORY_BYTES = 16 << 20  # of a zip archive, whose every entry takes some ten times as much

_LEGACY_PICKLES = 5  # magic number, protocol, system, the object itself, the storages' keys
# The ends of an archive's directory: what each begins with, and its fields.
_END, _END_FIELDS = b"PK\5\6", struct.Struct("<4s4H2LH")
_LOCATOR, _LOCATOR_FIELDS = b"PK\6\7", struct.Struct("<4sLQL")
_END64, _END64_FIELDS = b"PK\6\6", struct.Struct("<4sQ2H2L4Q")
# What the loader would call that takes memory by a number: an array of so many zeros, or a string
# that each call makes twice as long.
_ARRAY = {"builtins bytearray", "__builtin__ bytearray"}
_ENCODE = {"_codecs encode"}
_GROWING = {"hex_codec", "base64_codec", "uu_codec", "quopri_codec"}
_LONGEST_ENCODING = 32


def check_archive(file: BinaryIO, name: str) -> None:
    """Raises UsageError unless a zip archive is whole, and takes no more memory than its size.

    Every entry has to be stored as it is, as torch writes them, with the checksum that it was
    saved with. `name` begins the message. Raises whatever zipfile does for what is no archive.
    """
    size = file_size(file)
    _check_end(file, size, name)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise UsageError(
                    f"{name}: its entry {entry.filename} is compressed, or states another size "
                    "than it has; torch.save compresses none: save it again with it"
                )
        stated = sum(entry.file_size for entry in entries)
        if stated > size:
            raise UsageError(
                f"{name}: its entries state {stated} bytes, and the file has {size}; copy it again"
            )
        if any(entry.CRC for entry in entries):
            damaged = archive.testzip()
            if damaged is not None:
                raise UsageError(
                    f"{name}: it is damaged: {damaged} has not the checksum that it was saved "
                    "with; copy it again"
                )
        else:  # torch.serialization.set_crc32_options(False) saves none, and writes 0
            for entry in entries:
                entry.CRC = None  # type: ignore[assignment]  # zipfile's own way not to look
        for entry in entries:
            if entry.orig_filename.lower().endswith("data.pkl"):  # as torch looks for it
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise _too_much(name)
                _check_pickles(io.BytesIO(archive.read(entry)), 1, name)


def check_legacy(file: BinaryIO, name: str) -> None:
    """Raises UsageError for what torch's older format may not do either; it has no checksums."""
    _check_pickles(file, _LEGACY_PICKLES, name)


def _check_end(file: BinaryIO, size: int, name: str) -> None:
    """Raises UsageError unless every reader of the archive sees the same directory.

    Of an archive with two of them, zipfile may see one and torch the other. So the directory lies
    before the file's end, and nothing between or behind.
    """
    ends = (_END64_FIELDS, _LOCATOR_FIELDS, _END_FIELDS)
    tail = sum(fields.size for fields in ends)
    start = max(0, size - tail)
    file.seek(start)
    data = io.BytesIO(file.read(tail).rjust(tail, b"\0"))
    end64, locator, end = (fields.unpack(data.read(fields.size)) for fields in ends)
    *_, length, offset, comment = end
    behind = _END_FIELDS.size
    is_whole = end[0] == _END and not comment
    if locator[0] == _LOCATOR:
        *_, length, offset = end64
        behind = tail
        is_whole &= end64[0] == _END64 and locator[2] == start
    if not is_whole or offset + length + behind != size:
        raise UsageError(
            f"{name}: not a checkpoint, or a truncated one (no directory at its end); "
            "expected a .pth, .pt or .safetensors file"
        )
    if length > MAX_DIRECTORY_BYTES:
        raise UsageError(
            f"{name}: its directory has {length} bytes, expected at most {MAX_DIRECTORY_BYTES}; "
            "save a plain state dict: torch.save(model.state_dict(), ...)"
        )


def _check_pickles(stream: BinaryIO, count: int, name: str) -> None:
    """Looks through so many pickles in a row; raises UsageError, or ValueError for what is none."""
    operations = 0
    encodes = grows = False
    for _ in range(count):
        for operation, argument, _ in pickletools.genops(stream):
            operations += 1
            if operations > MAX_OPERATIONS:
                raise _too_much(name)
            if operation.name == "GLOBAL":
                if argument in _ARRAY:
                    raise _needless(name, "a bytearray")
                encodes |= argument in _ENCODE
            elif isinstance(argument, str) and len(argument) <= _LONGEST_ENCODING:
                alias = encodings.normalize_encoding(argument.lower()).replace(".", "_")
                grows |= encodings.aliases.aliases.get(alias, alias) in _GROWING
    if encodes and grows:
        raise _needless(name, "bytes in another encoding")


def _too_much(name: str) -> UsageError:
    return UsageError(
        f"{name}: it holds more than {MAX_OPERATIONS} objects, or {MAX_PICKLE_BYTES} bytes of "
        "them, beside its tensors; save a plain state dict: torch.save(model.state_dict(), ...)"
    )


def _needless(name: str, what: str) -> UsageError:
    return UsageError(
        f"{name}: it holds {what}, which no weights need and which can take any memory; "
        "save a plain state dict: torch.save(model.state_dict(), ...)"
    )
