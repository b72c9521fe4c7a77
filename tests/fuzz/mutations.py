"""Damaged and hostile variants of a good file; the same ones for the same seed."""

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

INTERESTING = [
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\x00" * 8,
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"\xff" * 4,
]


def _flip(data: bytearray, rng: random.Random, at: int) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: random.Random, at: int) -> None:
    content = rng.choice([rng.randbytes(rng.randint(1, 16)), rng.choice(INTERESTING)])
    data[at : at + len(content)] = content


def _insert(data: bytearray, rng: random.Random, at: int) -> None:
    data[at:at] = rng.choice([rng.randbytes(rng.randint(1, 32)), rng.choice(INTERESTING)])


def _delete(data: bytearray, rng: random.Random, at: int) -> None:
    del data[at : at + rng.randint(1, 64)]


def _truncate(data: bytearray, rng: random.Random, at: int) -> None:
    del data[at:]


BYTE_CHANGES = [_flip, _overwrite, _insert, _delete, _truncate]


def damaged(whole: bytes, seeds: range, hot: list[range] | None = None) -> Iterator[tuple[str, bytes]]:
    """`whole` after one to three changes of bytes.

    Args:
        seeds: One variant for each.
        hot: Where two of three changes are made; e.g. a header, that is small beside what it describes.
    """
    for seed in seeds:
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            if not data:
                break
            change = rng.choice(BYTE_CHANGES)
            place = rng.choice(hot) if hot and rng.random() < 2 / 3 else range(len(data))
            change(data, rng, min(rng.choice(place), len(data) - 1))
        yield f"bytes, seed {seed}", bytes(data)


# Text that stands for a value in a JSON document.
JSON_VALUES = [
    "null", "true", "false", "0", "-0", "1", "-1", "2", "0.5", "-0.0", "1e999", "-1e999", "NaN", "Infinity",
    "-Infinity", "1e308", "5e-324", str(2**31), str(2**32), str(2**53 + 1), str(2**63 - 1), str(2**63),
    str(-(2**63) - 1), str(10**12), str(10**18), "9" * 400, "9" * 4000, "9" * 5000, '""', '"1"', '"x"',
    '"' + "x" * 5000 + '"', '"\\u0000"', '"\\ud800"', '"../../etc/passwd"', '"\\u001b[2J"', '"float32"',
    '"vq"', '"continuous"', '"int8"', "[]", "[1]", "[null]", "[0.8, 1.0]", "[[[[]]]]", "{}", '{"a": 1}',
    '{"a": 1, "a": 2}', '{"0": "x"}', '{"-1": "x"}', '{"\\ud800": "x"}', "[" * 500 + "]" * 500,
    "[" * 50_000 + "]" * 50_000, '{"a":' * 5000 + "1" + "}" * 5000, "[" + "0," * 5000 + "0]", "1 2", "",
]  # fmt: skip


def paths(document: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """Places of all values in a JSON document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*prefix, key))


def _parent(document: Any, path: tuple) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def with_text(document: Any, path: tuple, text: str) -> str:
    """`document` as text, with `text` where the value at `path` stands."""
    document = copy.deepcopy(document)
    _parent(document, path)[path[-1]] = "\x02here\x03"
    return json.dumps(document).replace(json.dumps("\x02here\x03"), text)


def damaged_json(document: Any) -> Iterator[tuple[str, bytes]]:
    """Every value of a document missing, twice there, and replaced by each of `JSON_VALUES`."""
    for path in paths(document):
        where = ".".join(map(str, path))
        for number, text in enumerate(JSON_VALUES):
            yield f"JSON {where}, value {number}: {text[:40]}", with_text(document, path, text).encode()
        without = copy.deepcopy(document)
        del _parent(without, path)[path[-1]]
        yield f"JSON {where} missing", json.dumps(without).encode()
        if isinstance(path[-1], str):
            value = json.dumps(_parent(document, path)[path[-1]])
            twice = with_text(document, path, f"{value}, {json.dumps(path[-1])}: {value}")
            yield f"JSON {where} twice", twice.encode()


# ruff: noqa: E501
# Whole contents of any small document.
JSON_CONTENTS = [
    b"", b" ", b"\x00", b"null", b"[]", b"{}", b'""', b"0", b"NaN", b"{", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}",
    b"\xff" * 100, b'{"config": 1', b"[" * 200_000, b'{"a":' * 200_000, b"9" * 100_000, b'"' + b"x" * (2 << 20),
    b" " * (2 << 20), b"[" + b"[]," * 300_000 + b"[]]", b"\x80\x04\x95" + bytes(64), b"PK\x03\x04" + bytes(64),
]  # fmt: skip


def split(whole: bytes) -> tuple[dict, bytes]:
    """Header and data of a `.safetensors` file."""
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def joined(header: bytes | dict, data: bytes, length: int | None = None) -> bytes:
    """A `.safetensors` file; `length`: what it claims of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def forged_headers(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """A `.safetensors` file whose header says something else than its data is."""
    header, data = split(whole)
    for length in (0, 7, len(whole), 10**8, 2**63 - 1, 2**64 - 1):
        yield f"header of {length} bytes", joined(header, data, length)
    for number, content in enumerate(JSON_CONTENTS):
        yield f"header content {number}", joined(content, data)
    for name in sorted(header.keys() - {"__metadata__"}):
        tensor = header[name]
        start, stop = tensor["data_offsets"]
        changes = {
            "a step to the right": {"data_offsets": [start + 8, stop + 8]},
            "overlapping": {"data_offsets": [max(start - 8, 0), stop]},
            "beyond the end": {"data_offsets": [start, stop + 2**40]},
            "backwards": {"data_offsets": [stop, start]},
            "huge": {"shape": [2**32, 2**32], "data_offsets": [start, start + 2**62]},
            "another shape": {"shape": [*tensor["shape"], 2]},
            "turned": {"shape": tensor["shape"][::-1]},
            "another dtype": {"dtype": "F64" if tensor["dtype"] != "F64" else "I64"},
            "of no dtype": {"dtype": "PICKLE"},
            "without a shape": {"shape": None},
        }
        for change, values in changes.items():
            yield f"header {name} {change}", joined(header | {name: tensor | values}, data)
        yield f"header {name} missing", joined({key: v for key, v in header.items() if key != name}, data)
        others = {key + "\n" * (key == name): v for key, v in header.items()}
        yield f"header {name} renamed", joined(others, data)
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [len(data)] * 2}
    yield "20,000 tensors", joined(header | {f"t{number}": empty for number in range(20_000)}, data)
    yield "metadata that is a number", joined(header | {"__metadata__": 1}, data)
    yield "metadata of 6 MB", joined(header | {"__metadata__": {"a": "b" * (6 << 20)}}, data)
