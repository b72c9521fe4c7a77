"""Guidance: at deployment, tokens of what comes next are taken from a demonstration.

    demo.mp4 ─► frames at lam_fps ─► LAM ─┐
    STORE#7 ──────────────────────────────┴► track (T, n·a) ─► window(tick) = track[tick + offsets]

Tick t of a rollout is frame t of the track. Guidance is open loop: it does not wait for the robot. After the
end of the track, tokens are zero, as they are at the end of an episode in training.
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
from lerobot_lam_diffusion.policy.lams import check_lams, lam_problems, open_lam
from lerobot_lam_diffusion.sources import entries
from lerobot_lam_diffusion.tokens.provenance import VIDEOS, VQ
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import TrainingError, UserError, raise_problems

logger = logging.getLogger(__name__)

ANOTHER_SHAPE = 1.1
"""Ratio of two aspect ratios that triggers a warning: the LAM sees both images as squares."""
ANOTHER_LEVEL = 40.0
"""Difference in the mean level of R, G or B (0..255) that triggers a warning."""


@dataclass(frozen=True)
class Track:
    """The tokens of one demonstration.

    Attributes:
        name: As the user wrote it.
        tokens: float32 `(T, n·a)` on the CPU; zeros where there is no token.
        levels: Mean levels of R, G and B, for a video only.
    """

    name: str
    tokens: Tensor
    levels: list[float] | None = None


class Guide:
    """The tracks that a rollout's environments follow: environment b follows track b, modulo their number.

    Args:
        tracks: At least one.
        fps: Frame rate, if known; used to give times in messages.
        camera: The policy's name for the camera that the LAM looks at, if known.
    """

    def __init__(self, tracks: Sequence[Track], fps: float | None = None, camera: str | None = None) -> None:
        self.tracks = tuple(tracks)
        self._fps = fps
        self._camera = camera
        self._ended: set[str] = set()
        self._compared = False

    def window(self, tick: int, offsets: Sequence[int], batch_size: int) -> Tensor:
        """Tokens of the frames `tick + offsets`, float32 `(B, T, n·a)`; zeros outside of the track."""
        wanted = torch.tensor([tick + offset for offset in offsets])
        windows = []
        for track in self.tracks:
            frames = len(track.tokens)
            outside = (wanted < 0) | (wanted >= frames)
            tokens = track.tokens[wanted.clamp(0, frames - 1)]
            windows.append(tokens.masked_fill(outside.unsqueeze(1), 0.0))
            if int(wanted.min()) >= frames and track.name not in self._ended:
                self._ended.add(track.name)
                seconds = f" ({frames / self._fps:.1f} s)" if self._fps else ""
                logger.warning(
                    "Guidance %s has ended after %d frames%s: acting unguided from here on.",
                    track.name, frames, seconds,
                )  # fmt: skip
        return torch.stack([windows[at % len(windows)] for at in range(batch_size)])

    def compare(self, batch: dict[str, Any]) -> None:
        """Warn once of videos that look unlike what the LAM's camera sees at the start of a rollout."""
        if self._compared:
            return
        self._compared = True
        frames = batch.get(OBS_LAM_IMAGES)
        seen = frames.get(self._camera) if isinstance(frames, dict) else frames
        if not isinstance(seen, Tensor):
            return
        scale = 1.0 if seen.dtype == torch.uint8 else 255.0
        here = (seen.float().mean((*range(seen.ndim - 3), -2, -1)) * scale).tolist()
        for track in self.tracks:
            if track.levels is None:
                continue
            if max(abs(a - b) for a, b in zip(track.levels, here, strict=True)) > ANOTHER_LEVEL:
                logger.warning(
                    "Guidance %s has other colours than the camera %s: mean R, G, B %s against %s. The LAM "
                    "may see other motion in it than in training.",
                    track.name, self._camera, [round(level) for level in track.levels],
                    [round(level) for level in here],
                )  # fmt: skip


