"""Figures that training logs besides the loss: whether the policy uses its tokens.

    lam_token_share         share of the batch's samples that have a token
    lam_norm_ratio          norm of what tokens add in the U-Net's conditioning layers, relative to what the
                            stock conditioning adds there; 0 at the start
    lam_shuffled_loss_ratio loss with the tokens of another sample of the batch, divided by the actual loss;
                            1: the policy does not use its tokens

The last two need another pass, without gradients, every `EVERY` steps; in between, their last values are
repeated. It runs before the actual one, on the same random numbers, and restores generators and buffers, so
that losses stay bit-identical.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

EVERY = 100


class TrainingFigures:
    """Measures around the forward passes of one policy in training."""

    def __init__(self) -> None:
        self._steps = 0
        self._last: dict[str, float] = {}

    def loss(
        self,
        policy: nn.Module,
        batch: dict[str, Any],
        key: str,
        layers: list[tuple[nn.Module, nn.Module]],
        forward: Callable[[dict[str, Any]], tuple[Tensor, None]],
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, as `forward` gives it, and the figures.

        Args:
            policy: whose buffers the other pass must not change.
            batch: with the tokens `(B, T, n·a)` under `key`.
            layers: stock linear and LAM linear of each conditioning layer; empty: no other pass.
            forward: the stock forward pass.
        """
        tokens = batch[key]
        if self._steps % EVERY == 0 and len(tokens) > 1 and layers:
            with torch.no_grad(), _unchanged(policy, tokens.device), _squares(layers) as squares:
                shuffled, _ = forward({**batch, key: tokens.roll(1, 0)})
            loss, _ = forward(batch)
            stock, lam = (float(total) for total in squares)
            self._last = {
                "lam_norm_ratio": (lam / stock) ** 0.5 if stock else 0.0,
                "lam_shuffled_loss_ratio": float(shuffled) / max(float(loss.detach()), 1e-12),
            }
        else:
            loss, _ = forward(batch)
        self._steps += 1
        share = (tokens != 0).flatten(1).any(1).float().mean().item()
        return loss, {"lam_token_share": share, **self._last}


@contextmanager
def _unchanged(policy: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore random number generators and buffers afterwards, and forget the weights that autocast cast."""
    # Copies stand in for the buffers: the graph of an earlier batch may hold the buffers themselves.
    buffers = [
        (module, name, buffer)
        for module in policy.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in buffers:
        setattr(module, name, buffer.clone())
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
    torch.clear_autocast_cache()  # casts made without gradients would be used by the pass that follows


@contextmanager
def _squares(layers: list[tuple[nn.Module, nn.Module]]) -> Iterator[list[Any]]:
    """Sums of squares of the outputs of the stock and the LAM linear layers inside the context."""
    totals: list[Any] = [0.0, 0.0]

    def adding(which: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
            totals[which] = totals[which] + output.float().square().sum()

        return add

    hooks = [
        layer.register_forward_hook(adding(which)) for pair in layers for which, layer in enumerate(pair)
    ]
    try:
        yield totals
    finally:
        for hook in hooks:
            hook.remove()
