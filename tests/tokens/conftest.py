import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from lerobot_lam_diffusion.tokens import Provenance, TokenStore
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE, sha256_of
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, VQ, DatasetInfo, LamInfo
from lerobot_lam_diffusion.tokens.writer import write_store
from tests.hub_server import HubServer, connect, serve

SLOTS, WIDTH = 2, 4


class StoreFiles:
    """A copy of a store, for a test to damage."""

    def __init__(self, store: TokenStore, folder: Path) -> None:
        self.folder = shutil.copytree(store.path, folder)
        self.tensors = folder / TENSORS_FILE
        self.provenance = folder / PROVENANCE_FILE

    def document(self) -> dict:
        return json.loads(self.provenance.read_text())

    def write_document(self, document: object) -> None:
        self.provenance.write_text(json.dumps(document))

    def edit_document(self, change: Callable[[dict], object]) -> None:
        document = self.document()
        change(document)
        self.write_document(document)

    def edit_tensors(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Change the tensors and let the provenance vouch for the changed file, as a forger would."""
        tensors = {name: tensor.clone() for name, tensor in load_file(self.tensors).items()}
        change(tensors)
        save_file(tensors, self.tensors)
        self.edit_document(lambda document: document.update(tensors_sha256=sha256_of(self.tensors)))


@pytest.fixture
def files(store, tmp_path) -> StoreFiles:
    return StoreFiles(store, tmp_path / "copy")


@pytest.fixture(scope="session")
def partial_store(dataset, make_store) -> TokenStore:
    """Episodes 1 and 3 of `dataset` only. Not to be changed."""
    return make_store(
        LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=[3, 1], video_backend="pyav")
    )


@pytest.fixture(scope="session")
def make_provenance():
    """Provenance of a store of random tokens, `make_provenance(lengths, token_kind=…, frame_stride=…)`."""

    def make(lengths: Sequence[int], num_codes: int = 16, **changes) -> Provenance:
        provenance = Provenance(
            dataset=DatasetInfo("local/x", None, sum(lengths), len(lengths), 10, "digest"),
            lam=LamInfo("some/lam", None, "fingerprint", SLOTS, WIDTH, num_codes, 1.0),
            camera_key="observation.images.top",
            frame_stride=1,
            stride_seconds=0.1,
            token_kind=VQ,
            dtype="float32",
            versions={},
        )
        return replace(provenance, **changes)

    return make


@pytest.fixture(scope="session")
def write_random(make_provenance):
    """Writes a store of random tokens, none of them zero, of episodes of the given lengths."""

    def write(
        folder: Path,
        lengths: Sequence[int],
        covered: Sequence[bool] | None = None,
        num_codes: int = 16,
        **changes,
    ) -> TokenStore:
        stop = torch.tensor(lengths).cumsum(0)
        covers = torch.ones(len(lengths), dtype=torch.bool) if covered is None else torch.tensor(covered)
        num_rows = int((torch.tensor(lengths) * covers).sum())
        generator = torch.Generator().manual_seed(0)
        codebook = torch.rand(num_codes, WIDTH, generator=generator) + 1
        values = torch.randint(num_codes, (num_rows, SLOTS), generator=generator)
        if changes.get("token_kind") == CONTINUOUS:
            values = codebook[values].flatten(1) + torch.rand(num_rows, 1, generator=generator)
        provenance = make_provenance(lengths, num_codes, **changes)
        start = stop - torch.tensor(lengths)
        return write_store(folder, provenance, values.split(3), codebook, start, stop, covers)

    return write


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    """A Hub of our own with an empty cache; nobody is logged in."""
    with serve() as server:
        connect(monkeypatch, server.url, tmp_path / "hub-cache")
        yield server


@pytest.fixture
def random_store(write_random, tmp_path) -> TokenStore:
    """VQ tokens of a dataset that does not exist: 4 episodes, 34 frames."""
    return write_random(tmp_path / "random", (9, 12, 6, 7))


@pytest.fixture
def random_files(random_store) -> dict[str, bytes]:
    """Its files, as a repository has them."""
    return {name: (random_store.path / name).read_bytes() for name in (TENSORS_FILE, PROVENANCE_FILE)}