def open_guide(config: DiffusionLamConfig) -> Guide:
    """Open all that `lam_guidance` names, and check that it fits the policy.

    Args:
        config: Of a policy whose tokens' shape, stride and kind are resolved.

    Raises:
        TrainingError: a file or store is missing, damaged, or of another LAM, stride, kind or frame rate; all
            problems at once.
    """
    sources = config.token_sources
    if len(sources) > 1:
        raise TrainingError(
            f"--policy.lam_guidance shows one camera to one LAM, this policy has {len(sources)} sources of "
            "tokens; pass the tokens of them all in the batch instead"
        )
    names = list(map(str, entries(config.lam_guidance)))
    lam: list[Any] = []  # opened for the first video
    tracks: dict[str, Track] = {}
    problems = []
    for name in dict.fromkeys(names):
        try:
            tracks[name] = _video(config, name, lam) if _is_video(name) else _episode(config, name)
        except UserError as error:
            problems.append(str(error).rstrip("."))
    raise_problems("--policy.lam_guidance cannot be followed", list(dict.fromkeys(problems)), TrainingError)
    for name in names:
        logger.info("Guidance: %s, %d frames.", name, len(tracks[name].tokens))
    return Guide([tracks[name] for name in names], config.lam_fps, sources[0].camera_key)


def warn_of_missing_guide(config: DiffusionLamConfig) -> None:
    """Warn when training on tokens of what comes next without a guide for evaluations, or on too few."""
    future = config.future_token_deltas
    if future and max(future) < config.n_action_steps:
        logger.warning(
            "lam_token_offsets reach %d frames ahead, a chunk of actions %d (n_action_steps): a guide says "
            "nothing about its rest. Pass more offsets, or a smaller --policy.n_action_steps (and "
            "--policy.horizon).",
            max(future), config.n_action_steps,
        )  # fmt: skip
    if future and config.lam_guidance is None and config.lam_missing == "error":
        logger.warning(
            "Training on tokens of what comes next (lam_token_offsets=%s); an evaluation in an environment "
            "(--env.type) and deployment need --policy.lam_guidance=<video, or STORE#episode>%s.",
            future, ", or --policy.lam_missing=zero" if config.lam_token_dropout else "",
        )  # fmt: skip


def _episode(config: DiffusionLamConfig, name: str) -> Track:
    """The tokens of `STORE#episode`."""
    path, _, number = name.rpartition("#")
    if not path:
        path, number = name, ""
    store = TokenStore.open(path)
    episodes = len(store.episode_row)
    if not number and episodes == 1:
        number = "0"
    if not number.isdecimal() or int(number) >= episodes:
        raise TrainingError(
            f"{name}: the store has {episodes} episodes, name one of them: {path}#0 to {path}#{episodes - 1}"
        )
    episode = int(number)
    raise_problems(f"{name} does not fit the policy", _unfit(config, store), TrainingError)
    _warn_of_another_camera(config, name, store)
    if store.episode_row[episode] < 0:
        raise TrainingError(f"{name}: the store lacks episode {episode}; {store.coverage}. Name another one")
    frames = torch.arange(int(store.episode_from[episode]), int(store.episode_to[episode]))
    return Track(name, store.window(frames, [0])[:, 0])


