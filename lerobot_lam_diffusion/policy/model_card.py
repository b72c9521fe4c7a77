"""The LAM section of a trained policy's model card: which LAM, camera, stride and tokens."""

from pathlib import PurePath
from typing import Any

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.sources import LamSource

TAG = "lam-tokens"
_LOCAL = ("/", ".", "~", "\\")  # no Hub id starts with these

_TEMPLATE = """## Latent action model (LAM)

{deployment}

{table}

With the LeRobot plugin `lerobot_policy_diffusion_lam` installed:

```bash
lerobot-eval --policy.path={policy} --policy.lam_model_path={lam}{guidance} --env.type=<environment>
```
"""
_PAST = (
    "This policy also sees what moved, as tokens of a latent action model. At deployment it computes them "
    "live from the frames it sees, and so needs that LAM: another one is refused by its fingerprint."
)
_FUTURE = (
    "This policy also sees what moves next, as tokens of a latent action model. At deployment they come from "
    "a demonstration: a video (seen by that LAM; another one is refused by its fingerprint) or an episode of "
    "a token store."
)


def add_lam_section(card: Any, config: DiffusionLamConfig, fps: float | None) -> None:
    """Add the section to a `huggingface_hub.ModelCard`, and the token stores to its datasets.

    Args:
        config: Config of a policy with LAM conditioning.
        fps: Frame rate of the training dataset, to give the stride in seconds.
    """
    card.text = f"{card.text.rstrip()}\n\n{lam_section(config, fps)}"
    card.data.tags = [*(card.data.tags or []), TAG]
    stores = [store for source in config.token_sources if (store := _hub_store(source.trained_on))]
    if stores:
        datasets = card.data.datasets or []
        datasets = [datasets] if isinstance(datasets, str) else datasets
        card.data.datasets = list(dict.fromkeys([*datasets, *(store.partition("@")[0] for store in stores)]))


def lam_section(config: DiffusionLamConfig, fps: float | None) -> str:
    """Markdown of the section, which ends with a line break."""
    sources = config.token_sources
    facts = [_facts(config, source, fps) for source in sources]
    titles = "".join(f" source {number} |" for number in range(1, len(facts) + 1)) if len(facts) > 1 else " |"
    lines = [f"| |{titles}", "| --- |" + " --- |" * len(facts)]
    lines += [f"| {name} | {' | '.join(fact[name] for fact in facts)} |" for name in facts[0]]
    # Names of the LAMs that others can use: a folder on the training machine means nothing to them.
    names = [source.model_path for source in sources]
    many = len(set(names)) > 1
    lams = [
        f"<LAM {number}>" if many and _is_local(name) else "<LAM>" if _is_local(name) else str(name)
        for number, name in enumerate(names, 1)
    ]
    future = config.future_token_deltas
    return _TEMPLATE.format(
        deployment=_FUTURE if future else _PAST,
        table="\n".join(lines),
        policy=config.repo_id or "<this policy>",
        lam=f"'[{','.join(lams)}]'" if many else lams[0],
        guidance=" --policy.lam_guidance=<video, or STORE#episode>" if future else "",
    )


def _facts(config: DiffusionLamConfig, source: LamSource, fps: float | None) -> dict[str, str]:
    """What is known of one source of tokens, as cells of a table."""
    stride = config.lam_frame_stride
    seconds = f" = {stride / fps:.4g} s at {fps:g} fps" if stride is not None and fps else ""
    n, a = source.num_learned_tokens, source.action_latent_dim
    shape = f", {n} × {a} elements" if n is not None and a is not None else ""
    kind = "VQ (codebook rows)" if config.lam_use_vq_tokens else "continuous (before quantisation)"
    return {
        "LAM": _place(source.model_path),
        "LAM fingerprint": _code(source.fingerprint),
        "camera": _code(source.camera_key),
        "frame stride": "not recorded" if stride is None else f"{_count(stride, 'frame')}{seconds}",
        "tokens": f"{kind}{shape}, encoded in {config.lam_dtype}",
        "conditioning": _conditioning(config),
        "trained on tokens from": _trained_on(source.trained_on),
    }


def _conditioning(config: DiffusionLamConfig) -> str:
    offsets = config.lam_token_offsets
    if offsets is None:
        return f"{config.lam_temporal_aggregation}: {_count(len(config.lam_token_deltas), 'token')}"
    if min(offsets) > 0 and len(offsets) > 1:
        return f"the next {_count(len(offsets), 'token')} ({offsets[0]:+d} … {offsets[-1]:+d} frames)"
    return f"{_count(len(offsets), 'token')} (frames {', '.join(f'{offset:+d}' for offset in offsets)})"


def _trained_on(trained_on: str | None) -> str:
    kind, _, name = (trained_on or "").partition(":")
    if store := _hub_store(trained_on):
        repo_id, _, commit = store.partition("@")
        link = f"[{repo_id}](https://huggingface.co/datasets/{repo_id})"
        return f"the token store {link}, commit {_code(commit)}"
    texts = {
        "store": f"the token store {_place(name)}",
        "column": f"the dataset's column {_code(name)}",
        "live": f"the LAM itself, in training ({_place(name)})",
    }
    return texts.get(kind, "not recorded")


def _hub_store(trained_on: str | None) -> str | None:
    """`user/name@commit` of `store:user/name@commit`."""
    kind, _, name = (trained_on or "").partition(":")
    return name if kind == "store" and "@" in name and not _is_local(name) else None


def _is_local(path: str | None) -> bool:
    return not path or path.startswith(_LOCAL)


def _place(path: str | None) -> str:
    """A Hub id; of a folder only its name, since the rest describes a machine, not the policy."""
    if path and _is_local(path):
        return f"{_code(PurePath(path).name)} (a folder where it was trained)"
    return _code(path)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _code(text: str | None) -> str:
    """Text as a cell of a table."""
    if not text:
        return "not recorded"
    return f"`{' '.join(text.replace('`', chr(39)).split())}`".replace("|", "\\|")
