"""Look at a token store, and check it.

    lerobot-lam-tokens info ./data/pusht_lam
    lerobot-lam-tokens verify ./data/pusht_lam --dataset.repo_id=lerobot/pusht --lam.path=microsoft/villa-x

`verify` reads every byte again; with a dataset it checks that the store was made of it, and with a LAM as
well it encodes a random sample of frame pairs and compares.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.default import DatasetConfig

from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.recompute import recompute_sample
from lerobot_lam_diffusion.problems import UserError
from lerobot_lam_diffusion.scripts.command_line import LamSource, run_command
from lerobot_lam_diffusion.scripts.opening import open_dataset, open_metadata, usable_device
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE


@dataclass
class InfoConfig:
    """What a store holds.

    Args:
        store: Its folder.
    """

    store: Path


@dataclass
class VerifyConfig:
    """Check a store.

    Args:
        store: Its folder.
        dataset: Check that the store was made of this dataset.
        lam: With a dataset: encode a random sample again with this LAM and compare.
        num_samples: Tokens in that sample.
        seed: Of the sample.
        device: Where the LAM runs; the best there is if left out.
    """

    store: Path
    dataset: DatasetConfig | None = None
    lam: LamSource | None = None
    num_samples: int = 64
    seed: int = 0
    device: str | None = None


def info(config: InfoConfig) -> None:
    store = TokenStore.open(config.store)
    assert store.provenance is not None
    origin, lam = store.provenance.dataset, store.provenance.lam
    frames = len(store.values)
    missing = frames - len(store.frames_with_tokens())
    num_bytes = sum((store.path / name).stat().st_size for name in (TENSORS_FILE, PROVENANCE_FILE))
    rows = {
        "store": f"{store.path.resolve()}, {num_bytes:,} bytes",
        "dataset": f"{origin.repo_id} ({origin.total_frames} frames, {origin.total_episodes} episodes, "
        f"{origin.fps:g} fps, revision {origin.revision})",
        "coverage": f"{frames} frames, {missing} of them without a token; {store.coverage}",
        "camera": store.provenance.camera_key,
        "stride": f"{store.frame_stride} frames = {store.provenance.stride_seconds:g} s",
        "LAM": f"{lam.path} (fingerprint {lam.fingerprint[:16]}…)",
        "tokens": f"{store.kind}, {lam.num_learned_tokens} x {lam.action_latent_dim} numbers, "
        f"encoded in {store.provenance.dtype}",
        "codebook": ", ".join(f"{perplexity:.1f}" for perplexity in store.code_perplexity())
        + f" of {lam.num_codes} codes a slot (perplexity)",
        "made with": ", ".join(f"{name} {version}" for name, version in store.provenance.versions.items()),
    }
    if not store.code_perplexity():
        del rows["codebook"]
    for name, text in rows.items():
        print(f"{name:<10}{text}")


def verify(config: VerifyConfig) -> None:
    if config.lam is not None and config.dataset is None:
        raise UserError(
            "--lam.path needs --dataset.repo_id as well: the LAM's tokens are those of its frames"
        )
    store = TokenStore.open(config.store)
    print(f"ok  every byte of {TENSORS_FILE} as written, all values valid ({store.coverage})")
    if config.dataset is None:
        return
    TokenStore.open(config.store, open_metadata(config.dataset))
    dataset = open_dataset(config.dataset)
    print(f"ok  made of dataset {dataset.repo_id} at {dataset.root}")
    if config.lam is None:
        return
    assert store.provenance is not None
    dtype = getattr(torch, store.provenance.dtype)
    lam = load_lam(
        config.lam.path, revision=config.lam.revision, device=usable_device(config.device), dtype=dtype
    )
    result = recompute_sample(store, dataset, lam, config.num_samples, config.seed)
    told = (
        f"{result.equal} of {result.checked} sampled tokens agree with the LAM ({result.distinct} different "
        f"ones, largest difference {result.max_error:.2g})"
    )
    if result.equal < result.checked:
        raise UserError(
            f"{told}: the frames or the LAM changed, or the store was made on another kind of device. "
            "Extract the tokens again with lerobot-lam-precompute"
        )
    print(f"ok  {told}")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "info": (InfoConfig, info),
    "verify": (VerifyConfig, verify),
}


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        print(__doc__)
        sys.exit(0 if words in (["-h"], ["--help"]) else f"error: expected one of {', '.join(COMMANDS)}")
    config_class, command = COMMANDS[words.pop(0)]
    if words and not words[0].startswith("-"):
        words[0] = f"--store={words[0]}"
    run_command(config_class, command, words)


if __name__ == "__main__":
    main()
