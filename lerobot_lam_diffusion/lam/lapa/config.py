"""Dimensions of a LAPA latent action quantiser."""

from dataclasses import dataclass

from ..config import TokenConfig


def tokens_of_grid(code_seq_len: int, grid_size: int) -> int | None:
    """How many tokens the head `code_seq_len` makes of a grid of patches; None: there is no such head."""
    half = (grid_size - 1) // 2 + 1
    made = {
        1: max(0, half - 3) ** 2,
        2: max(0, half - 2) * max(0, half - 3),
        4: max(0, half - 2) ** 2,
        16: ((half - 1) // 2 + 1) ** 2,
        64: half**2,
        256: half**2,
    }
    return made.get(code_seq_len)


@dataclass(frozen=True, kw_only=True)
class LapaConfig(TokenConfig):
    """Dimensions; the defaults are those of the published weights.

    Args:
        image_size: Side R of the square that frames are resized to, in pixels; a multiple of `patch_size`.
        patch_size: Side P of a patch, in pixels.
        dim: Width D of the transformers.
        spatial_depth: Blocks of the spatial encoder, and of the decoder.
        temporal_depth: Blocks of the temporal encoder.
        heads, dim_head: Attention heads and their width.
        ff_dim: Hidden width of the MLPs.
        source_file, source_sha256, source_repository, source_revision, licence: What the weights were
            converted from.
    """

    num_learned_tokens: int = 4
    action_latent_dim: int = 32
    n_codes: int = 8
    stride_seconds: float | None = 0.6
    image_size: int = 256
    patch_size: int = 32
    dim: int = 1024
    spatial_depth: int = 8
    temporal_depth: int = 8
    heads: int = 16
    dim_head: int = 64
    ff_dim: int = 2730
    source_file: str | None = None
    source_sha256: str | None = None
    source_repository: str | None = None
    source_revision: str | None = None
    licence: str | None = None

    def problems(self) -> list[str]:
        if self.image_size % self.patch_size:
            return [
                f"image_size is {self.image_size}, expected a multiple of patch_size, "
                f"which is {self.patch_size}"
            ]
        tokens = tokens_of_grid(self.num_learned_tokens, self.grid_size)
        if tokens is None:
            return [f"code_seq_len is {self.num_learned_tokens}, expected 1, 2, 4, 16, 64 or 256"]
        if tokens != self.num_learned_tokens:
            return [
                f"code_seq_len is {self.num_learned_tokens}, but {self.grid_size} × {self.grid_size} patches "
                f"(image_size {self.image_size}, patch_size {self.patch_size}) give {tokens} tokens: name "
                "the image_size and code_seq_len of the training"
            ]
        return []

    @property
    def grid_size(self) -> int:
        """Patches along one side, G."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    @property
    def patch_values(self) -> int:
        """Numbers in one patch, 3·P·P."""
        return 3 * self.patch_size**2
