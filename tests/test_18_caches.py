"""Caches of keys and values: exact where theory says so."""

import copy

import pytest
import torch
from conftest import MASK, network, padded, rng

import d1_full as d1

WAYS = [{}, dict(temperature=0.9), dict(threshold=0.4), dict(steps=32), dict(remasking="random"),
        dict(stop_at_eos=True, eos_id=5, temperature=2.0)]


def decode(model, **options):
    prompt, real = padded()
    if "cache" in options:
        options["decoder"] = d1.CachedDecoder
    return d1.diffuse_decode(model, prompt, mask_id=MASK, attention_mask=real, gen_length=32, block_length=8,
                             generator=rng(1), **options)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "dream"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_decoder_is_exact_where_keys_do_not_depend_on_other_tokens_or_are_always_new(cache, kind, way):
    """In one layer they come from a token alone, so those of tokens that stay are right; refresh 1 keeps nothing."""
    assert torch.equal(decode(network(kind, 1), cache=cache, **way), decode(network(kind, 1), **way))
    assert torch.equal(decode(network(kind, 3), cache=cache, refresh=1, **way), decode(network(kind, 3), **way))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_cached_decoder_leaves_rows_their_keys_and_padding_when_others_are_done(cache, tiny):
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # surer, so that a threshold commits many tokens at once, and rows are done at different steps
    prompts = [torch.randint(200, (n,), generator=rng(5)).tolist() for n in (9, 6, 3)]
    prompt, real = d1.pad_left(prompts, 7)
    options = dict(mask_id=tiny[1].mask_token_id, gen_length=32, block_length=16, decoder=d1.CachedDecoder,
                   cache=cache, threshold=0.2)
    frames = list(d1.diffuse_steps(model, prompt, attention_mask=real, **options))
    steps = [sum(bool(f.new[i].any()) for f in frames if f.block == 0) for i in range(3)]
    assert steps[0] < min(steps[1:])  # the first row leaves first
    alone = [d1.diffuse_decode(model, torch.tensor([p]), **options)[:, len(p) :] for p in prompts]
    assert torch.equal(frames[-1].ids[:, 9:], torch.cat(alone))


def test_cached_decoder_holds_keys_under_gradient_checkpointing_too(tiny, quick):
    drawn = []
    for checkpointing in (False, True):
        cfg = quick(mu=2, rollout_cache="dual", grad_checkpoint=checkpointing, temperature=0.0)
        model = copy.deepcopy(tiny[0])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        task = d1.TASKS["sudoku"]
        stage = d1.rl_stage(model, tiny[1], task, task.examples("train", 4), cfg)
        next(stage.updates(d1.Trainer(stage, listener=stage.prompts)))
        drawn.append(stage.rollouts[0].completion)
        assert any(m.training for m in model.modules()) == checkpointing  # on again in the update
        prompts = [[5, 6, 7], [8, 9]]
        drawn[-1] = (drawn[-1], [r for b in d1.generate(model, tiny[1], prompts, cfg, 32) for r in b])
    assert torch.equal(drawn[0][0], drawn[1][0])


@pytest.mark.parametrize(("cache", "refresh", "fed"), [
    ("none", 0, [39] * 16), ("prefix", 0, [39, 32, 32, 32, 39, 24, 24, 24, 39, 16, 16, 16, 39, 8, 8, 8]),
    ("dual", 0, [39, 8, 8, 8] * 4), ("dual", 2, [39, 8] * 8)])
def test_cached_decoder_computes_fresh_positions_alone(cache, refresh, fed):
    model, lengths = network(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    decode(model, cache=cache, refresh=refresh)
    assert lengths == fed


def test_cached_decoder_leaves_a_row_that_has_filled_its_block_outside_the_batch():
    model, rows = network(), []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for cache in ("none", "dual"):
        rows.clear()
        decode(model, threshold=0.4, cache=cache)
        assert set(rows) == {1, 2, 3}


def test_cache_error_and_the_log_probabilities_in_the_frames():
    model, (prompt, real) = network(layers=3), padded()
    how = dict(mask_id=MASK, attention_mask=real, gen_length=32, block_length=8)
    frames = list(d1.diffuse_steps(model, prompt, **how))
    before = torch.nn.functional.pad(prompt, (0, 32), value=MASK)
    for f in frames:
        logp = model(before, attention_mask=d1.extend_mask(real, 39)).logits.log_softmax(-1)
        assert torch.allclose(f.logp, logp.gather(-1, f.ids[..., None])[..., 0] * f.new, atol=1e-5)
        before = f.ids
    assert d1.cache_error(model, frames, MASK, real) < 1e-5
    cached = list(d1.diffuse_steps(model, prompt, decoder=d1.CachedDecoder, cache="dual", **how))
    assert d1.cache_error(model, cached, MASK, real) > 1e-5


def test_cached_decoder_without_the_means_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="cfg_scale"):
        decode(network(), cache="dual", cfg_scale=1.0)
    with pytest.raises(ValueError, match="cache"):
        decode(network(), cache="magic")
