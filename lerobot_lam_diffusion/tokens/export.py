"""A store as a file of another format, for other programs; block by block, except for `pt`.

| format    | holds                                                                                     |
|-----------|-------------------------------------------------------------------------------------------|
| `npy`     | float32 (N, n·a), one row for each frame of the dataset                                   |
| `pt`      | the same under "tokens", and plain "metadata"; `TokenStore.open(x.pt, dataset_meta)` reads it |
| `parquet` | a row for each covered frame: its numbers in the dataset, tokens, code indices            |

In all of them a frame without a token has zeros.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lerobot_lam_diffusion.constants import OBS_LAM_TOKENS
from lerobot_lam_diffusion.tokens.provenance import VQ, Provenance
from lerobot_lam_diffusion.tokens.store import BLOCK_ROWS, TokenStore
from lerobot_lam_diffusion.utils.errors import TokenStoreError, UserError
from lerobot_lam_diffusion.utils.files import refuse_existing, whole_or_nothing

PARQUET_PROVENANCE = b"lerobot_lam_diffusion.provenance"


def export_store(store: TokenStore, output: Path, format: str) -> None:
    """Write a store's tokens to the file `output`, which appears whole or not at all.

    Args:
        store: With a provenance; of all episodes, unless `format` is "parquet".
        output: A file that does not exist.
        format: One of `FORMATS`.

    Raises:
        FileExistsError: `output` exists.
        UserError: an unknown format, or one that cannot tell a missing episode.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format} is unknown; expected one of {', '.join(FORMATS)}")
    if store.provenance is None:
        raise TokenStoreError(f"{store.path} is an exported file already, not a token store")
    if format != "parquet" and bool((store.episode_row < 0).any()):
        raise TokenStoreError(
            f"{store.path} is partial ({store.coverage}), and a .{format} file has a row for every frame: "
            "missing episodes would pass for zeros. Export it with --format=parquet, or extract the missing "
            "episodes with lerobot-lam-precompute first"
        )
    refuse_existing(output, "--output")
    with whole_or_nothing(output) as partial:
        FORMATS[format](store, partial)


def _write_npy(store: TokenStore, path: Path) -> None:
    shape = (store.num_frames, store.token_dim)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for tokens in _blocks(store):
            file.write(memoryview(tokens.contiguous().numpy()).cast("B"))


def _write_pt(store: TokenStore, path: Path) -> None:
    assert store.provenance is not None
    tokens = torch.cat(list(_blocks(store)))
    torch.save({"tokens": tokens, "metadata": _metadata(store.provenance)}, path)


def _blocks(store: TokenStore) -> Iterator[Tensor]:
    """Tokens of all the dataset's frames in order, float32 `(b, token_dim)`."""
    for start in range(0, store.num_frames, BLOCK_ROWS):
        frames = torch.arange(start, min(start + BLOCK_ROWS, store.num_frames))
        yield store.window(frames, [0])[:, 0]


def _metadata(provenance: Provenance) -> dict[str, Any]:
    """What a `.pt` file says about its tokens, in plain types."""
    lam, dataset = provenance.lam, provenance.dataset
    return {
        "frame_stride": provenance.frame_stride,
        "stride_seconds": provenance.stride_seconds,
        "use_vq_tokens": provenance.token_kind == VQ,
        "camera_key": provenance.camera_key,
        "num_learned_tokens": lam.num_learned_tokens,
        "action_latent_dim": lam.action_latent_dim,
        "lam_path": lam.path,
        "lam_fingerprint": lam.fingerprint,
        "lam_token_scale": lam.token_scale,
        "dtype": provenance.dtype,
        "max_error": provenance.max_error,
        "dataset_repo_id": dataset.repo_id,
        "dataset_digest": dataset.digest,
    }


def _write_parquet(store: TokenStore, path: Path) -> None:
    assert store.provenance is not None
    fields = [
        ("index", pa.int64()),
        ("episode_index", pa.int64()),
        ("frame_index", pa.int64()),
        ("has_token", pa.bool_()),
        (OBS_LAM_TOKENS, pa.list_(pa.float32(), store.token_dim)),
    ]
    if store.codebook is not None:
        fields.append(("lam_indices", pa.list_(pa.int32(), store.values.shape[1])))
    schema = pa.schema(fields, metadata={PARQUET_PROVENANCE: store.provenance.to_json()})
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, len(store.values), BLOCK_ROWS):
            rows = torch.arange(start, min(start + BLOCK_ROWS, len(store.values)))
            file.write_table(pa.Table.from_arrays(_columns(store, rows, schema), schema=schema))


def _columns(store: TokenStore, rows: Tensor, schema: pa.Schema) -> list[pa.Array]:
    frame, episode = store.frames_at(rows)
    within = frame - store.episode_from[episode]
    has_token = within >= store.frame_stride
    columns = [pa.array(column.numpy()) for column in (frame, episode, within, has_token)]
    columns.append(_lists(store.window(frame, [0])[:, 0], schema.field(OBS_LAM_TOKENS).type))
    if store.codebook is not None:
        indices = store.values[rows].int()
        columns.append(_lists(indices, schema.field("lam_indices").type, ~has_token))
    return columns


def _lists(rows: Tensor, kind: pa.DataType, null: Tensor | None = None) -> pa.Array:
    flat = pa.array(rows.flatten().numpy(), type=kind.value_type)
    mask = None if null is None else pa.array(null.numpy())
    return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=mask)


FORMATS: dict[str, Callable[[TokenStore, Path], None]] = {
    "pt": _write_pt,
    "parquet": _write_parquet,
    "npy": _write_npy,
}
