"""The one-step estimator: exact where theory says so, and its savings change no number."""

import math

import pytest
import torch
from conftest import MASK, ToyModel, log_p, network, padded, rng
from hypothesis import given, settings
from hypothesis import strategies as st

import d1_full as d1


class Positional(ToyModel):
    """A toy that also sees the attention mask; remembers how many rows its first pass had."""

    rows = 0

    def forward(self, ids, attention_mask=None):
        self.rows = self.rows or len(ids)
        hidden = ids if attention_mask is None else ids.masked_fill(~attention_mask, self.vocab - 1)
        return super().forward(hidden)


def test_one_step_logp_is_exact_for_one_token_and_no_prompt_mask():
    model, prompt, completion = ToyModel(4, 5), torch.tensor([[1, 2, 3]]), torch.tensor([[4]])
    prompt_mask = torch.zeros(1, 3, dtype=torch.bool)
    got = d1.one_step_logp(model, prompt, completion, prompt_mask, MASK)
    want = model(torch.tensor([[1, 2, 3, MASK]])).logits[0, 3].log_softmax(-1)[4]
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=1e-6)


def test_one_step_logp_sees_the_masked_prompt_and_a_fully_masked_completion():
    model, g = ToyModel(5, 6), rng()
    prompt, completion = torch.randint(1, 6, (3, 3), generator=g), torch.randint(1, 6, (3, 2), generator=g)
    prompt_mask = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    canvas = torch.cat([prompt.masked_fill(prompt_mask, MASK), torch.zeros(3, 2, dtype=torch.long)], 1)
    want = model(canvas).logits[:, 3:].log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    got = d1.one_step_logp(model, prompt, completion, prompt_mask, MASK)
    assert torch.allclose(got, want.float(), atol=1e-6)


def test_one_step_logp_is_biased_for_two_tokens():
    model, prompt, completion = ToyModel(3, 4), torch.tensor([[1]]), torch.tensor([[2, 3]])
    mean_field = d1.one_step_logp(model, prompt, completion, torch.zeros(1, 1, dtype=torch.bool), MASK).sum().item()
    x0 = torch.tensor([[1, 2, 3]])
    first = log_p(model, x0, torch.tensor([[True, False, False]]))
    chains = [first[1] + log_p(model, x0, torch.tensor([[True, True, False]]))[2],
              first[2] + log_p(model, x0, torch.tensor([[True, False, True]]))[1]]
    exact = torch.logsumexp(torch.stack(chains), 0).item() - math.log(2)
    assert abs(mean_field - exact) > 0.1


def test_draw_prompt_mask_hides_real_tokens_alone_at_rate_pmask():
    real = torch.ones(2000, 8, dtype=torch.bool)
    real[:, :3] = False
    prompt_mask = d1.draw_prompt_mask(real, 0.15, rng())
    assert not prompt_mask[:, :3].any() and prompt_mask[:, 3:].float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert not d1.draw_prompt_mask(real, 0.0, rng()).any() and torch.equal(d1.draw_prompt_mask(real, 1.0, rng()), real)


def test_one_step_logp_does_not_depend_on_padding(loud):
    model, tok = loud
    rows = [[5, 6, 7, 8, 9, 10, 11], [20, 21]]
    ids, real = d1.pad_left(rows, tok.pad_token_id)
    completion, prompt_mask = torch.tensor([[40, 41, 42], [50, 51, 52]]), torch.zeros_like(real)
    with torch.no_grad():
        together = d1.one_step_logp(model, ids, completion, prompt_mask, tok.mask_token_id, real)
        ignoring = d1.one_step_logp(model, ids, completion, prompt_mask, tok.mask_token_id)
        for i, row in enumerate(rows):
            alone = (torch.tensor([row]), completion[i : i + 1], torch.zeros(1, len(row), dtype=torch.bool))
            assert torch.allclose(together[i], d1.one_step_logp(model, *alone, tok.mask_token_id)[0], atol=1e-4)
    assert (together[1] - ignoring[1]).abs().max() > 0.1


