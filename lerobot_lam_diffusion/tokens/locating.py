"""Resolve what a user writes (a folder, a file, a Hub id) to a token store's path on this machine.

| written                                                      | is                                        |
|--------------------------------------------------------------|-------------------------------------------|
| a path that exists                                           | that folder or file, whatever its name    |
| `user/name`, `user/name@revision`                            | a dataset repository on the Hub           |
| `hf://datasets/user/name`, `hf://user/name`, `…@revision`    | the same, also where such a folder exists |
"""

import contextlib
import os
import re
from pathlib import Path

from lerobot_lam_diffusion.tokens.layout import (
    PROVENANCE_FILE,
    TENSORS_FILE,
    check_content,
    find_folder,
    unfinished_folder,
)
from lerobot_lam_diffusion.utils.errors import HubError, TokenStoreError, shown
from lerobot_lam_diffusion.utils.hub import REPO_ID, fetch

KIND = "dataset"  # the Hub's kind of repository that holds a store

_URL = re.compile(r"hf:/{1,2}(datasets/)?")  # a Path makes one slash of two
_NAMESPACES = ("datasets", "models", "spaces", "kernels", "buckets")
_FILES = (".pt", ".pth", ".safetensors", ".json")


def locate_store(path: str | Path) -> tuple[Path, str | None]:
    """Locate a store; one on the Hub is fetched into the Hub's cache unless it is already there.

    Returns:
        Where the store is, or would be, on this machine; and `user/name@commit` if it came from the Hub, else
        None.

    Raises:
        TokenStoreError: no such repository, no access, or no network.
    """
    text = str(path)
    url = _URL.match(text)
    if url is None:
        local = Path(path)
        with contextlib.suppress(RuntimeError):  # a home that does not exist: then nor does the path
            local = local.expanduser()
        repo_id = text.partition("@")[0]
        may_be_hub_id = REPO_ID.fullmatch(repo_id) and not repo_id.endswith(_FILES)
        if not may_be_hub_id or os.path.lexists(local) or unfinished_folder(local).is_dir():
            return local, None
        return _fetched(text, text)
    name = text[url.end() :]
    if not REPO_ID.fullmatch(name.partition("@")[0]) or name.split("/")[0] in _NAMESPACES:
        raise TokenStoreError(
            f"no token store at {shown(text, 500)}: expected hf://datasets/user/name, with @revision if need "
            "be. Correct the address"
        )
    return _fetched(name, f"hf://datasets/{name}")


def _fetched(hub_id: str, written: str) -> tuple[Path, str]:
    repo_id, _, revision = hub_id.partition("@")
    try:
        folder = fetch(repo_id, revision or None, (TENSORS_FILE, PROVENANCE_FILE), KIND)
    except HubError as error:
        here = "" if _URL.match(written) else "there is no such folder here, and "
        raise TokenStoreError(
            f"no token store at {written}: {here}{error}. A store is made by "
            "lerobot-lam-precompute, and put on the Hub by lerobot-lam-tokens push"
        ) from error
    return folder, f"{repo_id}@{folder.name}"


def check_located(path: Path, hub_id: str | None, *, again: bool = False) -> Path:
    """Run `check_content` on a store that `locate_store` has found.

    Returns:
        The store's folder.

    Raises:
        TokenStoreError: see `find_folder` and `check_content`; for a fetched store it says what to do.
    """
    try:
        folder = find_folder(path)
        check_content(folder, again=again)
    except TokenStoreError as error:
        if hub_id is None:
            raise
        raise TokenStoreError(
            f"{error}. It was fetched from {hub_id}: remove {path.parent.parent} and it is fetched again; if "
            "that does not help, its owner has to push it again"
        ) from error
    return folder
