"""Files of a Hugging Face Hub repository, through the Hub's own cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from lerobot_lam_diffusion.utils.errors import HubError, shown

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # cannot escape the cache's folder of branches


def fetch(repo_id: str, revision: str | None, files: Sequence[str], kind: str) -> Path:
    """Return the folder of a repository's snapshot, named by its commit, with those of `files` that it has.

    A commit in the cache is not requested again, so a pinned revision works offline. A branch is looked up if
    the Hub can be reached, and otherwise stays at its cached commit. Files are added to the cache atomically.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; None: the default branch.
        kind: "model" or "dataset".

    Raises:
        HubError: what the Hub, the network or the cache refused.
    """
    # Imported here: huggingface_hub costs 0.3 s, and a local folder needs none of it.
    import httpx
    from huggingface_hub import snapshot_download

    refuse_impossible(repo_id, revision)
    try:
        return Path(snapshot_download(repo_id, repo_type=kind, revision=revision, allow_patterns=list(files)))
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise HubError(f"huggingface_hub says: {reason(error)}") from error


def refuse_impossible(repo_id: str, revision: str | None) -> None:
    """Refuse names that the Hub would not have, or that lead out of its cache's folders.

    Raises:
        HubError: which of the two, and what is expected.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise HubError(f"{shown(repo_id)} is not a valid Hub repository, expected owner/name. Correct it")
    if revision is not None and not REVISION.fullmatch(revision):
        raise HubError(
            f"{shown(revision)} is not a valid revision, expected a branch, tag or commit. Correct it"
        )


def reason(error: Exception) -> str:
    """What huggingface_hub says of an error and of its cause, on one line without a full stop."""
    from huggingface_hub.errors import HfHubHTTPError

    told = " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__
    cause = error.__cause__
    if cause is None or isinstance(error, HfHubHTTPError) or str(cause) in str(error):  # it says all
        return told
    return f"{told} ({' '.join(str(cause).split())[:500]})"
