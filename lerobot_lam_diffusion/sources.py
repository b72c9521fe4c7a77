"""Sources of LAM tokens: each is one camera seen by one LAM.

A policy's config stores them field by field: a plain value for a single source, a list with one entry per
source for several. A plain value alongside lists applies to every source. An unknown entry is None.
"""

import contextlib
import re
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import yaml

from lerobot_lam_diffusion.constants import AUTO
from lerobot_lam_diffusion.utils.errors import UserError

DEFAULT_NUM_LEARNED_TOKENS = 2
DEFAULT_ACTION_LATENT_DIM = 32


@dataclass(frozen=True)
class LamSource:
    """One source of tokens; each attribute is described with its config field (`FIELDS`)."""

    tokens_path: str | None = None
    model_path: str | None = None
    camera_key: str | None = None
    num_learned_tokens: int | None = None
    action_latent_dim: int | None = None
    fingerprint: str | None = None
    token_scale: float | None = None
    trained_on: str | None = None
    frame_size: str | None = None

    @property
    def token_dim(self) -> int:
        """Token dimension, n * a."""
        n = self.num_learned_tokens or DEFAULT_NUM_LEARNED_TOKENS
        a = self.action_latent_dim or DEFAULT_ACTION_LATENT_DIM
        return n * a

    @property
    def is_auto(self) -> bool:
        """Whether its token store comes out of the cache."""
        return self.tokens_path == AUTO


FIELDS = {each.name: f"lam_{each.name}" for each in fields(LamSource)} | {"trained_on": "lam_source"}
"""Attribute of a source → field of the config."""


def entries(value: Any) -> list:
    """A field's value as a list."""
    return value if isinstance(value, list) else [value]


def parse_lists(config: Any) -> None:
    """Turn fields that hold the text of a list into lists.

    With `--policy.path` LeRobot reads flags as JSON, where `[a,b]` without quotation marks is a plain string.
    """
    for field in FIELDS.values():
        value = getattr(config, field)
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            with contextlib.suppress(yaml.YAMLError):
                setattr(config, field, yaml.safe_load(value))


def parse_guidance(config: Any) -> None:
    """Normalise `lam_guidance` to None, one entry or a list of entries; the text of a list is parsed.

    Unquoted, the comma in `demo.mp4#t=1.5,9` looks like a separator between two entries.
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
    """The sources that the fields of a config describe, in order.

    Raises:
        UserError: lists differ in length.
    """
    problems = length_problems(config)
    if problems:
        raise UserError("; ".join(problems))
    values = {attribute: entries(getattr(config, field)) for attribute, field in FIELDS.items()}
    count = max(map(len, values.values()))
    return [
        LamSource(**{attribute: each[at if len(each) > 1 else 0] for attribute, each in values.items()})
        for at in range(count)
    ]


def write_sources(config: Any, sources: list[LamSource]) -> None:
    """Write `sources` into the fields; a field whose meaning does not change keeps its spelling."""
    before = read_sources(config)
    for attribute, field in FIELDS.items():
        values = [getattr(source, attribute) for source in sources]
        if values != [getattr(source, attribute) for source in before]:
            setattr(config, field, values if len(values) > 1 else values[0])


def length_problems(config: Any) -> list[str]:
    """Why the number of sources is not clear: empty lists, and lists of different lengths."""
    lengths = {field: len(entries(getattr(config, field))) for field in FIELDS.values()}
    problems = [
        f"{field} is an empty list: leave it unset, or give it an entry for each source of tokens"
        for field, length in lengths.items()
        if not length
    ]
    several = {field: length for field, length in lengths.items() if length > 1}
    if len(set(several.values())) > 1:
        listed = ", ".join(f"{field} has {length}" for field, length in several.items())
        problems.append(
            f"lists with different numbers of entries: {listed}. Give each an entry for each source of "
            "tokens, in one order, or one plain value that counts for all of them"
        )
    return problems


def source_problems(sources: list[LamSource], precomputed: bool) -> list[str]:
    """Conflicts between sources that the config fields alone reveal."""
    problems = []
    if precomputed and any(source.tokens_path is not None for source in sources):
        if any(source.tokens_path is None for source in sources):
            problems.append("lam_tokens_path has an empty entry: name a token store for each source")
        if len({source.is_auto for source in sources}) > 1:
            problems.append(
                "lam_tokens_path mixes 'auto' and token stores: name a store for each source, or 'auto' for "
                "all of them"
            )
    for (one, a), (other, b) in combinations(enumerate(sources, 1), 2):
        view = (a.camera_key, a.model_path)
        if precomputed and a.tokens_path is not None and a.tokens_path == b.tokens_path and not a.is_auto:
            problems.append(
                f"sources {one} and {other} have the same token store, lam_tokens_path={a.tokens_path}: name "
                "one for each (a store holds the tokens of one camera and one LAM)"
            )
        elif None not in view and view == (b.camera_key, b.model_path):
            problems.append(
                f"sources {one} and {other} are the same: lam_camera_key={a.camera_key}, "
                f"lam_model_path={a.model_path} (a plain value, also one that a checkpoint brings, counts "
                "for all sources); leave one of them out, or name another camera or LAM"
            )
    return problems
