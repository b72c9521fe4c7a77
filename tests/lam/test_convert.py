"""Published checkpoints become LAM folders, or are refused with all that is wrong."""

import json
from math import prod

import pytest
import torch

from lerobot_lam_diffusion.lam import load_lam, loading, resolve_lam
from lerobot_lam_diffusion.lam.convert import Dims, Source, convert_lam, locate_checkpoint, sha256_of
from lerobot_lam_diffusion.lam.lapa import LapaConfig, LapaLam
from lerobot_lam_diffusion.lam.lapa.convert import translation_of as lapa_translation
from lerobot_lam_diffusion.lam.locating import PUBLISHED
from lerobot_lam_diffusion.lam.univla import UniVlaConfig, UniVlaLam
from lerobot_lam_diffusion.lam.univla.convert import translation_of as univla_translation
from lerobot_lam_diffusion.utils.errors import LamError
from tests.hub_server import connect, serve

from .conftest import DATA

LAPA = DATA / "lapa_laq" / "golden_public" / "laq.pt"
UNIVLA = DATA / "univla" / "golden_public" / "lam-stage-2.ckpt"
DIMS = {LAPA: Dims(image_size=64), UNIVLA: Dims(image_size=56, num_heads=5, dino_num_heads=4)}


def state_of(path):
    document = torch.load(path, weights_only=True)
    return document.get("state_dict", document)


@pytest.fixture
def convert(tmp_path):
    """Converts a document as `torch.save` writes it (or a file); returns the folder."""

    def run(document, of=LAPA, name="lam", **options):
        path = document
        if isinstance(document, dict):
            path = tmp_path / f"{name}.pt"
            torch.save(document, path)
        return convert_lam(Source(path), tmp_path / name, **{"dims": DIMS[of], **options})

    return run


@pytest.mark.parametrize(
    ("family", "translation", "tensors", "floats"),
    [
        (LapaLam, lapa_translation(LapaConfig()), 421, 343_815_536),
        (UniVlaLam, univla_translation(UniVlaConfig()), 429, 200_749_568),
    ],
)
def test_the_published_checkpoints_have_these_sizes(family, translation, tensors, floats):
    """Of the tensors that are used."""
    expected = translation.expected(loading.state_of(loading.meta_modules(family, translation.config)))
    assert (len(expected), sum(map(prod, expected.values()))) == (tensors, floats)


@pytest.mark.parametrize("path", [LAPA, UNIVLA])
def test_the_folder_says_where_it_is_from(convert, path):
    folder = convert(path, path)
    document = json.loads((folder / "model_config.json").read_text())
    config = document["config"]
    assert document["architecture"] == {LAPA: "LapaLaq", UNIVLA: "UniVlaLam"}[path]
    assert (config["source_file"], config["source_sha256"]) == (path.name, sha256_of(path))
    assert config["licence"] is config["source_repository"] is config["source_revision"] is None
    golden = json.loads((path.parents[1] / "golden_public.json").read_text())
    assert config["source_sha256"] == golden["checkpoint_sha256"]
    lam = load_lam(folder)
    assert (lam.num_learned_tokens, lam.action_latent_dim, lam.num_codes) == (4, 6, 12)
    assert {p.name for p in folder.iterdir()} == {"model_config.json", "model.safetensors"}


def test_what_trainers_wrap_around_a_model(convert):
    state = state_of(LAPA)
    fingerprint = load_lam(convert(state, name="plain")).fingerprint
    noise = {key: torch.zeros_like(value) for key, value in state.items()}
    wrapped = {
        "parallel": {f"module.{key}": value for key, value in state.items()},
        "compiled": {f"_orig_mod.{key}": value for key, value in state.items()},
        "nested": {"model": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "step": 3},
        "average": {"initted": torch.tensor(True), "step": torch.tensor(3)}
        | {f"online_model.{key}": value for key, value in noise.items()}
        | {f"ema_model.module.{key}": value for key, value in state.items()},
        "half": {key: value.double() for key, value in state.items()},
    }
    for name, document in wrapped.items():
        assert load_lam(convert(document, name=name)).fingerprint == fingerprint, name
    theirs = {"epoch": 1, "state_dict": {key.replace("lam.", ""): v for key, v in state_of(UNIVLA).items()}}
    bare = load_lam(convert(theirs, UNIVLA, "bare")).fingerprint
    assert bare == load_lam(convert(UNIVLA, UNIVLA, "whole")).fingerprint


