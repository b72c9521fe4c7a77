"""How rows are kept on disk: exactly, or with an error that is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lerobot_lam_diffusion.tokens.provenance import CONTINUOUS_STORAGE
from lerobot_lam_diffusion.tokens.storage import (
    decode_tokens,
    encode_indices,
    encode_tokens,
    index_dtype,
)

NUMBERS = st.floats(-6e4, 6e4, width=32)


@pytest.mark.parametrize("storage", CONTINUOUS_STORAGE)
@given(rows=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_what_is_read_back_differs_by_no_more_than_the_error_that_is_told(storage, rows):
    tokens = torch.tensor(rows)
    stored = encode_tokens(tokens, storage)
    read = decode_tokens(**stored.tensors)
    assert read.dtype == torch.float32
    assert float((read - tokens).abs().max()) == stored.max_error
    largest = tokens.abs().amax(1, keepdim=True)
    share = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.501 / 127}[storage]
    assert ((read - tokens).abs() <= share * largest + 1e-7).all()


@pytest.mark.parametrize("storage", CONTINUOUS_STORAGE)
def test_a_row_of_zeros_stays_one_and_no_row_is_fine(storage):
    tokens = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [3.0, -4.0]])
    read = decode_tokens(**encode_tokens(tokens, storage).tensors)
    assert not read[0].any()
    assert read[1:].isfinite().all()
    assert encode_tokens(tokens[:0], storage).max_error == 0.0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_indices_of_any_integers(dtype):
    codes = torch.tensor([[0, 7], [3, 2]])
    assert torch.equal(encode_indices(codes.to(dtype), 8).tensors["indices"].long(), codes)


def test_the_smallest_index_that_holds_the_codebook():
    assert index_dtype(256) == torch.uint8
    assert index_dtype(257) == index_dtype(65536) == torch.uint16
    with pytest.raises(ValueError, match="codebook of 65537 rows, expected at most 65536"):
        index_dtype(65537)
