"""Guidance: at deployment, tokens of what comes next are read off a demonstration.

    demo.mp4 ─► frames at lam_fps ─► LAM ─┐
    STORE#7 ──────────────────────────────┴► track (T, n·a) ─► window(tick) = track[tick + offsets]

Tick t of a rollout is frame t of the track. It is open loop: nothing waits for the robot, and after the track
there are no more tokens, zeros, as training has seen at the ends of its episodes.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.constants import OBS_LAM_IMAGES, VIDEO_SUFFIXES
from lerobot_lam_diffusion.problems import TrainingError, UserError, raise_problems
from lerobot_lam_diffusion.sources import LamSource, entries
from lerobot_lam_diffusion.tokens.provenance import VQ
from lerobot_lam_diffusion.tokens.store import TokenStore

logger = logging.getLogger(__name__)

ANOTHER_SHAPE = 1.1
"""Pictures whose aspect ratios differ by more are told of: the LAM sees both as squares."""
ANOTHER_LEVEL = 40.0
"""Mean levels of R, G or B (0..255) that differ by more are told of."""


class GuidanceError(TrainingError):
    """A demonstration that cannot guide this policy."""

    section = "demonstration-videos"


@dataclass(frozen=True)
class Track:
    """The tokens of one demonstration.

    Attributes:
        name: As the user wrote it.
        tokens: float32 `(T, n·a)` on the CPU; zeros where there is no token.
        levels: Of a video: its mean level of R, G, B.
    """

    name: str
    tokens: Tensor
    levels: list[float] | None = None


class Guide:
    """What the environments of a rollout follow: environment b the track b, modulo their number.

    Args:
        tracks: At least one.
        fps: To tell times, if known.
        camera: The policy's name of the camera that the LAM looks at, if known.
    """

    def __init__(self, tracks: Sequence[Track], fps: float | None = None, camera: str | None = None) -> None:
        self.tracks = tuple(tracks)
        self._fps = fps
        self._camera = camera
        self._told_end: set[str] = set()
        self._compared = False

    def window(self, tick: int, offsets: Sequence[int], batch_size: int) -> Tensor:
        """Tokens of the frames `tick + offsets`, float32 `(B, T, n·a)`; zeros outside of the track."""
        wanted = torch.tensor([tick + offset for offset in offsets])
        windows = []
        for track in self.tracks:
            frames = len(track.tokens)
            inside = (wanted >= 0) & (wanted < frames)
            tokens = track.tokens[wanted.clamp(0, frames - 1)]
            windows.append(tokens.masked_fill(~inside.unsqueeze(1), 0.0))
            if int(wanted.min()) >= frames and track.name not in self._told_end:
                self._told_end.add(track.name)
                seconds = f" ({frames / self._fps:.1f} s)" if self._fps else ""
                logger.warning(
                    "Guidance %s has ended after %d frames%s: acting unguided from here on.",
                    track.name,
                    frames,
                    seconds,
                )
        return torch.stack([windows[at % len(windows)] for at in range(batch_size)])

    def compare(self, batch: dict[str, Any]) -> None:
        """Tell once of videos that look unlike what the LAM's camera sees at the start of a rollout."""
        if self._compared:
            return
        self._compared = True
        frames = batch.get(OBS_LAM_IMAGES)
        seen = frames.get(self._camera) if isinstance(frames, dict) else frames
        if seen is None or not isinstance(seen, Tensor):
            return
        scale = 1.0 if seen.dtype == torch.uint8 else 255.0
        here = (seen.float().mean((*range(seen.ndim - 3), -2, -1)) * scale).tolist()
        for track in self.tracks:
            if track.levels is None:
                continue
            apart = max(abs(a - b) for a, b in zip(track.levels, here, strict=True))
            if apart > ANOTHER_LEVEL:
                logger.warning(
                    "Guidance %s has other colours than the camera %s: mean R, G, B %s against %s. The LAM "
                    "may see other motion in it than in training.",
                    track.name,
                    self._camera,
                    [round(level) for level in track.levels],
                    [round(level) for level in here],
                )


