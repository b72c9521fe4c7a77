"""Guidance at deployment: what comes next is read off a store's episode or a video, tick by tick."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from lerobot_lam_diffusion import OBS_LAM_TOKENS, DiffusionLamPolicy
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.policy.guidance import open_guide
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.utils.errors import TrainingError, UserError
from tests.conftest import EPISODE_LENGTHS, FPS, TOP, write_lam
from tests.policies import build, lam_config, live_config, refused
from tests.videos import write_video

NEXT = [1, 2, 3, 4]
STARTS = np.cumsum([0, *EPISODE_LENGTHS]).tolist()


@pytest.fixture(scope="module")
def checkpoints(dataset, store, tmp_path_factory):
    """Trained for offsets → folder of a checkpoint."""
    made = {}

    def checkpoint(*offsets, **fields):
        key = (offsets, *sorted(fields.items()))
        if key not in made:
            config = lam_config(
                lam_tokens_path=str(store.path),
                lam_token_offsets=list(offsets),
                lam_token_dropout=0.5,
                num_inference_steps=1,
                **fields,
            )
            policy, _ = build(config, dataset)
            made[key] = tmp_path_factory.mktemp("checkpoint")
            policy.save_pretrained(made[key])
        return made[key]

    return checkpoint


def deployed(folder, **fields) -> DiffusionLamPolicy:
    """As `lerobot-eval --policy.path=… --policy.…` loads it."""
    config = DiffusionLamPolicy.config_class.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    config.__post_init__()
    return DiffusionLamPolicy.from_pretrained(folder, config=config).eval()


def observation(dataset, frame: int, batch_size: int) -> dict[str, torch.Tensor]:
    item = dataset[frame]
    picture = (item[TOP].float() / 255).expand(batch_size, -1, -1, -1)
    state = item["observation.state"].expand(batch_size, -1)
    return {
        "observation.state": state,
        TOP: picture,
        "observation.images": picture[:, None],
        "observation.lam_images": {TOP: picture},
    }


def act(policy, dataset, ticks: int, batch_size: int, first: int = 0) -> list[torch.Tensor]:
    """Conditioning tokens `(B, k, n·a)` of each chunk of actions, after so many ticks."""
    chunks = []
    for tick in range(ticks):
        fresh = not policy._queues["action"]
        policy.select_action(observation(dataset, first + min(tick, 8), batch_size))
        if fresh:
            chunks.append(torch.stack(list(policy._queues[OBS_LAM_TOKENS]), dim=1))
    return chunks


# Tick t of a rollout sees frames t + offsets of the demonstration.


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_each_chunk_sees_the_window_of_its_tick(batch_size, checkpoints, dataset, store):
    policy = deployed(checkpoints(*NEXT), lam_guidance=[f"{store.path}#1", f"{store.path}#4"])
    assert policy.config.lam_guidance is None
    for _ in range(2):  # reset() starts over
        policy.reset()
        chunks = act(policy, dataset, 20, batch_size)
        assert len(chunks) == 5
        for at, tokens in enumerate(chunks):
            tick = at * policy.config.n_action_steps
            for b in range(batch_size):
                episode = (1, 4)[b % 2]
                if tick < EPISODE_LENGTHS[episode]:
                    index = torch.tensor([STARTS[episode] + tick])
                    expected = store.window(index, NEXT, ahead=True)[0]
                else:
                    expected = torch.zeros(4, 64)
                assert torch.equal(tokens[b], expected)
        assert chunks[0].any()
        assert not chunks[3][0].any()


def test_the_end_is_told_once(checkpoints, dataset, store, caplog):
    policy = deployed(checkpoints(*NEXT), lam_guidance=f"{store.path}#1")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            policy.reset()
            act(policy, dataset, 16, 1)
    told = [record.getMessage() for record in caplog.records if "has ended" in record.getMessage()]
    assert told == [
        f"Guidance {store.path}#1 has ended after 9 frames (0.9 s): acting unguided from here on."
    ]


def test_what_has_happened_is_seen_live_beside_the_guide(checkpoints, dataset, store):
    policy = deployed(checkpoints(-1, 0, 2), lam_guidance=f"{store.path}#2")
    chunks = act(policy, dataset, 9, 1)
    for at, tokens in enumerate(chunks):
        tick = 4 * at
        live = store.window(torch.tensor([tick]), [-1, 0])[0]  # of episode 0, whose frames it is shown
        guide = store.window(torch.tensor([STARTS[2] + tick]), [2], ahead=True)[0]
        assert torch.equal(tokens[0], torch.cat([live, guide]))
    assert chunks[1].any(-1).all()


def test_a_chunk_asked_for_by_itself_follows_too(checkpoints, dataset, store):
    policy = deployed(checkpoints(*NEXT), lam_guidance=f"{store.path}#2")
    seen = []
    original = policy.diffusion._prepare_global_conditioning
    policy.diffusion._prepare_global_conditioning = lambda batch: (
        seen.append(batch[OBS_LAM_TOKENS]) or original(batch)
    )
    once = observation(dataset, 0, 1)
    window = {key: once[key][:, None].repeat_interleave(2, 1) for key in ("observation.state", TOP)}
    for tick in (0, 4):
        assert policy.predict_action_chunk(dict(window)).shape == (1, 4, 2)
        expected = store.window(torch.tensor([STARTS[2] + tick]), NEXT, ahead=True)
        assert torch.equal(seen.pop(), expected)
    mixed = deployed(checkpoints(0, 1), lam_guidance=f"{store.path}#2")
    with pytest.raises(TrainingError, match="call select_action each tick"):
        mixed.predict_action_chunk(dict(window))


def test_the_batch_may_bring_its_own_tokens(checkpoints, dataset):
    policy = deployed(checkpoints(*NEXT))
    own = torch.randn(2, 4, 64)
    batch = observation(dataset, 0, 2)
    policy.select_action({**batch, policy.config.lam_tokens_key: own})
    assert torch.equal(torch.stack(list(policy._queues[OBS_LAM_TOKENS]), dim=1), own)
    with pytest.raises(TrainingError, match=r"expected \(B, 4, 64\): the tokens of all lam_token_offsets"):
        policy.select_action({**batch, policy.config.lam_tokens_key: own[:, 0]})
    single = deployed(checkpoints(1))
    single.select_action({**batch, single.config.lam_tokens_key: own[:, 0]})
    assert torch.equal(single._queues[OBS_LAM_TOKENS][0], own[:, 0])


def test_without_a_guide_it_says_what_to_pass_or_acts_unguided(checkpoints, dataset):
    with pytest.raises(TrainingError, match=r"pass --policy\.lam_guidance="):
        act(deployed(checkpoints(*NEXT)), dataset, 1, 1)
    (tokens,) = act(deployed(checkpoints(*NEXT), lam_missing="zero"), dataset, 1, 2)
    assert tokens.shape == (2, 4, 64)
    assert not tokens.any()


def test_a_policy_of_the_past_is_not_guided(dataset, store, checkpoints):
    with pytest.raises(UserError, match=r"\(\[0\]\), and a video shows what comes next: train with"):
        deployed(checkpoints(0), lam_guidance="demo.mp4")


def test_a_store_of_another_camera_warns(checkpoints, store, caplog):
    guide = f"{store.path}#1"
    deployed(checkpoints(*NEXT), lam_guidance=guide)
    assert "If these are two cameras" not in caplog.text
    deployed(checkpoints(*NEXT), lam_guidance=guide, lam_camera_key="observation.images.wrist")
    assert (
        f"Guidance {guide} is of the camera {TOP}, the LAM looks at observation.images.wrist" in caplog.text
    )


@pytest.mark.slow
def test_a_store_guides_without_any_lam(checkpoints, store):
    """On the robot: no LAM is loaded, its code not even imported."""
    folder = checkpoints(*NEXT, use_precomputed_lam_tokens=True, vision_backbone="resnet18")
    program = f"""
