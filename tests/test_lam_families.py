"""Every route of the tokens with other people's LAMs, and with one that has no codebook.

The invariant is spelled out pair by pair, and then asked of the store, verify, training on the fly, a robot's
ticks, `auto`, the live cache and a column, bit for bit for VQ tokens.
"""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from lerobot_lam_diffusion.lam import load_lam, register_lam, write_lam
from lerobot_lam_diffusion.lam.convert import Dims, Source, convert_lam
from lerobot_lam_diffusion.lam.loading import meta_modules
from lerobot_lam_diffusion.policy.live import FrameHistory
from lerobot_lam_diffusion.scripts import precompute_lam_tokens, tokens
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.utils.errors import UserError
from tests import policies
from tests.conftest import FPS, TOP
from tests.policies import build, lam_config, record_tokens, training_batch

DATA = Path(__file__).parent / "lam" / "data"
EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "own_lam.py"
CHECKPOINTS = {
    "lapa": (DATA / "lapa_laq" / "golden_public" / "laq.pt", Dims(image_size=64)),
    "univla": (
        DATA / "univla" / "golden_public" / "lam-stage-2.ckpt",
        Dims(image_size=56, num_heads=5, dino_num_heads=4),
    ),
}
KINDS = [("lapa", True), ("lapa", False), ("univla", True), ("univla", False), ("flow", False)]
STRIDES = {"lapa": 6, "univla": 9, "flow": 1}  # 0.6 s and 0.9 s at 10 fps; no proposal
TOLERANCE = 2e-5


def own_lam():
    spec = importlib.util.spec_from_file_location("own_lam", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A LAM of each family; `flow` is the documented example of one's own."""
    root = tmp_path_factory.mktemp("lams")
    made = {
        name: convert_lam(Source(path), root / name, dims=dims) for name, (path, dims) in CHECKPOINTS.items()
    }
    example = own_lam()
    made["flow"] = write_lam(root / "flow", example.MeanFlowLam, example.MeanFlowConfig(), {})
    return made


@pytest.fixture(scope="module")
def stores(dataset, folders, tmp_path_factory):
    """`stores(name, vq)`: what lerobot-lam-precompute makes, without a stride or kind named if it can be."""
    made: dict[tuple[str, bool], TokenStore] = {}

    def store(name: str, vq: bool) -> TokenStore:
        if (name, vq) not in made:
            folder = tmp_path_factory.mktemp("tokens") / "store"
            kind = [] if vq or name == "flow" else ["--use_vq_tokens=false"]
            flags = [*dataset_flags(dataset), f"--lam.path={folders[name]}", f"--output_dir={folder}", *kind]
            precompute_lam_tokens.main([*flags, f"--camera_key={TOP}", "--device=cpu", "--batch_size=8"])
            made[name, vq] = TokenStore.open(folder)
        return made[name, vq]

    return store


def dataset_flags(dataset) -> list[str]:
    return [
        "--dataset.repo_id=local/squares",
        f"--dataset.root={dataset.root}",
        "--dataset.video_backend=pyav",
    ]


def everything(store: TokenStore) -> torch.Tensor:
    return store.window(torch.arange(store.num_frames), [0])[:, 0]


def assert_same(got, want, vq: bool) -> None:
    if vq:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * max(1.0, want.abs().max().item()))


def live_config(folder, vq, stride, **fields):
    return policies.live_config(folder, lam_use_vq_tokens=vq, lam_frame_stride=stride, **fields)


@pytest.mark.parametrize(
    ("name", "vq"),
    [KINDS[0], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS[1:-1]), KINDS[-1]],
)
def test_one_token_on_every_route(dataset, frames, folders, stores, name, vq, capsys):
    store, lam = stores(name, vq), load_lam(folders[name])
    stride = store.frame_stride
    assert stride == STRIDES[name]
    assert store.provenance.stride_seconds == pytest.approx(stride / FPS)
    assert (store.kind == "vq") is vq
    assert store.provenance.lam.num_codes == (0 if name == "flow" else 12)
    assert store.provenance.lam.token_scale == pytest.approx(lam.token_scale)

    # The store, pair by pair.
    expected = torch.zeros(len(frames), lam.token_dim)
    for first, stop in zip(store.episode_from.tolist(), store.episode_to.tolist(), strict=True):
        for i in range(first + stride, stop):
            expected[i] = lam.encode_pairs(frames[i - stride, None], frames[i, None]).of_kind(vq)[0]
    assert_same(everything(store), expected, vq)
    assert expected.any(1).sum() > 10

    tokens.main(["verify", str(store.path), *dataset_flags(dataset), f"--lam.path={folders[name]}"])
    assert "error" not in capsys.readouterr().out

    # Training on the fly, and a robot's ticks.
    rows = [20, 21, 22, 35, 40, 45]
    config = live_config(folders[name], vq, stride)
    policy, preprocess = build(config, dataset)
    assert policy.config.lam_token_scale == pytest.approx(lam.token_scale)
    seen = record_tokens(policy)
    policy.forward(preprocess(training_batch(config, dataset, rows)))
    assert_same(seen[-1].flatten(1) * policy.config.lam_token_scale, expected[rows], False)
    (live,) = policy.live_tokens.lams
    history = FrameHistory(policy.config)
    first, stop = int(store.episode_from[2]), int(store.episode_to[2])
    for i in range(first, stop):
        history.append(frames[i, None])
        assert_same(history.tokens(live)[0, -1], expected[i], vq)

    # A policy that is trained on the store says how it was fed.
    trained, _ = build(lam_config(lam_tokens_path=str(store.path), lam_use_vq_tokens=vq), dataset)
    assert trained.config.lam_fingerprint == lam.fingerprint == policy.config.lam_fingerprint
    assert trained.config.lam_frame_stride == stride


