"""Stock `lerobot-train` runs `diffusion_lam` on precomputed tokens."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.scripts import lerobot_train
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors.torch import load_file

from lerobot_lam_diffusion import DiffusionLamPolicy

SMALL_FLAGS = [
    "--policy.type=diffusion_lam",
    "--policy.use_precomputed_lam_tokens=true",
    "--policy.push_to_hub=false",
    "--policy.device=cpu",
    "--policy.pretrained_backbone_weights=null",
    "--policy.down_dims=[16,32]",
    "--policy.n_groups=4",
    "--policy.horizon=8",
    "--policy.n_action_steps=4",
    "--policy.drop_n_last_frames=3",
    "--dataset.repo_id=local/squares",
    "--batch_size=4",
    "--num_workers=0",
    "--log_freq=1",
    "--seed=7",
]


def train(monkeypatch, *flags):
    """`lerobot-train` in this process."""
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *flags])
    register_third_party_plugins()
    lerobot_train.train()


@pytest.fixture
def flags(dataset, store, tmp_path):
    return [
        *SMALL_FLAGS,
        f"--dataset.root={dataset.root}",
        f"--policy.lam_tokens_path={store.path}",
        f"--output_dir={tmp_path / 'run'}",
    ]


def saved_config(run: Path, step: str = "last") -> dict:
    return json.loads((run / "checkpoints" / step / "pretrained_model" / "config.json").read_text())


def weights(run: Path, step: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / step / "pretrained_model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_trains_resumes_and_loads_again(monkeypatch, flags, tmp_path, store):
    run = tmp_path / "run"
    train(monkeypatch, *flags, "--steps=2")
    before = weights(run)
    checkpoint = run / "checkpoints" / "000002" / "pretrained_model"
    train(monkeypatch, f"--config_path={checkpoint / 'train_config.json'}", "--resume=true", "--steps=4")
    after = weights(run, "000004")
    assert before.keys() == after.keys()
    assert not same(before, after)

    policy = DiffusionLamPolicy.from_pretrained(run / "checkpoints" / "last" / "pretrained_model")
    assert same(dict(policy.state_dict()), after)
    saved = saved_config(run, "000002")
    assert saved["type"] == "diffusion_lam"
    assert saved["lam_fingerprint"] == store.provenance.lam.fingerprint
    assert saved["lam_conditioning_steps"] == 1
    assert any(value.any() for name, value in after.items() if name.endswith("cond_encoder.lam.weight"))


@pytest.mark.slow
def test_fine_tunes_on_the_store_that_the_command_line_names(
    monkeypatch, flags, tmp_path, dataset, make_store
):
    """The path saved with the checkpoint does not win over the flag."""
    train(monkeypatch, *flags, "--steps=1")
    checkpoint = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    moved = make_store(dataset)
    train(
        monkeypatch,
        f"--policy.path={checkpoint}",
        f"--policy.lam_tokens_path={moved.path}",
        "--policy.push_to_hub=false",
        f"--dataset.root={dataset.root}",
        "--dataset.repo_id=local/squares",
        f"--output_dir={tmp_path / 'tuned'}",
        "--steps=1",
        "--batch_size=4",
        "--num_workers=0",
    )
    saved = saved_config(tmp_path / "tuned")
    assert saved["lam_tokens_path"] == str(moved.path)
    assert saved["lam_source"] == f"store:{moved.path}"


@pytest.mark.slow
def test_trains_on_some_episodes_with_a_held_out_split(monkeypatch, flags, tmp_path):
    train(
        monkeypatch,
        *flags,
        "--dataset.episodes=[3,0,2]",
        "--dataset.eval_split=0.3",
        "--eval_steps=1",
        "--steps=2",
    )
    assert weights(tmp_path / "run")


def test_a_bad_store_stops_before_training(monkeypatch, flags, tmp_path):
    with pytest.raises(ValueError, match=r"no token store at .*lerobot-lam-precompute"):
        train(monkeypatch, *flags, f"--policy.lam_tokens_path={tmp_path}/nothing", "--steps=1")
    assert not (tmp_path / "run" / "checkpoints").exists()


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def test_contradicting_fields_are_told_although_draccus_drops_them(monkeypatch, flags, lam_folder, caplog):
    concat = "--policy.lam_temporal_aggregation=concat"
    with pytest.raises(SystemExit):
        train(monkeypatch, *flags, *on_the_fly(lam_folder), concat, "--policy.n_obs_steps=1")
    assert "tokens on the fly need n_obs_steps >= 2" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["precomputed, two workers, DDP", "on the fly, DDP", "on the fly, FSDP"])
def test_two_processes(flags, lam_folder, tmp_path, parallel):
    """torchrun as LeRobot's CPU runs need it: two ranks, each with its own loader."""
    console = Path(sys.executable).parent
    command = [console / "torchrun", "--standalone", "--nproc_per_node=2", console / "lerobot-train", *flags]
    command += ["--steps=3"]
    command += on_the_fly(lam_folder) if "on the fly" in parallel else ["--num_workers=1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **(FSDP if "FSDP" in parallel else {})}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Effective batch size: 4 x 2 = 8" in done.stdout + done.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    assert same(dict(DiffusionLamPolicy.from_pretrained(checkpoint).state_dict()), weights(tmp_path / "run"))


@pytest.mark.slow
def test_adapters_train_on_a_checkpoint(monkeypatch, flags, lam_folder, tmp_path, dataset):
    """PEFT: only the adapters learn, and the LAM is not among what they adapt."""
    train(monkeypatch, *flags, *on_the_fly(lam_folder), "--steps=1")
    train(
        monkeypatch,
        f"--policy.path={tmp_path / 'run' / 'checkpoints' / 'last' / 'pretrained_model'}",
        "--policy.push_to_hub=false",
        "--peft.method_type=LORA",
        "--peft.r=4",
        f"--dataset.root={dataset.root}",
        "--dataset.repo_id=local/squares",
        f"--output_dir={tmp_path / 'adapted'}",
        "--steps=1",
        "--batch_size=4",
        "--num_workers=0",
    )
    folder = tmp_path / "adapted" / "checkpoints" / "last" / "pretrained_model"
    adapters = load_file(folder / "adapter_model.safetensors")
    assert any("lam_projection" in name for name in adapters)
    assert not any("map_block" in name for name in adapters)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_policy_trains_on_the_fly_and_loads_uncompiled(monkeypatch, flags, lam_folder, tmp_path):
    compiled = ["--policy.compile_model=true", "--policy.compile_mode=default", "--steps=1"]
    train(monkeypatch, *flags, *on_the_fly(lam_folder), *compiled)
    checkpoint = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=["--compile_model=false"])
    policy = DiffusionLamPolicy.from_pretrained(checkpoint, config=config)
    trained = {name.replace("_orig_mod.", ""): value for name, value in weights(tmp_path / "run").items()}
    assert same(dict(policy.state_dict()), trained)


@pytest.mark.slow
def test_the_example_loop_trains_and_its_checkpoint_loads(dataset, store, tmp_path):
    script = Path(__file__).parents[1] / "docs" / "examples" / "train_with_precomputed_lam.py"
    arguments = {
        "--dataset-repo-id": "local/squares",
        "--dataset-root": dataset.root,
        "--lam-tokens-path": store.path,
        "--output-dir": tmp_path / "own",
        "--num-epochs": 1,
        "--learning-rate": 1e-4,
        "--batch-size": 30,
        "--num-workers": 0,
        "--device": "cpu",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    subprocess.run([sys.executable, script, *words], check=True, timeout=540)
    policy = DiffusionLamPolicy.from_pretrained(tmp_path / "own" / "last")
    assert policy.config.lam_fingerprint == store.provenance.lam.fingerprint


def on_the_fly(lam_folder) -> list[str]:
    """Flags that switch from precomputed tokens to computed ones; the later flag counts."""
    return [
        "--policy.use_precomputed_lam_tokens=false",
        f"--policy.lam_model_path={lam_folder}",
        "--policy.lam_camera_key=observation.images.top",
    ]
