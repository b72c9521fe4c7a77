"""The card (README.md) of a token store's repository: what the tokens are, and how to train with them.

Our section stands between two markers. Text around them and metadata (a license, say) are the user's, and
stay when the store is pushed again.
"""

import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from huggingface_hub import DatasetCard

from lerobot_lam_diffusion.tokens.described import described
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS, PACKAGE, Provenance
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import HubError

PICTURE_PREFIX = "lam_tokens_"
"""Files in the repository whose names begin with this prefix are the card's pictures."""
TAGS = ("lerobot", "lam-tokens")

_BEGIN = "<!-- lam-tokens: what follows is written by `lerobot-lam-tokens push`; write above or below it -->"
_END = "<!-- /lam-tokens -->"
_OURS = re.compile(r"<!-- lam-tokens: .*?<!-- /lam-tokens -->", re.DOTALL)


class CardPicture(NamedTuple):
    """Attributes:
    name: Of its file, with `PICTURE_PREFIX`.
    data: PNG or JPEG.
    alt: What it shows, in words.
    """

    name: str
    data: bytes
    alt: str


def make_card(
    store: TokenStore,
    repo_id: str,
    revision: str | None,
    *,
    pictures: Sequence[CardPicture] = (),
    verdict: str = "",
    existing: str | None = None,
) -> str:
    """Text of the README.

    Args:
        store: Must have a provenance.
        repo_id, revision: Where the store will be pushed; the revision only if it has to be named.
        pictures: Will be stored next to the README.
        verdict: A sentence on what the tokens say, in Markdown.
        existing: The repository's current README.

    Raises:
        HubError: the metadata of `existing` is not valid YAML.
    """
    section = f"{_BEGIN}\n{_section(store, repo_id, revision, pictures, verdict)}\n{_END}"
    try:
        card: Any = DatasetCard(existing if existing is not None else "---\ntags: []\n---\n")
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(
            f"README.md of {repo_id} begins with metadata that cannot be read ({error}); correct or remove "
            "it on the Hub"
        ) from error
    if existing is None:
        card.data.viewer = False  # the Hub has none for safetensors
        card.data.task_categories = ["robotics"]
    tags = card.data.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    card.data.tags = tags + [tag for tag in TAGS if tag not in tags]
    text = card.text.strip()
    ours = _OURS.search(text)
    if ours is not None:
        text = text[: ours.start()] + section + text[ours.end() :]
    else:
        text = f"{text}\n\n{section}".lstrip()
    card.text = f"\n{text}\n"
    return str(card)


def _section(
    store: TokenStore, repo_id: str, revision: str | None, pictures: Sequence[CardPicture], verdict: str
) -> str:
    assert store.provenance is not None
    source, lam = store.provenance.dataset, store.provenance.lam
    where = repo_id if revision is None else f"{repo_id}@{revision}"
    parts = [
        f"# {repo_id.split('/')[1]}",
        "Tokens of a latent action model (LAM) for the frames of the LeRobot dataset "
        f"{_code(source.repo_id)}: what moved in the {store.provenance.stride_seconds:g} s before each of "
        f"them. They condition the policy `diffusion_lam` of {_code(PACKAGE)}; training with them loads no "
        "LAM.",
        "## What they are",
        _table(("", ""), [(name, _cell(_code(text))) for name, text in described(store).items()]),
        "## How to train with them",
        _commands(store.provenance, where),
        "The dataset has to be the very one: training checks its episodes before the first step. At "
        "deployment the policy computes its tokens live and needs the LAM with the fingerprint "
        f"{_code(lam.fingerprint[:16] + '…')} (`--policy.lam_model_path`).",
    ]
    if pictures or verdict:
        parts += ["## What they look like", *([verdict] if verdict else [])]
        parts += [f"![{_alt(picture.alt)}]({picture.name})" for picture in pictures]
    if store.codebook is not None:
        parts += ["## Codebook use", _usage(store)]
    return "\n\n".join(parts)


def _commands(provenance: Provenance, where: str) -> str:
    dataset, lam = shlex.quote(provenance.dataset.repo_id), shlex.quote(provenance.lam.path)
    kind = " --policy.lam_use_vq_tokens=false" if provenance.token_kind == CONTINUOUS else ""
    return (
        f"With the LeRobot plugin {_code(PACKAGE)} installed:\n\n"
        "```bash\n"
        f"lerobot-train --policy.type=diffusion_lam --dataset.repo_id={dataset} \\\n"
        f"    --policy.use_precomputed_lam_tokens=true --policy.lam_tokens_path={where}{kind} \\\n"
        "    --policy.push_to_hub=false --output_dir=outputs/diffusion_lam\n"
        "\n"
        f"lerobot-lam-tokens verify {where} --dataset.repo_id={dataset} --lam.path={lam}\n"
        f"lerobot-lam-tokens pull {where} --output_dir=./lam_tokens\n"
        "```"
    )


def _usage(store: TokenStore) -> str:
    counts = store.code_counts()
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    rows = []
    for slot, perplexity in enumerate(store.code_perplexity()):
        most = int(shares[slot].argmax())
        used = f"{int((counts[slot] > 0).sum())} of {counts.shape[1]}"
        rows.append((f"{slot}", used, f"{perplexity:.1f}", f"{most} ({shares[slot, most]:.1f} %)"))
    return _table(("slot", "codes in use", "perplexity", "most frequent code"), rows)


def _table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def _alt(text: str) -> str:
    """Make text safe inside an image description."""
    return " ".join(text.split()).replace("[", "(").replace("]", ")")


def _cell(text: str) -> str:
    """Make text safe inside a table cell."""
    return " ".join(text.split()).replace("|", "\\|")
