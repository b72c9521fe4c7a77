"""`lam_tokens_path=auto`: stock `lerobot-train` builds the tokens that it lacks, once, and trains on them."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.utils.import_utils import get_safe_default_video_backend

from lerobot_lam_diffusion import DiffusionLamPolicy
from lerobot_lam_diffusion.precompute.cache import cached_entries
from lerobot_lam_diffusion.scripts.tokens import main as tokens_command
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.utils.errors import UserError
from tests.conftest import TOP, record_dataset, record_more, write_lam
from tests.policies import build, lam_config, refused
from tests.test_lerobot_train import SMALL_FLAGS, same, saved_config, train, weights

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def auto(lam_folder):
    return {"lam_tokens_path": "auto", "lam_model_path": str(lam_folder), "lam_camera_key": TOP}


def as_flags(fields):
    return [f"--policy.{name}={value}" for name, value in fields.items()]


@pytest.fixture
def losses(monkeypatch):
    """Of every training step, until they are taken."""
    values = []
    forward = DiffusionLamPolicy.forward

    def noted(self, batch):
        loss, output = forward(self, batch)
        values.append(loss.item())
        return loss, output

    monkeypatch.setattr(DiffusionLamPolicy, "forward", noted)
    return lambda: [values.pop(0) for _ in range(len(values))]


@pytest.mark.slow
def test_trains_as_on_a_store_bit_for_bit_deploys_and_fine_tunes(
    monkeypatch, dataset, make_store, lam, auto, builds, losses, home, tmp_path
):
    explicit = make_store(dataset, video_backend=get_safe_default_video_backend())
    flags = [*SMALL_FLAGS, f"--dataset.root={dataset.root}", "--steps=3"]
    runs = {name: [f"--output_dir={tmp_path / name}"] for name in ("by_store", "building", "built")}

    train(monkeypatch, *flags, *runs["by_store"], f"--policy.lam_tokens_path={explicit.path}")
    expected = losses()
    assert len(expected) == 3
    train(monkeypatch, *flags, *runs["building"], *as_flags(auto))
    assert losses() == expected
    assert len(builds) == 1
    train(monkeypatch, *flags, *runs["built"], *as_flags(auto), "--dataset.episodes=[0,1,2,3,4]")
    assert losses() == expected
    assert len(builds) == 1
    for run in ("building", "built"):
        assert same(weights(tmp_path / "by_store"), weights(tmp_path / run))
    config = saved_config(tmp_path / "built")
    assert config["lam_source"] == f"store:{builds[0]}"
    assert config["lam_tokens_path"] == "auto"
    assert config["lam_fingerprint"] == lam.fingerprint

    shutil.rmtree(home)
    checkpoint = tmp_path / "built" / "checkpoints" / "last" / "pretrained_model"
    policy = DiffusionLamPolicy.from_pretrained(checkpoint)
    preprocess, _ = make_pre_post_processors(policy.config, str(checkpoint))
    tick = {"observation.state": torch.zeros(2), TOP: torch.zeros(3, 48, 48)}
    assert policy.select_action(preprocess(tick)).shape == (1, 2)
    assert len(builds) == 1  # nothing is built to deploy

    other = record_dataset(tmp_path / "other", seed=1)
    tuned = [f"--policy.path={checkpoint}", "--policy.push_to_hub=false", f"--dataset.root={other.root}"]
    tuned += ["--dataset.repo_id=local/squares", f"--output_dir={tmp_path / 'tuned'}", "--steps=1"]
    train(monkeypatch, *tuned, "--batch_size=4", "--num_workers=0")
    assert len(builds) == 2
    assert builds[1] != builds[0]
    assert saved_config(tmp_path / "tuned")["lam_source"] == f"store:{builds[1]}"


@pytest.mark.slow
def test_two_ranks_one_of_which_builds(dataset, auto, tmp_path):
    console = Path(sys.executable).parent
    command = [console / "torchrun", "--standalone", "--nproc_per_node=2", console / "lerobot-train"]
    command += [*SMALL_FLAGS, *as_flags(auto), f"--dataset.root={dataset.root}", "--steps=2"]
    command += [f"--output_dir={tmp_path / 'run'}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_LEROBOT_HOME": str(tmp_path / "ranks")}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    (entry,) = cached_entries(tmp_path / "ranks" / "lam_tokens" / "stores")
    assert saved_config(tmp_path / "run")["lam_source"] == f"store:{entry.folder}"
    assert "60/60" in done.stderr  # one bar, of all frames, by whichever rank builds


@pytest.mark.slow
def test_a_training_on_some_episodes_builds_the_store_of_all(monkeypatch, dataset, auto, builds, tmp_path):
    flags = [*SMALL_FLAGS, f"--dataset.root={dataset.root}", f"--output_dir={tmp_path / 'run'}", "--steps=1"]
    train(monkeypatch, *flags, *as_flags(auto), "--dataset.episodes=[1,3]")
    assert not TokenStore.open(builds[0]).missing_episodes


@pytest.mark.slow
def test_bad_input_stops_lerobot_train_before_its_first_step(
    monkeypatch, dataset, auto, builds, losses, caplog
):
    flags = [*SMALL_FLAGS, f"--dataset.root={dataset.root}", "--steps=1"]
    with pytest.raises(SystemExit):
        train(monkeypatch, *flags, "--policy.lam_tokens_path=auto")
    assert "lam_tokens_path=auto needs --policy.lam_model_path=<LAM folder or Hub id>" in caplog.text
    assert "lam_tokens_path=auto needs --policy.lam_camera_key=<camera" in caplog.text
    with pytest.raises(UserError, match=r"tpo is not among the RGB cameras \['observation.images.top'\]"):
        train(monkeypatch, *flags, *as_flags({**auto, "lam_camera_key": "observation.images.tpo"}))
    with pytest.raises(UserError, match="lam_num_learned_tokens is 4, the LAM has 2"):
        train(monkeypatch, *flags, *as_flags(auto), "--policy.lam_num_learned_tokens=4")
    assert not builds
    assert not losses()


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"lam_model_path": "/nowhere/lam"},
            ["There is no LAM at '/nowhere/lam'", "--policy.lam_model_path"],
        ),
        (
            {"lam_num_learned_tokens": 4, "lam_action_latent_dim": 16, "lam_fingerprint": "abc"},
            ["3 problems", "is 4, the LAM has 2", "is 16, the LAM has 32", "was trained with abc…"],
        ),
        (
            {"lam_camera_key": "observation.images.wrist"},
            ["'local/squares'", "--rename_map", "--camera_key="],
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(dataset, auto, builds, fields, messages):
    with refused(*messages):
        build(lam_config(**{**auto, **fields}), dataset)
    assert not builds


def test_a_column_beside_auto_is_refused(dataset, store, auto, builds, tmp_path):
    made = add_column(store, dataset.meta, tmp_path / "data")
    with pytest.raises(UserError, match=r"two sources of LAM tokens: .*lam_tokens_path=auto"):
        build(lam_config(**auto), LeRobotDataset("local/column", root=made.root, video_backend="pyav"))
    assert not builds


@pytest.mark.slow
def test_of_a_grown_dataset_only_the_new_episodes_are_encoded(tmp_path, auto, home, builds, caplog):
    old = record_dataset(tmp_path / "old", lengths=(9, 7, 8))
    build(lam_config(**auto), old)
    new = record_more(tmp_path / "new", old)
    with caplog.at_level("INFO"):
        build(lam_config(**auto), new)
    assert "3 of 5 episodes are copied from older stores" in caplog.text
    extended = TokenStore.open(builds[-1], new.meta)
    home.rename(home.with_name("before"))
    build(lam_config(**auto), new)
    assert len(builds) == 3
    fresh = TokenStore.open(builds[-1], new.meta)
    assert torch.equal(extended.values, fresh.values)
    assert torch.equal(extended.episode_row, fresh.episode_row)


def test_without_a_dataset_there_is_nothing_to_build(dataset, auto):
    policy, _ = build(lam_config(**auto), dataset)
    fresh = lam_config(**auto)
    fresh.input_features, fresh.output_features = policy.config.input_features, policy.config.output_features
    with pytest.raises(UserError, match=r"there is none: build the policy with LeRobot's make_policy"):
        DiffusionLamPolicy(fresh)


@pytest.mark.slow
def test_kinds_strides_and_lams_have_stores_of_their_own(dataset, frames, auto, builds, tmp_path):
    other = str(write_lam(tmp_path / "other", frames, seed=9))
    same_lam = str(shutil.copytree(auto["lam_model_path"], tmp_path / "same"))
    for fields in ({}, {"lam_use_vq_tokens": False}, {"lam_frame_stride": 3}, {"lam_model_path": other}):
        policy, _ = build(lam_config(**{**auto, **fields}), dataset)
        assert policy.token_store.kind == ("vq" if fields.get("lam_use_vq_tokens", True) else "continuous")
        stride = fields.get("lam_frame_stride", 1)
        assert policy.config.lam_frame_stride == policy.token_store.frame_stride == stride
    assert len(set(builds)) == len(builds) == len(cached_entries()) == 4
    policy, _ = build(lam_config(**{**auto, "lam_model_path": same_lam}), dataset)
    assert len(builds) == 4  # the same LAM at another place
    assert policy.config.lam_model_path == same_lam


def test_a_lam_that_replaces_the_one_trained_with_is_adopted(dataset, frames, auto, builds, tmp_path):
    policy, _ = build(lam_config(**auto), dataset)
    config = policy.config
    trained_with = config.lam_fingerprint
    config.lam_model_path = str(write_lam(tmp_path / "b", frames, seed=9))
    with pytest.raises(UserError, match="lam_allow_mismatch=true"):
        build(config, dataset)
    assert len(builds) == 1
    config.lam_allow_mismatch = True
    build(config, dataset)
    assert config.lam_fingerprint != trained_with
    assert config.lam_model_path == str(tmp_path / "b")
    assert len(builds) == 2


def test_a_renamed_camera_is_known_where_there_is_only_one(dataset, auto, builds, tmp_path):
    renamed = {TOP: "observation.images.front"}
    plain, _ = build(lam_config(**auto), dataset)
    features = {renamed.get(key, key): value for key, value in plain.config.input_features.items()}
    config = lam_config(**{**auto, "lam_camera_key": "observation.images.front"}, input_features=features)
    policy = make_policy(config, ds_meta=dataset.meta, rename_map=renamed)
    assert len(builds) == 1
    assert policy.token_store.provenance.camera_key == TOP
    assert policy.config.lam_camera_key == "observation.images.front"


def test_an_episode_that_cannot_be_read_is_told(lam_folder, auto, tmp_path):
    broken = record_dataset(tmp_path / "broken", lengths=(6, 5))
    for video in broken.root.rglob("*.mp4"):
        video.write_bytes(video.read_bytes()[:200])
    with pytest.raises(
        UserError, match=r"auto cannot be built: frames 0 to \d+ of episode [01] .*lerobot-lam-precompute"
    ):
        build(lam_config(**auto), broken)


def test_cache_commands(dataset, auto, home, capsys):
    tokens_command(["cache", "path"])
    assert capsys.readouterr().out.strip() == str(home / "lam_tokens")
    tokens_command(["cache", "list"])
    assert capsys.readouterr().out.startswith("0 token stores, 0 bytes in ")
    policy, _ = build(lam_config(**auto), dataset)
    name = policy.token_store.path.name
    tokens_command(["cache", "list"])
    told = capsys.readouterr().out
    for fact in (
        f"{name}\n",
        "local/squares (60 frames, 5 episodes)",
        f"{auto['lam_model_path']} (fingerprint {policy.config.lam_fingerprint[:16]}…)",
        f"{TOP}, stride 1 frames",
        "vq, encoded in float32 on cpu",
        "last used 2",
        "1 token store, ",
    ):
        assert fact in told
    tokens_command(["cache", "prune", "--older_than_days=1"])
    assert capsys.readouterr().out.startswith("0 removed, 0 bytes\n")
    tokens_command(["cache", "prune", "--all=true"])
    told = capsys.readouterr().out
    assert f"removed {name}, " in told
    assert not cached_entries()


def test_an_interrupted_build_is_listed_gone_on_with_or_pruned(dataset, auto, builds, monkeypatch, capsys):
    def stopped_at_the_merge(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lerobot_lam_diffusion.precompute.engine.merge_shards", stopped_at_the_merge)
        with pytest.raises(KeyboardInterrupt):
            build(lam_config(**auto), dataset)
    tokens_command(["cache", "list"])
    told = capsys.readouterr().out
    assert "shards: interrupted; training with auto resumes it" in told
    assert "local/squares (60 frames, 5 episodes)" in told
    (entry,) = cached_entries()
    assert entry.shards()[0] == entry.shards()[1] > 0
    policy, _ = build(lam_config(**auto), dataset)
    assert policy.token_store.path == entry.folder == builds[0] == builds[1]
    (entry.folder / "lam_tokens.json").write_text("{}")
    tokens_command(["cache", "list"])
    assert "damaged   " in capsys.readouterr().out
    tokens_command(["cache", "prune", "--all=true"])
    assert f"removed {entry.name}, " in capsys.readouterr().out
    assert not cached_entries()


def test_a_dataset_that_is_not_all_here_is_told(auto, tmp_path, builds):
    bare = record_dataset(tmp_path / "bare", lengths=(6, 5))
    meta = copy.copy(bare.meta)
    shutil.rmtree(bare.root / "data")
    with pytest.raises(
        UserError,
        match=r"'local/squares' at .*bare is not whole: data/.*is not there",
    ):
        make_policy(lam_config(**auto), ds_meta=meta)
    assert not builds


def test_cache_commands_refuse_what_they_do_not_understand(capsys):
    for flags in ([], ["--all=true", "--older_than_days=3"], ["--older_than_days=-1"]):
        with pytest.raises(SystemExit) as stopped:
            tokens_command(["cache", "prune", *flags])
        assert "error: say which stores to remove" in stopped.value.code
    with pytest.raises(SystemExit) as stopped:
        tokens_command(["cache", "clear"])
    assert stopped.value.code == 2
    assert "cache list, cache prune, cache path" in capsys.readouterr().err
