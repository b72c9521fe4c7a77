"""`lerobot-lam-tokens push` and `pull`: a store and the Hub."""

from dataclasses import dataclass
from pathlib import Path

from lerobot_lam_diffusion.scripts.command_line import DatasetSource
from lerobot_lam_diffusion.scripts.next_step import next_step, train_on
from lerobot_lam_diffusion.scripts.report import illustrate, open_footage
from lerobot_lam_diffusion.tokens.pull import pull_store
from lerobot_lam_diffusion.tokens.push import push_store


@dataclass
class PushConfig:
    """Put a store on the Hub, as a dataset repository with a card, in one commit.

    Args:
        store: Its folder.
        repo_id: The repository, user/name; made if there is none.
        private: Whether a new one is private; left out: as the user or organisation has it.
        revision: Branch, made if there is none; left out: main.
        dataset: That the store was made of: the card shows its frames and what the tokens say of its state.
        tolerance_s: As in lerobot-train: how far a frame may lie from its timestamp, in seconds.
    """

    store: str
    repo_id: str
    private: bool | None = None
    revision: str | None = None
    dataset: DatasetSource | None = None
    tolerance_s: float = 1e-4


def push(config: PushConfig) -> None:
    store, footage = open_footage(config.store, config.dataset, tolerance_s=config.tolerance_s)
    pushed = push_store(
        store,
        config.repo_id,
        private=config.private,
        revision=config.revision,
        illustrate=lambda: illustrate(store, footage),
    )
    lam = store.provenance.lam.path if store.provenance is not None else ""
    if Path(lam).is_absolute():
        print(f"note: its provenance names the LAM by its path here, {lam}")
    print(pushed.url)
    if store.provenance is not None:
        print(next_step(train_on(store, pushed.hub_id, store.provenance.dataset.repo_id), "Train on it"))


@dataclass
class PullConfig:
    """Fetch a store from the Hub as a folder. Training needs no folder: it takes the repository's name.

    Args:
        store: The repository, user/name[@revision].
        output_dir: The new folder.
    """

    store: str
    output_dir: Path


def pull(config: PullConfig) -> None:
    store = pull_store(config.store, config.output_dir)
    print(f"{config.output_dir}: {store.hub_id}, {len(store.values)} frames; {store.coverage}")
