"""`lerobot-lam-tokens view`."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lerobot_lam_diffusion.precompute.frames import choose_camera
from lerobot_lam_diffusion.scripts.command_line import DatasetSource, LamFlags
from lerobot_lam_diffusion.scripts.inputs import open_dataset, open_metadata
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.provenance import refuse_other_lam
from lerobot_lam_diffusion.utils.errors import TokenStoreError, UserError

if TYPE_CHECKING:
    from lerobot_lam_diffusion.report.view import View


@dataclass
class ViewConfig:
    """Look at an episode in Rerun: camera, tokens, state and action on one timeline.

    Args:
        store: Its folder, or its repository on the Hub; or a `.pt` file.
        dataset: That the store was made of.
        episode: Its number in the dataset, counted from 0.
        save: Write this file, which must end in .rrd, and open no viewer: no display is needed.
        lam: That made the store: the frames that it predicts stand beside the true ones.
        camera_key: Of a `.pt` file: the camera that the LAM looked at, where the dataset has several.
        device: Where the LAM runs; the best there is if left out.
        tolerance_s: As in lerobot-train: how far a frame may lie from its timestamp, in seconds.
    """

    store: str
    dataset: DatasetSource
    episode: int
    save: Path | None = None
    lam: LamFlags | None = None
    camera_key: str | None = None
    device: str | None = None
    tolerance_s: float = 1e-4

    def __post_init__(self) -> None:
        if self.dataset.episodes is not None:
            raise UserError("--dataset.episodes is not for view: leave it out, --episode names the one")


def view(config: ViewConfig) -> None:
    """Open what is asked for, and log it into a file or the viewer."""
    _refuse_bad_place(config.save)
    opened = _open(config)
    if config.save is None:
        opened.show()
        return
    opened.save(config.save)
    print(f"{config.save}: {config.save.stat().st_size:,} bytes. Open it: rerun {config.save}")


def _refuse_bad_place(save: Path | None) -> None:
    if save is not None and save.suffix != ".rrd":
        raise UserError(f"--save={save} must end in .rrd, by which Rerun knows its files")
    if save is not None and save.exists():
        raise UserError(f"--save={save} exists already; choose another file, or remove it")
    displays = [os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")]
    if save is None and sys.platform == "linux" and not any(displays):
        raise UserError(
            "there is no display for Rerun's viewer; write a file with --save=FILE.rrd, and open it by "
            "rerun FILE.rrd on a machine with a screen"
        )


def _open(config: ViewConfig) -> "View":
    try:
        from lerobot_lam_diffusion.report.view import View
    except ImportError as error:
        raise UserError(f"view needs Rerun ({error}): pip install 'lerobot[viz]'") from error
    meta, episode = open_metadata(config.dataset), config.episode
    if not 0 <= episode < meta.total_episodes:
        raise UserError(
            f"--episode={episode}: dataset {meta.repo_id!r} has the episodes 0 to {meta.total_episodes - 1}"
        )
    store = TokenStore.open(config.store, meta)
    if store.episode_row[episode] < 0:
        raise TokenStoreError(
            f"{store.name} has no tokens of episode {episode}: {store.coverage}. Look at one of these, or "
            "extract the missing ones with lerobot-lam-precompute"
        )
    camera = (
        store.provenance.camera_key
        if store.provenance is not None
        else choose_camera(meta, config.camera_key)
    )
    lam = None
    if config.lam is not None:
        lam = config.lam.load(config.device, fdm=True)
        if store.provenance is not None:
            refuse_other_lam(str(store.path), store.provenance.lam, lam)
    one = replace(config.dataset, episodes=[episode])  # the Hub sends no others
    dataset = open_dataset(one, config.tolerance_s)
    return View(store, dataset, camera, episode, lam)
