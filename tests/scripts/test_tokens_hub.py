"""`lerobot-lam-tokens` and the Hub; once as users have it: own processes, which read their environment."""

import os
import re
import subprocess
import sys

import pytest

from lerobot_lam_diffusion.scripts.tokens import main
from lerobot_lam_diffusion.tokens import LamTokenDataset, TokenStore
from tests.hub_server import OWNER, connect, serve

REPO = "user/tokens"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve() as server:
        connect(monkeypatch, server.url, tmp_path / "hub-cache")
        monkeypatch.setenv("HF_TOKEN", OWNER)
        yield server


def run(*words):
    main(list(map(str, words)))


@pytest.mark.slow
def test_push_then_every_command_by_the_repositorys_name(
    hub, dataset, store, lam_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run("push", store.path, f"--repo_id={REPO}", "--private=true")
    told = capsys.readouterr().out
    hub_id = f"{REPO}@{hub.repos[REPO].branches['main']}"
    assert f"--policy.lam_tokens_path={hub_id} " in told
    assert f"names the LAM by its path here, {lam_folder}" in told
    assert hub.repos[REPO].private

    run("info", REPO)
    assert f"store           {hub_id}, " in capsys.readouterr().out
    of = [f"--dataset.repo_id={dataset.repo_id}", f"--dataset.root={dataset.root}"]
    run("verify", hub_id, *of, "--dataset.video_backend=pyav", f"--lam.path={lam_folder}", "--device=cpu")
    assert capsys.readouterr().out.count("ok  ") == 3
    run("export", f"hf://datasets/{REPO}", "--format=npy", "--output=x.npy")
    run("merge", REPO, hub_id, "--output_dir=merged")
    assert TokenStore.open("merged").provenance.tensors_sha256 == store.provenance.tensors_sha256
    run("pull", f"{REPO}@main", "--output_dir=pulled")
    assert hub_id in capsys.readouterr().out
    assert TokenStore.open("pulled").provenance == store.provenance
    assert LamTokenDataset(dataset, REPO).store.name == hub_id


@pytest.mark.slow
def test_with_its_dataset_the_card_shows_frames_and_the_verdict(hub, dataset, store):
    of = [f"--dataset.repo_id={dataset.repo_id}", f"--dataset.root={dataset.root}"]
    run("push", store.path, f"--repo_id={REPO}", *of, "--dataset.video_backend=pyav")
    files = hub.repos[REPO].head
    card = files["README.md"].decode()
    assert re.search(r"\*\*(Good|Doubtful|Useless)\*\*: on held-out episodes they explain \d+%", card)
    shown = re.findall(r"!\[.+?\]\((\S+?\.(?:png|jpg))\)", card)
    assert {name.rpartition("_")[0] for name in shown} >= {"lam_tokens_codes", "lam_tokens_time"}
    assert all(len(files[name]) > 1000 for name in shown)


def test_errors_are_one_message(hub, store, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("info", "user/nope")
    assert "error: no token store at user/nope: " in str(stopped.value.code)
    with pytest.raises(SystemExit) as stopped:
        run("push", store.path, "--repo_id=nobody")
    assert "is not a valid Hub repository" in str(stopped.value.code)


_STEPS = """
import sys
from lerobot_lam_diffusion.scripts.tokens import main
for line in sys.argv[1:]:
    main(line.split())
"""


@pytest.mark.slow
def test_real_environment_variables(store, tmp_path):
    environment = dict(os.environ, HF_HOME=str(tmp_path / "home"), HF_TOKEN=OWNER, HF_HUB_DISABLE_XET="1")

    def steps(*lines, **variables):
        command = [sys.executable, "-c", _STEPS, *lines]
        done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    with serve() as server:
        online = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        code, out, err = steps(f"push {store.path} --repo_id={REPO}", f"info {REPO}", **online)
        assert code == 0, err
        hub_id = f"{REPO}@{server.repos[REPO].branches['main']}"
        assert f"store           {hub_id}" in out
    code, out, err = steps(
        f"info {hub_id}", f"pull {REPO} --output_dir={tmp_path}/pulled", "info user/other", HF_HUB_OFFLINE="1"
    )
    assert f"store           {hub_id}" in out
    assert TokenStore.open(tmp_path / "pulled").provenance == store.provenance
    assert code == 1
    assert "unset the `HF_HUB_OFFLINE` environment variable" in err
