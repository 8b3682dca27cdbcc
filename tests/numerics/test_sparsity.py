"""Masks against numpy: sorted magnitudes, and norms as exact integers."""

import numpy as np
import pytest
import torch
from support.mask_oracle import element_mask, group_mask, mask_of
from support.oracle import random_floats

from gws_compile.numerics import sparsity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (5, 16)])
def test_n_of_m(kept, of, dtype):
    """Ties are common: few values, both signs, zeros of both signs."""
    rng = np.random.default_rng(kept)
    for values in (rng.normal(size=(6, 48)), rng.integers(-2, 3, (6, 48)) * 1.0, random_floats((6, 48), 3, (-14, 3))):
        w = torch.tensor(values, dtype=torch.float32).to(dtype)
        w[0, ::3] *= -0.0
        mask = sparsity.element_mask(w, 0, kept, of, over_rows=False)
        assert torch.equal(mask, torch.from_numpy(element_mask(w.float().numpy(), kept, of)))
        transposed = sparsity.element_mask(w.t(), 0, kept, of, over_rows=True)
        assert torch.equal(transposed.t(), mask)
        assert transposed.stride() == w.t().stride()


def test_n_of_m_keeps_what_is_not_finite():
    w = torch.tensor([[float("nan"), 1, float("inf"), 2, float("-inf"), float("nan"), 5, float("inf")]])
    mask = sparsity.element_mask(w, 0, 2, 4, over_rows=False)
    assert mask.tolist() == [[True, False, True, False, True, True, False, False]]


def test_experts_and_convolutions():
    w = torch.randn(3, 8, 12)
    experts = sparsity.element_mask(w, 1, 2, 4, over_rows=True)
    for one, mask in zip(w, experts, strict=True):
        assert torch.equal(mask, mask_of(one, "2:4", over_rows=True))
    conv = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    mask = sparsity.element_mask(conv, 0, 2, 4, over_rows=False)
    assert torch.equal(mask.reshape(8, 36), mask_of(conv.reshape(8, 36), "2:4"))
    assert mask.stride() == conv.stride()
    rows = sparsity.group_mask(conv, 0, 3, rows=True)
    assert torch.equal(rows.flatten(), torch.from_numpy(group_mask(conv.reshape(8, 36).numpy(), 3 / 8)))
    channels = sparsity.group_mask(conv, 0, 1, rows=False)
    by_channel = conv.transpose(0, 1).reshape(4, 72).numpy()
    assert channels.shape == (1, 4, 1, 1)
    assert torch.equal(channels.flatten(), torch.from_numpy(group_mask(by_channel, 1 / 4)))
    for one, found in zip(w, sparsity.group_mask(w, 1, 5, rows=False), strict=True):
        assert torch.equal(found.expand(8, 12), mask_of(one, f"columns:{5 / 12}"))


@pytest.mark.parametrize("rows", [True, False])
def test_groups(rows, monkeypatch):
    """Also where they are added in several parts, and of weights as small and as large as float32 has them."""
    monkeypatch.setattr(sparsity, "_PART_ELEMENTS", 100)
    for scale in (1.0, 2.0**-140, 2.0**120):
        w = torch.randn(21, 30) * scale
        w[7], w[:, 4] = w[3], w[:, 11]  # ties: the first is kept
        pruned = 10
        mask = sparsity.group_mask(w, 0, pruned, rows=rows)
        expected = mask_of(w, f"{'rows' if rows else 'columns'}:{pruned / (21 if rows else 30)}")
        assert torch.equal(mask.expand(21, 30), expected)


def test_groups_whatever_the_order_of_addition():
    """The score of a row is that of any permutation of it, bit for bit; a sum of floats has not that property."""
    w = torch.randn(4, 5000)
    permuted = w[:, torch.randperm(5000)]
    assert torch.equal(*(sparsity.group_scores(one, 0, rows=True) for one in (w, permuted)))


def test_groups_keep_what_is_not_finite():
    w = torch.rand(6, 8) + 1
    w[2] = 0
    w[4] = 0
    w[4, 3] = float("nan")
    assert sparsity.group_mask(w, 0, 1, rows=True).flatten().tolist() == [True, True, False, True, True, True]
    assert sparsity.group_mask(torch.zeros(4, 3), 0, 3, rows=True).flatten().tolist() == [True, False, False, False]


def test_what_is_not_kept_is_plus_zero():
    w = torch.tensor([[-1.0, float("nan"), float("inf"), -0.0]])
    kept = sparsity.keep(w, torch.tensor([[True, False, False, False]]))
    assert kept.tolist() == [[-1, 0, 0, 0]]
    assert kept.signbit().tolist() == [[True, False, False, False]]
