"""Eq. (1) against hand-computed numbers, a double loop in float64 and exact enumeration."""

import itertools
import math

import pytest
import torch
from conftest import MASK, ToyModel, log_p, rng

import d1_full as d1


def nelbo_loop(logits, x0, masked, t, is_prompt):
    total, count = 0.0, 0
    for b in range(x0.shape[0]):
        for k in range(x0.shape[1]):
            count += not is_prompt[b, k]
            if masked[b, k]:
                row = logits[b, k].double()
                total += -(row[x0[b, k]] - row.exp().sum().log()).item() / t[b].item()
    return total / count


def test_masked_nelbo_by_hand():
    # one row of three reply tokens and one prompt token; two are masked at t = 1/2, with p = .8 and .25
    p = torch.tensor([[[0.1, 0.9], [0.2, 0.8], [0.75, 0.25], [0.3, 0.7]]])
    x0, masked = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[False, True, True, False]])
    is_prompt = torch.tensor([[True, False, False, False]])
    loss, metrics = d1.masked_nelbo(p.log(), x0, masked, torch.tensor([0.5]), is_prompt)
    assert loss.item() == pytest.approx(-math.log(0.8 * 0.25) / 0.5 / 3)
    assert metrics["ce"].item() == pytest.approx(-math.log(0.2) / 2) and metrics["accuracy"].item() == 0.5


def test_masked_nelbo_equals_a_double_loop():
    g = rng(3)
    logits, x0 = torch.randn(5, 7, 11, generator=g, dtype=torch.float64), torch.randint(1, 11, (5, 7), generator=g)
    is_prompt, t = torch.rand(5, 7, generator=g) < 0.3, d1.sample_t(5, g).double()
    _, masked = d1.forward_process(x0, t, is_prompt, MASK, g)
    loss, _ = d1.masked_nelbo(logits, x0, masked, t, is_prompt)
    assert loss.item() == pytest.approx(nelbo_loop(logits, x0, masked, t, is_prompt), rel=1e-5)


def test_masked_nelbo_with_nothing_masked_is_zero_with_a_gradient():
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    none = torch.zeros(1, 3, dtype=torch.bool)
    loss, _ = d1.masked_nelbo(logits, torch.ones(1, 3, dtype=torch.long), none, torch.ones(1), none)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_masked_nelbo_is_the_exact_bound_of_the_any_order_likelihood():
    length, vocab = 3, 4
    model, x0 = ToyModel(length, vocab), torch.tensor([[2, 1, 3]])
    exact = 0.0  # sum over masks: integral of 1/t t^m (1-t)^(L-m) dt = B(m, L-m+1)
    for bits in itertools.product([False, True], repeat=length):
        masked, m = torch.tensor([bits]), sum(bits)
        if m:
            beta = math.gamma(m) * math.gamma(length - m + 1) / math.gamma(length + 1)
            exact -= beta * log_p(model, x0, ~masked)[masked[0]].sum().item()
    orders = []  # log-likelihood of each order of revealing the tokens
    for order in itertools.permutations(range(length)):
        visible, total = torch.zeros(1, length, dtype=torch.bool), 0.0
        for k in order:
            total += log_p(model, x0, visible)[k].item()
            visible[0, k] = True
        orders.append(total)
    assert exact == pytest.approx(-sum(orders) / len(orders))  # NELBO = mean over orders ...
    likelihood = math.log(sum(map(math.exp, orders)) / len(orders))
    assert exact > -likelihood + 0.01  # ... so it bounds -log p of the any-order mixture

    n, g = 40000, rng(5)
    rows, is_prompt = x0.expand(n, -1), torch.zeros(n, length, dtype=torch.bool)
    t = d1.sample_t(n, g, low=1e-5)
    xt, masked = d1.forward_process(rows, t, is_prompt, MASK, g)
    with torch.no_grad():
        logits = model(xt).logits
    each = [d1.masked_nelbo(logits[i : i + 400], rows[i : i + 400], masked[i : i + 400], t[i : i + 400],
                            is_prompt[i : i + 400])[0].item() * length for i in range(0, n, 400)]
    mean, sem = torch.tensor(each).mean().item(), torch.tensor(each).std().item() / len(each) ** 0.5
    assert abs(mean - exact) < 4 * sem and sem < 0.03 * exact


def test_nelbo_weighs_visible_tokens_one_and_masked_ones_the_inverse_of_t():
    g = rng(3)
    logits = torch.randn(4, 9, 7, generator=g, dtype=torch.float64)
    x0, is_prompt = torch.randint(7, (4, 9), generator=g), torch.rand(4, 9, generator=g) < 0.3
    masked, t = (torch.rand(4, 9, generator=g) < 0.5) & ~is_prompt, d1.sample_t(4, g)
    visible = ~masked & ~is_prompt
    logp = logits.float().log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    want = -sum(logp[b, k] * (1 / t[b] if masked[b, k] else 1.0)
                for b in range(4) for k in range(9) if not is_prompt[b, k])
    asked = masked | visible
    weight = torch.where(masked, (1 / t)[:, None], 1.0)[asked]
    ce, right = d1.cross_entropies(logits[asked], x0[asked])
    loss, metrics = d1.nelbo(ce, weight, is_prompt), d1.masked_figures(ce, right, masked[asked])
    assert torch.allclose(loss, want / (~is_prompt).sum(), rtol=1e-5)
    right = logits.argmax(-1) == x0  # the figures are of masked tokens alone
    assert torch.allclose(metrics["accuracy"], (right & masked).sum() / masked.sum()) and (right & visible).any()
    assert torch.allclose(metrics["ce"], -(logp * masked).sum() / masked.sum(), rtol=1e-5)
