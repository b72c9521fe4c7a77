"""Finished runs, one JSON line each."""

import json
from pathlib import Path
from typing import Any

import numpy as np


class Results:
    """A file of finished runs; a run is known by its condition and training seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, condition: str, seed: int) -> bool:
        return any(row["condition"] == condition and row["seed"] == seed for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def seeds(self, condition: str) -> list[int]:
        return sorted(row["seed"] for row in self.rows if row["condition"] == condition)

    def values(self, condition: str, field: str, seeds: list[int]) -> np.ndarray:
        """(training seeds, episodes) of a field that each run has once an episode."""
        found = {row["seed"]: row[field] for row in self.rows if row["condition"] == condition}
        return np.array([found[seed] for seed in seeds])
