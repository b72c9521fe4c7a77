"""`lam_live_cache`: tokens on the fly are computed once, kept, and never taken for those of other pixels."""

import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion import OBS_LAM_IMAGES
from lerobot_lam_diffusion.lam.pixels import pixel_digests
from lerobot_lam_diffusion.precompute.cache import live_cache_folder
from lerobot_lam_diffusion.precompute.live_store import store_of_live_cache
from lerobot_lam_diffusion.scripts.tokens import main as tokens_command
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE
from lerobot_lam_diffusion.tokens.pairs import PAIRS_FILE, PairCache
from tests.conftest import TOP, write_lam
from tests.policies import build, lam_config, live_config, refused, training_batch
from tests.test_lerobot_train import SMALL_FLAGS, on_the_fly, same, train, weights

ALL = list(range(60))


@pytest.fixture
def live(dataset, lam_folder, tmp_path):
    """Builds a policy that keeps its tokens; and the LAM's calls, as numbers of pairs."""

    def live(**fields):
        config = live_config(lam_folder, **{"lam_live_cache": str(tmp_path / "kept"), **fields})
        policy, preprocess = build(config, dataset)
        asked = []
        (one,) = policy.live_tokens.lams
        encode_pairs = one.model.encode_pairs
        one.model.encode_pairs = lambda prev, cur: asked.append(len(prev)) or encode_pairs(prev, cur)
        return policy, lambda rows: preprocess(training_batch(config, dataset, rows)), asked

    return live


def loss(policy, batch):
    torch.manual_seed(0)
    return policy.forward(dict(batch))[0].item()


def failing(code):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.fixture
def data(dataset):
    """Flags that name the dataset, decoded as in these tests."""
    where = ["--dataset.repo_id=local/squares", f"--dataset.root={dataset.root}"]
    return [*where, "--dataset.video_backend=pyav"]


@pytest.fixture
def filled(live, tmp_path):
    """A cache of all pairs."""
    policy, batch, _ = live()
    policy.forward(batch(ALL))
    (folder,) = (tmp_path / "kept").iterdir()
    return folder


# Each pair is encoded once, and never is a token taken that the LAM would not give.


@pytest.mark.parametrize("use_vq", [True, False], ids=["vq", "continuous"])
def test_each_pair_is_encoded_once_and_the_losses_are_the_same(live, use_vq):
    fields = {"lam_use_vq_tokens": use_vq, "lam_temporal_aggregation": "concat", "n_obs_steps": 3}
    plain, batch, _ = live(lam_live_cache=None, **fields)
    kept, _, asked = live(**fields)
    batches = [batch([30, 31, 32]), batch([31, 32, 33])]
    expected = [loss(plain, one) for one in batches]
    assert expected[0] != expected[1]
    for _ in range(3):  # epochs
        assert [loss(kept, one) for one in batches] == expected
    assert asked == [6, 1]  # three windows of two pairs, and the pair at 33

    another_run, _, asked = live(**fields)
    assert [loss(another_run, one) for one in batches] == expected
    assert asked == []


def test_other_pixels_are_never_given_a_kept_token(live, caplog):
    policy, batch, asked = live()
    policy.forward(batch([0, 14, 23]))  # first frames of episodes: they have no token
    assert asked == []
    plain, _, _ = live(lam_live_cache=None)
    plain_batch = batch([20, 30])
    augmented = dict(plain_batch)
    augmented[OBS_LAM_IMAGES] = {TOP: plain_batch[OBS_LAM_IMAGES][TOP] * 0.5}
    with caplog.at_level(logging.WARNING):
        for one in (plain_batch, augmented, plain_batch, augmented):
            assert loss(policy, one) == loss(plain, one)
    assert asked == [2, 2, 2, 2]
    told = [record for record in caplog.records if "are encoded again" in record.message]
    assert len(told) == 1
    assert "image_transforms" in told[0].message


