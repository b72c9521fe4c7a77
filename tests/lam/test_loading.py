import pytest
import torch
from safetensors.torch import load_file, save_file

from lerobot_lam_diffusion.lam import fingerprint_of, load_lam, loading
from lerobot_lam_diffusion.utils.errors import LamError


@pytest.fixture
def edit_weights(lam_folder):
    """Rewrite the weights of a model folder after a change of its state dict; returns the folder."""

    def edit(change):
        state = load_file(lam_folder / "model.safetensors")
        change(state)
        save_file(state, lam_folder / "model.safetensors")
        return lam_folder

    return edit


def test_round_trip(lam_folder):
    lam = load_lam(lam_folder, fdm=True)
    state = load_file(lam_folder / "model.safetensors")
    modules = {"encoder": lam.encoder, "vq": lam.vq, "decoder": lam.decoder}
    loaded = {f"{part}.{k}": v for part, module in modules.items() for k, v in module.state_dict().items()}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert not any(p.requires_grad for module in modules.values() for p in module.parameters())


def test_only_encoder_and_codebook_are_read(lam_folder, monkeypatch):
    read = []
    original = loading._finite
    monkeypatch.setattr(loading, "_finite", lambda *args: read.append(args[2]) or original(*args))
    assert load_lam(lam_folder).decoder is None
    assert {key.split(".")[0] for key in read} == {"encoder", "vq"}
    read.clear()
    load_lam(lam_folder, fdm=True)
    assert {key.split(".")[0] for key in read} == {"encoder", "vq", "decoder"}


def test_weights_are_memory_of_their_own(lam_folder, make_frames):
    """A model in use survives that its file is replaced or truncated."""
    lam = load_lam(lam_folder)
    before = lam.encode_pairs(make_frames(2, 3, 16, 16), make_frames(2, 3, 16, 16, seed=1))
    (lam_folder / "model.safetensors").write_bytes(b"")
    after = lam.encode_pairs(make_frames(2, 3, 16, 16), make_frames(2, 3, 16, 16, seed=1))
    assert torch.equal(before.continuous, after.continuous)


def test_all_key_and_shape_problems_are_told_at_once(edit_weights):
    def change(state):
        del state["encoder.norm.g"]
        state["encoder.extra"] = torch.zeros(2)
        state["vq.embedding.weight"] = torch.zeros(7, 6)
        state["decoder.pe"] = torch.zeros(1, 1, 16)
        state["critic.weight"] = torch.zeros(2)

    with pytest.raises(LamError) as error:
        load_lam(edit_weights(change), fdm=True)
    for part in (
        "model.safetensors does not fit its model_config.json; 4 problems",
        "unexpected part 'critic'",
        'Missing key(s) in state_dict: "norm.g"',
        'Unexpected key(s) in state_dict: "extra"',
        "size mismatch for embedding.weight",
        "size mismatch for pe",
        "again",
    ):
        assert part in str(error.value)


def test_values_that_are_no_weights(edit_weights):
    def integers(state):
        state["encoder.norm.g"] = torch.zeros(24, dtype=torch.int32)

    with pytest.raises(LamError, match=r"'encoder\.norm\.g' is stored as torch\.int32, expected floating"):
        load_lam(edit_weights(integers))

    def infinite(state):
        state["encoder.norm.g"] = torch.full((24,), float("inf"))

    with pytest.raises(LamError, match=r"'encoder\.norm\.g' holds NaN or Inf"):
        load_lam(edit_weights(infinite))


def test_without_its_fdm_a_model_makes_tokens(edit_weights, lam_folder, make_frames):
    frames = make_frames(2, 3, 16, 16), make_frames(2, 3, 16, 16, seed=1)
    before = load_lam(lam_folder).encode_pairs(*frames)

    def cut(state):
        for key in [key for key in state if key.startswith("decoder.")]:
            del state[key]

    folder = edit_weights(cut)
    assert torch.equal(load_lam(folder).encode_pairs(*frames).continuous, before.continuous)
    with pytest.raises(LamError, match="holds no FDM"):
        load_lam(folder, fdm=True)


def test_broken_and_missing_weights(lam_folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (lam_folder / "model.safetensors").write_bytes(pointer)
    with pytest.raises(LamError, match=r"not a readable safetensors file(.|\n)*git-lfs pointer"):
        load_lam(lam_folder)
    (lam_folder / "model.safetensors").unlink()
    with pytest.raises(LamError, match=r"safetensors file \(No such file(.|\n)*git lfs pull"):
        load_lam(lam_folder)


def test_unknown_dtype(lam_folder):
    with pytest.raises(LamError, match=r"torch\.float16, expected torch\.float32 or torch\.bfloat16"):
        load_lam(lam_folder, dtype=torch.float16)


class TestFingerprint:
    def test_is_a_hash_that_loading_shows(self, lam_folder):
        fingerprint = fingerprint_of(lam_folder)
        assert len(bytes.fromhex(fingerprint)) == 32
        assert load_lam(lam_folder).fingerprint == fingerprint
        assert load_lam(lam_folder, dtype=torch.bfloat16, fdm=True).fingerprint == fingerprint

    @pytest.mark.parametrize("key", ["encoder.layers.1.attn_temp.qkv.weight", "vq.embedding.weight"])
    def test_changes_with_the_weights(self, lam_folder, edit_weights, key):
        before = fingerprint_of(lam_folder)
        edit_weights(lambda state: state[key].view(-1)[0].add_(1e-6))
        assert fingerprint_of(lam_folder) != before

    def test_does_not_change_with_the_decoder(self, lam_folder, edit_weights):
        before = fingerprint_of(lam_folder)
        edit_weights(lambda state: state["decoder.pe"].add_(1))
        assert fingerprint_of(lam_folder) == before

    def test_depends_on_what_shapes_a_token_alone(self, make_lam_folder):
        before = fingerprint_of(make_lam_folder("plain"))
        assert fingerprint_of(make_lam_folder("told", description="a card", augment_type="none")) == before
        # The same tensors, divided into heads differently, give other tokens.
        assert fingerprint_of(make_lam_folder("heads", encoder_n_heads=4)) != before

    def test_is_computed_once(self, lam_folder, monkeypatch):
        before = fingerprint_of(lam_folder)
        monkeypatch.setattr("lerobot_lam_diffusion.lam.loading._hash", None)
        assert fingerprint_of(lam_folder) == before
