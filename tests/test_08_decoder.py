"""The block decoder: one generator, exact schedule, rows that do not know of each other."""

import math

import pytest
import torch
from conftest import MASK, Constant, Scripted, ToyModel, output, rng
from hypothesis import given, settings
from hypothesis import strategies as st

import d1_full as d1


def prompts(rows=3, length=4, seed=1):
    return torch.randint(1, 9, (rows, length), generator=rng(seed))


class Pair(torch.nn.Module):
    """Exact conditionals of a joint law of two tokens, 1 or 2 each, after one prompt token."""

    joint = torch.tensor([[0.45, 0.05], [0.1, 0.4]])  # p(a, b)

    def forward(self, ids, attention_mask=None):
        logits = torch.full((*ids.shape, 4), -30.0)
        for row, out in zip(ids.tolist(), logits, strict=True):
            for k, other in ((1, 2), (2, 1)):
                table = self.joint if k == 1 else self.joint.T
                law = table.sum(1) if row[other] == MASK else table[:, row[other] - 1]
                out[k, 1:3] = (law / law.sum()).log()
        return output(logits)


# the first test: a decoder that draws the mask token never ends in the others
def test_block_decoder_draws_no_mask_token_in_any_step():
    likes_masks = Constant({MASK: 9.0, 3: 5.0})
    for options in ({}, dict(temperature=1.0), dict(remasking="random"), dict(threshold=0.1)):
        frame = next(d1.diffuse_steps(likes_masks, prompts(), mask_id=MASK, gen_length=8, block_length=8,
                                      generator=rng(), **options))
        assert (frame.ids[frame.new] != MASK).all() and frame.new.any()


def test_diffuse_steps_equals_diffuse_decode_and_writes_each_position_once():
    model = ToyModel(4 + 16, 9)
    for options in ({}, dict(temperature=0.9, remasking="random"), dict(threshold=0.3), dict(cfg_scale=1.0)):
        arguments = dict(mask_id=MASK, gen_length=16, block_length=8, steps=6, **options)
        frames = list(d1.diffuse_steps(model, prompts(), generator=rng(5), **arguments))
        assert torch.equal(frames[-1].ids, d1.diffuse_decode(model, prompts(), generator=rng(5), **arguments))
        assert (sum(f.new.long() for f in frames)[:, 4:] == 1).all()
        assert not any(f.new[:, :4].any() for f in frames) and torch.equal(frames[-1].ids[:, :4], prompts())
        before = torch.cat([prompts(), torch.full((3, 16), MASK)], 1)
        for f in frames:
            assert torch.equal(f.ids != before, f.new) and (f.ids[f.new] != MASK).all()
            assert not f.new[:, : 4 + 8 * f.block].any() and not f.new[:, 4 + 8 * (f.block + 1) :].any()
            before = f.ids


