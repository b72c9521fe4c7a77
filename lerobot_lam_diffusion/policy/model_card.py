"""The LAM section of a trained policy's model card: which LAM, camera, stride and tokens."""

from pathlib import PurePath
from typing import Any

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.sources import LamSource

TAG = "lam-tokens"
_LOCAL = ("/", ".", "~", "\\")  # no Hub id starts with these

_TEMPLATE = """## Latent action model (LAM)

This policy also sees tokens of a latent action model. At deployment it computes them from the frames it sees,
and so needs that LAM: another one is refused by its fingerprint. Tokens of later frames (`lam_token_deltas`
above 0) come from a demonstration: add `--policy.lam_guidance=<video, or STORE#episode>`.

{table}

With the LeRobot plugin `lerobot_policy_diffusion_lam` installed:

```bash
lerobot-eval --policy.path={policy} --policy.lam_model_path=<LAM> --env.type=<environment>
```
"""


def add_lam_section(card: Any, config: DiffusionLamConfig, fps: float | None) -> None:
    """Add the section to a `huggingface_hub.ModelCard`, and the token stores to its datasets.

    Args:
        config: Config of a policy with LAM conditioning.
        fps: Frame rate of the training dataset, to give the stride in seconds.
    """
    card.text = f"{card.text.rstrip()}\n\n{lam_section(config, fps)}"
    card.data.tags = [*(card.data.tags or []), TAG]
    places = [(source.trained_on or "").removeprefix("store:") for source in config.token_sources]
    stores = [place.partition("@")[0] for place in places if "@" in place and not place.startswith(_LOCAL)]
    if stores:
        datasets = card.data.datasets or []
        datasets = [datasets] if isinstance(datasets, str) else datasets
        card.data.datasets = list(dict.fromkeys([*datasets, *stores]))


def lam_section(config: DiffusionLamConfig, fps: float | None) -> str:
    """Markdown of the section, which ends with a line break."""
    facts = [_facts(config, source, fps) for source in config.token_sources]
    titles = "".join(f" source {number} |" for number in range(1, len(facts) + 1))
    lines = [f"| |{titles}", "| --- |" + " --- |" * len(facts)]
    lines += [f"| {name} | {' | '.join(fact[name] for fact in facts)} |" for name in facts[0]]
    return _TEMPLATE.format(table="\n".join(lines), policy=config.repo_id or "<this policy>")


def _facts(config: DiffusionLamConfig, source: LamSource, fps: float | None) -> dict[str, str]:
    """What is known of one source of tokens, as cells of a table."""
    stride, n, a = config.lam_frame_stride, source.num_learned_tokens, source.action_latent_dim
    kind, _, name = (source.trained_on or "").partition(":")
    seconds = f" = {stride / fps:.4g} s at {fps:g} fps" if stride is not None and fps else ""
    shape = f", {n} × {a}" if n is not None and a is not None else ""
    return {
        "LAM": _place(source.model_path),
        "fingerprint": _place(source.fingerprint),
        "camera": _place(source.camera_key),
        "frame stride": f"{stride or 'not recorded'}{seconds}",
        "tokens": f"{'VQ' if config.lam_use_vq_tokens else 'continuous'}{shape}, {config.lam_dtype}",
        "`lam_token_deltas`": str(config.lam_token_deltas),
        "trained on": f"{kind} {_place(name)}",
    }


def _place(text: str | None) -> str:
    """A Hub id or name; of a folder only its name, since the rest describes a machine, not the policy."""
    if not text:
        return "not recorded"
    if text.startswith(_LOCAL):
        return f"`{PurePath(text).name}` (a folder where it was trained)"
    return f"`{text}`"
