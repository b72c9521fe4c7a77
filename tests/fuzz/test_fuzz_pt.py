"""A `.pt` file that is damaged or hostile: its tokens, or one clear error; nothing in it is ever called."""

import builtins
import io
import itertools
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._utils import _rebuild_meta_tensor_no_storage, _rebuild_parameter, _rebuild_tensor_v2

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from tests.fuzz import mutations
from tests.fuzz.conftest import check_refusal

ROWS, WIDTH = 6, 4
NUMBERS = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) + 1
META = SimpleNamespace(
    repo_id="local/x",
    total_frames=ROWS,
    episodes={"dataset_from_index": [0, 4], "dataset_to_index": [4, ROWS]},
)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


class View:
    """Pickles as a tensor over the file's one storage, without torch's own checks."""

    def __init__(self, storage_size: int, shape: tuple, stride: tuple, offset: int = 0) -> None:
        self.storage = torch.UntypedStorage(storage_size if storage_size < 1 << 10 else 4)
        self.arguments = (offset, shape, stride, False, {})

    def __reduce__(self) -> tuple:
        typed = torch.storage.TypedStorage(wrap_storage=self.storage, dtype=torch.float32, _internal=True)
        return _rebuild_tensor_v2, (typed, *self.arguments)


def saved(document: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(document, buffer, **options)
    return buffer.getvalue()


def good() -> Iterator[tuple[str, bytes]]:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        yield f"good, {dtype}", saved({"tokens": NUMBERS.to(dtype)})
    yield "good, transposed", saved({"tokens": NUMBERS.T.contiguous().T})
    yield "good, part of a larger tensor", saved({"tokens": torch.cat([NUMBERS, NUMBERS])[ROWS:]})
    metadata = {"n": None, "list": [1, 2.5, "x", (1,)], "size": torch.Size([2]), "other": torch.arange(3)}
    yield "good, metadata", saved({"tokens": NUMBERS, "metadata": metadata, "frame_stride": 2})
    yield "good, parameter", saved({"tokens": torch.nn.Parameter(NUMBERS)})


def code(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Files that make the file `canary` where anything of them is called."""
    calls = {
        "os.system": Call(os.system, f"touch {canary}"),
        "eval": Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({str(canary)!r}, 'w')"),
        "Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "Path.touch": Call(Path.touch, canary),
        "open": Call(builtins.open, str(canary), "w"),
        "getattr": Call(builtins.getattr, 1, "real"),
        "torch.load": Call(torch.load, str(canary)),
    }
    for name, call in calls.items():
        hook = Call(_rebuild_parameter, NUMBERS, False, call)
        places = {
            "alone": call,
            "tokens": {"tokens": call},
            "metadata": {"tokens": NUMBERS, "metadata": [call]},
            "hook": {"tokens": hook},
        }
        for (place, document), protocol in itertools.product(places.items(), (2, 4)):
            yield f"{name}, {place}, protocol {protocol}", saved(document, pickle_protocol=protocol)
        yield f"{name}, legacy", saved({"tokens": call}, _use_new_zipfile_serialization=False)
        yield f"{name}, bare pickle", pickle.dumps(call)


def hostile() -> Iterator[tuple[str, bytes]]:
    """Files that ask for memory, or whose parts do not fit."""
    storage = ROWS * WIDTH * 4
    tokens = {
        "one number as 10^12": View(4, (10**6, 10**6), (0, 0)),
        "one row as all rows": View(WIDTH * 4, (ROWS, WIDTH), (0, 1)),
        "more rows than bytes": View(storage, (ROWS, WIDTH + 1), (WIDTH + 1, 1)),
        "offset past the end": View(storage, (ROWS, WIDTH), (WIDTH, 1), offset=1),
        "negative stride": View(storage, (ROWS, WIDTH), (-WIDTH, 1)),
        "no columns": View(storage, (ROWS, 0), (1, 1)),
        "meta": Call(_rebuild_meta_tensor_no_storage, torch.float32, (ROWS, 10**12), (1, 1), False),
        "bytearray": Call(bytearray, 10**11),
        "expanded": NUMBERS[:1].clone().expand(ROWS, WIDTH),
        "sparse": NUMBERS.to_sparse(),
        "complex": NUMBERS.to(torch.complex64),
        "integers": NUMBERS.long(),
        "not finite": NUMBERS.double() * 1e300,
        "scalar": NUMBERS[0, 0],
        "text": "x",
    }
    for name, value in tokens.items():
        yield f"tokens: {name}", saved({"tokens": value})
    for stride in (0, -1, 1.0, "3", None, 2**70):
        yield f"stride: {stride!r}", saved({"tokens": NUMBERS, "frame_stride": stride})
    whole = saved({"tokens": NUMBERS})
    yield from {
        "empty": b"",
        "legacy": saved({"tokens": NUMBERS}, _use_new_zipfile_serialization=False),
    }.items()
    yield from ((f"first {length} bytes", whole[:length]) for length in range(1, len(whole), 97))


def damaged(seeds: range) -> Iterator[tuple[str, bytes]]:
    for name, whole in good():
        start = whole.index(b"\x80\x02")
        pickled = range(start, whole.index(b".PK", start) + 1)
        directory = range(whole.index(b"PK\x01\x02"), len(whole))
        for change, content in mutations.damaged(whole, seeds, [pickled, directory, range(start)]):
            yield f"{name}, {change}", content


class Reader:
    """Opens one file after another; whatever opens has the tokens that were saved."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lam_tokens.pt"
        self.canary = folder / "executed"
        documents = [torch.load(io.BytesIO(content), weights_only=True) for _, content in good()]
        self.possible = [document["tokens"].detach().float() for document in documents]

    def check(self, content: bytes) -> str:
        self.path.write_bytes(content)
        try:
            store = TokenStore.open(self.path, META)
        except TokenStoreError as error:
            return check_refusal(error, TokenStoreError)
        finally:
            assert not self.canary.exists()
        missing = ~store.values.any(1)
        assert any(torch.equal(store.values[~missing], tokens[~missing]) for tokens in self.possible)
        return "opened"


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    return Reader(tmp_path_factory.mktemp("pt"))


def test_tokens_open(reader, fuzz):
    counts = fuzz("pt", good(), reader.check)
    assert counts["opened"] == counts.total()


def test_code_is_refused(reader, fuzz):
    counts = fuzz("pt", code(reader.canary), reader.check)
    assert counts["refused"] == counts.total()


def test_the_canary_is_alive(reader):
    """What is refused would have been executed by a plain `torch.load`."""
    content = dict(code(reader.canary))["os.system, metadata, protocol 2"]
    torch.load(io.BytesIO(content), weights_only=False)
    assert reader.canary.exists()
    reader.canary.unlink()


def test_hostile_files_are_refused(reader, fuzz):
    counts = fuzz("pt", hostile(), reader.check)
    assert counts["refused"] == counts.total()


def test_damaged_files(reader, fuzz):
    assert fuzz("pt", damaged(range(40)), reader.check)["refused"] > 250
