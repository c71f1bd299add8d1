"""The block decoder: one generator, exact schedule, rows that do not know of each other."""

import copy

import pytest
import torch
from conftest import MASK, ToyModel

import d1_full as d1


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts(rows=3, length=4, seed=1):
    return torch.randint(1, 9, (rows, length), generator=rng(seed))


def test_no_step_draws_the_mask_token():  # the first test: a decoder that draws it never ends in the others
    def likes_masks(ids, attention_mask=None):
        logits = torch.zeros(*ids.shape, 9)
        logits[..., MASK], logits[..., 3] = 9.0, 5.0
        return type("Output", (), {"logits": logits})

    for options in ({}, dict(temperature=1.0), dict(remasking="random"), dict(threshold=0.1)):
        frame = next(d1.diffuse_steps(likes_masks, prompts(), mask_id=MASK, gen_length=8, block_length=8,
                                      generator=rng(), **options))
        assert (frame.ids[frame.new] != MASK).all() and frame.new.any()


def test_streamed_equals_blocking_and_each_position_is_committed_once():
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
def test_schedule(gen, block, steps):
    frames = list(d1.diffuse_steps(
        ToyModel(4 + gen, 9), prompts(), mask_id=MASK, gen_length=gen, block_length=block, steps=steps))
    per_block = max(1, steps // (gen // block))
    # n masked tokens over s steps: n // s each, one more in the first n % s
    want = [block // per_block + (i < block % per_block) for i in range(per_block)]
    got = [[int(f.new[0].sum()) for f in frames if f.block == b] for b in range(gen // block)]
    assert got == [[n for n in want if n]] * (gen // block)


def test_default_is_two_tokens_a_step():
    frames = list(d1.diffuse_steps(ToyModel(4 + 8, 9), prompts(), mask_id=MASK, gen_length=8, block_length=8))
    assert [int(f.new[0].sum()) for f in frames] == [2, 2, 2, 2]


@pytest.fixture(scope="module")
def loud(tiny):
    """The tiny model with larger weights: at its first ones, attention hardly matters."""
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    return model, tiny[1]


def test_log_probabilities_do_not_depend_on_padding(loud):
    model, tok = loud
    rows = [[5, 6, 7, 8, 9, 10, 11], [20, 21]]
    ids, real = d1.pad_left(rows, tok.pad_token_id)
    completion, hide = torch.tensor([[40, 41, 42], [50, 51, 52]]), torch.zeros_like(real)
    with torch.no_grad():
        together = d1.one_step_logp(model, ids, completion, hide, tok.mask_token_id, real)
        ignoring = d1.one_step_logp(model, ids, completion, hide, tok.mask_token_id)
        for i, row in enumerate(rows):
            alone = (torch.tensor([row]), completion[i : i + 1], torch.zeros(1, len(row), dtype=torch.bool))
            assert torch.allclose(together[i], d1.one_step_logp(model, *alone, tok.mask_token_id)[0], atol=1e-4)
    assert (together[1] - ignoring[1]).abs().max() > 0.1


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_padded_batch_equals_each_prompt_alone(loud, temperature):
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


def test_stop_at_eos_changes_nothing_up_to_the_first_eos():
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


def test_no_work_after_every_row_has_ended():
    calls = []

    def always_eos(ids, attention_mask=None):
        calls.append(len(ids))
        return type("Output", (), {"logits": torch.nn.functional.one_hot(torch.full(ids.shape, 3), 9).float() * 50})

    out = d1.diffuse_decode(
        always_eos, prompts(), mask_id=MASK, gen_length=32, block_length=4, eos_id=3, stop_at_eos=True)
    assert len(calls) == 2 and (out[:, 4:] == 3).all()


def test_the_mask_token_is_never_drawn():
    def loves_mask(ids, attention_mask=None):
        logits = torch.zeros(*ids.shape, 9)
        logits[..., MASK] = 30.0
        return type("Output", (), {"logits": logits})

    for temperature in (0.0, 1.0):
        out = d1.diffuse_decode(
            loves_mask, prompts(), mask_id=MASK, gen_length=8, block_length=8, temperature=temperature, generator=rng())
        assert (out != MASK).all()


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_gumbel_max_samples_the_tempered_softmax(temperature):
    p = torch.tensor([2 / 3, 1 / 4, 1 / 12])  # drawn in bf16, the first came up .984 of the time in the official code
    got = d1.sample_tokens(p.log().expand(40000, 3), temperature, [40000], [rng()])
    want = (p ** (1 / temperature)) / (p ** (1 / temperature)).sum()
    assert torch.allclose(torch.bincount(got, minlength=3) / 40000, want, atol=0.01)  # 4 standard errors


def test_sampling_repeats_with_its_seed_and_varies_with_it():
    how = dict(mask_id=MASK, gen_length=8, block_length=4, temperature=1.0)
    one, same, other = (d1.diffuse_decode(ToyModel(12, 9), prompts(), generator=rng(s), **how) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_rows_of_one_generator_have_streams_of_their_own():
    same = prompts(1).repeat(6, 1)
    how = dict(mask_id=MASK, gen_length=8, block_length=8, temperature=1.0)
    out = d1.diffuse_decode(ToyModel(12, 9), same, generator=rng(), **how)
    assert len({tuple(row) for row in out.tolist()}) > 1


def test_threshold_commits_all_that_is_sure_and_at_least_one():
    how = dict(mask_id=MASK, gen_length=8, block_length=8)
    assert len(list(d1.diffuse_steps(ToyModel(12, 9), prompts(), threshold=0.0, **how))) == 1
    assert len(list(d1.diffuse_steps(ToyModel(12, 9), prompts(), threshold=2.0, **how))) == 8


def test_no_gradient_is_kept():
    assert not d1.diffuse_decode(ToyModel(12, 9), prompts(), mask_id=MASK, gen_length=8, block_length=4).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("bad,word", [
    (dict(gen_length=10, block_length=4), "multiple"), (dict(gen_length=0), "positive"), (dict(steps=0), "at least 1"),
    (dict(remasking="best"), "remasking"), (dict(cache="magic"), "cache"), (dict(stop_at_eos=True), "eos_id"),
    (dict(temperature=0.5), "generator"),
])
def test_values_that_cannot_run_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        d1.diffuse_decode(ToyModel(12, 9), prompts(), mask_id=MASK, **{"gen_length": 8, "block_length": 4, **bad})
