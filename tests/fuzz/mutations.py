"""Damaged and hostile variants of a good file; the same ones for the same seed."""

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
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


def _duplicate(data: bytearray, rng: random.Random, at: int) -> None:
    data[at:at] = data[at : at + rng.randint(1, 256)]


def _clear(data: bytearray, rng: random.Random, at: int) -> None:
    size = len(data[at : at + rng.randint(1, 512)])
    data[at : at + size] = bytes(size)


def _move(data: bytearray, rng: random.Random, at: int) -> None:
    block = data[at : at + rng.randint(1, 64)]
    to = rng.randrange(len(data))
    data[to : to + len(block)] = block


def _append(data: bytearray, rng: random.Random, at: int) -> None:
    data += rng.randbytes(rng.randint(1, 64))


BYTE_CHANGES: list[Callable[[bytearray, random.Random, int], None]] = [
    _flip, _flip, _overwrite, _overwrite, _insert, _delete, _truncate, _duplicate, _clear, _move, _append,
]  # fmt: skip


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


def random_json(document: Any, seeds: range) -> Iterator[tuple[str, bytes]]:
    """Two or three values replaced at once."""
    places = list(paths(document))
    for seed in seeds:
        rng = random.Random(seed)
        changed = copy.deepcopy(document)
        texts = {}
        for number, path in enumerate(rng.sample(places, rng.choice([2, 3]))):
            marker = f"\x02{number}\x03"
            try:
                _parent(changed, path)[path[-1]] = marker
            except (TypeError, KeyError, IndexError):  # below a value that is replaced already
                continue
            texts[json.dumps(marker)] = rng.choice(JSON_VALUES)
        text = json.dumps(changed)
        for marker, value in texts.items():
            text = text.replace(marker, value)
        yield f"JSON values, seed {seed}", text.encode()


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


def joined(header: bytes | dict, data: bytes, length: int | None = None, pad: bool = True) -> bytes:
    """A `.safetensors` file; `length`: what it claims of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    if pad:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADER_VALUES = [
    "null", "true", "0", "1", "-1", "0.5", "1e999", "NaN", '"F32"', '"F64"', '"F8_E4M3"', '"F8_E8M0"', '"F4"',
    '"F6_E2M3"', '"C64"', '"BOOL"', '"U8"', '"I64"', '"PICKLE"', '""', str(2**31), str(2**63 - 1), str(2**63),
    str(2**64), str(10**12), "9" * 400, "9" * 5000, "[]", "[0]", "[1]", "[-1]", "[0, 0]", "[0, 1]", "[1, 0]",
    "[8, 16]", "[0, 1000000000000]", "[4294967296, 4294967296]", "[9223372036854775807, 2]", "[0, 1000000000000000000]",
    "[true]", "[1.0]", "[null]", '["1"]', "[" + "1," * 100 + "1]", "[" + "1," * 70_000 + "1]", "{}", "[" * 1000 + "]" * 1000,
]  # fmt: skip


def damaged_headers(whole: bytes, every: int = 1) -> Iterator[tuple[str, bytes]]:
    """A `.safetensors` file whose header says something else than its data is, of each `every`th tensor."""
    header, data = split(whole)
    size = len(whole) - len(data) - 8
    for length in (0, 1, 7, 8, size - 1, size + 1, size + 8, len(whole), len(whole) - 8, 2**20, 10**8, 2**31,
                   2**32, 2**63 - 1, 2**63, 2**64 - 1):  # fmt: skip
        yield f"header of {length} bytes", joined(header, data, length)
    for number, content in enumerate(JSON_CONTENTS):
        yield f"header content {number}", joined(content, data)
    for name in sorted(header.keys() - {"__metadata__"})[::every]:
        for path in ((name,), *((name, key) for key in ("dtype", "shape", "data_offsets"))):
            for number, text in enumerate(HEADER_VALUES):
                yield (
                    f"header {path}, value {number}: {text[:40]}",
                    joined(with_text(header, path, text).encode(), data),
                )
        for change in (_shift(-1), _shift(1), _shift(8), _grow(1), _grow(-1), _grow(2**40)):
            changed = copy.deepcopy(header)
            change(changed[name]["data_offsets"])
            yield f"header {name}, offsets {changed[name]['data_offsets']}", joined(changed, data)
        yield (
            f"header {name} twice",
            joined(
                with_text(
                    header,
                    (name,),
                    f"{json.dumps(header[name])}, {json.dumps(name)}: {json.dumps(header[name])}",
                ).encode(),
                data,
            ),
        )
        yield f"header {name} missing", joined({key: v for key, v in header.items() if key != name}, data)
        yield (
            f"header {name} renamed",
            joined({key + "\n" * (key == name): v for key, v in header.items()}, data),
        )
    for names in (("a", "b"), ("episode_from", "x")):
        extra = {
            name: {"dtype": "U8", "shape": [0, 2**62], "data_offsets": [len(data)] * 2} for name in names
        }
        yield f"empty tensors {names}", joined(header | extra, data)
    for size in (1, 3, 5, 9):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8 + size)
        yield f"data not aligned, {size}", joined(text, data, pad=False)
    many = {
        f"t{number}": {"dtype": "U8", "shape": [0], "data_offsets": [len(data)] * 2}
        for number in range(20_000)
    }
    yield "20,000 tensors", joined(header | many, data)
    yield "metadata", joined(header | {"__metadata__": {"a": "b"}}, data)
    yield "metadata that is a number", joined(header | {"__metadata__": 1}, data)
    yield "metadata of 6 MB", joined(header | {"__metadata__": {"a": "b" * (6 << 20)}}, data)


def swapped_headers(whole: bytes, seeds: range) -> Iterator[tuple[str, bytes]]:
    """Descriptions of tensors exchanged, shapes turned, offsets overlapping, dtypes of the same width."""
    header, data = split(whole)
    names = [name for name in header if name != "__metadata__"]
    for seed in seeds:
        rng = random.Random(seed)
        changed = copy.deepcopy(header)
        for _ in range(rng.choice([1, 1, 2])):
            one, other = changed[rng.choice(names)], changed[rng.choice(names)]
            kind = rng.randrange(6)
            if kind == 0:
                key = rng.choice(["dtype", "shape", "data_offsets"])
                one[key], other[key] = other[key], one[key]
            elif kind == 1:
                rng.shuffle(one["shape"])
            elif kind == 2:
                one["data_offsets"] = [rng.randint(-4, len(data) + 4) for _ in range(2)]
            elif kind == 3:
                one["dtype"] = rng.choice(
                    ["F64", "F32", "F16", "BF16", "I64", "I32", "U16", "U8", "I8", "BOOL"]
                )
            elif kind == 4:
                factor = rng.choice([2, 3, 4, 8])
                one["shape"] = [*one["shape"], factor] if rng.random() < 0.5 else one["shape"][:-1]
            else:
                one["data_offsets"] = list(other["data_offsets"])
        yield f"header, seed {seed}", joined(changed, data)


def _shift(by: int) -> Callable[[list[int]], None]:
    def change(offsets: list[int]) -> None:
        offsets[:] = [offset + by for offset in offsets]

    return change


def _grow(by: int) -> Callable[[list[int]], None]:
    def change(offsets: list[int]) -> None:
        offsets[1] += by

    return change
