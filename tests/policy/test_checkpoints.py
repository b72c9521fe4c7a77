"""Warm start from a stock policy, and checkpoints of compiled policies."""

import pytest
import torch
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from safetensors.torch import load_file, save_file

from lerobot_lam_diffusion import DiffusionLamPolicy
from tests.policies import build, lam_config, refused, stock_config, training_batch


@pytest.fixture(scope="module")
def stock_checkpoint(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    policy, _ = build(stock_config(), dataset, seed=5)
    policy.save_pretrained(folder)
    return folder


def loss(policy, batch):
    policy.train()
    torch.manual_seed(1)
    return policy.forward(dict(batch))[0].item()


def test_warm_start_has_the_stock_loss_bit_for_bit(dataset, store, stock_checkpoint, tmp_path):
    stock = DiffusionPolicy.from_pretrained(stock_checkpoint)
    fields = {"lam_tokens_path": str(store.path), "init_from_stock": str(stock_checkpoint)}
    warm, preprocess = build(lam_config(**fields), dataset, seed=6)
    cold, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset, seed=6)
    batch = preprocess(training_batch(warm.config, dataset, [1, 20, 30, 50]))
    assert loss(warm, batch) == loss(stock, batch) != loss(cold, batch)

    warm.save_pretrained(tmp_path)
    assert DiffusionLamPolicy.from_pretrained(tmp_path).config.init_from_stock is None


def test_warm_start_tells_all_differences(dataset, store, stock_checkpoint):
    fields = {"lam_tokens_path": str(store.path), "init_from_stock": str(stock_checkpoint)}
    with refused(
        "another architecture",
        "horizon is 16, the stock policy has 8",
        "kernel_size is 3",
        "prediction_type is sample",
    ):
        build(lam_config(**fields, horizon=16, kernel_size=3, prediction_type="sample"), dataset)


def test_warm_start_wants_a_stock_checkpoint(dataset, store, tmp_path):
    fields = {"lam_tokens_path": str(store.path)}
    with pytest.raises(ValueError, match="not a policy checkpoint"):
        build(lam_config(**fields, init_from_stock=str(tmp_path)), dataset)
    own, _ = build(lam_config(**fields), dataset)
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'diffusion_lam', expected 'diffusion'.*--policy.path"):
        build(lam_config(**fields, init_from_stock=str(tmp_path)), dataset)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_checkpoints_load_whether_or_not_they_were_compiled(dataset, store, tmp_path, compiled):
    policy, _ = build(lam_config(lam_tokens_path=str(store.path), compile_model=compiled), dataset, seed=3)
    policy.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("_orig_mod" in name for name in names) == compiled
    config = policy.config
    config.compile_model = not compiled
    again = DiffusionLamPolicy.from_pretrained(tmp_path, config=config)
    before = {name.replace("_orig_mod.", ""): value for name, value in policy.state_dict().items()}
    after = {name.replace("_orig_mod.", ""): value for name, value in again.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_that_lacks_weights_is_refused(dataset, store, tmp_path):
    policy, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    policy.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["diffusion.lam_projection.weight"]
    weights["diffusion.other"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    missing = 'Missing key(s) in state_dict: "diffusion.lam_projection.weight"'
    with refused(missing, 'Unexpected key(s) in state_dict: "diffusion.other"', "name a checkpoint of this"):
        DiffusionLamPolicy.from_pretrained(tmp_path)


def test_lam_weights_without_lam_conditioning_are_refused(dataset, store, tmp_path):
    policy, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    policy.save_pretrained(tmp_path)
    with refused("Unexpected key(s)", "leave out flags that change its network"):
        DiffusionLamPolicy.from_pretrained(
            tmp_path, config=lam_config(use_lam_conditioning=False, **features(policy))
        )


def test_two_starts_are_refused(dataset, store, stock_checkpoint, tmp_path):
    policy, _ = build(lam_config(lam_tokens_path=str(store.path)), dataset)
    policy.save_pretrained(tmp_path)
    policy.config.init_from_stock = str(stock_checkpoint)
    policy.config.pretrained_path = tmp_path
    with pytest.raises(ValueError, match="two places to start from"):
        build(policy.config, dataset)


def features(policy):
    return {side: getattr(policy.config, side) for side in ("input_features", "output_features")}
