"""A LAM of one's own: the mean optical flow of the moving pixels, without a codebook and without weights.

    python docs/examples/own_lam.py ./data/flow_lam   # writes the folder that --lam.path then takes

Commands find the class where its package names it in pyproject.toml; in a script the decorator is enough.

    [project.entry-points."lerobot_lam_diffusion.lams"]
    MeanFlow = "own_lam:MeanFlowLam"
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lerobot_lam_diffusion.lam import LatentActionModel, TokenConfig, register_lam, write_lam
from lerobot_lam_diffusion.lam.fit.flow import mean_flow
from lerobot_lam_diffusion.lam.resize import bilinear


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig(TokenConfig):
    num_learned_tokens: int = 3  # scales
    action_latent_dim: int = 2  # x and y, in pixels of that scale
    image_size: int = 96


@register_lam
class MeanFlowLam(LatentActionModel):
    architecture = "MeanFlow"
    config_class = MeanFlowConfig
    token_parts = ()

    @classmethod
    def build_modules(cls, config: MeanFlowConfig) -> dict[str, nn.Module]:
        return {}

    def resize_frames(self, frames: Tensor) -> Tensor:
        return bilinear(frames, self.config.image_size)

    def continuous(self, prev: Tensor, cur: Tensor) -> Tensor:
        return mean_flow(prev, cur)


if __name__ == "__main__":
    write_lam(Path(sys.argv[1]), MeanFlowLam, MeanFlowConfig(), {})
