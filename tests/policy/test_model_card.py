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
            "| frame stride | 1 = 0.1 s at 10 fps |",
            "| tokens | VQ, 2 × 32, float32 |",
            "| `lam_token_deltas` | [0] |",
            f"| trained on | store `{REPO}@{first}` |",
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


def test_no_path_of_the_training_machine_is_told():
    config = lam_config(
        repo_id="user/policy",
        lam_model_path=["microsoft/villa-x", "/home/me/lam"],
        lam_source="store:/home/me/data/pusht_lam",
        lam_frame_stride=3,
    )
    section = lam_section(config, 30)
    local = "(a folder where it was trained)"
    for fact in (
        f"| LAM | `microsoft/villa-x` | `lam` {local} |",
        f"| trained on | store `pusht_lam` {local} |",
        "| frame stride | 3 = 0.1 s at 30 fps |",
        "lerobot-eval --policy.path=user/policy --policy.lam_model_path=<LAM> ",
    ):
        assert fact in section, fact
    assert "/home" not in section
    assert "| LAM | not recorded |" in lam_section(lam_config(), None)
