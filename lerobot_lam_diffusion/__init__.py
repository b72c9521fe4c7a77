"""LeRobot's Diffusion Policy conditioned on the tokens of a latent action model (LAM).

Importing this package registers the policy type `diffusion_lam` and its processor step with LeRobot; stock
`lerobot-train`, `lerobot-eval` and `lerobot-rollout` do so through LeRobot's plugin discovery.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import lerobot_lam_commands
from lerobot_lam_diffusion.constants import OBS_LAM_IMAGES, OBS_LAM_TOKENS

if TYPE_CHECKING:
    from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
    from lerobot_lam_diffusion.lam import load_lam
    from lerobot_lam_diffusion.modeling_diffusion_lam import DiffusionLamModel, DiffusionLamPolicy
    from lerobot_lam_diffusion.processor_diffusion_lam import make_diffusion_lam_pre_post_processors
    from lerobot_lam_diffusion.tokens import LamTokenDataset, TokenStore

__version__ = "0.1.0"

__all__ = [
    "OBS_LAM_IMAGES",
    "OBS_LAM_TOKENS",
    "DiffusionLamConfig",
    "DiffusionLamModel",
    "DiffusionLamPolicy",
    "LamTokenDataset",
    "TokenStore",
    "load_lam",
    "make_diffusion_lam_pre_post_processors",
]

# Imported lazily: training on precomputed tokens needs no LAM code, and extraction needs no policy.
_LAZY = {
    "DiffusionLamConfig": "configuration_diffusion_lam",
    "DiffusionLamModel": "modeling_diffusion_lam",
    "DiffusionLamPolicy": "modeling_diffusion_lam",
    "LamTokenDataset": "tokens",
    "TokenStore": "tokens",
    "load_lam": "lam",
    "make_diffusion_lam_pre_post_processors": "processor_diffusion_lam",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if lerobot_lam_commands.registers_policy:
    import_module(f"{__name__}.configuration_diffusion_lam")
    import_module(f"{__name__}.processor_diffusion_lam")