@pytest.mark.slow
@pytest.mark.parametrize(("name", "vq"), [("lapa", True), ("univla", False), ("flow", False)])
@pytest.mark.usefixtures("home")
def test_auto_live_cache_and_column(dataset, folders, stores, name, vq, tmp_path, caplog):
    store = stores(name, vq)
    caplog.set_level(logging.INFO)
    fields = {"lam_model_path": str(folders[name]), "lam_camera_key": TOP, "lam_use_vq_tokens": vq}
    policy, _ = build(lam_config(lam_tokens_path="auto", **fields), dataset)
    assert policy.config.lam_frame_stride == store.frame_stride
    assert ("the LAM was trained on pairs" in caplog.text) is (name != "flow")
    rows = torch.arange(store.num_frames)
    assert torch.equal(policy.token_store.window(rows, [0]), store.window(rows, [0]))

    config = live_config(folders[name], vq, store.frame_stride, lam_live_cache=str(tmp_path / "live"))
    batch, losses = training_batch(config, dataset, [37, 38, 39]), []
    for _ in range(2):  # computed and kept, then taken
        policy, preprocess = build(config, dataset)
        torch.manual_seed(0)
        losses.append(policy.forward(preprocess(dict(batch)))[0].item())
    assert losses[0] == losses[1]
    pairs = policy.live_tokens.lams[0].cache._pairs
    assert sum(len(frames) for frames, _, _ in pairs.scan()) == 3

    target = tmp_path / "with_column"
    tokens.main(["add-column", str(store.path), *dataset_flags(dataset)[:2], f"--output_dir={target}"])
    tokens.main(["verify", "--dataset.repo_id=local/squares", f"--dataset.root={target}"])


def test_families_are_mixed_in_one_policy(dataset, folders, stores, tmp_path):
    """One camera seen by LAPA and UniVLA: their strides must agree, so it is named."""
    fields = {
        "lam_model_path": [str(folders["lapa"]), str(folders["univla"])],
        "lam_camera_key": [TOP, TOP],
    }
    policy, preprocess = build(
        lam_config(use_precomputed_lam_tokens=False, lam_frame_stride=3, **fields), dataset
    )
    config = policy.config
    assert config.lam_fingerprint == [load_lam(folders[name]).fingerprint for name in ("lapa", "univla")]
    assert policy.forward(preprocess(training_batch(config, dataset, [20, 40])))[0].isfinite()


def test_a_lam_without_a_codebook_refuses_vq_tokens(dataset, folders, tmp_path, capsys):
    with pytest.raises(UserError, match=r"no codebook(.|\n)*--policy\.lam_use_vq_tokens=false"):
        build(live_config(folders["flow"], True, 1), dataset)
    fields = {"lam_model_path": str(folders["flow"]), "lam_camera_key": TOP}
    with pytest.raises(UserError, match=r"no codebook(.|\n)*--policy\.lam_use_vq_tokens=false"):
        build(lam_config(lam_tokens_path="auto", **fields), dataset)
    flags = [*dataset_flags(dataset), f"--lam.path={folders['flow']}", f"--output_dir={tmp_path / 'store'}"]
    with pytest.raises(SystemExit) as stop:
        precompute_lam_tokens.main([*flags, "--use_vq_tokens=true"])
    assert "has no codebook, so it makes no VQ tokens" in str(stop.value.code)
    precompute_lam_tokens.main(
        [*flags, "--storage_dtype=float16"]
    )  # the LAM decides that they are continuous
    assert TokenStore.open(tmp_path / "store").provenance.storage_dtype == "float16"
    with pytest.raises(UserError, match="The LAM has no codebook"):
        load_lam(folders["flow"]).encode_pairs(*torch.zeros(2, 1, 3, 8, 8).byte()).of_kind(True)


def test_on_the_fly_the_lams_own_stride_is_told(dataset, folders, caplog):
    build(live_config(folders["lapa"], True, None), dataset)
    assert "--policy.lam_frame_stride=6" in caplog.text


def test_the_documented_example_is_short_and_its_mistakes_are_refused():
    example = own_lam()
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(code) - code.index("import sys") <= 32
    with pytest.raises(UserError, match="'MeanFlow' of Impostor is taken"):
        register_lam(type("Impostor", (example.MeanFlowLam,), {}))
    built = {"build_modules": classmethod(lambda _cls, _config: {"flow": torch.nn.Linear(2, 2)})}
    with pytest.raises(UserError, match=r"has the modules \['flow'\], but its fingerprint covers only"):
        meta_modules(type("Undeclared", (example.MeanFlowLam,), built), example.MeanFlowConfig())
    namesake = type("MeanFlowLam", (example.MeanFlowLam,), {"__module__": "another.package"})
    with pytest.raises(UserError, match="'MeanFlow' of MeanFlowLam is taken"):
        register_lam(namesake)
