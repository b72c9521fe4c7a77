"""The parquet files of a dataset, for tests that edit them."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def episodes_file(root: Path) -> Path:
    return next((root / "meta" / "episodes").rglob("*.parquet"))


def data_file(root: Path) -> Path:
    return next((root / "data").rglob("*.parquet"))


def change_column(
    path: Path, name: str, change: Iterable | Callable[[list], list], keep_type: bool = True
) -> None:
    """Give a column of a file other values, or what a function makes of its own."""
    table = pq.read_table(path)
    at = table.column_names.index(name)
    field = table.schema.field(at)
    values = change(table[name].to_pylist()) if callable(change) else list(change)
    column = pa.array(values, field.type if keep_type else None)
    pq.write_table(table.set_column(at, field if keep_type else name, column), path)
