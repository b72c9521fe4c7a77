"""The card with which a trained policy is pushed, and what training on a store of the Hub leaves behind."""

from huggingface_hub import ModelCard, constants

from lerobot_lam_diffusion.configuration_diffusion_lam import DiffusionLamConfig
from lerobot_lam_diffusion.policy.model_card import lam_section
from tests.conftest import TOP
from tests.hub_server import connect, serve
from tests.policies import build, lam_config

REPO = "user/squares-tokens"


def test_a_policy_trained_on_a_store_of_the_hub(dataset, store, lam_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelCard, "validate", lambda card: None)  # asks huggingface.co, wherever the Hub is
    with serve() as server:
        connect(monkeypatch, server.url, tmp_path)
        first = server.add(REPO, {file.name: file.read_bytes() for file in store.path.iterdir()})
        config = lam_config(lam_tokens_path=REPO)
        policy, _ = build(config, dataset)
        assert config.lam_source == f"store:{REPO}@{first}"

        card = policy.generate_model_card(
            dataset.repo_id, config.type, None, ["mine"], dataset_meta=dataset.meta
        )
        assert card.data.datasets == [dataset.repo_id, REPO]
        assert {"lam-tokens", "lerobot", "mine", "diffusion_lam"} == set(card.data.tags) - {"robotics"}
        assert "# Model Card for diffusion_lam" in card.text  # LeRobot's own
        for fact in (
            f"`{lam_folder.name}` (a folder where it was trained)",
            store.provenance.lam.fingerprint,
            f"| camera | `{TOP}` |",
            "1 frame = 0.1 s at 10 fps",
            "VQ (codebook rows), 2 × 32 elements, encoded in float32",
            "latest: 1 token |",
            f"[{REPO}](https://huggingface.co/datasets/{REPO}), commit `{first}`",
        ):
            assert fact in card.text, fact
        assert str(lam_folder.parent) not in card.text

        # The repository moves on; a resumed run does not. Nor does it need the Hub.
        server.add(REPO, {"lam_tokens.json": b"{}"})
        config.save_pretrained(tmp_path / "checkpoint")
        resumed = DiffusionLamConfig.from_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    build(resumed, dataset)
    assert resumed.lam_source == f"store:{REPO}@{first}"


def test_without_lam_conditioning_it_is_lerobots_card(dataset, monkeypatch):
    monkeypatch.setattr(ModelCard, "validate", lambda card: None)
    policy, _ = build(lam_config(use_lam_conditioning=False), dataset)
    card = policy.generate_model_card(dataset.repo_id, "diffusion_lam", None, None)
    assert "Latent action model" not in card.text
    assert "lam-tokens" not in card.data.tags


def test_sources():
    def told(**fields):
        section = lam_section(lam_config(**fields), None)
        return next(line for line in section.splitlines() if line.startswith("| trained on"))

    local = "(a folder where it was trained)"
    assert told() == "| trained on tokens from | not recorded |"
    assert told(lam_source="store:/home/me/data/pusht_lam").endswith(f"the token store `pusht_lam` {local} |")
    assert told(lam_source="column:observation.lam_tokens").endswith("column `observation.lam_tokens` |")
    assert told(lam_source="live:microsoft/villa-x").endswith("in training (`microsoft/villa-x`) |")


def test_the_command_names_a_lam_that_others_can_reach():
    assert "--policy.lam_model_path=microsoft/villa-x " in lam_section(
        lam_config(lam_model_path="microsoft/villa-x", repo_id="user/policy"), None
    )
    several = lam_config(lam_model_path=["microsoft/villa-x", "/home/me/lam"])
    assert "--policy.lam_model_path='[microsoft/villa-x,<LAM 2>]' " in lam_section(several, None)
    section = lam_section(lam_config(lam_model_path="/home/me/lam", lam_frame_stride=3), 30)
    assert "--policy.lam_model_path=<LAM> " in section
    assert "/home" not in section
    assert "| frame stride | 3 frames = 0.1 s at 30 fps |" in section