def test_what_decides_a_token_names_its_own_cache(live, frames, tmp_path):
    other_lam = write_lam(tmp_path / "other", frames, seed=1)
    for fields in (
        {},
        {"lam_frame_stride": 2},
        {"lam_use_vq_tokens": False},
        {"lam_model_path": str(other_lam)},
    ):
        policy, batch, asked = live(**fields)
        policy.forward(batch([20]))
        assert asked == [1], fields
    assert len(os.listdir(tmp_path / "kept")) == 4


# A cache is a convenience: what it cannot do costs no training.


@pytest.mark.slow
def test_what_the_cache_cannot_do_costs_no_training(live, monkeypatch, caplog):
    """A full disk, a disk that fails, frames that nothing tells."""
    plain, batch, _ = live(lam_live_cache=None)
    expected = [loss(plain, batch([20]))] * 2
    policy, _, asked = live()
    with monkeypatch.context() as patch:
        patch.setattr(PairCache, "write", failing(errno.ENOSPC))
        assert [loss(policy, batch([20])) for _ in range(2)] == expected
    assert asked == [1, 1]
    assert sum("no longer cached" in record.message for record in caplog.records) == 1
    policy, _, _ = live()
    with monkeypatch.context() as patch:
        patch.setattr(PairCache, "read", failing(errno.EIO))
        assert [loss(policy, batch([20])) for _ in range(2)] == expected
    nameless = {name: value for name, value in batch([20]).items() if name != "index"}
    policy, _, _ = live()
    assert [loss(policy, nameless) for _ in range(2)] == expected
    warned = [
        record.message for record in caplog.records if "Tokens are computed each time" in record.message
    ]
    assert len(warned) == 2
    assert "Input/output error" in warned[0]
    assert "no 'index'" in warned[1]


def test_with_precomputed_tokens_it_means_nothing(dataset, store, tmp_path):
    """A checkpoint that was trained with it may change its source of tokens."""
    config = lam_config(lam_tokens_path=str(store.path), lam_live_cache=str(tmp_path / "kept"))
    policy, preprocess = build(config, dataset)
    policy.forward(preprocess(training_batch(config, dataset, [20])))
    assert not (tmp_path / "kept").exists()


# Commands: verify, merge into a store, list and remove.


def test_verify_accepts_what_it_wrote(filled, data, lam_folder, capsys):
    tokens_command(["verify", str(filled), *data, f"--lam.path={lam_folder}", "--device=cpu"])
    told = capsys.readouterr().out
    assert "ok  55 of 55 pairs are kept" in told
    assert "ok  55 of 55 sampled tokens agree with the LAM" in told
    tokens_command(["info", str(filled)])
    assert "55 of 55 are kept" in capsys.readouterr().out


@pytest.mark.slow
def test_verify_refuses_other_tokens_and_tells_half_records(
    filled, dataset, data, lam_folder, tmp_path, capsys
):
    cache = PairCache.open(filled)
    frames, values, _ = next(cache.scan())
    prev, cur = (torch.stack([dataset[int(i)][TOP] for i in index]) for index in (frames - 1, frames))
    cache.write(frames[:1], pixel_digests(prev, cur)[:1], (values[:1] + 1) % 16)  # a plausible forgery
    with pytest.raises(SystemExit, match="54 of 55 sampled tokens agree"):
        tokens_command(["verify", str(filled), *data, f"--lam.path={lam_folder}", "--device=cpu"])
    content = bytearray((filled / PAIRS_FILE).read_bytes())
    content[-1] ^= 1
    (filled / PAIRS_FILE).write_bytes(content)
    capsys.readouterr()
    tokens_command(["verify", str(filled), *data])
    told = capsys.readouterr().out
    assert "ok  54 of 55 pairs are kept" in told
    assert "1 records were left half written" in told
    merging = ["merge", str(filled), *data, f"--lam.path={lam_folder}", f"--output_dir={tmp_path / 'store'}"]
    tokens_command(merging)
    assert "1 pair encoded now" in capsys.readouterr().out


