"""Imported by fork servers (see `env_workers`): registers environments and describes their tasks."""

from contextlib import suppress
from importlib import import_module

import gymnasium
from gymnasium.envs.registration import WrapperSpec

from lerobot_lam_diffusion.env_workers import PACKAGES, TaskDescription

for _package in PACKAGES:
    with suppress(ImportError):
        import_module(_package)
for _spec in gymnasium.registry.values():
    if _spec.namespace in PACKAGES:
        _spec.additional_wrappers += (
            WrapperSpec("TaskDescription", f"{TaskDescription.__module__}:{TaskDescription.__name__}", {}),
        )
