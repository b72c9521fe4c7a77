import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

from lerobot_lam_diffusion import OBS_LAM_IMAGES, OBS_LAM_TOKENS, DiffusionLamPolicy
from lerobot_lam_diffusion.modeling_diffusion_lam import DiffusionLamModel
from tests.policies import (
    SMALL,
    build,
    lam_config,
    observation,
    record_tokens,
    refused,
    stock_config,
    training_batch,
)

ROWS = [0, 1, 20, 30]  # two at an episode's start, where tokens are missing


def loss_and_gradients(policy, batch, seed=1):
    policy.train()
    policy.zero_grad()
    torch.manual_seed(seed)
    loss, _ = policy.forward(dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def sample_actions(policy, seen, seed=2):
    policy.eval()
    policy.reset()
    torch.manual_seed(seed)
    return torch.stack([policy.select_action(dict(seen)) for _ in range(3)])


def test_off_is_the_stock_policy_bit_for_bit(dataset, tmp_path):
    stock, preprocess = build(stock_config(), dataset)
    off, _ = build(lam_config(use_lam_conditioning=False), dataset)
    weights, stock_weights = off.state_dict(), stock.state_dict()
    assert weights.keys() == stock_weights.keys()
    assert all(torch.equal(weights[name], stock_weights[name]) for name in weights)
    batch = preprocess(training_batch(stock.config, dataset, ROWS))
    stock_loss, stock_gradients = loss_and_gradients(stock, batch)
    off_loss, off_gradients = loss_and_gradients(off, batch)
    assert off_loss == stock_loss
    assert stock_gradients.keys() == off_gradients.keys()
    assert all(torch.equal(off_gradients[name], stock_gradients[name]) for name in stock_gradients)
    seen = preprocess(observation(dataset, [20]))
    assert torch.equal(sample_actions(off, seen), sample_actions(stock, seen))
    stock.save_pretrained(tmp_path / "stock")
    off.save_pretrained(tmp_path / "off")
    files = [tmp_path / name / "model.safetensors" for name in ("stock", "off")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("aggregation", ["latest", "concat"])
@pytest.mark.parametrize("film", [True, False])
def test_on_starts_as_the_stock_policy_and_learns_from_tokens(dataset, store, aggregation, film):
    fields = {"use_film_scale_modulation": film}
    stock, preprocess = build(stock_config(**fields), dataset)
    config = lam_config(lam_tokens_path=str(store.path), lam_temporal_aggregation=aggregation, **fields)
    on, _ = build(config, dataset)
    batch = preprocess(training_batch(on.config, dataset, ROWS))
    stock_loss, stock_gradients = loss_and_gradients(stock, batch)
    on_loss, on_gradients = loss_and_gradients(on, batch)
    assert on_loss == stock_loss
    assert all(torch.equal(on_gradients[name], stock_gradients[name]) for name in stock_gradients)
    own = [name for name in on_gradients if name not in stock_gradients]
    assert own, "no LAM parameters"
    assert all(on_gradients[name].any() for name in own if name.endswith("cond_encoder.lam.weight"))


def test_tokens_are_those_of_the_store_divided_by_its_scale(dataset, store):
    policy, preprocess = build(
        lam_config(lam_tokens_path=str(store.path), lam_temporal_aggregation="concat"), dataset
    )
    batch = preprocess(training_batch(policy.config, dataset, ROWS))
    seen = record_tokens(policy)
    policy.forward(dict(batch))
    expected = store.window(torch.tensor(ROWS), [-1, 0])
    assert torch.equal(seen[-1], expected / store.provenance.lam.token_scale)
    assert seen[-1][2:].any()
    assert not seen[-1][0].any()  # frame 0: nothing before it


def test_training_fills_in_what_the_checkpoint_must_know(dataset, store, lam_folder):
    policy, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    config = policy.config
    assert config.lam_fingerprint == store.provenance.lam.fingerprint
    assert config.lam_token_scale == store.provenance.lam.token_scale
    assert (config.lam_num_learned_tokens, config.lam_action_latent_dim) == (2, 32)
    assert config.lam_frame_stride == 1
    assert config.lam_camera_key == "observation.images.top"
    assert config.lam_model_path == str(lam_folder)
    assert config.lam_source == f"store:{store.path}"
    assert policy.diffusion.lam_model is None


def test_a_checkpoint_loads_where_the_store_is_gone(dataset, make_store, tmp_path):
    store = make_store(dataset)
    policy, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    policy.save_pretrained(tmp_path)
    for file in store.path.iterdir():
        file.unlink()
    assert DiffusionLamPolicy.from_pretrained(tmp_path).config.lam_fingerprint


def test_predict_action_chunk_takes_a_dataset_batch(dataset, store):
    policy, preprocess = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    policy.eval()
    batch = preprocess(training_batch(policy.config, dataset, ROWS))
    assert policy.predict_action_chunk(batch).shape == (4, 4, 2)


def a_policy_of_the_users_test():
    config = lam_config(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 48, 48)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )
    return DiffusionLamPolicy(config)


def test_precomputed_policy_holds_no_lam_and_queues_tokens():
    policy = a_policy_of_the_users_test()
    assert policy.diffusion.lam_model is None
    assert hasattr(policy.diffusion, "lam_projection")
    assert isinstance(policy.diffusion, DiffusionLamModel)
    assert isinstance(policy, DiffusionPolicy)
    policy.reset()
    assert OBS_LAM_TOKENS in policy._queues
    assert OBS_LAM_IMAGES not in policy._queues


def test_forward_on_a_batch_that_brings_its_tokens():
    policy = a_policy_of_the_users_test()
    batch = {
        "observation.state": torch.randn(4, 2, 2),
        "observation.image": torch.rand(4, 2, 3, 48, 48),
        "observation.lam_tokens": torch.randn(4, 2, 64),
        "action": torch.randn(4, SMALL["horizon"], 2),
        "action_is_pad": torch.zeros(4, SMALL["horizon"], dtype=torch.bool),
    }
    loss, _ = policy.forward(batch)
    assert loss.ndim == 0
    assert torch.isfinite(loss)

    tokens = batch["observation.lam_tokens"]
    longer = batch | {"observation.lam_tokens": torch.cat([torch.randn(4, 1, 64), tokens], dim=1)}
    torch.manual_seed(0)
    expected, _ = policy.forward(batch)
    torch.manual_seed(0)
    assert torch.equal(policy.forward(longer)[0], expected)  # the last steps count


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({OBS_LAM_TOKENS: torch.zeros(4, 2, 32)}, "shape (4, 2, 32), expected (B, at least 1, 64)"),
        ({}, "and they cannot be looked up, as it has no 'index'"),
        ({"index": torch.tensor([0])}, "no token store open: wrap the dataset in LamTokenDataset"),
    ],
)
def test_a_batch_without_usable_tokens_is_refused(batch, message):
    with refused(message):
        a_policy_of_the_users_test().forward(batch)


@pytest.mark.slow
def test_no_lam_code_is_imported_for_precomputed_tokens(store, dataset):
    """Training on precomputed tokens neither loads nor imports a LAM."""
    script = f"""
import sys
sys.path.insert(0, ".")
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tests.policies import build, lam_config, training_batch
dataset = LeRobotDataset("local/squares", root={str(dataset.root)!r}, video_backend="pyav")
policy, preprocess = build(lam_config(lam_tokens_path={str(store.path)!r}), dataset)
loss, _ = policy.forward(preprocess(training_batch(policy.config, dataset, [5, 6])))
assert loss.isfinite()
assert not [name for name in sys.modules if name.startswith("lerobot_lam_diffusion.lam")]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, cwd=Path(__file__).parents[1])
