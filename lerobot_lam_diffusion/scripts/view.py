"""`lerobot-lam-tokens view`."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from lerobot_lam_diffusion.scripts.command_line import DatasetSource, LamFlags
from lerobot_lam_diffusion.scripts.report import open_footage
from lerobot_lam_diffusion.utils.errors import UserError


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
        if self.episode < 0:
            raise UserError(f"--episode={self.episode} must not be negative: episodes are counted from 0")


def view(config: ViewConfig) -> None:
    """Open what is asked for, and log it into a file or the viewer."""
    _refuse_bad_place(config.save)
    try:
        from lerobot_lam_diffusion.report.view import View
    except ImportError as error:
        raise UserError(f"view needs Rerun ({error}): pip install 'lerobot[viz]'") from error
    one = replace(config.dataset, episodes=[config.episode])  # the Hub sends no others
    store, footage = open_footage(
        config.store, one, config.lam, config.camera_key, config.device, config.tolerance_s, config.episode
    )
    assert footage is not None
    opened = View(store, footage, config.episode)
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
