"""What the tests of hostile inputs share."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import HOSTILE_INPUTS
from tests.fuzz.jail import try_all

REMEDIES = (
    "again",
    "Extract",
    "orrect",
    "oint to",
    "ake a store",
    "as lerobot-lam-precompute",
    "pip install",
)
LONGEST_MESSAGE = 20_000


def check_refusal(error: UserError, kind: type[UserError]) -> str:
    """A refusal is of its reader's kind, says what to do, can be printed, does not quote all the input."""
    assert type(error) is kind
    message = str(error)
    assert any(remedy in message for remedy in REMEDIES), message
    message.encode()
    assert len(message) < LONGEST_MESSAGE, message[:2000]
    return "refused"


@pytest.fixture
def fuzz(record_property) -> Callable[..., Counter[str]]:
    """`try_all`, counted under the name of the reader that is tried; `tests/conftest.py` tells the sums."""

    def run(
        reader: str, inputs: Iterable[tuple[str, Any]], check: Callable[[Any], str], **options
    ) -> Counter:
        counts = try_all(inputs, check, **options)
        record_property(HOSTILE_INPUTS + reader.replace(" ", "_"), dict(counts))
        return counts

    return run
