"""Which store a user means, and how one comes from the Hub; the Hub is a server on this machine."""

import pickle
import re
import shutil

import pytest
import torch
from huggingface_hub import constants

from lerobot_lam_diffusion.tokens import TokenStore, TokenStoreError
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.tokens.locating import locate_store
from tests.hub_server import OWNER, READER

REPO = "user/tokens"


@pytest.fixture
def commit(hub, random_files):
    """The store as a repository, among files that nobody asks for."""
    return hub.add(REPO, {**random_files, "README.md": b"# card\n", "video.mp4": b"x" * 5000})


def refusal(path):
    with pytest.raises(TokenStoreError) as refused:
        TokenStore.open(path)
    return str(refused.value)


@pytest.mark.parametrize("written", [REPO, f"hf://datasets/{REPO}", f"hf://{REPO}"])
def test_a_store_comes_from_the_hub_with_its_two_files_only(written, hub, commit, random_store):
    store = TokenStore.open(written)
    frames = torch.arange(34)
    assert torch.equal(store.window(frames, [-1, 0]), random_store.window(frames, [-1, 0]))
    assert store.hub_id == store.name == f"{REPO}@{commit}"
    assert sorted(file.name for file in store.path.iterdir()) == [PROVENANCE_FILE, TENSORS_FILE]
    assert not any("mp4" in line for line in hub.log)


def test_a_worker_maps_it_again_and_knows_its_name(hub, commit):
    store = pickle.loads(pickle.dumps(TokenStore.open(REPO)))
    assert store.name == f"{REPO}@{commit}"
    assert len(store.values) == 34


def test_a_revision_pins(hub, commit, random_files, write_random, tmp_path):
    write_random(tmp_path / "new", (9, 12, 6, 7), num_codes=20)
    newer = {name: (tmp_path / "new" / name).read_bytes() for name in random_files}
    later = hub.add(REPO, newer)
    hub.repos[REPO].branches["feature/x"] = commit
    assert TokenStore.open(REPO).hub_id == f"{REPO}@{later}"
    for revision in (commit, "feature/x"):
        pinned = TokenStore.open(f"{REPO}@{revision}")
        assert pinned.hub_id == f"{REPO}@{commit}"
        assert len(pinned.codebook) == 16
    hub.log.clear()
    TokenStore.open(f"{REPO}@{commit}")
    assert hub.log == []  # a commit in the cache is not asked for


@pytest.mark.parametrize("written", [REPO, "pinned"])
@pytest.mark.parametrize("trouble", ["HF_HUB_OFFLINE", "no server", "out of order"])
def test_offline_afterwards(trouble, written, hub, commit, monkeypatch):
    TokenStore.open(REPO)
    if trouble == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "no server":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.fails = 503
    hub.log.clear()
    assert TokenStore.open(f"{REPO}@{commit}" if written == "pinned" else REPO).name == f"{REPO}@{commit}"


def test_an_existing_folder_wins_and_an_address_does_not_look_at_folders(
    hub, commit, random_store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(random_store.path, tmp_path / REPO)
    hub.log.clear()
    assert TokenStore.open(REPO).hub_id is None
    assert hub.log == []
    assert TokenStore.open(f"hf://datasets/{REPO}").hub_id == f"{REPO}@{commit}"


@pytest.mark.parametrize(
    "written", ["./user/tokens", "/user/tokens", "tokens", "a/b/c", "user/tokens.pt", f"user/{TENSORS_FILE}"]
)
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(written, hub):
    path, hub_id = locate_store(written)
    assert (str(path), hub_id) == (written.removeprefix("./"), None)
    assert hub.log == []


def test_an_unfinished_extraction_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "tokens.shards").mkdir(parents=True)
    assert "its extraction is unfinished" in refusal(REPO)
    assert hub.log == []


@pytest.mark.parametrize(
    "written", ["hf://tokens", "hf://datasets/tokens", "hf://a/b/c", "hf://", "hf://a/b c"]
)
def test_an_address_that_is_none(written, hub):
    assert "expected hf://datasets/user/name" in refusal(written)
    assert hub.log == []


@pytest.mark.parametrize("revision", ["nope", "../../..", "a b", "0" * 40])
def test_an_unknown_revision(revision, hub, commit):
    assert re.search("revision|rev id", refusal(f"{REPO}@{revision}"), re.IGNORECASE)


def test_an_unknown_repository_tells_both_places_where_it_was_looked_for(hub):
    told = refusal("user/nope")
    assert told.startswith("no token store at user/nope: there is no such folder here, and huggingface_hub")
    assert "Repository Not Found" in told
    assert "make sure you are authenticated" in told
    assert "lerobot-lam-precompute" in told
    assert "folder here" not in refusal("hf://datasets/user/nope")


@pytest.mark.parametrize(
    ("options", "token", "expected"),
    [
        ({"private": True}, None, "make sure you are authenticated"),
        ({"private": True}, READER, "your token has the required permissions"),
        ({"private": True}, "hf_expired", "Invalid credentials"),
        ({"gated": True}, READER, "Access to this dataset is restricted"),
    ],
)
def test_refused_credentials(options, token, expected, hub, random_files, monkeypatch):
    hub.add(REPO, random_files, **options)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert expected in refusal(REPO)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    assert len(TokenStore.open(REPO).values) == 34


@pytest.mark.parametrize("status", [403, 503])
def test_a_hub_that_refuses_everything(status, hub, commit):
    hub.fails = status
    told = refusal(REPO)
    assert str(status) in told
    assert "out of order" in told


def test_no_network_and_nothing_in_the_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check your internet connection" in refusal(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset the `HF_HUB_OFFLINE` environment variable" in refusal(REPO)


@pytest.mark.parametrize("files", [{}, {"data.bin": b"x"}, {PROVENANCE_FILE: b"{}"}])
def test_a_repository_that_is_no_store(files, hub):
    hub.add(REPO, {"README.md": b"", **files})
    told = refusal(REPO)
    assert TENSORS_FILE in told
    assert "push" in told


def test_a_store_whose_hash_does_not_fit(hub, random_files):
    content = bytearray(random_files[TENSORS_FILE])
    content[-1] ^= 1
    sha = hub.add(REPO, {**random_files, TENSORS_FILE: bytes(content)})
    told = refusal(REPO)
    assert "its SHA-256 is" in told
    assert f"fetched from {REPO}@{sha}" in told
    assert "datasets--user--tokens and it is fetched again" in told


def test_a_damaged_cache_is_mended_as_the_message_says(hub, commit):
    store = TokenStore.open(REPO)
    path = (store.path / TENSORS_FILE).resolve()
    path.write_bytes(path.read_bytes()[:-1])
    told = refusal(REPO)
    shutil.rmtree(told.split("remove ")[1].split(" and ")[0])
    assert TokenStore.open(REPO).name == store.name
