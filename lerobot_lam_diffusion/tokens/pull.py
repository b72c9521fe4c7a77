"""Copy a token store from the Hub to a local folder."""

import shutil
from pathlib import Path

from lerobot_lam_diffusion.tokens.checked import note, place_of
from lerobot_lam_diffusion.tokens.layout import (
    PROVENANCE_FILE,
    TENSORS_FILE,
    check_content,
    refuse_occupied,
    stamp_of,
)
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.files import whole_or_nothing


def pull_store(hub_id: str, folder: Path) -> TokenStore:
    """Copy a store from the Hub to `folder`, which appears whole or not at all.

    Args:
        hub_id: `user/name[@revision]`, with or without `hf://datasets/`; a local folder of that name is
            ignored.
        folder: Must not exist or must be empty.

    Returns:
        The store in the Hub's cache, whose `hub_id` gives the commit; its copy has the same bytes.

    Raises:
        TokenStoreError: see `TokenStore.open`.
        FileExistsError, OSError: `folder` cannot be made, or the disk is full; nothing is left behind.
    """
    refuse_occupied(folder)
    store = TokenStore.open(hub_id if hub_id.startswith("hf:") else f"hf://datasets/{hub_id}")
    with whole_or_nothing(folder) as partial:
        partial.mkdir()
        for name in (TENSORS_FILE, PROVENANCE_FILE):
            shutil.copyfile(store.path / name, partial / name)
        check_content(partial)
        stamp = stamp_of(partial)
    note(place_of("checked", folder), stamp, True)
    return store
