"""How a LAM is fitted: everything but the data; and named model sizes."""

from dataclasses import dataclass
from math import cos, pi

from lerobot_lam_diffusion.utils.errors import LamError

from ..villa_x.config import LamConfig

GROUND, DRAW, QUANTISE = "ground", "draw", "quantise"
STATE_TERM, FLOW_TERM = "state", "flow"
"""Terms of the loss that tie tokens to what changed."""


@dataclass(frozen=True)
class FitRecipe:
    """Three phases under one learning-rate schedule.

    *ground*: the tokens learn to predict the change of the state, or the optical flow if the data have no
    state that changes; the FDM is not trained yet. *draw*: the FDM joins in, while the tokens are still
    continuous and noisy. *quantise*: the codebook is initialised to the k-means centres of the tokens, and
    training continues through it.

    Args:
        steps: total number of optimiser steps.
        batch_size: frame pairs per step.
        seed: seed for the initial weights, the batches and the noise.
        learning_rate: peak learning rate of AdamW; linear warm-up, then cosine decay to 5 % of it.
        warmup_steps: steps of the linear warm-up.
        ground_share, draw_share: share of `steps` spent in the first two phases.
        state_weight: weight of the loss that ties tokens to the state's change; 0 ties them to the flow.
        flow_weight: weight of the loss that ties tokens to the optical flow if no state is used; with 0 the
            tokens of a small LAM collapse, since its FDM learns to predict without them.
        moving_weight: extra loss weight of a pixel that changes over one that does not.
        noise: standard deviation of the noise on continuous tokens; makes distances between tokens matter.
        token_penalty: weight of the tokens' mean square; keeps both slots around one centre.
        commitment: weight of the loss that pulls tokens towards their codebook rows.
        codebook_decay: decay of the moving averages that the codebook rows follow.
    """

    steps: int = 3000
    batch_size: int = 64
    seed: int = 0
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    ground_share: float = 0.2
    draw_share: float = 0.2
    state_weight: float = 1.0
    flow_weight: float = 1.0
    moving_weight: float = 30.0
    noise: float = 0.3
    token_penalty: float = 0.01
    commitment: float = 0.25
    codebook_decay: float = 0.99

    def __post_init__(self) -> None:
        if self.ground_share + self.draw_share >= 1:
            raise LamError(
                f"ground_share and draw_share sum to {self.ground_share + self.draw_share}, expected less "
                "than 1: the rest of the steps is for the codebook."
            )

    def phase(self, step: int, is_grounded: bool) -> str:
        """The phase of a step, counted from 0; the first one is skipped if tokens are tied to nothing."""
        if step < self.ground_share * self.steps and is_grounded:
            return GROUND
        return DRAW if step < self.quantise_from else QUANTISE

    @property
    def quantise_from(self) -> int:
        """First step with a codebook."""
        return round((self.ground_share + self.draw_share) * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + cos(pi * step / self.steps)))


_COMPACT = LamConfig(
    resolution=96, patch_size=12, d_t=2, mlp_ratio=2.0,
    encoder_depth=2, encoder_embed_dim=64, encoder_n_heads=4, map_heads=8,
    num_learned_tokens=2, action_latent_dim=32, n_codes=32,
    decoder_depth=2, decoder_embed_dim=128, decoder_n_heads=4,
)  # fmt: skip

PRESETS: dict[str, LamConfig] = {
    # 0.6 M parameters, 2.6 MB: minutes on a CPU, for simple scenes.
    "compact": _COMPACT,
    # 5.8 M parameters, 23 MB: finer patches and more width, for a GPU and real cameras (not yet tried there).
    "small": LamConfig(
        resolution=96, patch_size=8, d_t=2, mlp_ratio=4.0,
        encoder_depth=4, encoder_embed_dim=128, encoder_n_heads=4, map_heads=8,
        num_learned_tokens=2, action_latent_dim=32, n_codes=32,
        decoder_depth=4, decoder_embed_dim=256, decoder_n_heads=8,
    ),
    # 0.02 M parameters, seconds: for tests and for trying a set-up.
    "tiny": LamConfig(
        resolution=32, patch_size=8, d_t=2, mlp_ratio=1.0,
        encoder_depth=1, encoder_embed_dim=16, encoder_n_heads=2, map_heads=2,
        num_learned_tokens=2, action_latent_dim=8, n_codes=8,
        decoder_depth=1, decoder_embed_dim=16, decoder_n_heads=2,
    ),
}  # fmt: skip
