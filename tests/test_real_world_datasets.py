"""Datasets as they are found: each goes the whole way, from extraction to the tokens of a training batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import BackwardCompatibilityError
from lerobot.policies.factory import make_policy, make_pre_post_processors

from lerobot_lam_diffusion.lam.preprocess import as_uint8
from lerobot_lam_diffusion.scripts import precompute_lam_tokens, tokens
from lerobot_lam_diffusion.tokens import TokenStore
from tests.conftest import TOP
from tests.policies import lam_config, live_config, training_batch

WRIST = "observation.images.wrist"
DEPTH = "observation.images.depth"
SIZES = {TOP: (48, 48), WRIST: (40, 64)}


class Rate(float):
    """Frames a second, not a whole number: LeRobot's recorder wants a fraction of it."""

    numerator = property(lambda self: round(self * 1000))
    denominator = property(lambda self: 1000)


def record(root: Path, lengths, fps: float, use_videos: bool = True) -> LeRobotDataset:
    """Two cameras of different size, files of a few episodes each; videos of 10 fps also of depth."""
    kind = "video" if use_videos else "image"
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    features = {"observation.state": vector, "action": vector}
    for camera, size in SIZES.items():
        features[camera] = {"dtype": kind, "shape": (*size, 3), "names": ["height", "width", "channels"]}
    depth = {}
    if use_videos and fps == 10:
        features[DEPTH] = {**features[TOP], "shape": (48, 48, 1), "info": {"is_depth_map": True}}
        depth[DEPTH] = np.full((48, 48, 1), 700, np.uint16)
    dataset = LeRobotDataset.create(
        "local/odd", fps, features, root=root, use_videos=use_videos, video_backend="pyav"
    )
    dataset.meta.update_chunk_settings(data_files_size_in_mb=0.003, video_files_size_in_mb=0.012)
    generator = np.random.default_rng(0)
    for length in lengths:
        noise = {camera: generator.integers(0, 80, (*size, 3), np.uint8) for camera, size in SIZES.items()}
        position = generator.uniform(8, 20, 2).astype("float32")
        for _ in range(length):
            position = np.clip(position + generator.uniform(-6, 6, 2), 0, 28).astype("float32")
            frame = {camera: picture.copy() for camera, picture in noise.items()}
            x, y = position.astype(int)
            for picture in frame.values():
                picture[y : y + 12, x : x + 12] = (250, 180, 40)
            vectors = {"observation.state": position, "action": position}
            dataset.add_frame({**vectors, **frame, **depth, "task": "wander"})
        dataset.save_episode()
    dataset.finalize()
    return LeRobotDataset("local/odd", root=root, video_backend="pyav", return_uint8=True)


KINDS = {
    "29.97 fps, video": ((5, 1, 8, 1, 4, 6, 2, 7), Rate(29.97), True),
    "14.985 fps, images": ((3, 1, 5, 1), Rate(14.985), False),
    "episodes of one frame": ((1, 1, 1), 10, False),
    "a depth camera beside": ((5, 4), 10, True),
}


@pytest.fixture(scope="module")
def recorded():
    return {}


@pytest.fixture(params=KINDS)
def odd(request, recorded, tmp_path_factory):
    if request.param not in recorded:
        recorded[request.param] = record(tmp_path_factory.mktemp("odd") / "data", *KINDS[request.param])
    return recorded[request.param]


def live_tokens(lam, dataset, camera: str, stride: int = 1) -> torch.Tensor:
    """The LAM's VQ tokens by LeRobot's own random access, zero where there is no pair; `(N, n·a)`."""
    items = [dataset[i] for i in range(len(dataset))]
    frames = torch.stack([as_uint8(item[camera]) for item in items])
    tokens = torch.zeros(len(items), lam.num_learned_tokens * lam.action_latent_dim)
    has_pair = [i for i, item in enumerate(items) if item["frame_index"] >= stride]
    if has_pair:
        now = torch.tensor(has_pair)
        tokens[now] = lam.encode_pairs(frames[now - stride], frames[now]).quantized
    return tokens


def only(dataset, camera: str) -> dict[str, PolicyFeature]:
    """Input features of a policy that sees one camera: stock diffusion wants all of one size."""
    height, width = dataset.meta.features[camera]["shape"][:2]
    return {
        camera: PolicyFeature(FeatureType.VISUAL, (3, height, width)),
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    }


