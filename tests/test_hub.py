"""What the Hub's refusals are told as; how stores come from it is in `tokens/test_locating.py`."""

import errno

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from lerobot_lam_diffusion.utils.errors import HubError
from lerobot_lam_diffusion.utils.hub import fetch, reason, refuse_impossible
from tests.hub_server import connect, serve

REPO = "user/model"


def answered(message):
    response = httpx.Response(403, request=httpx.Request("GET", "http://x/"))
    return HfHubHTTPError(message, response=response)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered("418 for url"), "418 for url"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), "No space left on device: '/cache/x'"),
        (ValueError("Malformed response.\nfrom  server."), "Malformed response. from server"),
        (httpx.ReadTimeout(""), "ReadTimeout"),
        (ValueError("x" * 5000), "x" * 500),
    ],
)
def test_a_reason_is_one_line(error, expected):
    told = reason(error)
    assert told.endswith(expected)
    assert len(told) < 600


def test_the_cause_is_told_once():
    uploading = RuntimeError("Error while uploading.")
    uploading.__cause__ = answered("403 for url read-only token")
    assert reason(uploading) == "Error while uploading (403 for url read-only token)"
    looking = RuntimeError("Got: 403 for url read-only token. Please try again.")
    looking.__cause__ = httpx.ConnectError("403 for url read-only token")
    assert reason(looking) == "Got: 403 for url read-only token. Please try again"


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "../x", "a/../b", "user/", "/user", ""])
def test_impossible_names(repo_id):
    with pytest.raises(HubError, match=r"expected owner/name\. Correct it"):
        refuse_impossible(repo_id, None)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with serve() as server:
        server.add(REPO, {"a": b"1"})
        connect(monkeypatch, server.url, tmp_path / "file" / "cache")
        with pytest.raises(HubError, match="Not a directory"):
            fetch(REPO, None, ["a"], "dataset")
