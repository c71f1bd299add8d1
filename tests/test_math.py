"""Sections 3 to 6 against hand-computed numbers, double loops in float64 and exact enumeration."""

import itertools
import math

import pytest
import torch
from conftest import MASK, ToyModel

import d1_full as d1


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- forward process


def test_forward_process_masks_at_rate_t_and_never_the_prompt():
    x0 = torch.randint(1, 9, (4000, 6), generator=rng())
    t = torch.tensor([0.25, 0.75]).repeat(2000)
    keep = torch.arange(6).expand_as(x0) < 2
    xt, masked = d1.forward_process(x0, t, keep, MASK, rng(1))
    assert not masked[:, :2].any() and torch.equal(xt[:, :2], x0[:, :2])
    assert torch.equal(xt == MASK, masked) and torch.equal(xt[~masked], x0[~masked])
    for level in (0.25, 0.75):  # 8000 draws: the standard error is .005
        assert masked[t == level][:, 2:].float().mean().item() == pytest.approx(level, abs=0.02)


def test_noise_levels_stay_in_their_range():
    t = d1.sample_t(10000, rng())
    assert t.min() >= 1e-3 and t.max() < 1 and t.mean().item() == pytest.approx(0.5, abs=0.02)


def test_t_one_masks_every_reply_token():
    x0 = torch.ones(2, 5, dtype=torch.long)
    xt, masked = d1.forward_process(x0, torch.ones(2), torch.zeros(2, 5, dtype=torch.bool), MASK, rng())
    assert masked.all() and (xt == MASK).all()


# ---- Eq. (1)


def test_nelbo_by_hand():
    # one row of three reply tokens and one prompt token; two are masked at t = 1/2, with p = .8 and .25
    p = torch.tensor([[[0.1, 0.9], [0.2, 0.8], [0.75, 0.25], [0.3, 0.7]]])
    x0, masked = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[False, True, True, False]])
    keep = torch.tensor([[True, False, False, False]])
    loss, metrics = d1.masked_nelbo(p.log(), x0, masked, torch.tensor([0.5]), keep)
    assert loss.item() == pytest.approx(-math.log(0.8 * 0.25) / 0.5 / 3)
    assert metrics["ce"].item() == pytest.approx(-math.log(0.2) / 2) and metrics["accuracy"].item() == 0.5


def nelbo_loop(logits, x0, masked, t, keep):
    total, count = 0.0, 0
    for b in range(x0.shape[0]):
        for k in range(x0.shape[1]):
            count += not keep[b, k]
            if masked[b, k]:
                row = logits[b, k].double()
                total += -(row[x0[b, k]] - row.exp().sum().log()).item() / t[b].item()
    return total / count


def test_nelbo_equals_a_double_loop():
    g = rng(3)
    logits, x0 = torch.randn(5, 7, 11, generator=g, dtype=torch.float64), torch.randint(1, 11, (5, 7), generator=g)
    keep, t = torch.rand(5, 7, generator=g) < 0.3, d1.sample_t(5, g).double()
    _, masked = d1.forward_process(x0, t, keep, MASK, g)
    loss, _ = d1.masked_nelbo(logits, x0, masked, t, keep)
    assert loss.item() == pytest.approx(nelbo_loop(logits, x0, masked, t, keep), rel=1e-5)


def test_nelbo_with_nothing_masked_is_zero_with_a_gradient():
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    none = torch.zeros(1, 3, dtype=torch.bool)
    loss, _ = d1.masked_nelbo(logits, torch.ones(1, 3, dtype=torch.long), none, torch.ones(1), none)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def log_p(model, x0, visible):
    """log p(x0^k | the visible tokens of x0) for every k, in float64."""
    canvas = torch.where(visible, x0, MASK)
    return model(canvas).logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0][0]


def test_nelbo_is_the_exact_bound_of_the_any_order_likelihood():
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
    rows, keep = x0.expand(n, -1), torch.zeros(n, length, dtype=torch.bool)
    t = d1.sample_t(n, g, low=1e-5)
    xt, masked = d1.forward_process(rows, t, keep, MASK, g)
    with torch.no_grad():
        logits = model(xt).logits
    each = [d1.masked_nelbo(logits[i : i + 400], rows[i : i + 400], masked[i : i + 400], t[i : i + 400],
                            keep[i : i + 400])[0].item() * length for i in range(0, n, 400)]
    mean, sem = torch.tensor(each).mean().item(), torch.tensor(each).std().item() / len(each) ** 0.5
    assert abs(mean - exact) < 4 * sem and sem < 0.03 * exact


