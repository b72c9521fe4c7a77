"""Hostile and odd `.pt` files, written without torch's own checks."""
# ruff: noqa: E501

import builtins
import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._utils import (
    _rebuild_device_tensor_from_cpu_tensor,
    _rebuild_meta_tensor_no_storage,
    _rebuild_parameter,
    _rebuild_tensor_v2,
)

ROWS, WIDTH = 6, 4


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


def pickled(document: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(document)
    return buffer.getvalue()


def tensor(
    storage_size: int,
    shape: tuple,
    stride: tuple,
    offset: int = 0,
    key: Any = "0",
    kind: Any = torch.FloatStorage,
) -> Call:
    storage = ("storage", kind, key, "cpu", storage_size)
    return Call(_rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict())


def archived(
    content: bytes,
    storages: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    **more: bytes,
) -> bytes:
    """A zip as torch.save writes it, of a pickle and storages; `more`: entries by name."""
    if storages is None:
        storages = {"0": b"".join(struct.pack("<f", 1 + number) for number in range(ROWS * WIDTH))}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("t/data.pkl", content)
        archive.writestr("t/version", "3\n")
        for key, data in storages.items():
            archive.writestr(f"t/data/{key}", data)
        for name, data in more.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def saved(document: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(document, buffer, **options)
    return buffer.getvalue()


GOOD = tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1))
PLAIN = pickled({"tokens": GOOD})


