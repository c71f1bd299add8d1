"""The savings: exact ones change no number, approximate ones are exact where theory says so."""

import copy
import json

import pytest
import torch
from conftest import MASK, ToyModel
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import d1_full as d1

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=50)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind="llama", layers=2):
    torch.manual_seed(0)
    wide = dict(initializer_range=0.2)  # at the usual .02 attention hardly matters
    more = dict(num_hidden_layers=layers, num_key_value_heads=2, is_causal=False, use_cache=False)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SIZES, **wide, num_hidden_layers=layers)).eval()
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **wide, **more)).eval()
    more |= dict(tie_word_embeddings=True, shift_logits=kind == "dream")
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **wide, **more)).eval()
    if kind == "dream":
        model.register_forward_hook(d1.shift_logits)
    return model


def padded(rows=3, length=7):
    ids, real = torch.randint(1, 50, (rows, length), generator=rng()), torch.ones(rows, length, dtype=torch.bool)
    real[1, :3] = False
    return ids, real


@pytest.mark.parametrize("kind", ["llama", "bert", "qwen", "dream", "lora", "toy"])
def test_logits_of_some_positions_are_those_of_all(kind):
    model = ToyModel(7, 50) if kind == "toy" else build("llama" if kind == "lora" else kind)
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


def test_the_output_layer_is_whole_again_after_an_error():
    model = build()
    ids, real = padded()
    want = model(ids).logits
    with pytest.raises(ZeroDivisionError):
        d1.logits_at(model, ids, real, compute=lambda layer, hidden: 1 / 0)
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_chunked_losses_and_their_gradients_are_the_plain_ones(size):
    layer = torch.nn.Linear(8, 20)
    hidden, target = torch.randn(12, 8, generator=rng()), torch.randint(20, (12,), generator=rng())
    weight, grads = torch.rand(12, generator=rng(3)), []
    for compute in (lambda h: d1.chunked_losses(layer, h, target, size), lambda h: d1.token_losses(layer(h), target)):
        h = hidden.clone().requires_grad_()
        ce, hit = compute(h)
        layer.zero_grad()
        (ce * weight).sum().backward()
        grads.append((ce.detach(), hit, h.grad, layer.weight.grad.clone()))
    assert torch.equal(grads[0][1], grads[1][1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True) if a.dtype != torch.bool)


def test_chunked_losses_hold_few_logits(monkeypatch):
    seen = []
    monkeypatch.setattr(d1, "token_losses", lambda logits, y: seen.append(len(logits)) or (logits.sum(1), y > 0))
    d1.chunked_losses(torch.nn.Linear(4, 9), torch.randn(7, 4), torch.zeros(7, dtype=torch.long), 3)
    assert seen == [3, 3, 1]


@pytest.mark.parametrize("masks", ["shared", "own", "none"])
@pytest.mark.parametrize("padding", [True, False])
def test_rows_of_one_prompt_mask_are_computed_once_with_the_same_result(masks, padding):
    model = build()
    prompt, real = (v.repeat_interleave(4, 0) for v in padded())
    real = real if padding else None
    completion = torch.randint(1, 50, (12, 5), generator=rng(4))
    hide = torch.rand((3, 7) if masks == "shared" else (12, 7), generator=rng(5)) < (masks != "none") * 0.5
    hide = hide.repeat_interleave(4, 0) if masks == "shared" else hide
    q = torch.cat([torch.where(hide, MASK, prompt), torch.full((12, 5), MASK)], 1)
    logits = model(q, attention_mask=None if real is None else d1.extend_mask(real, 12)).logits[:, 7:]
    want = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    rows = []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    got = d1.one_step_logp(model, prompt, completion, hide, MASK, real)
    assert torch.allclose(got, want, atol=1e-5)
    assert rows == ([12] if masks == "own" else [3])
    live = torch.rand(completion.shape, generator=rng(6)) < 0.5
    some = d1.one_step_logp(model, prompt, completion, hide, MASK, real, live=live)
    assert torch.allclose(some, want * live, atol=1e-5)
    grads = [torch.autograd.grad((v * live).square().sum(), model.parameters()) for v in (want, some)]
    assert all((a - b).abs().max() < 1e-5 * a.abs().max() for a, b in zip(*grads, strict=True))


def test_rows_of_the_same_tokens_but_other_padding_are_two_rows():
    model, prompt = build(), torch.tensor([[3, 3, 4, 5]]).expand(2, 4)
    real = torch.tensor([[False, True, True, True], [True] * 4])
    completion, hide = torch.randint(1, 50, (2, 5), generator=rng(4)), torch.zeros(2, 4, dtype=torch.bool)
    both = d1.one_step_logp(model, prompt, completion, hide, MASK, real)
    for i in range(2):
        row = slice(i, i + 1)
        alone = d1.one_step_logp(model, prompt[row], completion[row], hide[row], MASK, real[row])
        assert torch.allclose(both[row], alone, atol=1e-5)