# ---- Sec. 3.1


def test_estimator_is_exact_for_one_token_and_no_prompt_mask():
    model, prompt, completion = ToyModel(4, 5), torch.tensor([[1, 2, 3]]), torch.tensor([[4]])
    hide = torch.zeros(1, 3, dtype=torch.bool)
    got = d1.one_step_logp(model, prompt, completion, hide, MASK)
    want = model(torch.tensor([[1, 2, 3, MASK]])).logits[0, 3].log_softmax(-1)[4]
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=1e-6)


def test_estimator_sees_the_masked_prompt_and_a_fully_masked_completion():
    model, g = ToyModel(5, 6), rng()
    prompt, completion = torch.randint(1, 6, (3, 3), generator=g), torch.randint(1, 6, (3, 2), generator=g)
    hide = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    canvas = torch.cat([prompt.masked_fill(hide, MASK), torch.zeros(3, 2, dtype=torch.long)], 1)
    want = model(canvas).logits[:, 3:].log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    got = d1.one_step_logp(model, prompt, completion, hide, MASK)
    assert torch.allclose(got, want.float(), atol=1e-6)


def test_estimator_is_biased_for_two_tokens():
    model, prompt, completion = ToyModel(3, 4), torch.tensor([[1]]), torch.tensor([[2, 3]])
    mean_field = d1.one_step_logp(model, prompt, completion, torch.zeros(1, 1, dtype=torch.bool), MASK).sum().item()
    x0 = torch.tensor([[1, 2, 3]])
    first = log_p(model, x0, torch.tensor([[True, False, False]]))
    chains = [first[1] + log_p(model, x0, torch.tensor([[True, True, False]]))[2],
              first[2] + log_p(model, x0, torch.tensor([[True, False, True]]))[1]]
    exact = torch.logsumexp(torch.stack(chains), 0).item() - math.log(2)
    assert abs(mean_field - exact) > 0.1


def test_guidance_by_hand():
    model, prompt, completion = ToyModel(3, 4), torch.tensor([[1, 2]]), torch.tensor([[3]])
    cond, uncond = model(torch.tensor([[1, 2, MASK]])).logits, model(torch.tensor([[MASK, MASK, MASK]])).logits
    want = (uncond + 2.5 * (cond - uncond))[0, 2].log_softmax(-1)[3].item()
    got = d1.one_step_logp(model, prompt, completion, torch.zeros(1, 2, dtype=torch.bool), MASK, cfg_scale=1.5)
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_prompt_mask_hides_real_tokens_alone_at_rate_pmask():
    real = torch.ones(2000, 8, dtype=torch.bool)
    real[:, :3] = False
    hide = d1.draw_prompt_mask(real, 0.15, rng())
    assert not hide[:, :3].any() and hide[:, 3:].float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert not d1.draw_prompt_mask(real, 0.0, rng()).any() and torch.equal(d1.draw_prompt_mask(real, 1.0, rng()), real)


# ---- Eq. (2), live tokens


def test_advantages_by_hand():
    got = d1.group_advantages(torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 5.0]), 3)
    assert got.tolist() == [0.0, -1.0, 1.0, 0.0, 0.0, 0.0]  # no division by a deviation
    with pytest.raises(ValueError, match="groups of 4"):
        d1.group_advantages(torch.zeros(6), 4)


def test_live_tokens_end_with_the_first_eos():
    completion = torch.tensor([[5, 9, 7, 9], [9, 9, 9, 9], [1, 2, 3, 4]])
    want = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert d1.live_tokens(completion, 9).tolist() == want


# ---- Eq. (3) and (4)


