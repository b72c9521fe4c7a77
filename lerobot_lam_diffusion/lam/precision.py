"""Full float32 precision for the LAM, whatever the surrounding training has switched on.

LeRobot's training and evaluation enable TF32 globally, and Accelerate wraps the forward pass in autocast;
either would move tokens by some 1e-3 and flip indices of nearly tied codes.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # threads and nested contexts that need full precision now
_before: list[tuple[Any, str, Any]] = []


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off on `device`, and float32 kernels in true float32; restored when the last thread leaves."""
    with torch.autocast(device.type, enabled=False):
        _enter()
        try:
            yield
        finally:
            _leave()


def _enter() -> None:
    global _inside
    with _lock:
        if not _inside:
            for owner, name, exact in _switches():
                if getattr(owner, name) != exact:
                    _before.append((owner, name, getattr(owner, name)))
                    setattr(owner, name, exact)
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        while not _inside and _before:
            owner, name, value = _before.pop()
            setattr(owner, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """The settings that let a float32 matrix product or convolution use fewer bits, and their exact value."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9; its two ways must not be mixed
        operations = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
        return [(operation, "fp32_precision", "ieee") for operation in operations]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
