"""Dimensions of a villa-X latent action model.

The defaults are those of the villa-X code; the released checkpoint differs from them in every dimension, so
a loaded model takes them all from its file.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..config import ModelConfig


@dataclass(frozen=True)
class LamConfig(ModelConfig):
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
        LamError: the values do not describe a model; lists all problems.
    """

    resolution: int = 224
    patch_size: int = 14
    in_channels: int = 3
    d_t: int = 8
    augment_type: Any = "resize_crop"
    augment_level: Any = "clip"
    random_crop_scale: Any = (0.8, 1.0)
    random_crop_ratio: Any = (0.75, 4 / 3)
    mlp_ratio: float = 4.0
    use_xformers: Any = None
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
    """Not known of the released weights."""

    def problems(self) -> list[str]:
        problems = self.not_multiples(
            ("resolution", "patch_size"),
            ("encoder_embed_dim", "encoder_n_heads"),
            ("encoder_embed_dim", "map_heads"),
            ("decoder_embed_dim", "decoder_n_heads"),
        )
        for name in ("encoder_embed_dim", "decoder_embed_dim"):
            width = getattr(self, name)
            if width % 4:
                problems.append(
                    f"{name} is {width}, expected a multiple of 4 (sines and cosines of two axes)"
                )
            if int(width * self.mlp_ratio) < 1:
                problems.append(f"mlp_ratio is {self.mlp_ratio}, which leaves {name}={width} no hidden width")
        if self.d_t < 2:
            problems.append(f"d_t is {self.d_t}, expected at least 2: a token needs two frames")
        return problems

    @property
    def grid_size(self) -> int:
        """Patches along one side, G."""
        return self.resolution // self.patch_size

    @property
    def embed_tokens(self) -> int:
        """Patches of a frame, N = G·G."""
        return self.grid_size**2

    def to_dict(self) -> dict[str, Any]:
        """The `config` object as the villa-X code writes it, derived keys included."""
        return {**super().to_dict(), "grid_size": self.grid_size, "embed_tokens": self.embed_tokens}

    def token_fields(self, architecture: str) -> dict[str, Any]:
        """The fields that determine the tokens: no decoder, no training-only or kernel choices.

        Without the architecture: villa-X fingerprints predate the other families.
        """
        return {name: getattr(self, name) for name in _TOKEN_FIELDS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return super().from_dict({key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


_TOKEN_FIELDS = (
    "resolution", "patch_size", "d_t", "mlp_ratio", "encoder_depth", "encoder_embed_dim", "encoder_n_heads",
    "action_latent_dim", "st_use_qk_norm", "num_learned_tokens", "map_heads", "n_codes",
)  # fmt: skip
