"""A token store → a dataset repository on the Hub, with its card, in one commit."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lerobot_lam_diffusion.tokens.card import PICTURE_PREFIX, CardPicture, make_card
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE, check_content
from lerobot_lam_diffusion.tokens.locating import KIND
from lerobot_lam_diffusion.tokens.store import TokenStore
from lerobot_lam_diffusion.utils.errors import HubError, TokenStoreError, UserError
from lerobot_lam_diffusion.utils.hub import reason, refuse_impossible

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Illustrate = Callable[[], tuple[str, list[CardPicture]]]
CARD_FILE = "README.md"
DEFAULT_BRANCH = "main"
_PICTURES = (".png", ".jpg")
_ANYWHERE = (".gitattributes", CARD_FILE)  # files of a repository in which nothing is


class Pushed(NamedTuple):
    """Attributes:
    hub_id: `user/name@commit`.
    url: Of the commit's page.
    """

    hub_id: str
    url: str


def push_store(
    store: TokenStore,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    illustrate: Illustrate | None = None,
) -> Pushed:
    """Commit a store to `repo_id`, creating the repository if needed.

    Args:
        store: May be partial; all of it is read again first.
        repo_id: `user/name`.
        private: Visibility of a new repository; None: the namespace's default. An existing repository is not
            changed, and a public one is refused if a private one is requested.
        revision: Branch, created if needed; None: `main`.
        illustrate: Makes the card's verdict and pictures after the repository has been checked. They replace
            those of an earlier push.

    Raises:
        UserError: `store` is a `.pt` file or damaged, the Hub refuses it, or the repository holds something
            else.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    if store.provenance is None:
        raise TokenStoreError(
            f"{store.path} does not say what its tokens are, so nobody could check them; only token stores "
            "are pushed. Extract one with lerobot-lam-precompute"
        )
    check_content(store.path, again=True)
    api = HfApi()
    try:
        refuse_impossible(repo_id, revision)
        repo_id = api.create_repo(repo_id, repo_type=KIND, private=private, exist_ok=True).repo_id
        _refuse_public(api, repo_id, private)
        if revision not in (None, DEFAULT_BRANCH):
            api.create_branch(repo_id, repo_type=KIND, branch=str(revision), exist_ok=True)
        info = api.dataset_info(repo_id, revision=revision)
        present = {sibling.rfilename for sibling in info.siblings or []}
        _refuse_other(repo_id, present)
        existing = None
        if CARD_FILE in present:
            path = hf_hub_download(repo_id, CARD_FILE, repo_type=KIND, revision=info.sha)
            existing = Path(path).read_text(encoding="utf-8")
        verdict, pictures = illustrate() if illustrate is not None else ("", [])
        named = None if revision == DEFAULT_BRANCH else revision
        card = make_card(store, repo_id, named, pictures=pictures, verdict=verdict, existing=existing)
        outdated = {name for name in present if name.startswith(PICTURE_PREFIX) and name.endswith(_PICTURES)}
        operations: list[Any] = [
            CommitOperationAdd(TENSORS_FILE, store.path / TENSORS_FILE),
            CommitOperationAdd(PROVENANCE_FILE, store.path / PROVENANCE_FILE),
            CommitOperationAdd(CARD_FILE, card.encode()),
            *(CommitOperationAdd(picture.name, picture.data) for picture in pictures),
            *(CommitOperationDelete(name) for name in sorted(outdated - {each.name for each in pictures})),
        ]
        commit = api.create_commit(
            repo_id, operations, commit_message="LAM tokens", repo_type=KIND, revision=revision
        )
    except HubError as error:
        raise HubError(f"{store.name} was not pushed to {repo_id}: {error}.") from error
    except UserError:
        raise
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{store.name} was not pushed to {repo_id}: {reason(error)}.") from error
    return Pushed(f"{repo_id}@{commit.oid}", str(commit.commit_url))


def _refuse_public(api: "HfApi", repo_id: str, private: bool | None) -> None:
    if private and api.dataset_info(repo_id).private is False:
        raise HubError(
            f"{repo_id} exists already and is public, expected a private one (--private=true). Name another "
            "--repo_id, or make it private in its settings on the Hub"
        )


def _refuse_other(repo_id: str, present: set[str]) -> None:
    others = sorted(present.difference(_ANYWHERE))
    if others and PROVENANCE_FILE not in present:
        raise HubError(
            f"{repo_id} exists already and holds no token store but {', '.join(others[:3])}"
            f"{', …' if len(others) > 3 else ''}. A store has a repository of its own: name another --repo_id"
        )