@pytest.mark.parametrize("gen,block,steps", [(16, 8, 16), (16, 8, 6), (16, 16, 5), (16, 4, 2), (16, 8, 99)])
def test_block_decoder_keeps_its_schedule(gen, block, steps):
    frames = list(d1.diffuse_steps(
        ToyModel(4 + gen, 9), prompts(), mask_id=MASK, gen_length=gen, block_length=block, steps=steps))
    per_block = max(1, steps // (gen // block))
    # n masked tokens over s steps: n // s each, one more in the first n % s
    want = [block // per_block + (i < block % per_block) for i in range(per_block)]
    got = [[int(f.new[0].sum()) for f in frames if f.block == b] for b in range(gen // block)]
    assert got == [[n for n in want if n]] * (gen // block)


def test_block_decoder_writes_two_tokens_a_step_by_default():
    frames = list(d1.diffuse_steps(ToyModel(4 + 8, 9), prompts(), mask_id=MASK, gen_length=8, block_length=8))
    assert [int(f.new[0].sum()) for f in frames] == [2, 2, 2, 2]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_diffuse_decode_of_a_padded_batch_equals_each_prompt_alone(loud, temperature):
    model, tok = loud
    rows = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33]]
    ids, real = d1.pad_left(rows, tok.pad_token_id)
    how = dict(mask_id=tok.mask_token_id, gen_length=16, block_length=8, temperature=temperature)
    together = d1.diffuse_decode(model, ids, attention_mask=real, generator=[rng(i) for i in range(3)], **how)
    for i, row in enumerate(rows):
        alone = d1.diffuse_decode(model, torch.tensor([row]), generator=[rng(i)], **how)
        assert torch.equal(together[i, ids.shape[1] :], alone[0, len(row) :])
    ignoring = d1.diffuse_decode(model, ids, generator=[rng(i) for i in range(3)], **how)
    assert not torch.equal(together, ignoring)  # padding that is attended to changes the reply


def test_block_decoder_that_stops_at_eos_changes_nothing_up_to_the_first_eos():
    model, eos = ToyModel(4 + 32, 9), 3
    how = dict(mask_id=MASK, gen_length=32, block_length=4, temperature=1.0)
    for seed in range(5):
        full = d1.diffuse_decode(model, prompts(6), generator=rng(seed), **how)[:, 4:]
        frames = list(d1.diffuse_steps(model, prompts(6), eos_id=eos, stop_at_eos=True, generator=rng(seed), **how))
        stopped = frames[-1].ids[:, 4:]
        live = d1.live_tokens(full, eos)
        assert torch.equal(full[live], stopped[live]) and torch.equal(live, d1.live_tokens(stopped, eos))
        assert (stopped != MASK).all() and (sum(f.new.long() for f in frames)[:, 4:] == 1).all()
        ended = (full[:, :4] == eos).any(1)  # ended in the first block: all later blocks are filled with EOS
        assert (stopped[ended][:, 4:] == eos).all()


def test_block_decoder_does_no_work_after_every_row_has_ended():
    always_eos = Constant({3: 50.0})
    out = d1.diffuse_decode(
        always_eos, prompts(), mask_id=MASK, gen_length=32, block_length=4, eos_id=3, stop_at_eos=True)
    assert always_eos.calls == 2 and (out[:, 4:] == 3).all()


def test_diffuse_decode_never_draws_the_mask_token():
    loves_mask = Constant({MASK: 30.0})
    for temperature in (0.0, 1.0):
        out = d1.diffuse_decode(
            loves_mask, prompts(), mask_id=MASK, gen_length=8, block_length=8, temperature=temperature, generator=rng())
        assert (out != MASK).all()


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_sample_tokens_follow_the_tempered_softmax(temperature):
    p = torch.tensor([2 / 3, 1 / 4, 1 / 12])  # drawn in bf16, the first came up .984 of the time in the official code
    got = d1.sample_tokens(p.log().expand(40000, 3), temperature, [40000], [rng()])
    want = (p ** (1 / temperature)) / (p ** (1 / temperature)).sum()
    assert torch.allclose(torch.bincount(got, minlength=3) / 40000, want, atol=0.01)  # 4 standard errors


def test_diffuse_decode_repeats_with_its_seed_and_varies_with_it():
    how = dict(mask_id=MASK, gen_length=8, block_length=4, temperature=1.0)
    one, same, other = (d1.diffuse_decode(ToyModel(12, 9), prompts(), generator=rng(s), **how) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_row_generators_of_one_generator_are_streams_of_their_own():
    same = prompts(1).repeat(6, 1)
    how = dict(mask_id=MASK, gen_length=8, block_length=8, temperature=1.0)
    out = d1.diffuse_decode(ToyModel(12, 9), same, generator=rng(), **how)
    assert len({tuple(row) for row in out.tolist()}) > 1


def test_block_decoder_with_a_threshold_writes_all_that_is_sure_and_at_least_one():
    how = dict(mask_id=MASK, gen_length=8, block_length=8)
    assert len(list(d1.diffuse_steps(ToyModel(12, 9), prompts(), threshold=0.0, **how))) == 1
    assert len(list(d1.diffuse_steps(ToyModel(12, 9), prompts(), threshold=2.0, **how))) == 8


class Sure(torch.nn.Module):
    """Says 1 at place k with probability p[k], rolled by the row's first token, and shares the rest among others."""

    def __init__(self, p):
        super().__init__()
        self.p = torch.tensor(p)

    def forward(self, ids, attention_mask=None):
        length = ids.shape[1] - len(self.p)
        p = torch.stack([self.p.roll(int(row[0])) for row in ids])  # (B, C)
        rest = ((1 - p) / 8)[..., None].expand(*p.shape, 9).clone()
        rest[..., 1] = p
        return output(torch.nn.functional.pad(rest.log(), (0, 0, length, 0)))


def test_block_decoder_with_a_threshold_writes_what_is_above_it_and_else_the_likeliest():
    p = [0.99, 0.6, 0.95, 0.3, 0.85, 0.81, 0.79, 0.5]
    options = dict(mask_id=MASK, gen_length=8, block_length=8)
    frames = list(d1.diffuse_steps(Sure(p), torch.tensor([[2], [3]]), threshold=0.8, **options))
    written = [[sorted((k - roll) % 8 for k in row[1:].nonzero()[:, 0].tolist()) for row, roll in
                zip(frame.new, (2, 3), strict=True)] for frame in frames]
    assert written == [[places] * 2 for places in ([0, 2, 4, 5], [6], [1], [7], [3])]  # the likeliest of those left
    whole = list(d1.diffuse_steps(Sure(p), torch.tensor([[2]]), threshold=0.25, **options))
    assert [int(f.new.sum()) for f in whole] == [8]


def test_block_decoder_with_a_threshold_lets_rows_end_their_blocks_apart():
    p = [0.9, 0.9, 0.9, 0.9, 0.4, 0.3, 0.9, 0.9]  # of the first row; the second has the sure half first
    frames = list(d1.diffuse_steps(
        Sure(p), torch.tensor([[0], [4]]), mask_id=MASK, gen_length=8, block_length=4, threshold=0.8))
    made = [[f.new[row, 1:].sum().item() for f in frames] for row in (0, 1)]
    assert made == [[4, 0, 0, 2, 1, 1], [2, 1, 1, 4, 0, 0]]
    assert [f.block for f in frames] == [0, 0, 0, 1, 1, 1]


def test_diffuse_decode_keeps_no_gradient():
    assert not d1.diffuse_decode(ToyModel(12, 9), prompts(), mask_id=MASK, gen_length=8, block_length=4).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("bad,word", [
    (dict(gen_length=10, block_length=4), "multiple"), (dict(gen_length=0), "positive"), (dict(steps=0), "at least 1"),
    (dict(remasking="best"), "remasking"), (dict(stop_at_eos=True), "eos_id"),
    (dict(temperature=0.5), "generator"),
])
def test_block_decoder_refuses_values_that_cannot_run(bad, word):
    with pytest.raises(ValueError, match=word):
        d1.diffuse_decode(ToyModel(12, 9), prompts(), mask_id=MASK, **{"gen_length": 8, "block_length": 4, **bad})


@pytest.mark.parametrize(("remasking", "steps", "share"), [
    ("ancestral", 1, None), ("ancestral", 2, 0.5), ("random", 2, 1.0), ("low_confidence", 2, 1.0)])
def test_block_decoder_samples_follow_the_law_of_the_reverse_process(remasking, steps, share):
    """One step draws from the product of marginals; one token a step from the joint; ancestral with 2 steps between.

    Both tokens come in the same one of two ancestral steps with probability 1/2.
    """
    n = 6000
    prompt = torch.full((n, 1), 3)
    out = d1.diffuse_decode(Pair(), prompt, mask_id=MASK, gen_length=2, block_length=2, steps=steps, temperature=1.0,
                            remasking=remasking, generator=rng(5))
    found = torch.bincount((out[:, 1] - 1) * 2 + out[:, 2] - 1, minlength=4) / n
    joint, apart = Pair.joint, Pair.joint.sum(1)[:, None] * Pair.joint.sum(0)
    if remasking == "low_confidence":  # the surer token comes first, then the other given it: still the joint law?
        assert abs(found.view(2, 2).sum(1)[0] - 0.5) < 0.3
        return
    want = apart if share is None else share * joint + (1 - share) * apart
    assert (found - want.flatten()).abs().max() < 4 * math.sqrt(0.25 / n)


def test_block_decoder_unmasks_in_ancestral_steps_what_the_process_says():
    model, n = ToyModel(41, 3), 200
    frames = list(d1.diffuse_steps(model, torch.ones(n, 1, dtype=torch.long), mask_id=MASK, gen_length=40, steps=4,
                                   block_length=40, remasking="ancestral", generator=rng(6)))
    shares = [f.new.sum().item() / (n * 40) for f in frames]
    assert len(frames) == 4 and all(abs(s - 0.25) < 0.02 for s in shares)
    assert torch.stack([f.new for f in frames]).sum(0)[:, 1:].eq(1).all()


def test_block_decoder_ends_a_reply_after_the_block_with_the_stop():
    target = torch.tensor([1, 2, 3, 4, 5, 6, 5, 4, 3, 2])
    model = Scripted(lambda ids: target.expand_as(ids))

    def reply(prompt, stop):
        how = dict(mask_id=MASK, gen_length=8, block_length=4, steps=8, eos_id=7)
        return d1.diffuse_decode(model, torch.tensor([prompt]), stop=stop, **how)[0].tolist()

    # the block [3 4 5 6], then EOS
    assert reply([1, 2], lambda ids: 4 in ids.tolist()) == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]
    # what the prompt says stops nothing
    assert reply([8, 2], lambda ids: 8 in ids.tolist()) == [8, *target[1:].tolist()]


def test_block_decoder_keeps_a_mask_token_of_the_prompt_when_a_row_leaves_early(tiny):
    mask, eos = tiny[1].mask_token_id, tiny[1].eos_token_id
    prompt = torch.tensor([[5, mask, 6]])
    out = d1.diffuse_decode(tiny[0], prompt, mask_id=mask, eos_id=eos, gen_length=16, block_length=8, stop=len)
    assert torch.equal(out[:, :3], prompt) and (out[:, 11:] == eos).all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(8, 8), (8, 4), (8, 2), (12, 4)]), st.integers(1, 20), st.sampled_from([0.0, 0.5, 1.5]),
       st.sampled_from(d1.REMASKING), st.one_of(st.none(), st.floats(0.0, 1.0)), st.booleans(),
       st.integers(0, 99))
def test_block_decoder_fills_every_position_once_whatever_it_is_told(
        size, steps, temperature, remasking, threshold, stop, seed):
    length, block = size
    threshold = threshold if remasking == "low_confidence" else None
    prompt = torch.randint(1, 9, (3, 4), generator=torch.Generator().manual_seed(seed))
    frames = list(d1.diffuse_steps(
        ToyModel(4 + length, 9, seed), prompt, mask_id=MASK, gen_length=length, block_length=block, steps=steps,
        temperature=temperature, remasking=remasking, threshold=threshold, eos_id=3, stop_at_eos=stop,
        generator=torch.Generator().manual_seed(seed)))
    ids = frames[-1].ids
    assert torch.equal(ids[:, :4], prompt) and (ids[:, 4:] != MASK).all()
    assert (sum(f.new.long() for f in frames)[:, 4:] == 1).all()
    assert len(frames) <= max(length, steps) + 1 and all((f.logp <= 0).all() for f in frames)
