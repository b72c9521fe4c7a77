"""What the Hub's refusals are told as; how stores come from it is in `tokens/test_locating.py`."""

import errno

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lerobot_lam_diffusion.utils.errors import HubError
from lerobot_lam_diffusion.utils.hub import fetch, reason, refuse_impossible
from tests.hub_server import connect, serve

REPO = "user/model"


def answered(status, message=None):
    response = httpx.Response(status, request=httpx.Request("GET", "http://x/"))
    return HfHubHTTPError(f"{status} for url", response=response, server_message=message)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered(429), "overloaded or unavailable (429: 429 for url). Try again later"),
        (answered(418, "I am a teapot"), "the Hub refused (418: I am a teapot)"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), "/cache/x cannot be used (No space"),
        (
            OSError("Consistency check failed: file should be of size 9"),
            "broke off (Consistency check failed",
        ),
        (httpx.RemoteProtocolError("peer closed connection"), "nothing of it is used. Run the same command"),
        (ValueError("Malformed response\nfrom server"), "(ValueError: Malformed response). "),
        (httpx.ReadTimeout(""), "could not be reached"),
        (ValueError("x" * 5000), "…"),
    ],
)
def test_reasons(error, expected, monkeypatch, tmp_path):
    connect(monkeypatch, "http://127.0.0.1:9", tmp_path)
    told = reason(error, "model")
    assert expected in told
    assert len(told) < 500


def test_the_reason_below_is_the_one_told():
    for above in (LocalEntryNotFoundError("not found locally"), RuntimeError("Error while uploading")):
        above.__cause__ = answered(403, "read-only token")
        assert "refused the credentials (403: read-only token)" in reason(above, "model")


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "../x", "a/../b", "user/", "/user", ""])
def test_impossible_names(repo_id):
    with pytest.raises(HubError, match=r"expected owner/name\. Correct it"):
        refuse_impossible(repo_id, None)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with serve() as server:
        server.add(REPO, {"a": b"1"})
        connect(monkeypatch, server.url, tmp_path / "file" / "cache")
        with pytest.raises(HubError, match="cannot be used"):
            fetch(REPO, None, ["a"], "dataset")


def test_only_what_is_asked_for_is_fetched(monkeypatch, tmp_path):
    with serve() as server:
        commit = server.add(REPO, {"a": b"1", "b": b"2"})
        connect(monkeypatch, server.url, tmp_path)
        folder = fetch(REPO, None, ["a", "c"], "dataset")
    assert folder.name == commit
    assert [file.name for file in folder.iterdir()] == ["a"]
