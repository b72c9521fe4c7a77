"""`lerobot-lam-tokens report`, and the pictures of `push`; LeRobot is imported when there is a dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lerobot_lam_diffusion.scripts.command_line import DatasetSource, LamFlags
from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.card import CardPicture
from lerobot_lam_diffusion.utils.errors import LamError, UserError

if TYPE_CHECKING:
    from lerobot_lam_diffusion.report.frames import Footage


@dataclass
class ReportConfig:
    """Look at a store: one HTML page that says whether its tokens say what moved.

    Args:
        store: Its folder, or its repository on the Hub; or a `.pt` file, which needs the dataset.
        output: The page to write; it needs no network and no other file.
        dataset: That the store was made of; if left out, the page has the parts that need no frames.
        lam: That made the store: the page shows the frames that it predicts.
        camera_key: Of a `.pt` file: the camera that the LAM looked at, where the dataset has several.
        seed: Of the held-out episodes and of all examples.
        device: Where the LAM runs; the best there is if left out.
        tolerance_s: As in lerobot-train: how far a frame may lie from its timestamp, in seconds.
    """

    store: str
    output: Path = Path("report.html")
    dataset: DatasetSource | None = None
    lam: LamFlags | None = None
    camera_key: str | None = None
    seed: int = 0
    device: str | None = None
    tolerance_s: float = 1e-4

    def __post_init__(self) -> None:
        if self.lam is not None and self.dataset is None:
            raise UserError("--lam.path needs --dataset.repo_id as well: the LAM predicts its frames")


def report(config: ReportConfig) -> None:
    """Open what is asked for, look at it, write the page."""
    try:
        from lerobot_lam_diffusion.report.build import write_report
    except ImportError as error:
        raise UserError(f"the report needs matplotlib ({error}): pip install matplotlib") from error
    store, footage = open_footage(
        config.store, config.dataset, config.lam, config.camera_key, config.device, config.tolerance_s
    )
    verdict = write_report(store, footage, config.output, config.seed)
    print(f"{config.output}: {config.output.stat().st_size:,} bytes")
    print(f"{verdict.word}: {verdict.why}.")


def illustrate(store: TokenStore, footage: "Footage | None") -> tuple[str, list[CardPicture]]:
    """A card's verdict as a sentence, if there is a dataset; its pictures, if matplotlib is installed."""
    try:
        from lerobot_lam_diffusion.report.build import card_pictures
    except ImportError as error:
        print(f"note: the card has tables in place of pictures ({error}): pip install matplotlib")
        return "", []
    verdict, pictures = card_pictures(store, footage)
    return (f"**{verdict.word.capitalize()}**: {verdict.why}." if footage is not None else ""), pictures


def open_footage(
    path: str,
    dataset: DatasetSource | None,
    lam: LamFlags | None = None,
    camera_key: str | None = None,
    device: str | None = None,
    tolerance_s: float = 1e-4,
    episode: int | None = None,
) -> tuple[TokenStore, "Footage | None"]:
    """The store and, where a dataset is named, its frames and the LAM; all of them checked.

    Args:
        episode: That the store must have tokens of.

    Raises:
        TokenStoreError: the store has no tokens of the episode.
        LamError: the LAM predicts no images, or did not make the store.
    """
    if dataset is None:
        return TokenStore.open(path), None
    from lerobot_lam_diffusion.precompute.frames import choose_camera
    from lerobot_lam_diffusion.precompute.recompute import refuse_other_tokens
    from lerobot_lam_diffusion.report.frames import Footage
    from lerobot_lam_diffusion.scripts.inputs import open_dataset, open_metadata

    meta = open_metadata(dataset)
    store = TokenStore.open(path, meta)
    if episode is not None and store.episode_row[episode] < 0:
        raise TokenStoreError(
            f"{store.name} has no tokens of episode {episode}: {store.coverage}. Look at one of these, or "
            "extract the missing ones with lerobot-lam-precompute"
        )
    camera = store.provenance.camera_key if store.provenance is not None else choose_camera(meta, camera_key)
    loaded = None
    if lam is not None:
        nothing = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        try:
            loaded = lam.load(device, fdm=True)
            loaded.predict_next(nothing, torch.zeros(1, loaded.token_dim))  # some LAMs predict no images
        except LamError as error:
            raise LamError(f"{error} To do without predicted frames, leave out --lam.path.") from error
        refuse_other_tokens(store, loaded)
    return store, Footage(open_dataset(dataset, tolerance_s), camera, loaded)
