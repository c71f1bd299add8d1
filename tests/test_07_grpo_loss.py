"""Eqs. (2) to (4) against hand-computed numbers and double loops in float64."""

import math

import pytest
import torch
from conftest import random_case
from hypothesis import given, settings
from hypothesis import strategies as st

import d1_full as d1


def loss_loop(new, old, ref, adv, live, eps, beta, norm):
    rows = []
    for i in range(len(new)):
        terms = []
        for k in range(new.shape[1]):
            if live[i, k]:
                rho, d = math.exp(new[i, k] - old[i, k]), (ref[i, k] - new[i, k]).item()
                bound = min(max(rho, 1 - eps), 1 + eps)
                kl = math.exp(d) - d - 1
                terms.append(-min(rho * adv[i].item(), bound * adv[i].item()) + beta * kl)
        rows.append(terms)
    if norm == "sequence":
        return sum(sum(r) / len(r) for r in rows) / len(rows)
    return sum(map(sum, rows)) / sum(map(len, rows))


def test_group_advantages_by_hand():
    got = d1.group_advantages(torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 5.0]), 3)
    assert got.tolist() == [0.0, -1.0, 1.0, 0.0, 0.0, 0.0]  # no division by a deviation
    with pytest.raises(ValueError, match="groups of 4"):
        d1.group_advantages(torch.zeros(6), 4)


def test_live_tokens_end_with_the_first_eos():
    completion = torch.tensor([[5, 9, 7, 9], [9, 9, 9, 9], [1, 2, 3, 4]])
    want = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert d1.live_tokens(completion, 9).tolist() == want


@pytest.mark.parametrize("norm", ["sequence", "token"])
@pytest.mark.parametrize("seed", range(5))
def test_diffu_grpo_loss_equals_a_double_loop(norm, seed):
    case = random_case(seed)
    loss, metrics = d1.diffu_grpo_loss(*case, eps=0.4, beta=0.1, norm=norm)
    assert loss.item() == pytest.approx(loss_loop(*case, 0.4, 0.1, norm), rel=1e-9)
    new, old, ref, _, live = case
    d, rho = (ref - new)[live], (new - old).exp()[live]  # the figures are of live tokens alone
    assert metrics["kl"].item() == pytest.approx((d.exp() - d - 1).mean().item())
    assert metrics["ratio_max"].item() == pytest.approx(rho.max().item())


def test_diffu_grpo_loss_by_hand():
    # row 1: rho 2 is cut at 1.5, rho 1 stays, the third token is dead; row 2: A < 0, rho 1/4 is cut at 1/2
    logp = torch.tensor([[2.0, 1.0, 9.0], [0.25, 1.0, 9.0]]).log()
    live = torch.tensor([[True, True, False], [True, False, False]])
    args = (logp, torch.zeros_like(logp), logp.clone(), torch.tensor([1.0, -2.0]), live)
    loss, metrics = d1.diffu_grpo_loss(*args, eps=0.5, beta=0.04, norm="sequence")
    assert loss.item() == pytest.approx((-(1.5 + 1.0) / 2 + 2 * 0.5) / 2)
    assert metrics["kl"].item() == 0 and metrics["clip_frac"].item() == pytest.approx(2 / 3)
    assert metrics["ratio_max"].item() == pytest.approx(2)  # not 9, of a dead token
    loss, _ = d1.diffu_grpo_loss(*args, eps=0.5, beta=0.04, norm="token")
    assert loss.item() == pytest.approx((-2.5 + 1.0) / 3)


def test_token_objective_counts_a_token_as_clipped_only_where_the_clip_takes_its_gradient():
    logp = torch.tensor([[2.0, 0.5, 1.2, 1.0]]).log().requires_grad_()
    for advantage, clipped in ((1.0, [True, False, False, False]), (-1.0, [False, True, False, False])):
        gain, cut = d1.token_objective(logp, torch.zeros(1, 4), torch.tensor([advantage]), 0.4)
        assert cut[0].tolist() == clipped == (torch.autograd.grad(gain.sum(), logp)[0] == 0)[0].tolist()


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_diffu_grpo_loss_at_ratio_one_gives_the_policy_gradient(norm):
    new, _, _, adv, live = random_case(7)
    new.requires_grad_()
    loss, metrics = d1.diffu_grpo_loss(new, None, None, adv, live, norm=norm)
    loss.backward()
    weight = 1 / (live.sum(1, keepdim=True) * len(live)) if norm == "sequence" else 1 / live.sum()
    assert torch.allclose(new.grad, -adv[:, None] * live * weight)  # - A grad log phi
    assert metrics["clip_frac"] == 0 and metrics["ratio_max"] == 1


