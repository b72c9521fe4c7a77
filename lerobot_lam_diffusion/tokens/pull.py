"""A token store on the Hub → a folder of one's own."""

import shutil
from pathlib import Path

from lerobot_lam_diffusion.tokens.checked import remember
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE, check_content, stamp_of
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.tokens.tensor_file import fsync
from lerobot_lam_diffusion.tokens.writer import into_place, refuse_existing
from lerobot_lam_diffusion.utils.files import partial_folder


def pull_store(hub_id: str, folder: Path) -> TokenStore:
    """Copy a store from the Hub to `folder`, which appears whole or not at all.

    Args:
        hub_id: `user/name[@revision]`, with or without `hf://datasets/`; a local folder of that name does
            not count.
        folder: Must not exist, or be empty.

    Returns:
        The store in the Hub's cache, where `hub_id` tells the commit; its copy has the same bytes.

    Raises:
        TokenStoreError: see `TokenStore.open`.
        FileExistsError, OSError: `folder` cannot be made, or the disk is full; nothing is left behind.
    """
    refuse_existing(folder)
    store = TokenStore.open(hub_id if hub_id.startswith("hf:") else f"hf://datasets/{hub_id}")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(folder)
    try:
        for name in (TENSORS_FILE, PROVENANCE_FILE):
            shutil.copyfile(store.path / name, partial / name)
            fsync(partial / name)
        check_content(partial)
        stamp = stamp_of(partial)
        refuse_existing(folder)  # fetching may have taken long
        into_place(partial, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    remember(folder, stamp)
    return store