def test_many_masks_in_one_pass_or_one_by_one():
    model = build()
    prompt, real = padded()
    completion, live = torch.randint(1, 50, (3, 5), generator=rng(4)), torch.rand(3, 5, generator=rng(1)) < 0.7
    hide = torch.rand(5, 3, 7, generator=rng(5)) < 0.3
    with torch.no_grad():
        want = torch.stack([d1.one_step_logp(model, prompt, completion, h, MASK, real, live=live) for h in hide])
        for size in (1, 2, 5, 9):
            got = d1.one_step_logps(model, prompt, completion, hide, MASK, real, live, size)
            assert torch.allclose(got, want, atol=1e-5)
        assert d1.one_step_logps(model, prompt, completion, hide[:0], MASK).shape == (0, 3, 5)


WAYS = [{}, dict(temperature=0.9), dict(threshold=0.4), dict(steps=32), dict(remasking="random"),
        dict(stop_at_eos=True, eos_id=5, temperature=2.0)]


def decode(model, **options):
    prompt, real = padded()
    return d1.diffuse_decode(model, prompt, mask_id=MASK, attention_mask=real, gen_length=32, block_length=8,
                             generator=rng(1), **options)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "dream"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_is_exact_where_keys_do_not_depend_on_other_tokens_or_are_always_new(cache, kind, way):
    """In one layer they come from a token alone, so those of tokens that stay are right; refresh 1 keeps nothing."""
    assert torch.equal(decode(build(kind, 1), cache=cache, **way), decode(build(kind, 1), **way))
    assert torch.equal(decode(build(kind, 3), cache=cache, refresh=1, **way), decode(build(kind, 3), **way))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_rows_that_are_done_leave_the_others_their_keys_and_padding(cache, tiny):
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # surer, so that a threshold commits many tokens at once, and rows are done at different steps
    prompts = [torch.randint(200, (n,), generator=rng(5)).tolist() for n in (9, 6, 3)]
    prompt, real = d1.pad_left(prompts, 7)
    options = dict(mask_id=tiny[1].mask_token_id, gen_length=32, block_length=16, cache=cache, threshold=0.2)
    frames = list(d1.diffuse_steps(model, prompt, attention_mask=real, **options))
    steps = [sum(bool(f.new[i].any()) for f in frames if f.block == 0) for i in range(3)]
    assert steps[0] < min(steps[1:])  # the first row leaves first
    alone = [d1.diffuse_decode(model, torch.tensor([p]), **options)[:, len(p) :] for p in prompts]
    assert torch.equal(frames[-1].ids[:, 9:], torch.cat(alone))


def test_a_mask_token_in_the_prompt_stays_when_a_row_leaves_early(tiny):
    mask, eos = tiny[1].mask_token_id, tiny[1].eos_token_id
    prompt = torch.tensor([[5, mask, 6]])
    out = d1.diffuse_decode(tiny[0], prompt, mask_id=mask, eos_id=eos, gen_length=16, block_length=8, stop=len)
    assert torch.equal(out[:, :3], prompt) and (out[:, 11:] == eos).all()


def test_guidance_hides_the_prompts_part_of_a_window(tiny, monkeypatch):
    seen, found = [], d1.guided_logits
    monkeypatch.setattr(d1, "guided_logits", lambda *a, **k: seen.append(k["is_prompt"]) or found(*a, **k))
    options = dict(mask_id=tiny[1].mask_token_id, gen_length=24, block_length=4, steps=6, cfg_scale=1.0, context=12)
    d1.diffuse_decode(tiny[0], torch.arange(6)[None], **options)
    firsts = [2, 6, 10, 14, 18, 18]  # of the window in each block, which ends one block ahead of it, or at the end
    assert [int(s.sum()) for s in seen] == [max(6 - first, 0) for first in firsts]
    assert all(len(s) == 12 and s[: int(s.sum())].all() for s in seen)


def test_a_cache_holds_keys_under_gradient_checkpointing_too(tiny, quick, tmp_path):
    drawn = []
    for checkpointing in (False, True):
        cfg = quick(mu=2, rollout_cache="dual", grad_checkpoint=checkpointing, temperature=0.0)
        model = copy.deepcopy(tiny[0])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        task = d1.TASKS["sudoku"]
        stage = d1.DiffuGRPO(model, tiny[1], task.examples("train", 4), task.messages, task.batch_rewards, cfg,
                             tmp_path)
        stage.update()
        drawn.append(stage.batch[0].completion)
        assert any(m.training for m in model.modules()) == checkpointing  # on again in the update
        prompts = [[5, 6, 7], [8, 9]]
        drawn[-1] = (drawn[-1], [r for b in d1.generate(model, tiny[1], prompts, cfg, 32) for r in b])
    assert torch.equal(drawn[0][0], drawn[1][0])


