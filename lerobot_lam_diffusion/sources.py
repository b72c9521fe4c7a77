"""Where LAM tokens come from: sources, each of which is one camera seen by one LAM.

A policy's config keeps them field by field: a plain value where there is one source, a list with an entry for
each where there are several. A plain value beside lists counts for every source. An entry that is not known
is None.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from lerobot_lam_diffusion.constants import AUTO
from lerobot_lam_diffusion.problems import UserError

DEFAULT_NUM_LEARNED_TOKENS = 2
DEFAULT_ACTION_LATENT_DIM = 32


@dataclass(frozen=True)
class LamSource:
    """One source of tokens; what its attributes mean is told of the config's fields (`FIELDS`)."""

    tokens_path: str | None = None
    model_path: str | None = None
    camera_key: str | None = None
    num_learned_tokens: int | None = None
    action_latent_dim: int | None = None
    fingerprint: str | None = None
    token_scale: float | None = None
    origin: str | None = None
    frame_size: str | None = None

    @property
    def token_dim(self) -> int:
        """Numbers in one frame's token of this source, n * a."""
        n = self.num_learned_tokens or DEFAULT_NUM_LEARNED_TOKENS
        a = self.action_latent_dim or DEFAULT_ACTION_LATENT_DIM
        return n * a

    @property
    def is_auto(self) -> bool:
        """Whether its token store comes out of the cache."""
        return self.tokens_path == AUTO


FIELDS = {
    "tokens_path": "lam_tokens_path",
    "model_path": "lam_model_path",
    "camera_key": "lam_camera_key",
    "num_learned_tokens": "lam_num_learned_tokens",
    "action_latent_dim": "lam_action_latent_dim",
    "fingerprint": "lam_fingerprint",
    "token_scale": "lam_token_scale",
    "origin": "lam_source",
    "frame_size": "lam_frame_size",
}
"""Attribute of a source → field of the config."""


def entries(value: Any) -> list:
    """A field's value as a list: one entry unless it is one already."""
    return value if isinstance(value, list) else [value]


def parse_lists(config: Any) -> None:
    """Make lists of fields that hold a list's text.

    With `--policy.path` LeRobot reads flags as JSON, where `[a,b]` without quotation marks is a plain string.
    """
    for field in FIELDS.values():
        value = getattr(config, field)
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            with contextlib.suppress(yaml.YAMLError):
                setattr(config, field, yaml.safe_load(value))


def parse_guidance(config: Any) -> None:
    """`lam_guidance` as None, one entry, or a list of entries, also where it is a list's text.

    Unquoted, the comma of `demo.mp4#t=1.5,9` in a list looks as if it parted two entries.
    """
    value = config.lam_guidance
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = value[1:-1].split(",")
    if isinstance(value, list | tuple):
        joined: list[str] = []
        for entry in (str(each).strip().strip("'\"") for each in value):
            if joined and re.fullmatch(r"[\d.]+", entry) and re.search(r"#t=[\d.]*$", joined[-1]):
                joined[-1] += f",{entry}"
            elif entry:
                joined.append(entry)
        value = joined
    config.lam_guidance = value or None


def read_sources(config: Any) -> list[LamSource]:
    """The sources that the fields of a config tell, in order.

    Raises:
        UserError: the fields do not tell how many there are.
    """
    problems = number_problems(config)
    if problems:
        raise UserError("; ".join(problems))
    told = {attribute: entries(getattr(config, field)) for attribute, field in FIELDS.items()}
    count = max(map(len, told.values()))
    return [
        LamSource(**{attribute: values[at if len(values) > 1 else 0] for attribute, values in told.items()})
        for at in range(count)
    ]


def write_sources(config: Any, sources: list[LamSource]) -> None:
    """Write what is known now into the fields; one that says the same already stays as it is written."""
    before = read_sources(config)
    for attribute, field in FIELDS.items():
        values = [getattr(source, attribute) for source in sources]
        if values != [getattr(source, attribute) for source in before]:
            setattr(config, field, values if len(values) > 1 else values[0])


def number_problems(config: Any) -> list[str]:
    """Why the fields of a config do not tell how many sources there are."""
    lengths = {field: len(entries(getattr(config, field))) for field in FIELDS.values()}
    problems = [
        f"{field} is an empty list: leave it unset, or give it an entry for each source of tokens"
        for field, length in lengths.items()
        if not length
    ]
    several = {field: length for field, length in lengths.items() if length > 1}
    if len(set(several.values())) > 1:
        told = ", ".join(f"{field} has {length}" for field, length in several.items())
        problems.append(
            f"lists with different numbers of entries: {told}. Give each an entry for each source of tokens, "
            "in one order, or one plain value that counts for all of them"
        )
    return problems


def source_problems(sources: list[LamSource], precomputed: bool) -> list[str]:
    """Why several sources cannot stand side by side, as far as the fields alone tell."""
    problems = []
    if precomputed and any(source.tokens_path is not None for source in sources):
        automatic = sum(source.is_auto for source in sources)
        if any(source.tokens_path is None for source in sources):
            problems.append("lam_tokens_path has an empty entry: name a token store for each source")
        if 0 < automatic < len(sources):
            problems.append(
                "lam_tokens_path mixes 'auto' and token stores: name a store for each source, or 'auto' for "
                "all of them"
            )
    for one, other, a, b in _pairs(sources):
        where = f"sources {one} and {other}"
        if precomputed and a.tokens_path is not None and a.tokens_path == b.tokens_path and not a.is_auto:
            problems.append(
                f"{where} have the same token store, lam_tokens_path={a.tokens_path}: name one for "
                "each (a store holds the tokens of one camera and one LAM)"
            )
        elif None not in (a.camera_key, a.model_path) and (a.camera_key, a.model_path) == (
            b.camera_key,
            b.model_path,
        ):
            problems.append(
                f"{where} are the same: lam_camera_key={a.camera_key}, lam_model_path={a.model_path} (a "
                "plain value, also one that a checkpoint brings, counts for all sources); leave one of them "
                "out, or name another camera or LAM"
            )
    return problems


def twins(known: Sequence[tuple[str | None, str | None]]) -> Iterator[tuple[int, int]]:
    """Which sources (1, 2, …) are the same camera and LAM, given the camera and fingerprint of each."""
    return ((one, other) for one, other, a, b in _pairs(known) if a == b and None not in a)


def _pairs(items: Sequence[Any]) -> Iterator[tuple[int, int, Any, Any]]:
    """Every two items, with their numbers from 1."""
    for one, a in enumerate(items, 1):
        for other, b in enumerate(items[one:], one + 1):
            yield one, other, a, b
