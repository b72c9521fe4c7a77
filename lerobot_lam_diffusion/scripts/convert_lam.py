"""Convert a published LAM checkpoint (LAPA, UniVLA) to a LAM folder that every command takes.

    lerobot-lam-convert latent-action-pretraining/LAPA-7B-openx --output_dir=./data/lapa_lam
    lerobot-lam-convert qwbu/univla-latent-action-model --output_dir=./data/univla_lam
    lerobot-lam-convert ./laq.pt --dims.image_size=256 --dims.code_seq_len=4 --output_dir=./data/my_lapa

SOURCE is a checkpoint file, one of these Hub ids (the one file is fetched), or owner/name/path/in/it.pt.
It is opened with weights_only=True: a checkpoint that would run code is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lerobot_lam_commands
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.lam.convert import CONVERTERS, Dims, convert_lam, locate_checkpoint
from lerobot_lam_diffusion.lam.locating import WEIGHTS_FILE
from lerobot_lam_diffusion.scripts.command_line import Command, run_command
from lerobot_lam_diffusion.scripts.next_step import next_step
from lerobot_lam_diffusion.utils.errors import raise_problems
from lerobot_lam_diffusion.utils.files import refuse_existing


@dataclass
class ConvertConfig:
    """Published checkpoint → LAM folder.

    Args:
        source: Checkpoint file (.pt, .ckpt), Hub id of published weights, or owner/name/path/in/it.pt.
        output_dir: The new folder.
        family: lapa or univla; recognised by its tensors if left out.
        keep_fdm: LAPA: also keep what predicts the next frame, for pictures (0.55 GB more).
        revision: Branch, tag or commit, for the Hub.
        dims: What the file does not tell; the published values if left out.
    """

    source: str
    output_dir: Path
    family: str | None = None
    keep_fdm: bool = False
    revision: str | None = None
    dims: Dims = field(default_factory=Dims)

    def __post_init__(self) -> None:
        problems = [
            f"--dims.{name}={value} must be at least 1"
            for name, value in vars(self.dims).items()
            if value is not None and value < 1
        ]
        if self.family not in (None, *CONVERTERS):
            problems.append(f"--family={self.family} must be one of {', '.join(CONVERTERS)}")
        raise_problems("cannot convert so", problems)


COMMAND = Command("lerobot-lam-convert", ConvertConfig, __doc__, words="source")


def convert(config: ConvertConfig) -> None:
    """Find the checkpoint, convert it, say what was made."""
    output_dir = config.output_dir
    refuse_existing(output_dir)
    source = locate_checkpoint(config.source, config.revision)
    convert_lam(
        source,
        output_dir,
        family=config.family,
        dims=config.dims,
        keep_fdm=config.keep_fdm,
    )
    lam = load_lam(output_dir)
    sizes = [path.stat().st_size for path in (output_dir / WEIGHTS_FILE, source.path)]
    lines = [
        f"LAM       {output_dir.resolve()}, {sizes[0]:,} bytes (the checkpoint has {sizes[1]:,})",
        f"family    {lam.architecture}, frames of {lam.config.image_size} × {lam.config.image_size} pixels",
        f"tokens    {lam.num_learned_tokens} × {lam.action_latent_dim}, {lam.num_codes} codes",
        f"stride    trained on pairs {lam.stride_seconds:g} s apart; lerobot-lam-precompute proposes "
        "that many frames",
        f"source    {source.path.name}, SHA-256 {lam.config.source_sha256[:16]}…, licence "
        f"{source.licence or 'not known: see where the file is from'}",
        f"hash      fingerprint {lam.fingerprint[:16]}…",
    ]
    print("\n".join(lines))
    command = ["lerobot-lam-precompute", "--dataset.repo_id=USER/NAME", f"--lam.path={config.output_dir}"]
    print(next_step([*command, "--output_dir=./data/tokens"], "Next, on a dataset of yours"))


def main(argv: Sequence[str] | None = None) -> None:
    run_command(COMMAND, convert, argv)


if __name__ == "__main__":
    lerobot_lam_commands.convert()
