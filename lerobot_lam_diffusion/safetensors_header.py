"""The header of a `.safetensors` file, checked more strictly than by its library, and reading without a map.

Tensors must fill the file without gap or overlap: what is declared is never more than what is there.
"""

import math
import os
import struct
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from lerobot_lam_diffusion.reading import UnreadableError, parse_json, read_exactly, shown

HEADER_BYTES = 1 << 22  # villa-X's is 50 kB

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor's place: `offset` in the file, of `num_bytes`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(file: BinaryIO, at_most: int = HEADER_BYTES, for_map: bool = False) -> dict[str, Entry]:
    """Name → dtype, shape and place of every tensor, in the file's order; no tensor is read.

    Args:
        file: Opened by `open_regular`.
        at_most: Bytes of the header.
        for_map: The file is to be mapped by `safe_open`: each tensor must be aligned to its dtype.

    Raises:
        UnreadableError: not such a file, or its header and its size do not agree.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise UnreadableError(f"it has {size} bytes, too few for a header")
    start = bytearray(8)
    read_exactly(file, 0, memoryview(start))
    length = struct.unpack("<Q", start)[0]
    if length > size - 8:
        raise UnreadableError(f"its header claims {length} bytes, the file has {size}")
    if length > at_most:
        raise UnreadableError(f"its header has {length} bytes, expected at most {at_most}")
    text = bytearray(length)
    read_exactly(file, 8, memoryview(text))
    document = parse_json(bytes(text))
    if not isinstance(document, dict):
        raise UnreadableError("its header is no JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnreadableError("its header's __metadata__ is no object of texts")
    entries = [(name, _entry(name, value, 8 + length)) for name, value in document.items()]
    entries.sort(key=lambda item: (item[1].offset, item[1].num_bytes))
    end = 8 + length
    for name, entry in entries:
        if entry.offset != end:
            raise UnreadableError(f"tensor {shown(name)} overlaps another one, or leaves a gap")
        if for_map and entry.offset % entry.dtype.itemsize:
            raise UnreadableError(f"tensor {shown(name)} of {entry.dtype} is not aligned to it")
        end += entry.num_bytes
    if end != size:
        raise UnreadableError(f"its header describes {end} bytes, the file has {size}")
    return dict(entries)


def read_tensor(file: BinaryIO, entry: Entry) -> Tensor:
    """A tensor in memory of its own: later changes of the file do not reach it.

    Raises:
        UnreadableError: the file has become shorter since its header was read.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if entry.num_bytes:
        read_exactly(file, entry.offset, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return tensor


def _entry(name: str, value: Any, data_start: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnreadableError(f"tensor {shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnreadableError(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise UnreadableError(
            f"tensor {shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}, "
            "expected lists of sizes"
        )
    begin, end = offsets
    item = DTYPES[dtype].itemsize
    # The product of the sizes other than zero too: torch computes strides from them, in 64 bits.
    if math.prod(size for size in shape if size) * item >= 2**63:
        raise UnreadableError(f"tensor {shown(name)} has shape {shown(shape)}, more than a file can hold")
    if end - begin != math.prod(shape) * item:
        raise UnreadableError(
            f"tensor {shown(name)} has shape {shown(shape)} of {dtype}, but {end - begin} bytes"
        )
    return Entry(DTYPES[dtype], tuple(shape), data_start + begin, end - begin)


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64  # torch's own limit of dimensions
        and all(
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values
        )
    )
