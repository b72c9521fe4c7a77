"""The user's own `lam_tokens.pt`: read as plain tensors, checked as far as it can be, never executed."""

import logging
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from lerobot_lam_diffusion.tokens import LamTokenDataset, TokenStore, TokenStoreError
from tests.conftest import EPISODE_LENGTHS

REMEDY = "lerobot-lam-precompute"
STARTS = [sum(EPISODE_LENGTHS[:e]) for e in range(len(EPISODE_LENGTHS))]


def tokens_of(num_rows: int = 60, dim: int = 64) -> torch.Tensor:
    """Random tokens, none of them zero."""
    return torch.rand(num_rows, dim, generator=torch.Generator().manual_seed(0)) + 1


def save(tmp_path, document) -> Path:
    torch.save(document, tmp_path / "lam_tokens.pt")
    return tmp_path / "lam_tokens.pt"


def refusal(path, meta) -> str:
    with pytest.raises(TokenStoreError) as error:
        TokenStore.open(path, meta)
    assert str(path) in str(error.value)
    assert REMEDY in str(error.value)
    return str(error.value)


class Touch:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_tokens_are_the_files_own(tmp_path, dataset):
    tokens = tokens_of()
    store = TokenStore.open(save(tmp_path, {"tokens": tokens}), dataset.meta)
    assert (store.kind, store.frame_stride, store.token_dim, store.provenance) == ("vq", 1, 64, None)
    window = store.window(torch.arange(60), [0])[:, 0]
    present = torch.ones(60, dtype=torch.bool)
    present[STARTS] = False
    assert torch.equal(window[present], tokens[present])
    assert torch.equal(store.window(torch.tensor([20]), [-1, 0])[0], tokens[19:21])


def test_it_is_told_to_be_unverified(tmp_path, dataset, caplog):
    with caplog.at_level(logging.WARNING):
        TokenStore.open(save(tmp_path, {"tokens": tokens_of()}), dataset.meta)
    assert "lam_tokens.pt is unverified" in caplog.text


@pytest.mark.parametrize("stride", [1, 3, 10])
def test_rows_at_episode_starts_are_zeroed_with_a_warning(tmp_path, dataset, caplog, stride):
    path = save(tmp_path, {"tokens": tokens_of(), "metadata": {"frame_stride": stride}})
    with caplog.at_level(logging.WARNING):
        store = TokenStore.open(path, dataset.meta)
    missing = [
        start + i for start, n in zip(STARTS, EPISODE_LENGTHS, strict=True) for i in range(min(n, stride))
    ]
    assert f"{len(missing)} frames at episode starts have no frame {stride} before them" in caplog.text
    window = store.window(torch.arange(60), [0])[:, 0]
    assert (~window.any(1)).nonzero().flatten().tolist() == missing


def test_rows_that_are_zero_already_need_no_warning(tmp_path, dataset, caplog):
    tokens = tokens_of()
    tokens[STARTS] = 0
    with caplog.at_level(logging.WARNING):
        TokenStore.open(save(tmp_path, {"tokens": tokens}), dataset.meta)
    assert "episode starts" not in caplog.text


@pytest.mark.parametrize("nested", [True, False])
def test_metadata_may_stand_beside_the_tokens_or_below_a_key(tmp_path, dataset, nested):
    metadata = {"frame_stride": 4, "use_vq_tokens": False}
    document = {"tokens": tokens_of(), **({"metadata": metadata} if nested else metadata)}
    store = TokenStore.open(save(tmp_path, document), dataset.meta)
    assert (store.kind, store.frame_stride) == ("continuous", 4)


def test_half_precision_tokens_and_parameters_are_read(tmp_path, dataset):
    tokens = torch.nn.Parameter(tokens_of().half())
    store = TokenStore.open(save(tmp_path, {"tokens": tokens}), dataset.meta)
    window = store.window(torch.tensor([5]), [0])
    assert window.dtype == torch.float32
    assert not window.requires_grad
    assert torch.equal(window[0, 0], tokens[5].detach().float())


def test_it_works_through_lam_token_dataset(tmp_path, dataset):
    tokens = tokens_of()
    joined = LamTokenDataset(dataset, save(tmp_path, {"tokens": tokens}), deltas=[-1, 0])
    assert torch.equal(joined[30]["observation.lam_tokens"], tokens[29:31])
    assert not joined[0]["observation.lam_tokens"].any()
    again = LamTokenDataset(dataset, joined.store)
    assert torch.equal(again[30]["observation.lam_tokens"], tokens[30:31])


def test_it_travels_to_another_process(tmp_path, dataset):
    store = TokenStore.open(save(tmp_path, {"tokens": tokens_of()}), dataset.meta)
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.window(torch.arange(60), [-1, 0]), store.window(torch.arange(60), [-1, 0]))