def test_what_shapes_a_token_shapes_the_fingerprint(convert):
    state = state_of(UNIVLA)
    plain = load_lam(convert({"state_dict": state}, UNIVLA, "plain")).fingerprint
    other_heads = Dims(image_size=56, num_heads=4, dino_num_heads=4)
    assert load_lam(convert({"state_dict": state}, UNIVLA, "heads", dims=other_heads)).fingerprint != plain
    state["lam.decoder.out.bias"] += 1  # the FDM decides no token
    assert load_lam(convert({"state_dict": state}, UNIVLA, "fdm")).fingerprint == plain
    state["lam.vq_action.codebook.weight"][0, 0] += 1e-6
    assert load_lam(convert({"state_dict": state}, UNIVLA, "code")).fingerprint != plain


def test_the_decoder_is_kept_on_request(convert, make_frames):
    frames = make_frames(2, 3, 64, 64)
    without, kept = convert(LAPA, name="without"), convert(LAPA, name="kept", keep_fdm=True)
    assert load_lam(without).fingerprint == load_lam(kept).fingerprint
    assert load_lam(kept, fdm=True).predict_next(frames, torch.zeros(2, 24)).shape == (2, 3, 64, 64)
    with pytest.raises(LamError, match=r"holds no FDM(.|\n)*--keep_fdm=true"):
        load_lam(without, fdm=True)
    with pytest.raises(LamError, match=r"opened without its FDM"):
        load_lam(kept).predict_next(frames, torch.zeros(2, 24))
    with pytest.raises(LamError, match=r"not images(.|\n)*Leave it out"):
        convert(UNIVLA, UNIVLA, keep_fdm=True)


def test_all_problems_of_the_tensors_are_told_at_once(convert):
    state = dict(state_of(LAPA))
    del state["vq.project_in.bias"], state["dec_spatial_transformer.norm_out.gamma"]
    state["extra"] = torch.zeros(3)
    state["enc_temporal_transformer.layers.0.4.weight"] = torch.zeros(2)
    state["vq.cnn_encoder.2.weight"] = torch.zeros(6, 6, 4, 4)
    state["enc_spatial_transformer.layers.0.3.0.bias"] = torch.full((48,), float("nan"))
    state["vq.project_out.bias"] = torch.zeros(48, dtype=torch.int64)
    with pytest.raises(LamError) as error:
        convert(state)
    for part in (
        "missing key vq.project_in.bias, expected with shape [6]",
        "missing key dec_spatial_transformer.norm_out.gamma",
        "unexpected key 'extra' of shape [3]",
        "unexpected key 'enc_temporal_transformer.layers.0.4.weight' of shape [2]",
        "vq.cnn_encoder.2.weight has shape [6, 6, 4, 4], expected [6, 6, 3, 3]",
        "enc_spatial_transformer.layers.0.3.0.bias holds NaN or Inf",
        "vq.project_out.bias is stored as torch.int64",
    ):
        assert part in str(error.value)


def test_dimensions_that_do_not_fit_are_refused(convert):
    with pytest.raises(LamError, match=r"16 × 16 patches (.|\n)*give 36 tokens"):
        convert(LAPA, dims=Dims(image_size=128))
    with pytest.raises(LamError, match="image_size is 60, expected a multiple of patch_size"):
        convert(LAPA, dims=Dims(image_size=60))
    with pytest.raises(LamError, match="code_seq_len is 5, expected one of"):
        convert(LAPA, dims=Dims(image_size=64, code_seq_len=5))
    with pytest.raises(LamError, match="model_dim is 40, expected a multiple of num_heads"):
        convert(UNIVLA, UNIVLA, dims=Dims(image_size=56, dino_num_heads=4))
    with pytest.raises(LamError, match=r"--dims\.num_heads means nothing for lapa"):
        convert(LAPA, dims=Dims(image_size=64, num_heads=3))


