"""A LAM of one's own: optical flow of a grid of cells, without a codebook and without weights.

    python docs/examples/own_lam.py ./data/flow_lam   # writes the folder that --lam.path then takes

Commands find the class where its package names it in pyproject.toml; in a script the decorator is enough.

    [project.entry-points."lerobot_lam_diffusion.lams"]
    GridFlow = "own_lam:GridFlowLam"
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_lam_diffusion.lam import LatentActionModel, TokenConfig, register_lam, write_lam
from lerobot_lam_diffusion.lam.preprocess import resize


@dataclass(frozen=True, kw_only=True)
class GridFlowConfig(TokenConfig):
    num_learned_tokens: int = 16  # cells, 4 x 4
    action_latent_dim: int = 2  # x and y, in pixels
    image_size: int = 64


@register_lam
class GridFlowLam(LatentActionModel):
    architecture = "GridFlow"
    config_class = GridFlowConfig
    token_parts = ()

    @classmethod
    def build_modules(cls, config: GridFlowConfig) -> dict[str, nn.Module]:
        return {}

    def resize_frames(self, frames: Tensor) -> Tensor:
        return resize(frames, self.config.image_size)

    def continuous(self, prev: Tensor, cur: Tensor) -> Tensor:
        before, after = (frames.float().mean(1, keepdim=True) / 255 for frames in (prev, cur))
        dy, dx = torch.gradient(before, dim=(-2, -1))
        products = torch.cat([dx * dx, dx * dy, dy * dy, dx * (before - after), dy * (before - after)], dim=1)
        cells = F.adaptive_avg_pool2d(products, round(self.config.num_learned_tokens**0.5)).flatten(2)
        xx, xy, yy, xt, yt = cells.unbind(1)  # least squares in each cell (Lucas and Kanade)
        determinant = xx * yy - xy * xy + 1e-6
        flow = torch.stack([(yy * xt - xy * yt) / determinant, (xx * yt - xy * xt) / determinant], dim=-1)
        return flow.flatten(1)


if __name__ == "__main__":
    write_lam(Path(sys.argv[1]), GridFlowLam, GridFlowConfig(), {})