def random_case(seed, rows=4, length=5):
    g = rng(seed)
    new, old, ref = (torch.randn(rows, length, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    return new, old, ref, torch.randn(rows, generator=g).double(), torch.arange(length).expand(rows, -1) < lengths


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


@pytest.mark.parametrize("norm", ["sequence", "token"])
@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_a_double_loop(norm, seed):
    case = random_case(seed)
    loss, _ = d1.diffu_grpo_loss(*case, eps=0.4, beta=0.1, norm=norm)
    assert loss.item() == pytest.approx(loss_loop(*case, 0.4, 0.1, norm), rel=1e-9)


def test_loss_by_hand():
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


def test_a_token_counts_as_clipped_only_where_the_clip_takes_its_gradient():
    logp = torch.tensor([[2.0, 0.5, 1.2, 1.0]]).log().requires_grad_()
    for advantage, clipped in ((1.0, [True, False, False, False]), (-1.0, [False, True, False, False])):
        gain, cut = d1.token_objective(logp, torch.zeros(1, 4), torch.tensor([advantage]), 0.4)
        assert cut[0].tolist() == clipped == (torch.autograd.grad(gain.sum(), logp)[0] == 0)[0].tolist()


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_ratio_one_gives_the_policy_gradient(norm):
    new, _, _, adv, live = random_case(7)
    new.requires_grad_()
    loss, metrics = d1.diffu_grpo_loss(new, None, None, adv, live, norm=norm)
    loss.backward()
    weight = 1 / (live.sum(1, keepdim=True) * len(live)) if norm == "sequence" else 1 / live.sum()
    assert torch.allclose(new.grad, -adv[:, None] * live * weight)  # - A grad log phi
    assert metrics["clip_frac"] == 0 and metrics["ratio_max"] == 1


def test_kl_is_never_negative_and_pulls_to_the_reference():
    new, _, ref, adv, live = random_case(8)
    new.requires_grad_()
    loss, metrics = d1.diffu_grpo_loss(new, None, ref, 0 * adv, live, beta=1.0)
    assert metrics["kl"] > 0
    loss.backward()
    assert torch.equal((new.grad > 0)[live], (new > ref)[live])  # the minimised loss falls towards ref
    same, metrics = d1.diffu_grpo_loss(ref, ref, ref, adv, live, beta=5.0)
    without, _ = d1.diffu_grpo_loss(ref, ref, None, adv, live, beta=5.0)
    assert metrics["kl"] == 0 and same == without


def test_norms_agree_on_equal_lengths_and_only_there():
    new, old, ref, adv, live = random_case(9)
    full = torch.ones_like(live)
    both = [d1.diffu_grpo_loss(new, old, ref, adv, full, norm=n)[0].item() for n in ("sequence", "token")]
    assert both[0] == pytest.approx(both[1])
    ragged = [d1.diffu_grpo_loss(new, old, ref, adv, live, norm=n)[0].item() for n in ("sequence", "token")]
    assert abs(ragged[0] - ragged[1]) > 1e-3
    with pytest.raises(ValueError, match="norm"):
        d1.diffu_grpo_loss(new, old, ref, adv, live, norm="batch")


def test_dead_tokens_have_no_gradient():
    new, old, ref, adv, live = random_case(10)
    new.requires_grad_()
    d1.diffu_grpo_loss(new, old, ref, adv, live)[0].backward()
    assert not new.grad[~live].any()


# ---- purity


def test_inputs_are_left_alone_and_the_global_stream_does_not_move():
    model, g = ToyModel(6, 7), rng()
    x0 = torch.randint(1, 7, (3, 6), generator=g)
    prompt, completion = x0[:, :4], x0[:, 4:]
    hide, keep = torch.rand(3, 4, generator=g) < 0.5, torch.zeros(3, 6, dtype=torch.bool)
    case, rewards = random_case(1), torch.tensor([1.0, 2.0, 3.0])
    inputs = [x0, hide, keep, rewards, *case]
    copies, state = [v.clone() for v in inputs], torch.random.get_rng_state()
    _, masked = d1.forward_process(x0, d1.sample_t(3, g), keep, MASK, g)
    d1.masked_nelbo(model(x0).logits, x0, masked, torch.ones(3), keep)
    d1.one_step_logp(model, prompt, completion, hide, MASK, cfg_scale=0.5)
    d1.group_advantages(rewards, 3)
    d1.live_tokens(completion, 3)
    d1.diffu_grpo_loss(*case)
    d1.diffuse_decode(model, prompt, mask_id=MASK, gen_length=2, block_length=1, temperature=0.9, generator=g)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
