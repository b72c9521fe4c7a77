"""The villa-X model description: the `config` object of the `model_config.json` beside the weights.

The defaults are those of the villa-X code; the released checkpoint differs from them in every dimension, so
a loaded model takes them all from its file.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from lerobot_lam_diffusion.reading import shown

from ..config import CONFIG_REMEDY
from ..errors import problems_to_error


@dataclass(frozen=True)
class LamConfig:
    """Dimensions of a villa-X latent action model (the `config` object of `model_config.json`).

    Args:
        resolution: side R of the square the frames are resized to, in pixels; a multiple of `patch_size`.
        patch_size: side P of a patch, in pixels.
        in_channels: colour channels that the decoder predicts (the patch embeddings always take 3).
        d_t: longest temporal window, in frames.
        augment_type, augment_level, random_crop_scale, random_crop_ratio: training only; kept for the file.
        mlp_ratio: hidden width of every MLP over its input width (truncated to an integer).
        use_xformers: kernel choice of the original code, ignored here.
        encoder_depth, encoder_embed_dim, encoder_n_heads: blocks, width D and heads of the encoder.
        action_latent_dim: width `a` of one learned token and of a codebook row.
        st_use_qk_norm: LayerNorm on queries and keys in the encoder's blocks.
        num_learned_tokens: tokens `n` per frame pair.
        map_heads: heads of the pooling block.
        decoder_depth, decoder_embed_dim, decoder_n_heads: blocks, width X and heads of the decoder (FDM).
        use_qk_norm: LayerNorm on queries and keys in the decoder.
        n_codes: codebook rows K.

    Raises:
        LamError: if the values do not describe a model; all problems at once.
    """

    resolution: int = 224
    patch_size: int = 14
    in_channels: int = 3
    d_t: int = 8
    augment_type: str = "resize_crop"
    augment_level: str = "clip"
    random_crop_scale: tuple[float, float] = (0.8, 1.0)
    random_crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    mlp_ratio: float = 4.0
    use_xformers: bool | None = None
    encoder_depth: int = 12
    encoder_embed_dim: int = 768
    encoder_n_heads: int = 8
    action_latent_dim: int = 128
    st_use_qk_norm: bool = True
    num_learned_tokens: int = 4
    map_heads: int = 24
    decoder_depth: int = 8
    decoder_embed_dim: int = 768
    decoder_n_heads: int = 16
    use_qk_norm: bool = True
    n_codes: int = 32

    stride_seconds: ClassVar[float | None] = None
    """Not told of the released weights."""

    def __post_init__(self) -> None:
        problems = _type_problems(self) or _value_problems(self)
        if problems:
            raise problems_to_error("These LAM dimensions do not describe a model", problems, CONFIG_REMEDY)

    @property
    def grid_size(self) -> int:
        """Patches along one side, G."""
        return self.resolution // self.patch_size

    @property
    def embed_tokens(self) -> int:
        """Patches of a frame, N = G·G."""
        return self.grid_size**2

    @property
    def num_codes(self) -> int:
        """Codebook rows K."""
        return self.n_codes

    @property
    def token_dim(self) -> int:
        """Width n·a of the flattened token of a frame pair."""
        return self.num_learned_tokens * self.action_latent_dim

    def to_dict(self) -> dict[str, Any]:
        """The `config` object as the villa-X code writes it, derived keys included."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {**values, "grid_size": self.grid_size, "embed_tokens": self.embed_tokens}

    def token_fields(self, architecture: str) -> dict[str, Any]:
        """The fields that determine the tokens: no decoder, no training-only or kernel choices.

        Without the architecture: villa-X fingerprints are older than other families.
        """
        return {key: value for key, value in self.to_dict().items() if key in _ENCODER_FIELDS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LamConfig":
        """Build from a `config` object: unknown and derived keys are ignored, missing ones take defaults."""
        known = {field.name for field in fields(cls)}
        chosen: dict[str, Any] = {key: v for key, v in values.items() if key in known}
        chosen |= {key: tuple(v) for key, v in chosen.items() if isinstance(v, list)}
        return cls(**chosen)


_ENCODER_FIELDS = (
    "resolution", "patch_size", "d_t", "mlp_ratio", "encoder_depth", "encoder_embed_dim", "encoder_n_heads",
    "action_latent_dim", "st_use_qk_norm", "num_learned_tokens", "map_heads", "n_codes",
)  # fmt: skip

# Far beyond any LAM, and small enough that no product of them overflows and no model takes long to build:
# the numbers come from a file that may be damaged.
_LARGEST = {
    "resolution": 4096, "patch_size": 4096, "in_channels": 1024, "d_t": 1 << 16,
    "encoder_depth": 512, "encoder_embed_dim": 1 << 16, "encoder_n_heads": 1 << 16,
    "action_latent_dim": 1 << 16, "num_learned_tokens": 1 << 12, "map_heads": 1 << 16,
    "decoder_depth": 512, "decoder_embed_dim": 1 << 16, "decoder_n_heads": 1 << 16, "n_codes": 1 << 20,
}  # fmt: skip
_LARGEST_RATIO = 1024
_FOR_THE_FILE = (
    "augment_type", "augment_level", "random_crop_scale", "random_crop_ratio", "use_xformers",
)  # fmt: skip


def _type_problems(config: LamConfig) -> list[str]:
    values = vars(config)
    problems = [
        f"{name} is {shown(values[name])}, expected a positive integer"
        + (f" up to {largest}" if isinstance(values[name], int) and values[name] > largest else "")
        for name, largest in _LARGEST.items()
        if isinstance(values[name], bool)
        or not isinstance(values[name], int)
        or not 1 <= values[name] <= largest
    ]
    problems += [
        f"{name} is {shown(values[name])}, expected true or false"
        for name in ("st_use_qk_norm", "use_qk_norm")
        if not isinstance(values[name], bool)
    ]
    ratio = config.mlp_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= _LARGEST_RATIO:
        problems.append(f"mlp_ratio is {shown(ratio)}, expected a positive number up to {_LARGEST_RATIO}")
    problems += [
        f"{name} is {shown(values[name])}, expected a plain value or a list of them"
        for name in _FOR_THE_FILE
        if not all(map(_is_plain, values[name] if isinstance(values[name], tuple) else (values[name],)))
    ]
    return problems


def _is_plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, bool | int | str)
        or (isinstance(value, float) and math.isfinite(value))
    )


def _value_problems(config: LamConfig) -> list[str]:
    values = vars(config)
    multiples = [
        ("resolution", "patch_size"),
        ("encoder_embed_dim", "encoder_n_heads"),
        ("encoder_embed_dim", "map_heads"),
        ("decoder_embed_dim", "decoder_n_heads"),
    ]
    problems = [
        f"{name} is {values[name]}, expected a multiple of {other}, which is {values[other]}"
        for name, other in multiples
        if values[name] % values[other]
    ]
    for name in ("encoder_embed_dim", "decoder_embed_dim"):
        width = values[name]
        if width % 4:
            problems.append(f"{name} is {width}, expected a multiple of 4 (sines and cosines of two axes)")
        if int(width * config.mlp_ratio) < 1:
            problems.append(f"mlp_ratio is {config.mlp_ratio}, which leaves {name}={width} no hidden width")
    if config.d_t < 2:
        problems.append(f"d_t is {config.d_t}, expected at least 2: a token needs two frames")
    return problems
