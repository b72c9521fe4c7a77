"""The rows of an opened dataset, without LeRobot, which takes seconds to import."""

from typing import Any

import numpy as np
import pyarrow as pa


def rows_of(dataset: Any) -> pa.Table:
    """The rows of the opened episodes, as they are stored.

    An interrupted recording leaves rows beyond the last episode, which are no frames; they are not here.
    """
    return dataset.hf_dataset.data.slice(0, dataset.meta.total_frames)


def vectors_of(dataset: Any, key: str) -> np.ndarray:
    """A column of numbers or vectors of the opened episodes, float64 `(rows, D)`."""
    column = rows_of(dataset).column(key)
    values: Any = column.combine_chunks()
    while not pa.types.is_primitive(values.type):  # a matrix is an extension type
        values = values.storage if isinstance(values, pa.ExtensionArray) else values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(column), -1)
