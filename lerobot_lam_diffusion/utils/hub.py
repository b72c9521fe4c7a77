"""Files of a Hugging Face Hub repository, through the Hub's own cache, and what its refusals mean."""

import re
from collections.abc import Sequence
from pathlib import Path

from lerobot_lam_diffusion.utils.errors import HubError, first_line, shown

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # cannot escape the cache's folder of branches

_ACCOUNT = "(hf auth login, or HF_TOKEN) with an account that may"


def fetch(repo_id: str, revision: str | None, files: Sequence[str], kind: str) -> Path:
    """Return the folder of a repository's snapshot, named by its commit, with those of `files` that it has.

    A commit in the cache is not requested again, so a pinned revision works offline. A branch is looked up if
    the Hub can be reached, and otherwise stays at its cached commit. Files are added to the cache atomically.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; None: the default branch.
        kind: "model" or "dataset".

    Raises:
        HubError: see `reason`.
    """
    # Imported here: huggingface_hub costs 0.3 s, and a local folder needs none of it.
    import httpx
    from huggingface_hub import snapshot_download

    refuse_impossible(repo_id, revision)
    try:
        return Path(snapshot_download(repo_id, repo_type=kind, revision=revision, allow_patterns=list(files)))
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise HubError(reason(error, kind)) from error


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


def reason(error: Exception, kind: str) -> str:
    """What an error of huggingface_hub means, and what to do about it.

    Args:
        error: `httpx.HTTPError`, `OSError`, `ValueError` or `RuntimeError` as it came from there.
        kind: "model" or "dataset": which repository was asked for.
    """
    from huggingface_hub import errors

    below = error.__cause__  # what prevented the lookup or the upload
    if isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) and isinstance(below, Exception):
        return reason(below, kind)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the Hub gives this {kind} only to those who accepted its conditions. Accept them on its page, "
            f"and log in {_ACCOUNT} see it"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the Hub has no {kind} repository of that name, or you may not see it. Correct the name, "
            f"or log in {_ACCOUNT} see it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hub has the repository, but not that revision. Correct it: a branch, tag or commit"
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error)
    return _not_delivered(error)


def _refused(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    answer = f"{status}: {first_line(getattr(error, 'server_message', None) or error)}"
    if status in (401, 403):
        return f"the Hub refused the credentials ({answer}). Log in {_ACCOUNT} do this"
    if status == 429 or (status or 0) >= 500:
        return f"the Hub is overloaded or unavailable ({answer}). Try again later"
    return f"the Hub refused ({answer}). Correct the request, or try again later"


def _not_delivered(error: Exception) -> str:
    import httpx
    from huggingface_hub import constants, errors

    cache = constants.HF_HUB_CACHE
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return (
            f"the Hub's cache {cache} does not have all of it, and HF_HUB_OFFLINE keeps from fetching it. Go "
            "online once (unset HF_HUB_OFFLINE), or name a local copy"
        )
    if isinstance(error, httpx.ConnectError | httpx.TimeoutException | errors.LocalEntryNotFoundError):
        return (
            f"the Hub could not be reached, nor does its cache {cache} have all of it "
            f"({first_line(error)}). Go online once, or name a local copy"
        )
    if isinstance(error, httpx.HTTPError) or "Consistency check failed" in str(error):
        return (
            f"the transfer broke off ({first_line(error)}); nothing of it is used. Run the same command again"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or cache} cannot be used ({error.strerror}). Free space, or set HF_HOME"
    return (
        f"the Hub did not answer as expected ({type(error).__name__}: {first_line(error)}). Correct the name"
    )
