"""Damage to bytes and to JSON, from a seed: what the fuzzers and the differential test feed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

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
