"""`lerobot-lam-tokens export`."""

from dataclasses import dataclass
from pathlib import Path

from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.export import export_store
from lerobot_lam_diffusion.utils.errors import UserError


@dataclass
class ExportConfig:
    """Write a store in another format.

    Args:
        store: Its folder, or its repository on the Hub.
        format: pt, parquet or npy; training reads a .pt file, the others are for other programs.
        output: The new file.
    """

    store: str
    format: str
    output: Path


def export(config: ExportConfig) -> None:
    if config.format == "pt" and config.output.suffix not in (".pt", ".pth"):
        raise UserError(f"--output={config.output} must end in .pt, by which a token file is known")
    store = TokenStore.open(config.store)
    export_store(store, config.output, config.format)
    print(f"{config.output}: {config.output.stat().st_size:,} bytes")
