"""What the card of a trained policy says besides LeRobot's own: which LAM, camera, stride and tokens."""

from pathlib import PurePath
from typing import Any

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.sources import LamSource

TAG = "lam-tokens"
_LOCAL = ("/", ".", "~", "\\")  # no Hub id begins so
_PACKAGE = "lerobot_policy_diffusion_lam"


def add_lam_section(card: Any, config: DiffusionLamConfig, fps: float | None) -> None:
    """Add the section to a `huggingface_hub.ModelCard`, and the token stores to the datasets that it names.

    Args:
        config: Of a policy with LAM conditioning.
        fps: Of the dataset that it was trained on, to tell the stride in seconds.
    """
    card.text = f"{card.text.rstrip()}\n\n{lam_section(config, fps)}"
    card.data.tags = [*(card.data.tags or []), TAG]
    stores = [store for source in config.token_sources if (store := _hub_store(source.origin))]
    if stores:
        named = card.data.datasets or []
        named = [named] if isinstance(named, str) else named
        card.data.datasets = list(dict.fromkeys([*named, *(store.partition("@")[0] for store in stores)]))


def lam_section(config: DiffusionLamConfig, fps: float | None) -> str:
    """Markdown of the section, which ends with a line break."""
    sources = config.token_sources
    told = [_facts(config, source, fps) for source in sources]
    table = "\n".join(f"| {name} | {' | '.join(facts[name] for facts in told)} |" for name in told[0])
    titles = "".join(f" source {number} |" for number in range(1, len(told) + 1)) if len(told) > 1 else " |"
    rule = " --- |" * len(told)
    lams = list(dict.fromkeys(source.model_path for source in sources))
    if len(lams) == 1:
        lam = _reachable(lams[0])
    else:
        named = [_reachable(source.model_path, f" {number}") for number, source in enumerate(sources, 1)]
        lam = f"'[{','.join(named)}]'"
    policy = config.repo_id or "<this policy>"
    guidance = " --policy.lam_guidance=<video, or STORE#episode>" if config.future_token_deltas else ""
    return (
        "## Latent action model (LAM)\n\n"
        f"{_deployment(config)}\n\n"
        f"| |{titles}\n| --- |{rule}\n{table}\n\n"
        f"```bash\npip install {_PACKAGE}\n"
        f"lerobot-eval --policy.path={policy} --policy.lam_model_path={lam}{guidance} "
        "--env.type=<environment>\n```\n"
    )


def _facts(config: DiffusionLamConfig, source: LamSource, fps: float | None) -> dict[str, str]:
    """What there is to know of one source of tokens, as cells of a table."""
    stride = config.lam_frame_stride
    seconds = f" = {stride / fps:.4g} s at {fps:g} fps" if stride is not None and fps else ""
    n, a = source.num_learned_tokens, source.action_latent_dim
    shape = f", {n} × {a} numbers" if n is not None and a is not None else ""
    kind = "VQ (codebook rows)" if config.lam_use_vq_tokens else "continuous (before quantisation)"
    return {
        "LAM": _place(source.model_path),
        "LAM fingerprint": _code(source.fingerprint),
        "camera": _code(source.camera_key),
        "frame stride": "not recorded" if stride is None else f"{_several(stride, 'frame')}{seconds}",
        "tokens": f"{kind}{shape}, encoded in {config.lam_dtype}",
        "conditioning": _conditioning(config),
        "trained on tokens from": _source(source.origin),
    }


def _conditioning(config: DiffusionLamConfig) -> str:
    offsets = config.lam_token_offsets
    if offsets is None:
        return f"{config.lam_temporal_aggregation}: {_several(len(config.lam_token_deltas), 'token')}"
    if min(offsets) > 0 and len(offsets) > 1:
        return f"the next {_several(len(offsets), 'token')} ({offsets[0]:+d} … {offsets[-1]:+d} frames)"
    return f"{_several(len(offsets), 'token')} (frames {', '.join(f'{offset:+d}' for offset in offsets)})"


def _deployment(config: DiffusionLamConfig) -> str:
    """What the card says of acting."""
    if not config.future_token_deltas:
        return (
            "This policy also sees what moved, as tokens of a latent action model. At deployment it computes "
            "them live from the frames it sees, and so needs that LAM: another one is refused by its "
            "fingerprint."
        )
    return (
        "This policy also sees what moves next, as tokens of a latent action model. At deployment they come "
        "from a demonstration: a video (seen by that LAM; another one is refused by its fingerprint) or an "
        "episode of a token store."
    )


def _hub_store(source: str | None) -> str | None:
    """`user/name@commit` of a source `store:user/name@commit`."""
    kind, _, name = (source or "").partition(":")
    return name if kind == "store" and "@" in name and not name.startswith(_LOCAL) else None


def _source(source: str | None) -> str:
    kind, _, name = (source or "").partition(":")
    if kind == "store":
        store = _hub_store(source)
        if store is None:
            return f"the token store {_place(name)}"
        repo_id, _, commit = store.partition("@")
        return (
            f"the token store [{repo_id}](https://huggingface.co/datasets/{repo_id}), commit {_code(commit)}"
        )
    if kind == "column":
        return f"the dataset's column {_code(name)}"
    if kind == "live":
        return f"the LAM itself, in training ({_place(name)})"
    return "not recorded"


def _place(path: str | None) -> str:
    """A path; of a folder only its name, for the rest of it says more of a machine than of the policy."""
    if path is None or not path.startswith(_LOCAL):
        return _code(path)
    return f"{_code(PurePath(path).name)} (a folder where it was trained)"


def _reachable(path: str | None, which: str = "") -> str:
    """A LAM as others can name it."""
    return f"<LAM{which}>" if not path or path.startswith(_LOCAL) else path


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _code(text: str | None) -> str:
    """Text as a cell of a table."""
    if not text:
        return "not recorded"
    return f"`{' '.join(text.replace('`', chr(39)).split())}`".replace("|", "\\|")