def code(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Files that make the file `canary` where anything of them is called."""
    command = f"touch {canary}"
    calls = {
        "os.system": Call(os.system, command),
        "eval": Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({str(canary)!r}, 'w')"),
        "Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "Path.touch": Call(Path.touch, canary),
        "open": Call(builtins.open, str(canary), "w"),
        "getattr": Call(builtins.getattr, 1, "real"),
        "torch.load": Call(torch.load, str(canary)),
        "import": Call(builtins.__import__, "antigravity"),
    }
    for name, call in calls.items():
        for protocol in (0, 1, 2, 4, 5):
            places = {
                "alone": call, "tokens": {"tokens": call}, "metadata": {"tokens": GOOD, "metadata": call},
                "list": {"tokens": GOOD, "x": [call]}, "hooks": {"tokens": Call(_rebuild_parameter, GOOD, False, call)},
            }  # fmt: skip
            for place, document in places.items():
                content = pickled(document, protocol)
                yield f"code {name}, {place}, protocol {protocol}", archived(content)
                yield f"code {name}, {place}, protocol {protocol}, bare", content
        yield f"code {name}, legacy", saved({"tokens": call}, _use_new_zipfile_serialization=False)
    raw = f"cos\nsystem\n(X{len(command):c}\0\0\0{command}tR.".encode("latin1")
    yield "code, raw GLOBAL", archived(b"\x80\x02" + raw)
    yield "code, raw INST", archived(f"(S'{command}'\nios\nsystem\n.".encode())
    yield "code, raw OBJ", archived(f"(cos\nsystem\nS'{command}'\no.".encode())
    yield (
        "code, STACK_GLOBAL",
        archived(
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command.encode() + b"\x85R."
        ),
    )
    yield "code, extension", archived(b"\x80\x02\x82\x01.")
    yield "code, BUILD", archived(b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\nsb.")


def hostile() -> Iterator[tuple[str, bytes]]:
    """Files that ask for memory or time, or whose parts do not fit."""
    big = 10**6
    shapes = {
        "a number as 10^12": tensor(1, (big, big), (0, 0)),
        "a number as 6 rows of 10^11": tensor(1, (ROWS, 10**11), (0, 0)),
        "a number as the tokens": tensor(1, (ROWS, WIDTH), (0, 0)),
        "a row as all rows": tensor(WIDTH, (ROWS, WIDTH), (0, 1)),
        "10^12 in storage": tensor(10**12, (ROWS, WIDTH), (WIDTH, 1)),
        "2^63 in storage": tensor(2**63, (ROWS, WIDTH), (WIDTH, 1)),
        "more rows than bytes": tensor(ROWS * WIDTH, (ROWS, WIDTH + 1), (WIDTH + 1, 1)),
        "offset past the end": tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1), offset=1),
        "huge offset": tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1), offset=2**62),
        "negative offset": tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1), offset=-1),
        "negative shape": tensor(ROWS * WIDTH, (-ROWS, -WIDTH), (WIDTH, 1)),
        "negative stride": tensor(ROWS * WIDTH, (ROWS, WIDTH), (-WIDTH, 1)),
        "huge stride": tensor(ROWS * WIDTH, (ROWS, WIDTH), (2**62, 1)),
        "huge shape, no number": tensor(ROWS * WIDTH, (ROWS, 2**62, 0), (0, 1, 1)),
        "no column": tensor(ROWS * WIDTH, (ROWS, 0), (1, 1)),
        "shape of a bool": tensor(ROWS * WIDTH, (ROWS, True), (WIDTH, 1)),
        "shape of texts": tensor(ROWS * WIDTH, ("6", "4"), (WIDTH, 1)),
        "shape that is a list": tensor(ROWS * WIDTH, [ROWS, WIDTH], [WIDTH, 1]),  # type: ignore[arg-type]
        "shape without strides": tensor(ROWS * WIDTH, (ROWS, WIDTH), ()),
        "100 dimensions": tensor(ROWS * WIDTH, (1,) * 100, (1,) * 100),
        "key with a path": tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1), key="../../t/data/0"),
        "key that is absent": tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1), key="7"),
        "key that is a number": tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1), key=0),
        "no type of storage": tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1), kind="FloatStorage"),
        "another type of storage": tensor(ROWS * WIDTH, (ROWS, WIDTH), (WIDTH, 1), kind=torch.DoubleStorage),
        "cast of a number as 10^10": Call(
            _rebuild_device_tensor_from_cpu_tensor, tensor(1, (ROWS, 10**10), (0, 0)), torch.float64, "cpu", False
        ),
        "meta": Call(_rebuild_meta_tensor_no_storage, torch.float32, (ROWS, 10**12), (1, 1), False),
        "bytearray": Call(bytearray, 10**11),
        "Tensor": Call(torch.Tensor, big, big),
        "set": {1, 2}, "complex": 1j, "bytes": b"x" * 100, "text": "x" * 10_000, "number": 10**5000,
    }  # fmt: skip
    for name, value in shapes.items():
        yield f"tokens: {name}", archived(pickled({"tokens": value}))
        yield f"metadata: {name}", archived(pickled({"tokens": GOOD, "metadata": {"x": value}}))
        yield (
            f"stride: {name}",
            archived(pickled({"tokens": GOOD, "frame_stride": value, "use_vq_tokens": value})),
        )
    listed: Any = []
    for _ in range(60):
        listed = [listed, listed]
    yield "a key of 2^60 tuples", archived(_laughing_key())
    yield "a stride of 2^60 lists", archived(pickled({"tokens": GOOD, "frame_stride": listed}))
    yield "tokens of 2^60 lists", archived(pickled({"tokens": listed}))
    yield "a list of 2^60 lists", archived(pickled(listed))
    yield "deep lists", archived(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    yield "a million values", archived(b"\x80\x02](" + b"N" * 1_000_000 + b"e.")
    yield "a pickle of 3 MB", archived(pickled({"tokens": GOOD, "metadata": "x" * (3 << 20)}))
    yield "a huge memo", archived(b"\x80\x02}r\xff\xff\xff\xff.")
    yield "a text that claims 4 GB", archived(b"\x80\x02X\xff\xff\xff\xffabc.")
    yield "bytes that claim 2^60", archived(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".")
    yield "a bytearray that claims 2^60", archived(b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".")
    yield "a frame that claims 2^60", archived(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b".")
    for name, content in {
        "empty": b"",
        "no STOP": b"\x80\x02}",
        "STOP alone": b".",
        "marks": b"(((((.",
        "pops": b"0000.",
    }.items():
        yield f"pickle: {name}", archived(content)
    good = pickled({"tokens": GOOD})
    zeros = bytes(400 << 20)
    huge = pickled({"tokens": tensor(100 << 20, (ROWS, WIDTH), (WIDTH, 1))})
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"compressed by {compression}", archived(good, compression=compression)
    yield "a bomb of zeros", archived(huge, {"0": zeros}, zipfile.ZIP_DEFLATED)
    del zeros
    yield "a bomb as pickle", archived(b"\x80\x02" + b"N0" * (50 << 20), compression=zipfile.ZIP_DEFLATED)
    yield "two pickles", archived(good, **{"u__data.pkl": good})
    yield "no pickle", _zip({"t/version": b"3"})
    yield "an empty zip", _zip({})
    yield "10,000 entries", _zip({"t/data.pkl": good, **{f"t/data/{n}": b"" for n in range(10_000)}})
    yield "big endian", archived(good, **{"t__byteorder": b"big"})
    yield "byte order of a megabyte", archived(good, **{"t__byteorder": b"x" * (1 << 20)})
    yield "paths out", _zip({"../../t/data.pkl": good, "../../t/data/0": bytes(96)})
    yield "before a zip", b"\x80\x02}." + archived(good)
    yield "after a zip", archived(good) + bytes(100)
    yield "a comment", _zip({"t/data.pkl": good}, b"PK\x05\x06" + bytes(18))
    end = archived(good)
    for offset in range(-22, 0, 2):
        for value in (b"\xff\xff", b"\x00\x00", b"\x01\x00"):
            cut = len(end) + offset
            yield f"end record {offset} = {value!r}", end[:cut] + value + end[cut + 2 :]
    numbers = torch.rand(ROWS, WIDTH)
    kinds = {
        "sparse": numbers.to_sparse(), "csr": numbers.to_sparse_csr(), "complex": numbers.to(torch.complex64),
        "quantized": torch.quantize_per_tensor(numbers, 0.1, 0, torch.quint8), "integers": numbers.long(),
        "meta": numbers.to("meta"), "expanded": numbers[:1].expand(ROWS, WIDTH), "inf": numbers.double() * 1e300,
        "nan": numbers * torch.nan, "nested": torch.nested.nested_tensor([numbers, numbers[:2]]),
        "boolean": numbers > 0.5, "scalar": numbers[0, 0], "parameter": torch.nn.Parameter(numbers),
    }  # fmt: skip
    for name, value in kinds.items():
        for legacy in (False, True):
            try:
                content = saved({"tokens": value}, _use_new_zipfile_serialization=not legacy)
            except (RuntimeError, NotImplementedError):  # nested tensors have no legacy format
                continue
            yield f"{name}, {'legacy' if legacy else 'zip'}", content


def good() -> Iterator[tuple[str, bytes]]:
    """Files that are tokens, of several dtypes and layouts."""
    numbers = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) + 1
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        yield f"good, {dtype}", saved({"tokens": numbers.to(dtype)})
    yield "good, turned", saved({"tokens": numbers.T.contiguous().T})
    yield "good, part", saved({"tokens": torch.cat([numbers, numbers], 1)[:, :WIDTH]})
    yield "good, rows backwards in a larger one", saved({"tokens": torch.cat([numbers, numbers])[ROWS:]})
    more = {"n": None, "l": [1, 2.5, "x", (1,)], "t": torch.Size([2]), "d": torch.float32, "b": b"x", "s": {1},
            "other": torch.arange(3), "od": OrderedDict(a=1), "module": torch.nn.Linear(2, 2).state_dict()}  # fmt: skip
    yield (
        "good, metadata",
        saved({"tokens": numbers, "metadata": more, "frame_stride": 2, "use_vq_tokens": False}),
    )
    yield "good, parameter", saved({"tokens": torch.nn.Parameter(numbers)})


def _zip(entries: dict[str, bytes], comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = comment
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _laughing_key() -> bytes:
    """A dict whose key is a tuple of two tuples of two …, 60 deep; hashing it in Python would not end."""
    return b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s."