def test_diffu_grpo_loss_has_a_kl_that_is_never_negative_and_pulls_to_the_reference():
    new, _, ref, adv, live = random_case(8)
    new.requires_grad_()
    loss, metrics = d1.diffu_grpo_loss(new, None, ref, 0 * adv, live, beta=1.0)
    assert metrics["kl"] > 0
    loss.backward()
    assert torch.equal((new.grad > 0)[live], (new > ref)[live])  # the minimised loss falls towards ref
    same, metrics = d1.diffu_grpo_loss(ref, ref, ref, adv, live, beta=5.0)
    without, _ = d1.diffu_grpo_loss(ref, ref, None, adv, live, beta=5.0)
    assert metrics["kl"] == 0 and same == without


def test_diffu_grpo_loss_has_norms_that_agree_on_equal_lengths_and_only_there():
    new, old, ref, adv, live = random_case(9)
    full = torch.ones_like(live)
    both = [d1.diffu_grpo_loss(new, old, ref, adv, full, norm=n)[0].item() for n in ("sequence", "token")]
    assert both[0] == pytest.approx(both[1])
    ragged = [d1.diffu_grpo_loss(new, old, ref, adv, live, norm=n)[0].item() for n in ("sequence", "token")]
    assert abs(ragged[0] - ragged[1]) > 1e-3
    with pytest.raises(ValueError, match="norm"):
        d1.diffu_grpo_loss(new, old, ref, adv, live, norm="batch")


def test_diffu_grpo_loss_gives_dead_tokens_no_gradient():
    new, old, ref, adv, live = random_case(10)
    new.requires_grad_()
    d1.diffu_grpo_loss(new, old, ref, adv, live)[0].backward()
    assert not new.grad[~live].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(0, 99), st.floats(0.0, 0.9), st.floats(0.0, 1.0),
       st.sampled_from(["sequence", "token"]))
def test_diffu_grpo_loss_at_the_old_policy_and_its_bounds(rewards, seed, eps, beta, norm):
    g = torch.Generator().manual_seed(seed)
    n = len(rewards)
    advantages = d1.group_advantages(torch.tensor(rewards), n)
    assert abs(float(advantages.sum())) < 1e-4 * (1 + max(map(abs, rewards)))
    logp, live = -torch.rand(n, 6, generator=g) * 3, torch.ones(n, 6, dtype=torch.bool)
    same, m = d1.diffu_grpo_loss(logp, logp.clone(), logp.clone(), advantages, live, eps=eps, beta=beta, norm=norm)
    assert abs(float(same)) < 1e-4 * (1 + max(map(abs, rewards))) and m["kl"] == 0 and m["ratio_max"] == 1
    other = logp + torch.randn(n, 6, generator=g)
    _, m = d1.diffu_grpo_loss(logp, other, other, advantages, live, eps=eps, beta=beta, norm=norm)
    assert m["kl"] >= 0 and 0 <= m["clip_frac"] <= 1


@pytest.mark.parametrize("reward", [0.1, 0.7, -1.3, 1 / 3])
@pytest.mark.parametrize("group", [2, 6, 8])
def test_group_advantages_of_equal_rewards_are_exactly_zero(reward, group):
    assert not d1.group_advantages(torch.tensor([reward] * group + [1.0] * group), group)[:group].any()


@pytest.mark.parametrize("norm", ["sequence", "token"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_diffu_grpo_loss_of_a_ratio_that_overflows_is_finite_with_its_gradient(advantage, norm):
    for up in (100.0, -100.0):  # of log φ_θ over the old policy and the reference, or below them
        logp = torch.full((1, 3), -101.0 + max(up, 0.0), requires_grad=True)
        other = logp.detach() - up
        loss, metrics = d1.diffu_grpo_loss(logp, other, other, torch.tensor([advantage]),
                                           torch.ones(1, 3, dtype=torch.bool), norm=norm)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()
        assert all(torch.isfinite(value) for value in metrics.values())
    if advantage > 0:  # a clipped token has no gradient but that of the KL term, which pulls it back
        far, near = (torch.full((1, 1), -1.0, requires_grad=True) for _ in range(2))
        for logp, gap in ((far, 100.0), (near, 2.0)):
            mask = torch.ones(1, 1, dtype=torch.bool)
            d1.diffu_grpo_loss(logp, logp.detach() - gap, None, torch.tensor([advantage]), mask)[0].backward()
        assert far.grad.item() == near.grad.item() == 0