def open_guide(config: DiffusionLamConfig) -> Guide:
    """Open all that `lam_guidance` names, and check that it fits the policy.

    Args:
        config: Of a policy whose tokens' shape, stride and kind are settled.

    Raises:
        GuidanceError: a file or store is missing, damaged, or of another LAM, stride, kind or frame rate; all
            problems at once.
    """
    sources = config.token_sources
    if len(sources) > 1:
        raise GuidanceError(
            f"--policy.lam_guidance shows one camera to one LAM, this policy has {len(sources)} sources of "
            "tokens; pass the tokens of them all in the batch instead"
        )
    opener = _Opener(config, sources[0])
    tracks, problems = [], []
    for entry in entries(config.lam_guidance):
        try:
            tracks.append(opener.open(str(entry)))
        except UserError as error:
            problems.append(str(error).rstrip("."))
    raise_problems("--policy.lam_guidance cannot be followed", list(dict.fromkeys(problems)), GuidanceError)
    for track in tracks:
        logger.info("Guidance: %s, %d frames.", track.name, len(track.tokens))
    return Guide(tracks, config.lam_fps, sources[0].camera_key)


class _Opener:
    """Opens one entry after the other; the LAM, where it is needed, once."""

    def __init__(self, config: DiffusionLamConfig, source: LamSource) -> None:
        self._config = config
        self._source = source
        self._stride = config.lam_frame_stride or 1
        self._lam: Any = None
        self._tracks: dict[str, Track] = {}

    def open(self, text: str) -> Track:
        if text not in self._tracks:
            self._tracks[text] = self._video(text) if _is_video(text) else self._episode(text)
        return self._tracks[text]

    def _episode(self, text: str) -> Track:
        path, _, number = text.rpartition("#")
        if not path:
            path, number = text, ""
        store = TokenStore.open(path)
        episodes = len(store.episode_row)
        if not number and episodes == 1:
            number = "0"
        if not number.isdecimal() or int(number) >= episodes:
            raise GuidanceError(
                f"{text}: the store has {episodes} episodes, name one of them: {path}#0 to "
                f"{path}#{episodes - 1}"
            )
        episode = int(number)
        problems = self._unfit(store)
        raise_problems(f"{text} does not fit the policy", problems, GuidanceError)
        if store.episode_row[episode] < 0:
            raise GuidanceError(
                f"{text}: the store lacks episode {episode}; {store.coverage}. Name another one"
            )
        frames = torch.arange(int(store.episode_from[episode]), int(store.episode_to[episode]))
        return Track(text, store.window(frames, [0])[:, 0])

    def _unfit(self, store: TokenStore) -> list[str]:
        provenance, fps = store.provenance, self._config.lam_fps
        if provenance is None:
            return ["it does not say which LAM made it; name a store made by lerobot-lam-precompute"]
        problems = []
        if self._source.fingerprint not in (None, provenance.lam.fingerprint):
            told = (
                f"it was made by the LAM with fingerprint {provenance.lam.fingerprint[:16]}…, the policy was "
                f"trained with {str(self._source.fingerprint)[:16]}…"
            )
            if not self._config.lam_allow_mismatch or store.token_dim != self._source.token_dim:
                problems.append(f"{told}: extract its tokens with that LAM")
            else:
                logger.warning("ANOTHER LAM THAN TRAINED WITH: %s.", told)
        elif store.token_dim != self._source.token_dim:
            problems.append(
                f"its tokens have {store.token_dim} numbers, the policy's {self._source.token_dim}"
            )
        if store.frame_stride != self._stride:
            problems.append(
                f"its frame stride is {store.frame_stride}, the policy's {self._stride}: extract it with "
                f"--frame_stride={self._stride}"
            )
        if (store.kind == VQ) != self._config.lam_use_vq_tokens:
            wanted = str(self._config.lam_use_vq_tokens).lower()
            problems.append(f"it holds {store.kind} tokens: extract it with --use_vq_tokens={wanted}")
        if fps is not None and abs(provenance.dataset.fps - fps) > 1e-6 * fps:
            problems.append(
                f"it is of {provenance.dataset.fps:g} fps, the policy of {fps:g}: extract it at that rate "
                f"(--videos=… --fps={fps:g})"
            )
        return problems

    def _video(self, text: str) -> Track:
        from lerobot_lam_diffusion.precompute.demonstrations import DemonstrationVideo, encode_video

        video = DemonstrationVideo.parse(text)
        fps = self._config.lam_fps
        if fps is None:
            raise GuidanceError(
                f"{text}: this checkpoint does not say at how many frames per second it was trained; pass "
                "--policy.lam_fps=<fps of its dataset>"
            )
        lam = self._opened_lam()
        values, frames = encode_video(video, lam, fps, self._stride, self._config.lam_use_vq_tokens)
        if self._config.lam_use_vq_tokens:
            values = lam.codebook.cpu()[values].flatten(1)
        tokens = torch.zeros(frames, values.shape[1])
        tokens[self._stride :] = values
        self._warn_of_look(text, video.look)
        return Track(text, tokens, video.look.mean_levels)

    def _warn_of_look(self, text: str, look: Any) -> None:
        """Of a video that is slower, or of another shape, than what the LAM saw in training."""
        fps = self._config.lam_fps
        assert fps is not None
        if 0 < look.rate < 0.99 * fps:
            logger.warning(
                "Guidance %s has %.3g frames per second, the policy was trained at %.3g: some neighbouring "
                "frames are the same one, which to the LAM is standstill.",
                text,
                look.rate,
                fps,
            )
        feature = self._config.image_features.get(self._source.camera_key or "")
        if feature is None:
            return
        height, width = feature.shape[-2:]
        ratio = (look.width / look.height) / (width / height)
        if max(ratio, 1 / ratio) > ANOTHER_SHAPE:
            logger.warning(
                "Guidance %s is %d × %d, the LAM's camera %s %d × %d: the LAM squeezes both into a square, "
                "so motion looks different. Crop the video to the camera's shape.",
                text,
                look.width,
                look.height,
                self._source.camera_key,
                width,
                height,
            )

    def _opened_lam(self) -> Any:
        if self._lam is None:
            self._lam = _load_lam(self._config)
        return self._lam