def test_a_filled_cache_becomes_the_store_of_an_extraction(filled, store, data, lam_folder, tmp_path, capsys):
    lam = f"--lam.path={lam_folder}"
    tokens_command(["merge", str(filled), *data, lam, f"--output_dir={tmp_path / 'store'}"])
    told = capsys.readouterr().out
    assert "it covers all 5 episodes" in told
    assert "encoded now" not in told
    for name in (TENSORS_FILE, PROVENANCE_FILE):
        assert (tmp_path / "store" / name).read_bytes() == (store.path / name).read_bytes()
    with pytest.raises(SystemExit, match=r"for the merging of one live cache, and .*store is none"):
        tokens_command(["merge", str(tmp_path / "store"), *data, f"--output_dir={tmp_path / 'another'}"])
    for flags in ([lam, f"--output_dir={tmp_path / 'another'}"], [*data, lam]):
        with pytest.raises(SystemExit, match=r"is a live cache, whose merging needs --dataset.repo_id"):
            tokens_command(["merge", str(filled), *flags])


@pytest.mark.slow
def test_tokens_of_other_pixels_do_not_become_a_store(live, dataset, store, lam, tmp_path):
    policy, batch, _ = live()
    policy.forward(batch(ALL[:40]))  # episodes 0, 1 and 2
    one = batch([30])  # in episode 2
    policy.forward({**one, OBS_LAM_IMAGES: {TOP: 1 - one[OBS_LAM_IMAGES][TOP]}})
    (folder,) = (tmp_path / "kept").iterdir()
    cache = PairCache.open(folder)
    made, encoded = store_of_live_cache(cache, dataset, tmp_path / "store", lam, show_progress=False)
    assert encoded == 1 + (8 - 1) + (12 - 1)  # frame 30 and two episodes
    for name in (TENSORS_FILE, PROVENANCE_FILE):
        assert (made.path / name).read_bytes() == (store.path / name).read_bytes()

    some = LeRobotDataset(dataset.repo_id, root=dataset.root, episodes=[3, 1], video_backend="pyav")
    made, encoded = store_of_live_cache(cache, some, tmp_path / "some", lam, show_progress=False)
    assert (made.covered_episodes, encoded) == ([1, 3], 8 - 1)
    index = torch.cat([torch.arange(made.episode_from[e], made.episode_to[e]) for e in (1, 3)])
    assert torch.equal(made.window(index, [-1, 0]), store.window(index, [-1, 0]))


@pytest.mark.slow
def test_a_policy_may_be_copied_while_it_trains(live):
    """As averaging of weights does; the copy's end must not close the original's file."""
    policy, batch, asked = live()
    expected = loss(policy, batch([20, 30]))
    averaged = torch.optim.swa_utils.AveragedModel(policy)
    assert loss(averaged.module, batch([20, 30])) == expected
    del averaged
    gc.collect()
    assert loss(policy, batch([20, 30])) == expected
    assert loss(policy, batch([21])) == loss(live(lam_live_cache=None)[0], batch([21]))
    assert asked == [2, 1]


def test_a_folder_that_cannot_be_made_names_the_flag(live, tmp_path):
    (tmp_path / "file").write_text("")
    with refused("--policy.lam_live_cache=", "/file/x cannot be used: ", "Name another folder"):
        live(lam_live_cache=str(tmp_path / "file" / "x"))
    for value in ("false", "True", ""):  # it is no switch
        with refused("must be 'auto' or a folder"):
            live(lam_live_cache=value)


