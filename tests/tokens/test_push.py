"""A store's way to the Hub and back; the Hub is a server on this machine."""

from dataclasses import replace

import pytest
from huggingface_hub import constants

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.card import CardPicture
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS
from lerobot_lam_diffusion.tokens.pull import pull_store
from lerobot_lam_diffusion.tokens.push import push_store
from lerobot_lam_diffusion.utils.errors import UserError
from tests.hub_server import OWNER, READER

REPO = "user/tokens"


def illustrate():
    return "**Good**: they do.", [CardPicture("lam_tokens_use_1.png", b"\x89PNG", "share of each code")]


@pytest.fixture
def owner(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    return hub


def refusal(*arguments, **options):
    with pytest.raises(UserError) as refused:
        push_store(*arguments, **options)
    return str(refused.value)


def test_push_makes_a_dataset_repository_with_card_and_picture(owner, random_store, random_files):
    pushed = push_store(random_store, REPO, illustrate=illustrate)
    head = owner.repos[REPO].head
    assert {name: head[name] for name in random_files} == random_files
    assert head["lam_tokens_use_1.png"] == b"\x89PNG"
    assert b"**Good**: they do.\n\n![share of each code](lam_tokens_use_1.png)" in head["README.md"]
    assert b"--policy.lam_tokens_path=user/tokens " in head["README.md"]
    assert pushed.hub_id == f"{REPO}@{owner.repos[REPO].branches['main']}"
    assert pushed.url.endswith(f"/datasets/{REPO}/commit/{pushed.hub_id.partition('@')[2]}")
    assert TokenStore.open(pushed.hub_id).provenance == random_store.provenance


def test_one_commit_holds_everything(owner, random_store):
    push_store(random_store, REPO)
    assert len(owner.repos[REPO].commits) == 2  # the empty repository, and ours


def test_a_branch_of_ones_own(owner, random_store, write_random, tmp_path):
    push_store(random_store, REPO)
    other = write_random(tmp_path / "other", (9, 12, 6, 7), frame_stride=3)
    pushed = push_store(other, REPO, revision="stride-3")
    branches = owner.repos[REPO].branches
    assert pushed.hub_id == f"{REPO}@{branches['stride-3']}"
    assert (
        b"lam_tokens_path=user/tokens@stride-3 "
        in owner.repos[REPO].commits[branches["stride-3"]]["README.md"]
    )
    assert TokenStore.open(f"{REPO}@stride-3").frame_stride == 3
    assert TokenStore.open(REPO).frame_stride == 1


def test_private(owner, random_store, monkeypatch):
    push_store(random_store, REPO, private=True)
    assert owner.repos[REPO].private
    push_store(random_store, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TokenStoreError, match="make sure you are authenticated"):
        TokenStore.open(REPO)


def test_what_shall_be_private_does_not_go_into_a_public_repository(owner, random_store):
    owner.add(REPO, {".gitattributes": b""})
    assert "is public, expected a private one" in refusal(random_store, REPO, private=True)
    assert TENSORS_FILE not in owner.repos[REPO].head


def test_pushing_again_keeps_what_the_user_wrote(owner, random_store, continuous_random, tmp_path):
    push_store(random_store, REPO, illustrate=illustrate)
    repo = owner.repos[REPO]
    card = repo.head["README.md"].decode()
    card = card.replace("---\n", "---\nlicense: mit\n", 1) + "\nAsk me about them.\n"
    repo.commit("main", {"README.md": card.encode(), "notes.txt": b"mine"})
    push_store(continuous_random, REPO)
    new = repo.head["README.md"].decode()
    assert "license: mit\n" in new
    assert "Ask me about them." in new
    assert "continuous, 2 × 4 numbers" in new
    assert "vq, 2 × 4" not in new
    assert repo.head["notes.txt"] == b"mine"
    assert "lam_tokens_use_1.png" not in repo.head  # of the store that was there before


@pytest.fixture
def continuous_random(write_random, tmp_path):
    return write_random(tmp_path / "continuous", (9, 12, 6, 7), token_kind=CONTINUOUS)


def test_a_repository_of_something_else_is_left_alone(owner, random_store):
    owner.add(REPO, {"meta/info.json": b"{}", "README.md": b"# a dataset"})
    assert "holds no token store but meta/info.json" in refusal(
        random_store, REPO, illustrate=lambda: pytest.fail("a long look at what is refused")
    )
    assert set(owner.repos[REPO].head) == {"meta/info.json", "README.md"}


def test_a_card_that_cannot_be_read_is_not_overwritten(owner, random_store):
    owner.add(REPO, {"README.md": b"---\nlicense: [\n---\n"})
    assert "metadata that cannot be read" in refusal(random_store, REPO)


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, "401"),
        (READER, "You don't have the rights"),
        ("hf_expired", "Invalid credentials"),
    ],
)
def test_refused_credentials(token, expected, hub, random_store, monkeypatch):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    told = refusal(random_store, REPO)
    assert told.startswith(f"{random_store.path} was not pushed to {REPO}: ")
    assert expected in told
    assert not hub.repos


def test_no_network(hub, random_store, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Connection refused" in refusal(random_store, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(random_store, REPO)


@pytest.mark.parametrize("repo_id", ["tokens", "a/b/c", "user/to kens", "user/.."])
def test_an_impossible_name(repo_id, owner, random_store):
    assert "Correct" in refusal(random_store, repo_id)
    assert not owner.repos


def test_a_damaged_store_is_not_pushed(owner, random_store):
    path = random_store.path / TENSORS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "its SHA-256 is" in refusal(random_store, REPO)
    assert owner.log == []


def test_a_file_without_provenance_is_not_pushed(owner, random_store):
    assert "does not say what its tokens are" in refusal(replace(random_store, provenance=None), REPO)


def test_pull(owner, random_store, random_files, tmp_path, monkeypatch):
    pushed = push_store(random_store, REPO)
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)  # `pull` is of the Hub, whatever lies here
    for number, written in enumerate((REPO, pushed.hub_id, f"hf://datasets/{REPO}")):
        folder = tmp_path / f"pulled-{number}"
        assert pull_store(written, folder).hub_id == pushed.hub_id
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == random_files
        assert not any(file.is_symlink() for file in folder.iterdir())


def test_pull_leaves_nothing_behind_where_it_fails(owner, random_files, tmp_path):
    owner.add(REPO, {**random_files, PROVENANCE_FILE: b"{}"})
    target = tmp_path / "target"
    with pytest.raises(TokenStoreError, match="does not describe a token store"):
        pull_store(REPO, target / "store")
    assert not target.exists()
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(FileExistsError):
        pull_store(REPO, target)