def test_a_store_may_bear_a_pt_name(store, tmp_path, write_random):
    written = write_random(tmp_path / "tokens.pt", [4, 5])
    assert torch.equal(TokenStore.open(tmp_path / "tokens.pt").values, written.values)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_pickle_in_disguise_is_not_executed(tmp_path, dataset, hidden):
    trace = tmp_path / "executed"
    document = {"tokens": tokens_of(), "metadata": Touch(trace)} if hidden else Touch(trace)
    path = save(tmp_path, document)
    told = refusal(path, dataset.meta)
    assert "is refused" in told
    assert "could execute code" in told
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert trace.exists()


NOT_TOKENS = {
    "a tensor": (torch.ones(60, 64), "found none"),
    "a list": ([1, 2], "found none"),
    "no tokens": ({"latents": torch.ones(60, 64)}, "found none"),
    "a list of tokens": ({"tokens": [1.0]}, "found none"),
    "whole numbers": ({"tokens": torch.ones(60, 64, dtype=torch.int64)}, "tokens (60, 64) of torch.int64"),
    "complex numbers": ({"tokens": torch.ones(60, 64, dtype=torch.complex64)}, "of torch.complex64"),
    "another shape": ({"tokens": torch.ones(60, 2, 32)}, "tokens (60, 2, 32)"),
    "no columns": ({"tokens": torch.ones(60, 0)}, "tokens (60, 0)"),
    "sparse": ({"tokens": torch.ones(60, 64).to_sparse()}, "tokens (60, 64)"),
    "without values": ({"tokens": torch.ones(60, 64, device="meta")}, "tokens (60, 64)"),
    "one row repeated": ({"tokens": torch.ones(1, 64).expand(60, 64)}, "tokens (60, 64) of torch.float32"),
}


@pytest.mark.parametrize(("document", "found"), NOT_TOKENS.values(), ids=NOT_TOKENS)
def test_not_a_dict_of_tokens(tmp_path, dataset, document, found):
    told = refusal(save(tmp_path, document), dataset.meta)
    assert found in told
    assert "expected a dict with a float tensor 'tokens' (N, n*a)" in told


@pytest.mark.parametrize("num_rows", [0, 59, 61])
def test_another_number_of_rows_than_the_dataset_has_frames(tmp_path, dataset, num_rows):
    told = refusal(save(tmp_path, {"tokens": tokens_of(num_rows)}), dataset.meta)
    assert f"has {num_rows} rows, dataset 'local/squares' has 60 frames" in told


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_not_finite_as_float32(tmp_path, dataset, bad):
    tokens = tokens_of().double()
    tokens[41, 3] = bad
    assert "NaN or Inf in token row 41" in refusal(save(tmp_path, {"tokens": tokens}), dataset.meta)


@pytest.mark.parametrize("stride", [0, -1, "3", 1.0, True, 2**70])
def test_impossible_stride(tmp_path, dataset, stride):
    told = refusal(save(tmp_path, {"tokens": tokens_of(), "frame_stride": stride}), dataset.meta)
    assert f"frame_stride = {stride!r} and use_vq_tokens = True, expected a positive integer" in told


def test_impossible_kind(tmp_path, dataset):
    told = refusal(save(tmp_path, {"tokens": tokens_of(), "use_vq_tokens": "yes"}), dataset.meta)
    assert "use_vq_tokens = 'yes', expected a positive integer and True or False" in told


def test_enormous_stride_costs_nothing(tmp_path, dataset):
    path = save(tmp_path, {"tokens": tokens_of(), "frame_stride": 2**60})
    assert not TokenStore.open(path, dataset.meta).window(torch.arange(60), [0]).any()


def test_without_its_dataset(tmp_path):
    assert "does not say where episodes begin" in refusal(save(tmp_path, {"tokens": tokens_of()}), None)


def test_missing_file(tmp_path, dataset):
    assert "no token file at" in refusal(tmp_path / "lam_tokens.pt", dataset.meta)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -1000])
def test_truncated_file(tmp_path, dataset, keep):
    path = save(tmp_path, {"tokens": tokens_of()})
    path.write_bytes(path.read_bytes()[:keep])
    assert "is refused: it is damaged or not plain tensors" in refusal(path, dataset.meta)


def test_a_zip_of_something_else(tmp_path, dataset):
    path = tmp_path / "lam_tokens.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "is refused" in refusal(path, dataset.meta)


def test_a_compressed_file_is_refused(tmp_path, dataset):
    path = save(tmp_path, {"tokens": tokens_of(), "metadata": {"more": torch.zeros(1000, 64)}})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert "compressed" in refusal(path, dataset.meta)


def test_a_flipped_bit_of_a_token_is_noticed(tmp_path, dataset):
    tokens = tokens_of()
    path = save(tmp_path, {"tokens": tokens})
    content = bytearray(path.read_bytes())
    content[content.index(tokens[30].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert "checksum" in refusal(path, dataset.meta)
