"""The forward process against what it says, by chance and by property."""

import pytest
import torch
from conftest import MASK, rng
from hypothesis import given, settings
from hypothesis import strategies as st

import d1_full as d1

IDS = st.integers(1, 8)


def test_forward_process_masks_at_rate_t_and_never_the_prompt():
    x0 = torch.randint(1, 9, (4000, 6), generator=rng())
    t = torch.tensor([0.25, 0.75]).repeat(2000)
    is_prompt = torch.arange(6).expand_as(x0) < 2
    xt, masked = d1.forward_process(x0, t, is_prompt, MASK, rng(1))
    assert not masked[:, :2].any() and torch.equal(xt[:, :2], x0[:, :2])
    assert torch.equal(xt == MASK, masked) and torch.equal(xt[~masked], x0[~masked])
    for level in (0.25, 0.75):  # 8000 draws: the standard error is .005
        assert masked[t == level][:, 2:].float().mean().item() == pytest.approx(level, abs=0.02)


def test_sample_t_is_uniform_above_its_floor():
    t = d1.sample_t(10000, rng())
    assert t.min() >= 1e-3 and t.max() < 1 and t.mean().item() == pytest.approx(0.5, abs=0.02)


def test_forward_process_at_t_one_masks_every_reply_token():
    x0 = torch.ones(2, 5, dtype=torch.long)
    xt, masked = d1.forward_process(x0, torch.ones(2), torch.zeros(2, 5, dtype=torch.bool), MASK, rng())
    assert masked.all() and (xt == MASK).all()


def test_sample_t_keeps_to_the_range_that_is_given():
    t = d1.sample_t(20000, rng(), low=0.5, high=0.75)
    assert 0.5 <= t.min() < 0.501 and 0.749 < t.max() < 0.75 and abs(t.mean() - 0.625) < 0.002


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(IDS, min_size=5, max_size=5), min_size=1, max_size=4), st.floats(1e-3, 1.0),
       st.integers(0, 99), st.integers(0, 5))
def test_forward_process_masks_the_reply_alone_and_leaves_its_input(rows, level, seed, prompt_len):
    x0 = torch.tensor(rows)
    is_prompt = torch.zeros_like(x0, dtype=torch.bool)
    is_prompt[:, :prompt_len] = True
    before, t = x0.clone(), torch.full((len(rows),), level)
    xt, masked = d1.forward_process(x0, t, is_prompt, MASK, torch.Generator().manual_seed(seed))
    assert torch.equal(x0, before) and not (masked & is_prompt).any()
    assert torch.equal(xt == MASK, masked) and torch.equal(torch.where(masked, x0, xt), x0)
    if level == 1.0:
        assert torch.equal(masked, ~is_prompt)
    loss, metrics = d1.masked_nelbo(torch.randn(*x0.shape, 9), x0, masked, t, is_prompt)
    assert loss >= 0 and torch.isfinite(loss) and 0 <= metrics["accuracy"] <= 1
    assert loss > 0 or not masked.any()