def _unfit(config: DiffusionLamConfig, store: TokenStore) -> list[str]:
    """Why the tokens of a store are not those of the policy."""
    (source,), stride, fps = config.token_sources, config.lam_frame_stride or 1, config.lam_fps
    provenance = store.provenance
    if provenance is None:
        return ["it does not say which LAM made it; name a store made by lerobot-lam-precompute"]
    problems = lam_problems(config, source, provenance.lam, "store")
    if not problems and store.token_dim != source.token_dim:
        problems.append(f"its tokens have {store.token_dim} elements, the policy's {source.token_dim}")
    if store.frame_stride != stride:
        problems.append(
            f"its frame stride is {store.frame_stride}, the policy's {stride}: extract it with "
            f"--frame_stride={stride}"
        )
    if (store.kind == VQ) != config.lam_use_vq_tokens:
        wanted = str(config.lam_use_vq_tokens).lower()
        problems.append(f"it holds {store.kind} tokens: extract it with --use_vq_tokens={wanted}")
    if fps is not None and abs(provenance.dataset.fps - fps) > 1e-6 * fps:
        problems.append(
            f"it is of {provenance.dataset.fps:g} fps, the policy of {fps:g}: extract it at that rate "
            f"(--videos=… --fps={fps:g})"
        )
    return problems


def _warn_of_another_camera(config: DiffusionLamConfig, name: str, store: TokenStore) -> None:
    """Names may differ for one camera (`rename_map`), so this is no error."""
    (source,), provenance = config.token_sources, store.provenance
    assert provenance is not None
    if provenance.dataset.repo_id.startswith(VIDEOS):
        return
    if source.camera_key not in (None, provenance.camera_key):
        logger.warning(
            "Guidance %s is of the camera %s, the LAM looks at %s here. If these are two cameras, the policy "
            "was not trained on tokens of that view.", name, provenance.camera_key, source.camera_key,
        )  # fmt: skip


def _video(config: DiffusionLamConfig, name: str, opened: list[Any]) -> Track:
    """The tokens of a video; its LAM is kept in `opened` for the next one."""
    from lerobot_lam_diffusion.precompute.demonstrations import DemonstrationVideo, encode_video

    video, fps, stride = DemonstrationVideo.parse(name), config.lam_fps, config.lam_frame_stride or 1
    (source,) = config.token_sources
    if fps is None:
        raise TrainingError(
            f"{name}: this checkpoint does not say at how many frames per second it was trained; pass "
            "--policy.lam_fps=<fps of its dataset>"
        )
    if source.model_path is None:
        raise TrainingError(
            "a video needs the LAM to make tokens of it: pass --policy.lam_model_path=<LAM folder or Hub "
            "id>, or the video's tokens, STORE#episode (lerobot-lam-precompute --videos=…)"
        )
    if not opened:
        lam = open_lam(config, source.model_path, str(config.device or "cpu"))
        check_lams(config, [lam])
        opened.append(lam)
    values, frames = encode_video(video, opened[0], fps, stride, config.lam_use_vq_tokens)
    if config.lam_use_vq_tokens:
        values = opened[0].codebook.cpu()[values].flatten(1)
    tokens = torch.zeros(frames, values.shape[1])
    tokens[stride:] = values
    _warn_of_look(config, name, video.look)
    return Track(name, tokens, video.look.mean_levels)


def _warn_of_look(config: DiffusionLamConfig, name: str, look: Any) -> None:
    """Warn if a video has a lower frame rate or another shape than what the LAM saw in training."""
    (source,), fps = config.token_sources, config.lam_fps
    if fps is not None and 0 < look.rate < 0.99 * fps:
        logger.warning(
            "Guidance %s has %.3g frames per second, the policy was trained at %.3g: some neighbouring "
            "frames are the same one, which the LAM sees as no motion.",
            name, look.rate, fps,
        )  # fmt: skip
    feature = config.image_features.get(source.camera_key or "")
    if feature is None:
        return
    height, width = feature.shape[-2:]
    ratio = (look.width / look.height) / (width / height)
    if max(ratio, 1 / ratio) > ANOTHER_SHAPE:
        logger.warning(
            "Guidance %s is %d × %d, the LAM's camera %s %d × %d: the LAM squeezes both into a square, "
            "so motion looks different. Crop the video to the camera's shape.",
            name, look.width, look.height, source.camera_key, width, height,
        )  # fmt: skip


def _is_video(text: str) -> bool:
    """Whether an entry names a video file, not a store, by its fragment, extension or what is on disk."""
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