@pytest.mark.parametrize(
    ("odd", "camera"),
    [
        ("29.97 fps, video", WRIST),
        pytest.param("29.97 fps, video", TOP, marks=pytest.mark.slow),
        *(pytest.param(kind, TOP, marks=pytest.mark.slow) for kind in list(KINDS)[1:]),
    ],
    indirect=["odd"],
)
def test_from_extraction_to_the_training_batch(odd, camera, lam, lam_folder, tmp_path, capsys):
    where = [f"--dataset.repo_id={odd.repo_id}", f"--dataset.root={odd.root}", f"--lam.path={lam_folder}"]
    where += ["--dataset.video_backend=pyav"]
    flags = [f"--camera_key={camera}", f"--output_dir={tmp_path / 'store'}", "--batch_size=8", "--device=cpu"]
    precompute_lam_tokens.main([*where, *flags])
    expected = live_tokens(lam, odd, camera)
    if expected.any():
        tokens.main(["verify", str(tmp_path / "store"), *where, "--device=cpu"])
        assert "ok" in capsys.readouterr().out

    store = TokenStore.open(tmp_path / "store", odd.meta)
    assert store.provenance.dataset.fps == odd.fps
    index = torch.arange(len(odd))
    assert torch.equal(store.window(index, [0])[:, 0], expected)
    fields = {"input_features": only(odd, camera), "lam_temporal_aggregation": "concat"}
    by_store = lam_config(lam_tokens_path=str(store.path), lam_conditioning_steps=1, **fields)
    live = live_config(lam_folder, lam_camera_key=camera, **fields)
    for config in (by_store, live):
        policy = make_policy(config, ds_meta=odd.meta)
        preprocessor, _ = make_pre_post_processors(config, dataset_stats=odd.meta.stats)
        batch = preprocessor(training_batch(config, odd, index.tolist()))
        assert torch.equal(policy._window_tokens(batch)[:, 0], expected)


def test_the_datasets_are_as_odd_as_they_say(odd):
    """Several files, and other ones for each camera: what the test above goes through."""
    episodes = range(odd.num_episodes)
    if odd.fps == 29.97:
        files = {key: [odd.meta.get_video_file_path(e, key).name for e in episodes] for key in SIZES}
        assert all(1 < len(set(of_camera)) < len(episodes) for of_camera in files.values())
        assert files[TOP] != files[WRIST]
    if odd.fps == 10:
        assert odd.meta.depth_keys == ([DEPTH] if odd.meta.video_keys else [])
    else:
        assert odd.fps != round(odd.fps)
        assert len({odd.meta.get_data_file_path(e) for e in episodes}) > 1


def test_some_episodes_in_any_order_are_joined_by_their_own_frames(odd, make_store):
    """`--dataset.episodes=[7,0]`: LeRobot counts rows anew, the store does not."""
    store = make_store(odd)
    last = odd.num_episodes - 1
    config = lam_config(lam_tokens_path=str(store.path), input_features=only(odd, TOP))
    some = LeRobotDataset(
        odd.repo_id,
        root=odd.root,
        episodes=[last, 0],
        delta_timestamps=resolve_delta_timestamps(config, odd.meta),
        video_backend="pyav",
    )
    policy = make_policy(config, ds_meta=some.meta)
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=some.meta.stats)
    batch = torch.utils.data.default_collate([some[row] for row in range(len(some))])
    bounds = odd.meta.episodes
    own = [
        i for e in (0, last) for i in range(bounds[e]["dataset_from_index"], bounds[e]["dataset_to_index"])
    ]
    assert sorted(batch["index"].tolist()) == own
    found = policy._window_tokens(preprocessor(batch))
    assert torch.equal(found, store.window(batch["index"], [0]))


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_older_datasets_are_refused_with_lerobots_command(store, lam_folder, dataset, tmp_path, version):
    root = shutil.copytree(dataset.root, tmp_path / "old")
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": version}))
    shutil.rmtree(root / "meta" / "episodes")
    (root / "meta" / "episodes.jsonl").write_text("")
    if version == "v2.1":  # LeRobot's own error, whose hint we pass on
        with pytest.raises(
            BackwardCompatibilityError, match=r"convert_dataset_v21_to_v30 --repo-id=local/old"
        ):
            LeRobotDataset("local/old", root=root)
    where = ["--dataset.repo_id=local/old", f"--dataset.root={root}"]
    refusals = {
        "precompute": (precompute_lam_tokens.main, [f"--lam.path={lam_folder}", f"--output_dir={root}/o"]),
        "verify": (lambda words: tokens.main(["verify", str(store.path), *words]), []),
        "add-column": (
            lambda words: tokens.main(["add-column", str(store.path), *words]), [f"--output_dir={root}/o"],
        ),
    }  # fmt: skip
    for command, more in refusals.values():
        with pytest.raises(SystemExit) as stopped:
            command([*where, *more])
        told = str(stopped.value)
        assert told.startswith(
            "error: dataset 'local/old' is in an older format than LeRobot's v3.0; convert"
        )
        assert f"convert_dataset_v21_to_v30 --repo-id=local/old --root={root} --push-to-hub=false" in told
        assert "Traceback" not in told


def test_a_dataset_in_the_lance_layout_is_named_as_such(lam_folder, tmp_path):
    for table in ("frames", "videos", "meta"):
        (tmp_path / "lance" / f"{table}.lance" / "data").mkdir(parents=True)
    where = ["--dataset.repo_id=local/lance", f"--dataset.root={tmp_path / 'lance'}"]
    with pytest.raises(SystemExit) as stopped:
        precompute_lam_tokens.main([*where, f"--lam.path={lam_folder}", f"--output_dir={tmp_path}/o"])
    assert "is in the Lance layout" in str(stopped.value)
    assert "huggingface.co" not in str(stopped.value)
