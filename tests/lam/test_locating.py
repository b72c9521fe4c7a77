"""Where models are found: folders, shipped names, and a Hub that is a server on this machine."""

import pytest

from lerobot_lam_diffusion.lam import load_lam, resolve_lam, shipped_lams
from lerobot_lam_diffusion.lam.locating import locate_lam
from lerobot_lam_diffusion.utils.errors import LamError
from tests.hub_server import connect, serve

REPO = "someone/a-lam"


def test_a_folder_or_its_lam_folder(make_lam_folder, tmp_path):
    folder = make_lam_folder("checkpoint/lam")
    assert resolve_lam(folder) == folder
    assert resolve_lam(str(tmp_path / "checkpoint")) == folder
    assert load_lam(tmp_path / "checkpoint").path == folder


def test_nothing_there(tmp_path):
    with pytest.raises(LamError, match=r"no LAM at '.*nowhere'(.|\n)*Hub id(.|\n)*Correct the path"):
        resolve_lam(tmp_path / "nowhere")
    with pytest.raises(LamError, match=r"holds no model_config\.json"):
        resolve_lam(tmp_path)


def test_shipped_names():
    for name in shipped_lams():
        assert load_lam(name).revision is None


def test_hub(make_lam_folder, tmp_path, monkeypatch):
    """A model in the folder lam/ of a repository, beside a large file that nobody wants."""
    files = {f"lam/{path.name}": path.read_bytes() for path in make_lam_folder("remote").iterdir()}
    with serve() as server:
        commit = server.add(REPO, files | {"policy.bin": b"x" * 1000})
        server.repos[REPO].branches["v1"] = commit
        connect(monkeypatch, server.url, tmp_path / "cache")
        for revision in (None, "v1"):
            folder, found = locate_lam(REPO, revision)
            assert found == commit
            assert sorted(path.name for path in folder.iterdir()) == [
                "model.safetensors",
                "model_config.json",
            ]
            assert [path.name for path in folder.parent.iterdir()] == ["lam"]
        with pytest.raises(
            LamError, match=r"LAM at 'someone/a-lam' at revision 'nope'(.|\n)*Revision Not Found"
        ):
            locate_lam(REPO, "nope")
        with pytest.raises(LamError, match=r"LAM at 'someone/else'(.|\n)*Repository Not Found"):
            locate_lam("someone/else")
    # The cache serves it offline, and an absent one says how to get it.
    connect(monkeypatch, server.url, tmp_path / "cache", offline=True)
    assert locate_lam(REPO) == (folder, commit)
    with pytest.raises(LamError, match="HF_HUB_OFFLINE"):
        locate_lam("someone/other")
