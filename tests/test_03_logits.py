"""Logits at some positions, and guidance."""

import pytest
import torch
from conftest import MASK, ToyModel, network, padded, rng

import d1_full as d1


@pytest.mark.parametrize("kind", ["llama", "bert", "qwen", "dream", "lora", "toy"])
def test_logits_at_some_positions_are_those_of_all(kind):
    model = ToyModel(7, 50) if kind == "toy" else network("llama" if kind == "lora" else kind)
    model = d1.adapt_with_lora(model, 2, 4) if kind == "lora" else model
    ids, real = padded()
    where = torch.rand(ids.shape, generator=rng(2)) < 0.4
    where[:, 0] = True  # the first position has no left neighbour to take Dream's logits from
    places = dict(position_ids=(real.long().cumsum(1) - 1).clamp(min=0)) if kind == "bert" else {}  # learned [D4]
    full = model(ids, attention_mask=real, **places).logits
    some = d1.logits_at(model, ids, where, real)
    assert some.shape == (int(where.sum()), 50) and torch.allclose(some, full[where], atol=1e-6)
    assert torch.equal(model(ids, attention_mask=real, **places).logits, full)  # the layer is as it was
    (full[where].square().sum() - some.square().sum()).backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-3


def test_guided_logits_by_hand():
    model, prompt, completion = ToyModel(3, 4), torch.tensor([[1, 2]]), torch.tensor([[3]])
    cond, uncond = model(torch.tensor([[1, 2, MASK]])).logits, model(torch.tensor([[MASK, MASK, MASK]])).logits
    want = (uncond + 2.5 * (cond - uncond))[0, 2].log_softmax(-1)[3].item()
    got = d1.one_step_logp(model, prompt, completion, torch.zeros(1, 2, dtype=torch.bool), MASK, cfg_scale=1.5)
    assert got.item() == pytest.approx(want, rel=1e-6)
