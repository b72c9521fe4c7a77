"""A `.safetensors` file, block by block: the very bytes that safetensors itself would write."""

import errno
import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lerobot_lam_diffusion.tokens import tensor_file
from lerobot_lam_diffusion.tokens.tensor_file import NAMES, Readahead, TensorFileWriter, fsync, read_blocks

TENSORS = {
    "tokens": torch.arange(21).view(7, 3).to(torch.int8),
    "row_scale": torch.rand(7),
    "half": torch.rand(7, 3).half(),
    "brain": torch.rand(2, 5).bfloat16(),
    "wide": torch.arange(6).view(3, 2).to(torch.uint16),
    "bytes": torch.arange(3, dtype=torch.uint8).unsqueeze(1),
    "empty": torch.empty(0, 4),
    "episode_from": torch.arange(5) - 2,
    "a_table": torch.arange(5),
}


def write(path, tensors=TENSORS, block=2):
    """All tensors at once, two rows of each in turn."""
    with TensorFileWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as file:
        for start in range(0, max(map(len, tensors.values())), block):
            for name, tensor in tensors.items():
                file.write(name, tensor[start : start + block])
    return path


def test_safetensors_reads_it_and_would_have_written_it_so(tmp_path):
    assert {tensor.dtype for tensor in TENSORS.values()} == set(NAMES)
    path = write(tmp_path / "ours")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)
    save_file(TENSORS, tmp_path / "theirs")
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert path.read_bytes() == write(tmp_path / "again", block=7).read_bytes()


def test_a_tensor_that_is_not_contiguous(tmp_path):
    tensor = torch.arange(12).view(3, 4)
    with TensorFileWriter(tmp_path / "x", {"x": (torch.int64, (4, 3))}) as file:
        file.write("x", tensor.T)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), tensor.T)


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_reading_gives_every_row_and_every_byte_in_order(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "x")
    digest = hashlib.sha256()
    read = {name: [] for name in TENSORS}
    for name, block in read_blocks(path, digest.update):
        read[name].append(block.clone())
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    for name, tensor in TENSORS.items():
        assert torch.equal(torch.cat(read[name]) if read[name] else tensor, tensor)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (torch.zeros(2, 3), "fewer rows than the 3 announced for x"),
        (torch.zeros(4, 3), "more rows than the 3 announced for x"),
        (torch.zeros(3, 2), r"x is torch.float32 \(3, 3\), given rows of torch.float32 \(3, 2\)"),
        (torch.zeros(3, 3).double(), "given rows of torch.float64"),
    ],
)
def test_rows_that_were_not_announced(tmp_path, rows, expected):
    with (
        pytest.raises(ValueError, match=expected),
        TensorFileWriter(tmp_path / "x", {"x": (torch.float32, (3, 3))}) as file,
    ):
        file.write("x", rows)


def test_a_disk_that_does_not_take_a_files_bytes_is_told(tmp_path, monkeypatch):
    def broken(_handle):
        raise OSError(errno.EIO, "Input/output error")

    path = write(tmp_path / "x")
    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        fsync(path)
    fsync(tmp_path)  # a folder's entries are synced where that can be done


def test_readahead_takes_the_first_and_the_last_row_of_a_file(tmp_path):
    tensors = {"x": torch.rand(3000, 3), "y": torch.rand(3000)}
    path = write(tmp_path / "x", tensors, block=3000)
    Readahead(path, tensors).expect(torch.tensor([[0, 2999], [1500, 7]]))
