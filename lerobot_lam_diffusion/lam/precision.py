"""Full float32 precision for the LAM, whatever the surrounding training has switched on.

LeRobot's training and evaluation enable TF32 globally, and Accelerate wraps the forward pass in autocast;
either would move tokens by some 1e-3 and flip indices of nearly tied codes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off on `device`, and float32 kernels in true float32; both restored on leaving."""
    changed = [
        (owner, name, getattr(owner, name), exact)
        for owner, name, exact in _switches()
        if getattr(owner, name) != exact
    ]
    with torch.autocast(device.type, enabled=False):
        try:
            for owner, name, _, exact in changed:
                setattr(owner, name, exact)
            yield
        finally:
            for owner, name, before, _ in reversed(changed):
                setattr(owner, name, before)


def _switches() -> list[tuple[Any, str, Any]]:
    """The settings that let a float32 matrix product or convolution use fewer bits, and their exact value."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9; its two ways must not be mixed
        operations = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
        return [(operation, "fp32_precision", "ieee") for operation in operations]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