def test_digests_tell_pixels():
    """One changed pixel, two in the places that a plain sum would confuse, two sizes of the same bytes."""
    generator = torch.manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=generator)
    prev, cur = frames[:1].repeat(2000, 1, 1, 1), frames[1:].repeat(2000, 1, 1, 1)
    (whole,) = pixel_digests(frames[:1], frames[1:]).tolist()
    assert (pixel_digests(prev, cur) == whole).all()
    assert pixel_digests(frames[1:], frames[:1]).item() != whole
    assert pixel_digests(frames[:1].view(1, 3, 24, 16), frames[1:].view(1, 3, 24, 16)).item() != whole
    for where in (slice(7, None, 8), slice(0, None, 8)):  # the high, the low byte of a word
        changed = cur.clone()
        for row in range(2000):
            places = torch.randperm(3 * 16 * 3, generator=generator)[: 1 + row % 3]
            bytes_ = changed[row].view(-1)[where]
            bytes_[places] ^= 128
        assert not (pixel_digests(prev, changed) == whole).any()


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_the_cache_command_lists_and_removes_it(live, capsys):
    policy, batch, _ = live(lam_live_cache="auto")
    policy.forward(batch(ALL))
    (folder,) = live_cache_folder().iterdir()
    tokens_command(["cache", "list"])
    assert "55 of 55 are kept" in capsys.readouterr().out
    tokens_command(["verify", folder.name])
    tokens_command(["cache", "prune", "--older_than_days=1"])
    assert folder.exists()
    tokens_command(["cache", "prune", "--all=true"])
    assert not folder.exists()
    assert f"removed {folder.name}, " in capsys.readouterr().out


@pytest.mark.slow
def test_lerobot_train_is_killed_and_goes_on(dataset, data, lam_folder, tmp_path):
    """The stock command, killed while it writes; what it kept until then is right."""
    kept = tmp_path / "kept"
    command = [
        sys.executable,
        "-m",
        "lerobot.scripts.lerobot_train",
        *SMALL_FLAGS,
        *on_the_fly(lam_folder),
        f"--dataset.root={dataset.root}",
        f"--policy.lam_live_cache={kept}",
        "--steps=100000",
    ]
    process = subprocess.Popen([*command, f"--output_dir={tmp_path / 'killed'}"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not _num_kept(kept):
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder,) = (path for path in kept.iterdir() if not path.name.startswith("."))
    assert 0 < _num_kept(kept) <= 55
    tokens_command(["verify", str(folder), *data, f"--lam.path={lam_folder}", "--device=cpu"])


def _num_kept(kept) -> int:
    folders = list(kept.glob("[!.]*"))
    return sum(len(frames) for frames, _, _ in PairCache.open(folders[0]).scan()) if folders else 0


@pytest.mark.slow
def test_every_route_of_a_map_style_dataset_trains_bit_for_bit_alike(
    monkeypatch, dataset, store, lam_folder, home, tmp_path
):
    column = add_column(store, dataset.meta, tmp_path / "data_with_column")
    root, kept = f"--dataset.root={dataset.root}", f"--policy.lam_live_cache={tmp_path / 'kept'}"
    lam = on_the_fly(lam_folder)
    routes = {
        "store": [root, f"--policy.lam_tokens_path={store.path}"],
        "column": [f"--dataset.root={column.root}"],
        "auto": [root, *lam[1:], "--policy.lam_tokens_path=auto"],
        "on_the_fly": [root, *lam],
        "live_cache": [root, *lam, kept],
        "live_cache_again": [root, *lam, kept],
    }
    for route, flags in routes.items():
        train(monkeypatch, *SMALL_FLAGS, *flags, "--steps=4", f"--output_dir={tmp_path / route}")
    trained = {route: weights(tmp_path / route) for route in routes}
    different = [route for route in routes if not same(trained["store"], trained[route])]
    assert different == []
    stock = [*SMALL_FLAGS, root, "--policy.use_lam_conditioning=false", "--steps=4"]
    train(monkeypatch, *stock, f"--output_dir={tmp_path / 'stock'}")
    without = weights(tmp_path / "stock")
    shared = without.keys() & trained["store"].keys()
    assert not all(torch.equal(without[name], trained["store"][name]) for name in shared)  # tokens do matter
    assert TokenStore.open(store.path).num_tokens == 55