@pytest.mark.parametrize("masks", ["shared", "own", "none"])
@pytest.mark.parametrize("padding", [True, False])
def test_one_step_logp_computes_rows_of_one_prompt_mask_once_with_the_same_result(masks, padding):
    model = network()
    prompt, real = (v.repeat_interleave(4, 0) for v in padded())
    real = real if padding else None
    completion = torch.randint(1, 50, (12, 5), generator=rng(4))
    prompt_mask = torch.rand((3, 7) if masks == "shared" else (12, 7), generator=rng(5)) < (masks != "none") * 0.5
    prompt_mask = prompt_mask.repeat_interleave(4, 0) if masks == "shared" else prompt_mask
    q = torch.cat([torch.where(prompt_mask, MASK, prompt), torch.full((12, 5), MASK)], 1)
    logits = model(q, attention_mask=None if real is None else d1.extend_mask(real, 12)).logits[:, 7:]
    want = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    rows = []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    got = d1.one_step_logp(model, prompt, completion, prompt_mask, MASK, real)
    assert torch.allclose(got, want, atol=1e-5)
    assert rows == ([12] if masks == "own" else [3])
    live = torch.rand(completion.shape, generator=rng(6)) < 0.5
    some = d1.one_step_logp(model, prompt, completion, prompt_mask, MASK, real, completion_mask=live)
    assert torch.allclose(some, want * live, atol=1e-5)
    grads = [torch.autograd.grad((v * live).square().sum(), model.parameters()) for v in (want, some)]
    assert all((a - b).abs().max() < 1e-5 * a.abs().max() for a, b in zip(*grads, strict=True))


def test_one_step_logp_takes_the_same_tokens_with_other_padding_for_two_rows():
    model, prompt = network(), torch.tensor([[3, 3, 4, 5]]).expand(2, 4)
    real = torch.tensor([[False, True, True, True], [True] * 4])
    completion, prompt_mask = torch.randint(1, 50, (2, 5), generator=rng(4)), torch.zeros(2, 4, dtype=torch.bool)
    both = d1.one_step_logp(model, prompt, completion, prompt_mask, MASK, real)
    for i in range(2):
        row = slice(i, i + 1)
        alone = d1.one_step_logp(model, prompt[row], completion[row], prompt_mask[row], MASK, real[row])
        assert torch.allclose(both[row], alone, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=6), st.integers(0, 99), st.booleans(),
       st.sampled_from([0.0, 1.5]))
def test_one_step_logp_that_shares_rows_is_the_plain_path(kinds, seed, padding, cfg_scale):
    """Rows drawn from three prompts with three prompt masks, against each row by itself, all positions asked for."""
    g, n = rng(seed), len(kinds)
    prompts, masks = torch.randint(1, 9, (3, 4), generator=g), torch.rand(3, 4, generator=g) < 0.5
    pads = torch.tensor([[True] * 4, [False, True, True, True], [True] * 4])
    prompt, prompt_mask, real = prompts[kinds], masks[kinds], pads[kinds] if padding else None
    completion = torch.randint(1, 9, (n, 3), generator=g)
    model = Positional(7, 9, seed)
    got = d1.one_step_logp(model, prompt, completion, prompt_mask, MASK, real, cfg_scale)
    plain = []
    for i in range(n):
        rows = [torch.where(prompt_mask[i], MASK, prompt[i]), torch.full((4,), MASK)][: 1 + (cfg_scale > 0)]
        canvas = torch.stack([torch.cat([row, torch.full((3,), MASK)]) for row in rows])
        seen = None if real is None else d1.extend_mask(real[i : i + 1], 7).expand(len(rows), -1)
        logits = model(canvas, seen).logits[:, 4:].float()
        logits = logits[-1] + (cfg_scale + 1) * (logits[0] - logits[-1]) if cfg_scale else logits[0]
        plain.append(logits.log_softmax(-1).gather(-1, completion[i][:, None])[:, 0])
    assert torch.allclose(got, torch.stack(plain), atol=1e-5)
    masked = torch.where(prompt_mask, MASK, prompt)
    seen = real if padding else torch.ones_like(prompt_mask)
    different = {(*row, *mask) for row, mask in zip(masked.tolist(), seen.tolist(), strict=True)}
    assert model.rows == len(different) * (2 if cfg_scale else 1)
    grads = [torch.autograd.grad(v.square().sum(), model.weight)[0] for v in (got, torch.stack(plain))]
    assert torch.allclose(*grads, atol=1e-5)