import sys, torch
from lerobot_lam_diffusion import DiffusionLamPolicy
config = DiffusionLamPolicy.config_class.from_pretrained({str(folder)!r})
config.lam_model_path, config.lam_guidance = "/nowhere", {str(store.path) + "#1"!r}
policy = DiffusionLamPolicy.from_pretrained({str(folder)!r}, config=config).eval()
state, images = torch.zeros(1, 2), torch.zeros(1, 1, 3, 48, 48)
policy.select_action({{"observation.state": state, "observation.images": images, {TOP!r}: images[:, 0]}})
assert policy.diffusion.lam_model is None
assert not [name for name in sys.modules if name.startswith("lerobot_lam_diffusion.lam")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_intent_policy_trained_on_the_fly_needs_no_lam_to_act(dataset, lam_folder, store, tmp_path):
    build(live_config(lam_folder, lam_token_offsets=NEXT), dataset)[0].save_pretrained(tmp_path)
    policy = deployed(tmp_path, lam_model_path="/nowhere", lam_guidance=f"{store.path}#0")
    assert act(policy, dataset, 1, 1)[0].any()
    assert policy.diffusion.lam_model is None
    assert policy.rollout._history is None


# A lossless video gives the tokens of its episode; what does not fit is refused or warned of.


@pytest.fixture(scope="module")
def videos(tmp_path_factory, dataset):
    """Lossless videos of episode 2: at its own rate, at twice that (each frame twice), with a lead-in."""
    folder = tmp_path_factory.mktemp("videos")
    frames = [dataset[i][TOP].permute(1, 2, 0).numpy() for i in range(STARTS[2], STARTS[3])]
    write_video(folder / "same.mkv", frames, FPS)
    write_video(folder / "twice.mkv", [frame for frame in frames for _ in range(2)], 2 * FPS)
    write_video(folder / "lead.mkv", [frames[0] // 2] * 5 + frames + [frames[-1] // 2] * 7, FPS)
    return folder


@pytest.mark.parametrize("name", ["same.mkv", "twice.mkv", "lead.mkv#t=0.5,2.2"])
def test_a_lossless_video_of_an_episode_is_that_episode(name, videos, checkpoints, store):
    config = deployed(checkpoints(*NEXT)).config
    config.lam_guidance = [f"{videos}/{name}", f"{store.path}#2"]
    video, episode = open_guide(config).tracks
    assert episode.tokens[1:].any(1).all()
    assert torch.equal(video.tokens, episode.tokens)


@pytest.fixture(scope="module")
def errors(make_store, dataset, tmp_path_factory, frames, lam_folder):
    folder = tmp_path_factory.mktemp("errors")
    write_video(folder / "short.mkv", [np.zeros((48, 48, 3), np.uint8)], FPS)
    one = type(dataset)(
        dataset.repo_id, root=dataset.root, episodes=[1], video_backend="pyav", return_uint8=True
    )
    other = load_lam(write_lam(folder / "other", frames, seed=5))
    precompute_tokens(
        dataset,
        other,
        folder / "other_lam",
        camera_key=TOP,
        lam_path="other",
        show_progress=False,
        batch_size=8,
    )
    return {
        "video": folder / "short.mkv",
        "nothing": folder / "nothing.mp4",
        "stride": make_store(dataset, frame_stride=2).path,
        "kind": make_store(dataset, use_vq_tokens=False).path,
        "partial": make_store(one).path,
        "lam": folder / "other_lam",
    }


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{nothing}", "there is no such file"),
        ("{video}", "too few for one pair"),
        ("{video}#t=9,1", "ends at 1 s, not after its start"),
        ("{video}#t=x", "is not a part of a video; expected seconds"),
        ("{partial}", "has 5 episodes, name one of them"),
        ("{partial}#9", "#0 to "),
        ("{partial}#0", "lacks episode 0; it covers 1 of 5 episodes"),
        ("{stride}#0", "--frame_stride=1"),
        ("{kind}#0", "--use_vq_tokens=true"),
        ("{lam}#0", "the LAM's fingerprint is"),
        ("no/store#0", "no token store at no/store"),
    ],
)
def test_what_cannot_guide_is_refused(entry, words, errors, checkpoints):
    with refused("--policy.lam_guidance cannot be followed", words, error=TrainingError):
        deployed(checkpoints(*NEXT), lam_guidance=entry.format(**errors))


def test_what_a_policy_lacks_is_named(errors, checkpoints, store, videos):
    video, checkpoint = str(videos / "same.mkv"), checkpoints(*NEXT)
    cases = {
        "2 problems": [str(errors["nothing"]), f"{store.path}#0", f"{errors['stride']}#0"],
        "pass --policy.lam_fps=": {"lam_guidance": video, "lam_fps": None},
        "it is of 10 fps, the policy of 30": {"lam_guidance": f"{store.path}#0", "lam_fps": 30.0},
        "pass --policy.lam_model_path=": {"lam_guidance": video, "lam_model_path": None},
    }
    for message, fields in cases.items():
        with refused(message, error=TrainingError):
            deployed(checkpoint, **(fields if isinstance(fields, dict) else {"lam_guidance": fields}))
    config = deployed(checkpoint).config
    config.lam_camera_key, config.lam_guidance = [TOP, "observation.images.side"], "demo.mp4"
    with refused("2 sources of tokens", error=TrainingError):
        open_guide(config)


def test_videos_unlike_training_are_told_of(checkpoints, tmp_path, caplog, dataset):
    frames = [np.full((48, 96, 3), 255 - 20 * k, np.uint8) for k in range(6)]
    write_video(tmp_path / "wide.mkv", frames, FPS // 2)
    with caplog.at_level(logging.WARNING):
        policy = deployed(checkpoints(*NEXT), lam_guidance=str(tmp_path / "wide.mkv"))
        act(policy, dataset, 9, 1)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "has 5 frames per second, the policy was trained at 10" in told
    assert "is 96 × 48, the LAM's camera observation.images.top 48 × 48" in told
    assert told.count("has other colours than the camera") == 1
