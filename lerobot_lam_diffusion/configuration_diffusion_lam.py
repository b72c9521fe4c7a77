"""`--policy.type=diffusion_lam`: LeRobot's Diffusion Policy and the settings of its LAM tokens."""

import logging
import math
from dataclasses import dataclass

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.utils.constants import OBS_PREFIX

from lerobot_lam_diffusion.constants import OBS_LAM_TOKENS
from lerobot_lam_diffusion.sources import (
    LamSource,
    entries,
    length_problems,
    parse_guidance,
    parse_lists,
    read_sources,
    source_problems,
    write_sources,
)
from lerobot_lam_diffusion.utils.errors import UserError, raise_problems

logger = logging.getLogger(__name__)

CHOICES = {
    "lam_temporal_aggregation": ["latest", "concat"],
    "lam_dtype": ["float32", "bfloat16"],
    "lam_missing": ["error", "zero"],
}
NO_FOLDERS = ("", "true", "false", "yes", "no")  # as lam_live_cache: meant as a switch


@PreTrainedConfig.register_subclass("diffusion_lam")
@dataclass
class DiffusionLamConfig(DiffusionConfig):
    """Configuration of `DiffusionLamPolicy`; every field of `DiffusionConfig` keeps its meaning.

    Token of frame i = LAM(frame i - stride, frame i) inside one episode; zero where frame i - stride does
    not exist. A field that is unset (`None`) is taken from the token store or the LAM when training starts
    and saved with the checkpoint; one that is set must agree with them.

    Several sources of tokens (cameras, LAMs): the fields that may be lists have an entry for each, and a
    plain value beside them counts for all. A frame's token is then the concatenation of all sources. Stride,
    kind and compute dtype are one for all.

    Args:
        use_lam_conditioning: Condition the U-Net on LAM tokens. False: exactly the stock Diffusion Policy.
        use_precomputed_lam_tokens: True: tokens come with the batch (store, dataset column or
            `LamTokenDataset`) and training loads no LAM. False: the LAM computes them on the fly.
        lam_tokens_key: Batch key of the tokens and name of a native dataset column that holds them.
        lam_tokens_path: Token store: folder, file, or Hub repository (`user/name[@revision]`; training pins
            it to its commit). None in precomputed mode: the dataset's own column. "auto": out of the cache,
            built first if missing; with `lam_model_path` and `lam_camera_key`, and all fields as on the fly.
            A list: one store for each source.
        lam_model_path: LAM folder (`model_config.json` + `model.safetensors`), the name of a shipped LAM
            (`pusht-compact`) or a Hub id such as `microsoft/villa-x`. Required on the fly.
        lam_camera_key: Camera that the LAM looks at, as the policy names it (after `rename_map`); it need
            not be an input of the policy. Required on the fly.
        lam_num_learned_tokens: Vectors per frame pair, n.
        lam_action_latent_dim: Width of one vector, a. A source's token has n * a elements.
        lam_use_vq_tokens: True: codebook rows. False: the vectors before quantisation.
        lam_dtype: Compute dtype of the LAM, "float32" or "bfloat16"; the quantiser is always float32.
        lam_temporal_aggregation: "latest": condition on the newest token. "concat": on all of the window.
        lam_frame_stride: Offset between the two frames of a pair, in frames of the dataset.
        lam_conditioning_steps: Tokens in the conditioning vector. Derived once ("latest": 1; "concat":
            `n_obs_steps` precomputed, `n_obs_steps - 1` on the fly), then saved, so that a checkpoint can
            change its token source without changing shape.
        lam_token_offsets: Which tokens condition, as frame offsets, ascending: `[1,…,8]` is what happens
            next, `[0,1,…,8]` both. They replace `lam_temporal_aggregation`. Those above 0 come from
            `lam_guidance` at deployment; cover `n_action_steps` frames with them.
        lam_fingerprint: SHA-256 of the LAM that made the tokens. Written by training.
        lam_token_scale: RMS of the codebook's entries; a source's tokens are divided by its own. Written by
            training.
        lam_source: Where training took its tokens from. Written by training.
        lam_frame_size: Height x width of the camera's frames in training, such as "480x640". Written by
            training.
        lam_fps: Frames per second of the training dataset: the time base of `lam_frame_stride`, the rate at
            which a robot should run the policy, and that to which a guiding video is resampled. Written by
            training.
        lam_live_cache: On the fly in training: cache each token that the LAM computes, so that a frame pair
            is encoded once; later epochs and runs read it, for the very pixels that it was computed from.
            "auto": in LeRobot's home, or a folder.
        lam_allow_mismatch: Compute live tokens with another LAM than trained with; warns.
        lam_token_dropout: Probability p in training of dropping a sample's whole window of tokens, and
            otherwise of each token of it; 0.5 is villa-X's masking. A policy trained with it survives
            missing tokens.
        lam_missing: Without tokens and LAM: "error", or "zero" to act without them (for a policy trained
            with `lam_token_dropout`).
        lam_guidance: At deployment: where the tokens of what comes next come from. A video (`demo.mp4`, or a
            part of it in seconds, `demo.mp4#t=1.5,9`) or an episode of a token store, local or on the Hub
            (`STORE#7`). A list: environment b follows entry b, modulo their number. Never saved.
        init_from_stock: Checkpoint of a stock Diffusion Policy whose weights this one starts from; cleared
            once they are loaded.

    Raises:
        ValueError: fields contradict each other; lists all contradictions.
    """

    use_lam_conditioning: bool = True
    use_precomputed_lam_tokens: bool = False
    lam_tokens_key: str = OBS_LAM_TOKENS
    # draccus tries a union's members in order: `str | list[str]` would turn a list into its text.
    lam_tokens_path: list[str | None] | str | None = None
    lam_model_path: list[str | None] | str | None = None
    lam_camera_key: list[str | None] | str | None = None
    lam_num_learned_tokens: list[int | None] | int | None = None
    lam_action_latent_dim: list[int | None] | int | None = None
    lam_use_vq_tokens: bool = True
    lam_dtype: str = "float32"
    lam_temporal_aggregation: str = "latest"
    lam_frame_stride: int | None = None
    lam_conditioning_steps: int | None = None
    lam_token_offsets: list[int] | None = None
    lam_fingerprint: list[str | None] | str | None = None
    lam_token_scale: list[float | None] | float | None = None
    lam_source: list[str | None] | str | None = None
    lam_frame_size: list[str | None] | str | None = None
    lam_fps: float | None = None
    lam_live_cache: str | None = None
    lam_allow_mismatch: bool = False
    lam_token_dropout: float = 0.0
    lam_missing: str = "error"
    lam_guidance: list[str] | str | None = None
    init_from_stock: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_lists(self)
        parse_guidance(self)
        if not self.use_lam_conditioning:
            return
        try:
            raise_problems("policy `diffusion_lam` cannot be built from these fields", self._problems())
        except UserError as error:
            # LeRobot's command lines lose the text of a ValueError (draccus drops it).
            logger.error("%s\n(What LeRobot prints after this follows from it.)", error)
            raise
        if self.lam_conditioning_steps is None:
            self.lam_conditioning_steps = self._derived_conditioning_steps()

    @property
    def token_sources(self) -> list[LamSource]:
        """The sources of tokens, in the order in which their tokens are concatenated."""
        return read_sources(self)

    def set_token_sources(self, sources: list[LamSource]) -> None:
        """Write `sources` into the fields."""
        write_sources(self, sources)

    @property
    def lam_token_dim(self) -> int:
        """Token dimension of one frame: n * a of each source."""
        return sum(source.token_dim for source in self.token_sources)

    @property
    def lam_conditioning_dim(self) -> int:
        """Dimension that the LAM adds to the U-Net's conditioning; 0 without LAM conditioning."""
        if not self.use_lam_conditioning:
            return 0
        return len(self.lam_token_deltas) * self.lam_token_dim

    @property
    def lam_token_deltas(self) -> list[int]:
        """Frame offsets of the conditioning tokens, oldest first, e.g. `[-1, 0]`."""
        if self.lam_token_offsets is not None:
            return list(self.lam_token_offsets)
        steps = self.lam_conditioning_steps or self._derived_conditioning_steps()
        return list(range(1 - steps, 1))

    @property
    def past_token_deltas(self) -> list[int]:
        """The offsets in `lam_token_deltas` up to 0: what has already happened."""
        return [delta for delta in self.lam_token_deltas if delta <= 0]

    @property
    def future_token_deltas(self) -> list[int]:
        """The offsets in `lam_token_deltas` above 0: what comes next."""
        return [delta for delta in self.lam_token_deltas if delta > 0]

    @property
    def observation_delta_indices(self) -> list[int]:
        """Frame offsets that the dataset delivers: on the fly also those of the LAM's frame pairs."""
        window = super().observation_delta_indices
        if not self.use_lam_conditioning or self.use_precomputed_lam_tokens:
            return window
        stride = self.lam_frame_stride or 1
        pairs = {frame for delta in self.lam_token_deltas for frame in (delta, delta - stride)}
        return sorted({*window, *pairs})

    def validate_features(self) -> None:
        # Tokens are never normalised: LeRobot would treat a native column as another STATE feature and
        # normalise it if the dataset has statistics for it.
        if self.input_features:
            self.input_features.pop(self.lam_tokens_key, None)
        super().validate_features()

    def _derived_conditioning_steps(self) -> int:
        if self.lam_token_offsets is not None:
            return len(self.lam_token_offsets)
        if self.lam_temporal_aggregation == "latest":
            return 1
        return self.n_obs_steps if self.use_precomputed_lam_tokens else self.n_obs_steps - 1

    def _problems(self) -> list[str]:
        problems = [
            f"{name}={getattr(self, name)!r} must be one of {choices}"
            for name, choices in CHOICES.items()
            if getattr(self, name) not in choices
        ]
        problems += [
            f"{name}={getattr(self, name)} must be a positive integer, or unset to take it from the LAM"
            for name in ("lam_num_learned_tokens", "lam_action_latent_dim", "lam_frame_stride")
            if any(entry is not None and entry < 1 for entry in entries(getattr(self, name)))
        ]
        if not self.lam_tokens_key.startswith(OBS_PREFIX):
            problems.append(
                f"lam_tokens_key={self.lam_tokens_key!r} must start with '{OBS_PREFIX}': LeRobot gives other "
                "keys no observation window and drops them"
            )
        if self.lam_live_cache is not None and self.lam_live_cache.lower() in NO_FOLDERS:
            problems.append(
                f"lam_live_cache={self.lam_live_cache!r} must be 'auto' or a folder; to cache nothing leave "
                "it out"
            )
        if not 0 <= self.lam_token_dropout <= 1:
            problems.append(f"lam_token_dropout={self.lam_token_dropout} must be in 0..1")
        if self.lam_missing == "zero" and not self.lam_token_dropout:
            problems.append(
                "lam_missing=zero is for policies trained with lam_token_dropout > 0; this one has never "
                "seen a missing token"
            )
        if self.lam_fps is not None and not 0 < self.lam_fps < math.inf:
            problems.append(f"lam_fps={self.lam_fps} must be a positive number of frames per second")
        return problems + self._source_problems() + self._window_problems()

    def _source_problems(self) -> list[str]:
        """Problems with the fields that name stores, LAMs and cameras."""
        problems = length_problems(self)
        sources = [] if problems else self.token_sources
        problems += source_problems(sources, self.use_precomputed_lam_tokens)
        needed = {
            "lam_model_path": "<LAM folder or Hub id>",
            "lam_camera_key": "<camera that the LAM looks at>",
        }
        missing = [
            f"--policy.{name}={what}"
            for name, what in needed.items()
            if not all(entries(getattr(self, name)))
        ]
        if self.use_precomputed_lam_tokens:
            if any(source.is_auto for source in sources):
                problems += [f"--policy.lam_tokens_path=auto needs {flag}" for flag in missing]
        elif not any((self.lam_tokens_path, self.lam_model_path, self.lam_camera_key)):
            problems.append(
                "LAM tokens need a source: --policy.use_precomputed_lam_tokens=true "
                "--policy.lam_tokens_path=<store made by lerobot-lam-precompute>, or on the fly "
                "--policy.lam_model_path=<LAM folder or Hub id> --policy.lam_camera_key=<camera>"
            )
        elif self.lam_tokens_path and not self.lam_model_path:
            problems.append(
                f"--policy.lam_tokens_path={self.lam_tokens_path} is for precomputed tokens: add "
                "--policy.use_precomputed_lam_tokens=true"
            )
        else:
            problems += [
                f"tokens on the fly need {flag}, precomputed ones --policy.use_precomputed_lam_tokens=true"
                for flag in missing
            ]
        return problems

    def _window_problems(self) -> list[str]:
        """Problems with the fields that select the conditioning tokens."""
        if self.lam_token_offsets is not None:
            return self._offset_problems(self.lam_token_offsets)
        problems = []
        steps, aggregation = self.lam_conditioning_steps, self.lam_temporal_aggregation
        if steps is None and aggregation == "concat" and self._derived_conditioning_steps() < 1:
            problems.append(
                "tokens on the fly need n_obs_steps >= 2 with lam_temporal_aggregation=concat, which has "
                f"n_obs_steps - 1 of them, got {self.n_obs_steps}; raise --policy.n_obs_steps, set "
                "--policy.lam_temporal_aggregation=latest or train on precomputed tokens"
            )
        if steps is not None and aggregation == "latest" and steps != 1:
            problems.append(f"lam_conditioning_steps={steps} must be 1 with lam_temporal_aggregation=latest")
        elif steps is not None and not 1 <= steps <= self.n_obs_steps:
            problems.append(f"lam_conditioning_steps={steps} must be in 1..n_obs_steps={self.n_obs_steps}")
        return problems + self._guidance_problems()

    def _offset_problems(self, offsets: list[int]) -> list[str]:
        if not offsets or any(type(offset) is not int for offset in offsets):
            return [
                f"lam_token_offsets={offsets} must be whole frames, at least one, such as [1,2,3,4]; leave "
                "it out to condition as lam_temporal_aggregation says"
            ]
        problems = []
        if offsets != sorted(set(offsets)):
            problems.append(
                f"lam_token_offsets={offsets} must ascend, each once: pass {sorted(set(offsets))}"
            )
        elif self.lam_conditioning_steps not in (None, len(offsets)):
            problems.append(
                f"lam_conditioning_steps={self.lam_conditioning_steps} contradicts "
                f"lam_token_offsets={offsets}, which has {len(offsets)}: leave lam_conditioning_steps out"
            )
        if self.lam_temporal_aggregation != "latest":
            problems.append(
                "lam_temporal_aggregation=concat and lam_token_offsets both say which tokens condition: "
                "leave one out"
            )
        return problems + self._guidance_problems()

    def _guidance_problems(self) -> list[str]:
        if self.lam_guidance is None or self.future_token_deltas:
            return []
        return [
            f"--policy.lam_guidance={self.lam_guidance}: this policy is for tokens of what has happened "
            f"({self.lam_token_deltas}), and a video shows what comes next: train with "
            "'--policy.lam_token_offsets=[1,2,3,4,5,6,7,8]' --policy.lam_token_dropout=0.5 "
            "--policy.horizon=16 --policy.n_action_steps=8"
        ]