def test_other_models_are_refused(convert):
    with pytest.raises(LamError, match=r"is not a checkpoint of a known family(.|\n)*lapa, univla"):
        convert({"layer.weight": torch.zeros(2)})
    with pytest.raises(LamError, match="is a checkpoint of lapa, but --family=univla"):
        convert(LAPA, family="univla")
    with pytest.raises(LamError, match=r"holds the keys \['epoch', 'weights'\], expected a state dict"):
        convert({"epoch": 1, "weights": [1.0]})
    state = state_of(UNIVLA)
    del state["lam.vq_action.codebook.weight"]
    with pytest.raises(LamError, match=r"stage 1(.|\n)*lam-stage-2\.ckpt"):
        convert({"state_dict": state}, UNIVLA)
    state = dict(state_of(LAPA))
    with pytest.raises(LamError, match="twice, with and without a prefix"):
        convert(state | {"module.vq.codebooks": state["vq.codebooks"]})
    del state["vq.codebooks"]
    with pytest.raises(LamError, match=r"vq\.codebooks is missing, expected it to give"):
        convert(state)


class Trap:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


def test_code_in_a_checkpoint_is_refused_and_does_not_run(convert, tmp_path, capsys):
    path = tmp_path / "trap.ckpt"
    torch.save({"state_dict": state_of(UNIVLA), "hyper_parameters": {"optimizer": Trap()}}, path)
    with pytest.raises(LamError, match=r"GLOBAL print was(.|\n)*could run code(.|\n)*state dict alone"):
        convert(path, UNIVLA)
    assert "ran" not in capsys.readouterr().out
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", LAPA.read_bytes()[:-1000]):
        path.write_bytes(content)
        with pytest.raises(LamError, match=r"does not open with torch\.load\(weights_only=True\)"):
            convert(path)
    assert not (tmp_path / "lam").exists()


def test_names_of_checkpoints(tmp_path):
    assert locate_checkpoint(str(LAPA)) == Source(LAPA)
    with pytest.raises(LamError, match=r"no checkpoint at '.*nothing\.pt'(.|\n)*latent-action-pretraining"):
        locate_checkpoint(str(tmp_path / "nothing.pt"))
    with pytest.raises(LamError, match="no checkpoint at 'someone/a-lam'"):
        locate_checkpoint("someone/a-lam")
    with pytest.raises(LamError, match=r"no checkpoint at 'someone/a-lam/laq/x\.pt': (.|\n)*HF_HUB_OFFLINE"):
        locate_checkpoint("someone/a-lam/laq/x.pt")


@pytest.mark.parametrize(
    ("path", "command"),
    [
        (LAPA, "lerobot-lam-convert <checkpoint> --output_dir="),
        (LAPA.parent, "lerobot-lam-convert <checkpoint> --output_dir="),
        *((name, f"lerobot-lam-convert {name} --output_dir=") for name in PUBLISHED),
    ],
)
def test_a_checkpoint_named_as_a_lam_is_answered_with_the_command_to_run(path, command):
    for call in (load_lam, resolve_lam):
        with pytest.raises(LamError) as error:
            call(path)
        assert command in str(error.value)


def test_a_damaged_folder_is_refused(convert):
    folder = convert(LAPA)
    path = folder / "model_config.json"
    document = json.loads(path.read_text())
    for key, value, message in (
        ("spatial_depth", 3, r'Missing key\(s\) in state_dict: "spatial\.blocks\.2\.peg\.weight"'),
        ("spatial_depth", 1 << 16, "spatial_depth is 65536, expected an integer from 1 to 128"),
        ("heads", "3", "heads is '3', expected an integer"),
        ("image_size", 0, "image_size is 0, expected an integer from 1"),
        ("n_codes", 0, "n_codes is 0, expected an integer from 1"),
        ("stride_seconds", -1, "stride_seconds is -1, expected a positive number"),
        ("licence", 3, "licence is 3, expected str"),
        ("dim_head", 9, r"size mismatch for spatial\.blocks\.0\.attn\.q\.weight"),
    ):
        path.write_text(json.dumps(document | {"config": document["config"] | {key: value}}))
        with pytest.raises(LamError, match=message):
            load_lam(folder)


def test_of_a_hub_repository_the_one_file_is_fetched(tmp_path, monkeypatch):
    files = {"laq/laq.pt": LAPA.read_bytes(), "labels.bin": b"x" * 1000, "laq/other.pt": b"x" * 1000}
    with serve() as server:
        commit = server.add("someone/a-lam", files)
        connect(monkeypatch, server.url, tmp_path / "cache")
        source = locate_checkpoint("someone/a-lam/laq/laq.pt")
        assert (source.repository, source.revision) == ("someone/a-lam", commit)
        snapshot = source.path.parents[1]
        assert [str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()] == ["laq/laq.pt"]
        with pytest.raises(LamError, match=r"has no file laq/none\.pt"):
            locate_checkpoint("someone/a-lam/laq/none.pt")