@pytest.mark.parametrize(("cache", "refresh", "fed"), [
    ("none", 0, [39] * 16), ("prefix", 0, [39, 32, 32, 32, 39, 24, 24, 24, 39, 16, 16, 16, 39, 8, 8, 8]),
    ("dual", 0, [39, 8, 8, 8] * 4), ("dual", 2, [39, 8] * 8)])
def test_what_a_cache_computes(cache, refresh, fed):
    model, lengths = build(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    decode(model, cache=cache, refresh=refresh)
    assert lengths == fed


def test_a_row_that_has_filled_its_block_waits_outside_the_batch():
    model, rows = build(), []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for cache in ("none", "dual"):
        rows.clear()
        decode(model, threshold=0.4, cache=cache)
        assert set(rows) == {1, 2, 3}


def test_the_log_probabilities_in_the_frames_and_the_error_of_a_cache():
    model, (prompt, real) = build(layers=3), padded()
    how = dict(mask_id=MASK, attention_mask=real, gen_length=32, block_length=8)
    frames = list(d1.diffuse_steps(model, prompt, **how))
    before = torch.nn.functional.pad(prompt, (0, 32), value=MASK)
    for f in frames:
        logp = model(before, attention_mask=d1.extend_mask(real, 39)).logits.log_softmax(-1)
        assert torch.allclose(f.logp, logp.gather(-1, f.ids[..., None])[..., 0] * f.new, atol=1e-5)
        before = f.ids
    assert d1.cache_error(model, frames, MASK, real) < 1e-5
    assert d1.cache_error(model, list(d1.diffuse_steps(model, prompt, cache="dual", **how)), MASK, real) > 1e-5


def test_a_cache_without_the_means_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="cfg_scale"):
        decode(build(), cache="dual", cfg_scale=1.0)
    with pytest.raises(ValueError, match="cache"):
        decode(build(), cache="magic")


def test_rollout_cache_warns_and_logs_how_far_off_policy_rollouts_are(quick, tmp_path, capsys):
    flags = "--task sudoku --skip_sft --steps_rl 4 --mu 2 --group 2 --bs_rl 4 --save_steps 2 --limit 4 --skip_eval"
    assert d1.main([*flags.split(), "--rollout_cache", "dual", "--output_dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "sudoku" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["cache_error"] > 0 for r in rows if "loss" in r)
    assert "off-policy" in capsys.readouterr().out


def test_evaluation_with_a_cache_and_a_threshold_says_so(tmp_path, capsys):
    flags = "--task sudoku --eval_only --limit 2 --eval_lengths 32 --cache dual --threshold 0.9 --output_dir"
    assert d1.main([*flags.split(), str(tmp_path)]) == 0
    assert "other decoding than the paper's: cache dual, threshold 0.9" in " ".join(capsys.readouterr().out.split())
    entry = json.loads((tmp_path / "sudoku" / "eval.json").read_text())[0]
    assert entry["cache"] == "dual" and entry["threshold"] == 0.9


def test_a_model_that_scales_its_logits_after_the_output_layer_is_trained_on_the_scaled_ones(tiny, quick, tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(
        **SIZES | {"vocab_size": len(tiny[1])}, num_hidden_layers=1, num_key_value_heads=2, head_dim=8,
        final_logit_softcapping=1.0, initializer_range=0.5, use_cache=False, pad_token_id=0))
    model.config.is_causal = False
    row = (list(range(20, 60)), 10)
    stage = d1.MaskedSFT(model, tiny[1], [row] * 8, quick(bs_sft=2, rows_sft=2, steps_sft=2), tmp_path)
    loss, metrics = stage.nelbo([row, row], ("k",))
    capped = 2 + torch.log(torch.tensor(len(tiny[1]))).item()  # by logits in [-1, 1]
    assert torch.isfinite(loss) and metrics["ce"] < capped


def test_compiled_blocks_compute_the_same(tiny, monkeypatch):
    ids, compiler = torch.randint(1, 200, (2, 12), generator=rng()), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, **{**how, "backend": "eager"}))  # in no time
    cfg = d1.settle({k: (v, "test") for k, v in dict(task="sudoku", compile=True).items()})[0]
    model, _ = d1.open_model(cfg, d1.Screen())
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    plain = copy.deepcopy(tiny[0])
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
    assert all(layer._compiled_call_impl is not None for layer in d1.twin(model).model.layers)
