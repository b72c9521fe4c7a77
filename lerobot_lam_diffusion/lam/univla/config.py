"""Dimensions of UniVLA's latent action model."""

from dataclasses import dataclass, field

from ..config import TokenConfig


@dataclass(frozen=True, kw_only=True)
class UniVlaConfig(TokenConfig):
    """Dimensions; the defaults are those of the published stage-2 weights.

    Args:
        image_size: Side R of the square that frames are resized to, in pixels; a multiple of
            `dino_patch_size`.
        model_dim, num_heads, enc_blocks: Width D, attention heads and blocks of the LAM's own encoder.
        irrelevant_codes: Codebook rows of the task-irrelevant slots.
        dino_patch_size, dino_dim, dino_depth, dino_num_heads, dino_registers: The DINOv2 tower.
        source_file, source_sha256, source_repository, source_revision, licence: What the weights were
            converted from.
    """

    num_learned_tokens: int = 4
    action_latent_dim: int = 128
    n_codes: int = 16
    stride_seconds: float | None = 0.9
    image_size: int = 224
    model_dim: int = 768
    num_heads: int = 12
    enc_blocks: int = 12
    irrelevant_codes: int = 16
    dino_patch_size: int = 14
    dino_dim: int = 768
    dino_depth: int = 12
    dino_num_heads: int = 12
    dino_registers: int = field(default=4, metadata={"least": 0})
    source_file: str | None = None
    source_sha256: str | None = None
    source_repository: str | None = None
    source_revision: str | None = None
    licence: str | None = None

    def problems(self) -> list[str]:
        multiples = [
            ("image_size", "dino_patch_size"),
            ("model_dim", "num_heads"),
            ("dino_dim", "dino_num_heads"),
        ]
        problems = [
            f"{name} is {getattr(self, name)}, expected a multiple of {other} ({getattr(self, other)})"
            for name, other in multiples
            if getattr(self, name) % getattr(self, other)
        ]
        if self.model_dim % 2:
            problems.append(f"model_dim is {self.model_dim}, expected an even number (sines and cosines)")
        return problems

    @property
    def grid_size(self) -> int:
        """Patches along one side, G."""
        return self.image_size // self.dino_patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    @property
    def num_latents(self) -> int:
        """Latent rows in front of the patches: task-centric, then task-irrelevant ones."""
        return 2 * self.num_learned_tokens
