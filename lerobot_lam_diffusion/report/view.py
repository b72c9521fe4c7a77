"""One episode in Rerun: camera, tokens, state and action on one timeline. Only this module imports rerun."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rerun as rr
import rerun.blueprint as rrb
import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from tqdm import tqdm

from lerobot_lam_diffusion.lam.fit.report import evenly
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames
from lerobot_lam_diffusion.precompute.rows import vectors_of
from lerobot_lam_diffusion.report.codes import PRINCIPAL_TOKENS, principal_directions
from lerobot_lam_diffusion.report.frames import Footage
from lerobot_lam_diffusion.report.motion import dimension_names
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import UserError, first_line
from lerobot_lam_diffusion.utils.files import whole_or_nothing

FRAME, SECONDS = "frame_index", "timestamp"
"""The timelines, named as the dataset's columns are; both begin at 0 with the episode."""
CODE, DIRECTION, NORM, MISSING, PREDICTION = (
    f"lam/{name}" for name in ("code", "direction", "norm", "missing", "prediction")
)
_JPEG_QUALITY = 95
_LAM_BATCH = 16


@dataclass(frozen=True)
class View:
    """An episode of a store and what it was made of.

    Args:
        store: covers the episode.
        footage: of a dataset that was opened with that episode, perhaps alone.
    """

    store: TokenStore
    footage: Footage
    episode: int

    def save(self, path: Path) -> None:
        """Write a file that `rerun` opens; it appears whole.

        Raises:
            UserError: it cannot be written, or a frame cannot be read.
        """
        with whole_or_nothing(path) as partial:
            self._record(
                f"--save={path} cannot be written",
                lambda recording: recording.save(partial, default_blueprint=self.blueprint()),
            )

    def show(self) -> None:
        """Start Rerun's viewer, which stays open when this process ends, and log to it.

        Raises:
            UserError: the viewer does not start or is closed meanwhile, or a frame cannot be read.
        """
        # Rerun looks for its viewer on PATH, which does not include an environment that is not activated.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._record(
            "Rerun's viewer cannot be reached; write a file with --save=FILE.rrd, and open it by rerun "
            "FILE.rrd on a machine with a screen",
            lambda recording: recording.spawn(default_blueprint=self.blueprint()),
        )

    def _record(self, refusal: str, open_sink: Callable[[rr.RecordingStream], None]) -> None:
        # The viewer remembers the user's layout per application, and recordings differ in their contents.
        recording = rr.RecordingStream(f"{self.footage.dataset.repo_id}/episode_{self.episode}")
        try:
            with _refusing(refusal):
                open_sink(recording)
            self.log(recording)
            with _refusing(refusal):
                recording.flush()
        finally:
            recording.disconnect()

    def blueprint(self) -> rrb.Blueprint:
        """Pictures above, curves below."""
        pictures = [rrb.Spatial2DView(origin=self._camera, name=self.footage.camera_key)]
        if self.footage.lam is not None:
            pictures.append(rrb.Spatial2DView(origin=PREDICTION, name="the LAM's prediction"))
        curves = [CODE if self.store.codebook is not None else DIRECTION, NORM, MISSING, *self._vectors]
        return rrb.Blueprint(
            rrb.Vertical(
                rrb.Horizontal(*pictures),
                rrb.Grid(*(rrb.TimeSeriesView(origin=path, name=path) for path in curves), grid_columns=2),
            ),
            collapse_panels=True,
        )

    def log(self, recording: rr.RecordingStream) -> None:
        """Everything, each on its own entity; a frame without a token has no code, norm and prediction."""
        self._log_pictures(recording)
        self._log_tokens(recording)
        for path, (names, values) in self._vectors.items():
            self._log_curves(recording, path, names, np.arange(len(values)), values)

    def _log_pictures(self, recording: rr.RecordingStream) -> None:
        source = EpisodeFrames(self.footage.dataset, self.footage.camera_key)
        stride, start = self.store.frame_stride, 0
        known: Tensor | None = None  # the chunk's frames, and before them as many as the first pairs need
        with tqdm(total=len(self._frames), desc="view", unit="frame") as bar:
            for chunk in source.chunks(self.episode):
                stop = start + len(chunk)
                known = chunk if known is None else torch.cat([known[-stride:], chunk])
                for row, picture in self._predictions(known, range(max(start, stride), stop), stop):
                    self._log_picture(recording, PREDICTION, row, _image(picture))
                for row, picture in enumerate(chunk, start):
                    packed = _image(picture).compress(jpeg_quality=_JPEG_QUALITY)
                    self._log_picture(recording, self._camera, row, packed)
                start = stop
                bar.update(len(chunk))

    def _predictions(self, known: Tensor, rows: range, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows of the episode, each with its predicted frame; `known` are the frames before row `stop`."""
        if self.footage.lam is None or not rows:
            return
        for some in torch.tensor(rows).split(_LAM_BATCH):
            earlier = known[some - self.store.frame_stride - stop + len(known)]
            yield from zip(
                some.tolist(), self.footage.lam.predict_next(earlier, self._tokens(some)).cpu(), strict=True
            )

    def _log_picture(self, recording: rr.RecordingStream, path: str, row: int, picture: Any) -> None:
        recording.set_time(FRAME, sequence=row)
        recording.set_time(SECONDS, duration=float(self._seconds[row]))
        recording.log(path, picture, strict=True)

    def _log_tokens(self, recording: rr.RecordingStream) -> None:
        rows = torch.arange(len(self._frames))
        missing = rows < self.store.frame_stride
        self._log_curves(recording, MISSING, ["no token"], rows, missing.unsqueeze(1))
        rows = rows[~missing]
        if not len(rows):
            return
        tokens = self._tokens(rows).double()
        self._log_curves(recording, NORM, ["token norm"], rows, tokens.norm(dim=1, keepdim=True))
        if self.store.codebook is not None:
            codes = self.store.values[self.store.episode_row[self.episode] + rows]
            names = [f"slot {slot}" for slot in range(codes.shape[1])]
            self._log_curves(recording, CODE, names, rows, codes, rr.SeriesPoints)
            return
        # Of the whole store, so that episodes can be compared.
        places = evenly(torch.arange(self.store.num_tokens), PRINCIPAL_TOKENS)
        frames, _ = self.store.frames_at(places, skip=self.store.frame_stride)
        mean, basis, shares = principal_directions(self.store.window(frames, [0])[:, 0])
        names = [f"direction {at + 1} ({share:.0%} of the variance)" for at, share in enumerate(shares)]
        self._log_curves(recording, DIRECTION, names, rows, (tokens - mean) @ basis.T)

    def _log_curves(
        self, recording: rr.RecordingStream, path: str, names: list[str], rows: Any, values: Any,
        style: type = rr.SeriesLines,
    ) -> None:  # fmt: skip
        """Values (T, S) of the named curves at rows (T,) of the episode; tensors or arrays."""
        rows, values = np.asarray(rows), np.asarray(values, dtype=np.float64)
        recording.log(path, style(names=names), static=True, strict=True)
        times = [rr.TimeColumn(FRAME, sequence=rows), rr.TimeColumn(SECONDS, duration=self._seconds[rows])]
        recording.send_columns(path, times, rr.Scalars.columns(scalars=values), strict=True)

    def _tokens(self, rows: Tensor) -> Tensor:
        return self.store.window(self._frames[rows], [0])[:, 0]

    @property
    def _camera(self) -> str:
        return rr.new_entity_path([self.footage.camera_key])

    @cached_property
    def _frames(self) -> Tensor:
        """The episode's absolute frame indices."""
        return torch.arange(
            int(self.store.episode_from[self.episode]), int(self.store.episode_to[self.episode])
        )

    def _column(self, key: str) -> np.ndarray:
        """The episode's rows of the dataset's table, double (T, S)."""
        index = vectors_of(self.footage.dataset, "index")[:, 0]
        own = (index >= int(self._frames[0])) & (index <= int(self._frames[-1]))
        return vectors_of(self.footage.dataset, key)[own]

    @cached_property
    def _seconds(self) -> np.ndarray:
        return self._column("timestamp")[:, 0]

    @cached_property
    def _vectors(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """State and action as far as the dataset has them: entity → names, values (T, S)."""
        features = self.footage.dataset.meta.features
        found = {path: key for path, key in (("state", OBS_STATE), (ACTION, ACTION)) if key in features}
        return {
            path: (dimension_names(features[key], path), self._column(key)) for path, key in found.items()
        }


def _image(picture: Tensor) -> rr.Image:
    """Of uint8 (3, H, W)."""
    return rr.Image(picture.permute(1, 2, 0).contiguous().numpy())


@contextmanager
def _refusing(message: str) -> Iterator[None]:
    """Turn Rerun's own errors, which are multi-line RuntimeErrors, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{message} ({first_line(error)})") from error