def _load_lam(config: DiffusionLamConfig) -> Any:
    """The LAM, checked, on the policy's device; its camera need not be known to look at a video."""
    from lerobot_lam_diffusion.lam import load_lam
    from lerobot_lam_diffusion.live_tokens import check_lams

    (source,) = config.token_sources
    if source.model_path is None:
        raise GuidanceError(
            "a video needs the LAM to make tokens of it: pass --policy.lam_model_path=<LAM folder or Hub "
            "id>, or the video's tokens, STORE#episode (lerobot-lam-precompute --videos=…)"
        )
    device = str(config.device or "cpu")
    lam = load_lam(source.model_path, device=device, dtype=getattr(torch, config.lam_dtype))
    check_lams(config, [lam.fingerprint], [lam])
    return lam


def _is_video(text: str) -> bool:
    """Whether an entry names a video file, not a store: by its fragment, its ending or what is there."""
    name, _, fragment = text.rpartition("#")
    if not name:
        name, fragment = text, ""
    path = Path(name).expanduser()
    is_store = path.suffix in (".safetensors", ".pt", ".pth", ".json")
    return bool(
        re.match(r"t=", fragment)
        or path.suffix.lower() in VIDEO_SUFFIXES
        or (path.is_file() and not is_store)
        or Path(text).expanduser().is_file()
    )
