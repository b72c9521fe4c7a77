"""The one message with which a command refuses its input."""

from collections.abc import Callable, Sequence

import pytest


def refusal(main: Callable[[list[str]], None], argv: Sequence[object]) -> str:
    """Run a command that must exit with status 1 and a message, which Python prints to standard error."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    message = stopped.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message
