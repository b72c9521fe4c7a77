"""The README.md beside a fitted LAM: data, recipe, figures."""

from pathlib import Path

from ..base import LatentActionModel
from ..loading import WEIGHTS_FILE
from .report import FitReport

_CARD = """\
# A compact latent action model

villa-X architecture, fitted with `lerobot-lam-fit`. Open it with `--lam.path` or `load_lam(path)`.

| about | |
| --- | --- |
{facts}

## Held-out figures ({episodes} episodes, {pairs} frame pairs)

{figures}

Moving pixels: a colour changes by more than 20 of 255. Errors on the 0..1 scale. The probe is a ridge
regression from a pair's VQ token to the change of `observation.state`, fitted on the other episodes.
Shuffled: tokens of other pairs. Constant: the mean change.
"""


def write_card(folder: Path, lam: LatentActionModel, report: FitReport, facts: dict[str, str]) -> None:
    """Write `README.md` into a model folder.

    Args:
        facts: name → text, on data and recipe.
    """
    config = lam.config
    size = (folder / WEIGHTS_FILE).stat().st_size / 1e6
    parameters = sum(p.numel() for module in lam.modules.values() for p in module.parameters())
    model = {
        "model": f"{config.resolution} px, patches of {config.patch_size}, {parameters:,} parameters",
        "size": f"{size:.1f} MB",
        "tokens": f"{config.num_learned_tokens} × {config.action_latent_dim}, {config.n_codes} codes",
        "fingerprint": f"`{lam.fingerprint}`",
    }
    text = _CARD.format(
        facts="\n".join(f"| {name} | {value} |" for name, value in (facts | model).items()),
        episodes=report.episodes,
        pairs=report.pairs,
        figures="\n".join(report.lines()),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
