"""Damage to bytes and to JSON, from a seed: what the fuzzers and the differential test feed."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
import zlib
from typing import Any

from tests.hostile_images import chunk

ODD_JSON = [
    "null", "true", "false", "0", "-0", "-1", "1", "2", "1.0", "1e0", "0.1", "1e-400", "1e400",
    "-1e400", "5e-324", "4096", "4097", "1000000", "1000001", "1e3", "1001", "2147483648",
    "4294967297", "9007199254740992", "9007199254740993", "-9007199254740993",
    "9007199254740992.5", "9007199254740994.0", "1e15", "9223372036854775808",
    "18446744073709551616", "123456789012345678901234567890", "0.30000000000000004",
    "0.1000000000000000055511151231257827", "0.09999999999999999", "1.0000000000000002", "01",
    "1.", ".5", "+1", "1e", "NaN", "Infinity", "-Infinity", "0x10", '""', '"a"', '"fp16"',
    '"uint8"', '"rexnet_lite"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"',
    '"\\u00e9"', '"\u00e9"', '"\\x41"', '"a\\nb"', '"a\nb"', '"a\tb"', '"\x7f"', '"\u2028"',
    '"../x"', '"' + "a" * 64 + '"', '"' + "A" * 64 + '"', "[]", "{}", "[1]", "[1, 2, 3]",
    "[0.5, 0.5, 0.5]", "[0, 0, 0]", "[1, 1, 1, 1]", '["a"]', '{"a": "b"}', '{"a": 1}',
    '{"Half": 3}', '{"Half": -1}', '{"Quarter": 1}', '{"a": "b", "a": "c"}',
    '{"min": 1, "opt": 2, "max": 3}', '{"min": 3, "opt": 2, "max": 3}',
    '{"wanted": null, "layers": {}}', '{"wanted": "Half", "layers": {"Half": 1}, "differing": [1]}',
    "[" * 20 + "]" * 20, "[" * 29 + "]" * 29, "[" * 33 + "]" * 33, "[" * 5000 + "]" * 5000,
    "/* x */ 1", "1 // x\n", "'a'", "9" * 5000, "0." + "9" * 400, '"\\uD83D\\u0041"',
]  # fmt: skip
"""Values in JSON's own spelling, right and wrong, that readers are known to differ on."""
_ODD_ENDS = [b"\0", b"\n \t\r", b"\x0b", b"{}", b"]", b",", b"\xef\xbb\xbf", b"\0{", b"\x1a"]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, removed, repeated, or cut off."""
    damaged = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(damaged) or 1)
        length = rng.choice((1, 2, 4, 8, 100))
        match rng.randrange(5):
            case 0:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del damaged[at : at + length]
            case 2:
                damaged[at:at] = damaged[at : at + length]
            case 3:
                damaged[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
            case _:
                damaged[at : at + 1] = bytes([(damaged or b"\0")[at % (len(damaged) or 1)] ^ 1])
    if rng.random() < 0.1:
        del damaged[rng.randrange(len(damaged) or 1) :]
    return bytes(damaged)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON document with fields replaced, removed, renamed or doubled, or its bytes damaged."""
    document = json.loads(data)
    marks: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parent = _somewhere(document, rng)
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        new = f"@{len(marks)}@"
        marks[json.dumps(new)] = rng.choice(ODD_JSON)
        match rng.randrange(6):
            case 0 if isinstance(parent, dict):
                parent[f"unknown{len(marks)}"] = new
            case 1 if keys:
                del parent[rng.choice(keys)]
            case 2 if keys and isinstance(parent, list):
                parent.append(copy.deepcopy(rng.choice(parent)))
            case 3 if keys and isinstance(parent, dict):
                key = rng.choice(keys)
                marks[json.dumps(new)] = f"{json.dumps(parent[key])}, {json.dumps(key)}: " + (
                    json.dumps(parent[key]) if rng.random() < 0.5 else rng.choice(ODD_JSON)
                )
                parent[key] = new
            case _ if keys:
                parent[rng.choice(keys)] = new
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    for mark, spelling in marks.items():
        text = text.replace(mark, spelling)
    changed = text.encode(errors="surrogatepass")
    if rng.random() < 0.1:
        changed = rng.choice((changed + rng.choice(_ODD_ENDS), rng.choice(_ODD_ENDS) + changed))
    return mutated(changed, rng) if rng.random() < 0.2 else changed


def _somewhere(document: Any, rng: random.Random) -> Any:
    """A dict or list of the document, each as likely."""
    places = []
    pending = [document]
    while pending:
        place = pending.pop()
        places.append(place)
        items = place.values() if isinstance(place, dict) else place
        pending += [item for item in items if isinstance(item, (dict, list))]
    return rng.choice(places)


def mutated_png(data: bytes, rng: random.Random) -> bytes:
    """Damage inside chunks whose checksums are right, so that it is not found at once."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    index = rng.randrange(len(chunks))
    kind, content = chunks[index]
    if kind == b"IDAT" and rng.random() < 0.5:  # damage rows, not their compression
        content = zlib.compress(mutated(zlib.decompress(content), rng))
    else:
        content = mutated(content, rng)
    chunks[index] = (kind, content)
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    return data[:8] + b"".join(chunk(*item) for item in chunks)


def mutated_image(data: bytes, rng: random.Random) -> bytes:
    """Damage anywhere; of a PNG mostly where its checksums do not tell."""
    if data.startswith(b"\x89PNG") and rng.random() < 0.8:
        return mutated_png(data, rng)
    return mutated(data, rng)


def mutated_zip(data: bytes, rng: random.Random) -> bytes:
    """An archive with a damaged member and its right checksum; or damage anywhere."""
    if not data.startswith(b"PK") or rng.random() < 0.3:
        return mutated(data, rng)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, mutated(content, rng) if name == chosen else content)
    return changed.getvalue()


def mutated_message(message: Any, rng: random.Random) -> None:
    """Changes some fields of a protobuf message, anywhere in it, to odd values."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        places: list[Any] = []
        pending = [message]
        while pending:
            place = pending.pop()
            places.append(place)
            for field, value in place.ListFields():
                if field.message_type is not None:
                    pending += value if hasattr(value, "extend") else [value]
        _change(rng.choice(places), rng)


def _change(message: Any, rng: random.Random) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    is_list = hasattr(getattr(message, field.name), "extend")
    odd: tuple[Any, ...]
    if field.message_type is not None:
        if is_list:
            entries = getattr(message, field.name)
            if entries and rng.random() < 0.5:
                entries.add().CopyFrom(rng.choice(entries))
            elif entries:
                del entries[rng.randrange(len(entries))]
        else:
            message.ClearField(field.name)
        return
    if field.cpp_type in (field.CPPTYPE_STRING,):
        is_text = field.type == field.TYPE_STRING
        odd = ("", "x", "a\nb", "Conv", "If", "x" * 300) if is_text else (b"", b"\0", bytes(64))
    elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        odd = (0.0, -1.0, float("nan"), float("inf"), 1e30)
    elif field.cpp_type == field.CPPTYPE_ENUM:
        odd = tuple(value.number for value in field.enum_type.values)
    else:
        odd = (0, 1, 2, 7, 16, 99, 2**31 - 1)
        if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64):
            odd += (-1, -(2**31))
        if field.cpp_type == field.CPPTYPE_INT64:
            odd += (2**62, -(2**63))
    if is_list:
        entries = getattr(message, field.name)
        if entries and rng.random() < 0.7:
            entries[rng.randrange(len(entries))] = rng.choice(odd)
        else:
            entries.append(rng.choice(odd))
    else:
        setattr(message, field.name, rng.choice(odd))
