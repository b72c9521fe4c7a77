"""What LeRobot's plugin discovery imports: the distribution's own name. The package does the registering."""

import lerobot_lam_diffusion  # noqa: F401
from lerobot_lam_diffusion.env_workers import preload_environments

preload_environments()
