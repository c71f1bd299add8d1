"""The two stages: learning, frozen reference, distinct masks, exact resume, guards."""

import copy
import json

import pytest
import torch

import d1_full as d1


def sft(cfg, tiny, out, lora=None, **changes):
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    model = d1.adapt_with_lora(model, *lora) if lora else model
    for k, v in changes.items():
        setattr(cfg, k, v)
    out.mkdir(parents=True, exist_ok=True)
    return d1.MaskedSFT(model, tok, d1.sft_rows(cfg, tok, [d1.TASKS["sudoku"]], d1.Screen()), cfg, out)


def grpo(cfg, tiny, out, reward=None, lora=None):
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    if lora:
        torch.manual_seed(0)  # peft draws its first weights from the global stream
        model = d1.adapt_with_lora(model, *lora)
        with torch.no_grad():  # an adapter that stage 1 has trained
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    task = d1.TASKS["sudoku"]
    out.mkdir(parents=True, exist_ok=True)

    def length_reward(texts, examples):
        return [{"length": float(len(t))} for t in texts]

    return d1.DiffuGRPO(model, tok, task.examples("train", 8), task.messages, reward or length_reward, cfg, out)


def weights(stage):
    return torch.cat([p.detach().flatten() for p in stage.params])


def logged(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


@pytest.fixture
def screen():
    return d1.Screen()


def test_sft_learns(tiny, quick, tmp_path, screen):
    stage = sft(quick(), tiny, tmp_path / "a", steps_sft=40, bs_sft=16, lr_sft=3e-3)
    stage.run(screen)
    losses = [r["loss"] for r in logged(stage.out) if "loss" in r]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_sft_trains_the_reply_and_eos_alone(tiny, quick, tmp_path):
    stage = sft(quick(), tiny, tmp_path / "a")
    ids, n = stage.rows[0]
    x0, keep = stage.collate([stage.rows[0]], 56)
    assert keep[0].tolist() == [True] * n + [False] * (56 - n)
    assert x0[0].tolist() == ids + [stage.tokenizer.eos_token_id] * (56 - len(ids))
    short, _ = stage.collate([stage.rows[0]], len(ids) - 3)
    assert short[0].tolist() == ids[:-3]


def test_rows_without_room_for_a_reply_teach_nothing(tiny, quick, tmp_path):
    cfg = quick(sft_length=8, sft_extra=0, rows_sft=4)
    stage = d1.MaskedSFT(copy.deepcopy(tiny[0]), tiny[1], [([1] * 12, 10)] * 3 + [([1] * 12, 2)], cfg, tmp_path)
    loss, _ = stage.nelbo([([1] * 12, 10)] * 2, ("sft_mask", 0))
    assert loss.item() == 0  # not 0/0, which would count as a broken update


@pytest.mark.parametrize("kind", ["sft", "sft_lora", "grpo", "grpo_lora"])
def test_a_resumed_run_equals_an_unbroken_one(tiny, quick, tmp_path, screen, kind):
    def make(out, steps):
        if "sft" in kind:
            return sft(quick(steps_sft=6, save_steps=3), tiny, out, lora=(4, 8, 0.5) if kind == "sft_lora" else None)
        return grpo(quick(steps_rl=steps, save_steps=4), tiny, out, lora=(4, 8) if kind == "grpo_lora" else None)

    total = 6 if "sft" in kind else 8
    whole = make(tmp_path / "whole", total)
    whole.run(screen)
    first = make(tmp_path / "parts", total)
    first.total = total // 2
    if "sft" in kind:
        first.rate = lambda: whole_rate(first, total)
    first.run(screen)
    second = make(tmp_path / "parts", total)
    assert d1.load_trainer(second, screen) and second.step == total // 2
    second.run(screen)
    assert torch.equal(weights(whole), weights(second))
    for a, b in zip(whole.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def whole_rate(stage, total):
    """The learning rate of a run of `total` steps, for a run stopped early."""
    warm = min(1.0, (stage.step + 1) / max(stage.cfg.warmup_sft, 1))
    return stage.lr * warm * (1 - stage.step / total)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tiny, quick, tmp_path, screen):
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        stage = grpo(quick(seed=seed), tiny, tmp_path / str(i))
        stage.run(screen)
        runs.append(weights(stage))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("lora", [None, (4, 8)])
def test_reference_is_the_frozen_start_and_the_first_ratio_is_one(tiny, quick, tmp_path, screen, lora):
    stage = grpo(quick(lr_rl=1e-2, mu=3, steps_rl=6), tiny, tmp_path, lora=lora)
    start = copy.deepcopy(stage.model)
    first = stage.update()
    assert first["ratio_max"] == 1 and first["clip_frac"] == 0 and first["kl"] == pytest.approx(0, abs=1e-9)
    stage.step += 1
    assert stage.update()["ratio_max"] != 1  # the policy moved
    batch = stage.batch[0]
    args = (batch.prompt, batch.completion, batch.hide[0], stage.tokenizer.mask_token_id, batch.real)
    with torch.no_grad(), stage.reference() as reference:
        assert torch.equal(d1.one_step_logp(reference, *args), d1.one_step_logp(start, *args))
    assert not torch.equal(d1.one_step_logp(stage.model, *args), d1.one_step_logp(start, *args))
    trained = [n for n, p in stage.model.named_parameters() if p.requires_grad]
    assert trained and all(("lora_" in n and ".default." in n) == bool(lora) for n in trained)


def test_a_batch_in_parts_is_the_batch(tiny, quick, tmp_path, screen):
    stage = sft(quick(bs_sft=6), tiny, tmp_path / "a")
    with torch.no_grad():
        whole = stage.nelbo(stage.rows[:6], ("key",))[0].item()
        parts = [stage.nelbo(stage.rows[:6], ("key",), slice(i, i + 2))[0].item() for i in (0, 2, 4)]
    assert sum(parts) == pytest.approx(whole, rel=1e-5) and len(set(parts)) == 3
    ends = []
    for i, n in enumerate((6, 2)):
        stage = sft(quick(bs_sft=6, rows_sft=n, steps_sft=3), tiny, tmp_path / str(i))
        stage.run(screen)
        ends.append((weights(stage), [r["loss"] for r in logged(stage.out) if "loss" in r]))
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-5) and ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)


def test_lora_comes_from_the_seed_alone(tiny):
    def first(seed):
        model = d1.adapt_with_lora(copy.deepcopy(tiny[0]), 4, 8, seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    before = torch.random.get_rng_state()
    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_long_prompts_lose_their_beginning(tiny, quick, tmp_path):
    stage = grpo(quick(max_prompt=10), tiny, tmp_path)
    drawn = stage.roll_out(0)
    whole = d1.encode_prompt(stage.tokenizer, stage.ask(stage.examples[stage.problem_indices(0)[0]]))
    assert drawn.prompt[0].tolist() == whole[-10:] and drawn.parts["prompts_cut"] == 1
    asked = d1.evaluation_prompts(stage.tokenizer, d1.TASKS["sudoku"], stage.examples[:3], stage.cfg)
    assert asked[1] == 3 and [len(p) for p in asked[0]] == [10] * 3
    assert stage.tokenizer.decode(asked[0][0]).endswith("<|eot|><|assistant|>")


def test_lora_adapts_every_linear_layer_of_the_blocks_in_fp32(tiny):
    model = d1.adapt_with_lora(copy.deepcopy(tiny[0]).bfloat16(), 4, 8)
    adapted = {n.split(".")[-4] for n, p in model.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    with pytest.raises(d1.UserError, match="no linear layer"):
        d1.adapt_with_lora(NoLinear(), 4, 8)


class NoLinear(torch.nn.Module):
    def get_output_embeddings(self):
        return None


def test_each_inner_update_has_its_own_prompt_mask(tiny, quick, tmp_path):
    stage = grpo(quick(mu=5, bs_rl=4, grad_accum=2, pmask=0.5, steps_rl=5), tiny, tmp_path)
    batches = [stage.roll_out(micro) for micro in stage.micro_batches(0)]
    masks = {tuple(h.flatten().tolist()) for b in batches for h in b.hide}
    assert len(masks) == 10  # official, with accumulation 2, would meet half of them twice
    for b in batches:
        assert len(b.logp_old) == len(b.logp_ref) == 5
        for k, h in enumerate(b.hide):
            args = (b.prompt, b.completion, h, stage.tokenizer.mask_token_id, b.real)
            with torch.no_grad():
                logp = d1.one_step_logp(stage.model, *args) * b.live
            assert b.logp_old[0] is None and torch.allclose(b.logp_ref[k], logp, atol=1e-5)
            assert k == 0 or torch.allclose(b.logp_old[k], logp, atol=1e-5)


@pytest.mark.parametrize("preset", ["auto", "official"])
def test_a_group_shares_its_prompt_masks_but_for_the_official_preset(preset, tiny, quick, tmp_path):
    b = grpo(quick(mu=3, bs_rl=4, pmask=0.5, preset=preset, beta=0.0), tiny, tmp_path).roll_out(0)
    shared = [torch.equal(b.hide[:, i], b.hide[:, i + 1]) for i in (0, 2)]
    assert shared == [preset == "auto"] * 2
    assert not torch.equal(b.hide[:, 1], b.hide[:, 2]) and not torch.equal(b.hide[0], b.hide[1])


def test_groups_are_of_one_prompt_and_completions_differ(tiny, quick, tmp_path):
    b = grpo(quick(group=2, bs_rl=4), tiny, tmp_path).roll_out(0)
    assert torch.equal(b.prompt[0], b.prompt[1]) and not torch.equal(b.prompt[1], b.prompt[2])
    assert not torch.equal(b.completion[0], b.completion[1])
    assert b.advantages.view(2, 2).sum(1).abs().max() < 1e-6


def test_reward_goes_up(tiny, quick, tmp_path, screen):
    """A token that earns a point is written more often: the loss has the right sign."""
    def likes_a(texts, examples):
        return [{"a": float(t.count("a"))} for t in texts]

    cfg = quick(steps_rl=24, mu=4, group=8, bs_rl=32, lr_rl=3e-3, beta=0.0, save_steps=100)
    stage = grpo(cfg, tiny, tmp_path, likes_a)
    stage.run(screen)
    rewards = [r["reward"] for r in logged(tmp_path) if "reward" in r]
    assert rewards[-1] > rewards[0] + 1


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_non_finite_loss_stops_with_step_and_batch_and_keeps_the_checkpoint(tiny, quick, tmp_path, screen, kind):
    stage = sft(quick(), tiny, tmp_path) if kind == "sft" else grpo(quick(), tiny, tmp_path)
    stage.total = 2
    stage.run(screen)
    kept = (tmp_path / "trainer" / f"{stage.name}-2.pt").read_bytes()
    good = weights(stage)
    with torch.no_grad():
        stage.model.get_input_embeddings().weight.fill_(float("nan"))
    stage.total, stage.batch, stage.cfg.save_steps = 6, [], 100
    with pytest.raises(d1.NonFiniteLoss, match=r"step 5: no finite loss or gradient on .*\[\d+"):
        stage.run(screen)
    assert (tmp_path / "trainer" / f"{stage.name}-2.pt").read_bytes() == kept
    assert "batch" in torch.load(tmp_path / "trainer" / f"nonfinite-{stage.name}-5.pt", weights_only=True)
    fresh = sft(quick(), tiny, tmp_path) if kind == "sft" else grpo(quick(), tiny, tmp_path)
    d1.load_trainer(fresh, screen)
    assert torch.equal(weights(fresh), good)


def test_best_held_out_weights_come_back(tiny, quick, tmp_path, screen):
    stage = grpo(quick(steps_rl=4, mu=2, save_steps=2), tiny, tmp_path)
    scores, seen = iter([0.5, 0.25]), []
    stage.heldout = lambda model: (seen.append(weights(stage)), next(scores))[1]
    stage.run(screen)
    stage.finish(screen)
    assert torch.equal(weights(stage), seen[0]) and not torch.equal(seen[0], seen[1])


@pytest.fixture
def drawn(tiny, quick, tmp_path, monkeypatch):
    """A stage whose policy has moved away from its reference, and two rollouts of the same problems by it."""
    stage = grpo(quick(mu=3, group=2, bs_rl=4, grad_accum=2, pmask=0.5, beta=0.1), tiny, tmp_path)
    with torch.no_grad():
        for i, p in enumerate(stage.model.parameters()):
            p.add_(0.1 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    stage.ask = lambda e: [{"role": "user", "content": "x" * (3 + 4 * stage.examples.index(e))}]  # of different lengths
    stage.problem_indices = lambda micro: [0, 1]
    found, eos = d1.diffuse_steps, stage.tokenizer.eos_token_id

    def with_eos(*args, **options):
        *_, frame = found(*args, **options)
        frame.ids[:, -12], frame.ids[0, -20] = eos, eos
        yield frame

    monkeypatch.setattr(d1, "diffuse_steps", with_eos)
    return stage, [stage.roll_out(0), stage.roll_out(1)]


def scored(stage, model, r, k):
    mask = stage.tokenizer.mask_token_id
    return d1.one_step_logp(model, r.prompt, r.completion, r.hide[k], mask, r.real, live=r.live)


def test_a_rollout_holds_what_its_names_say(drawn):
    stage, (r, later) = drawn
    assert not (r.hide & ~r.real).any() and (~r.real).any() and r.hide.any()
    assert r.live.sum(1).tolist() == [13, 21, 21, 21]  # with the EOS, of 32 tokens
    assert not torch.equal(r.completion[:, :12], later.completion[:, :12])  # each has streams of its own
    assert torch.equal(r.advantages, d1.group_advantages(r.rewards, 2)) and r.advantages.any()
    with torch.no_grad():
        for k in (1, 2):
            assert torch.allclose(r.logp_old[k], scored(stage, stage.model, r, k), atol=1e-5)
            with stage.reference() as reference:
                assert torch.allclose(r.logp_ref[k], scored(stage, reference, r, k), atol=1e-5)
            assert not torch.allclose(r.logp_ref[k], r.logp_old[k], atol=1e-2)


def test_an_inner_update_is_the_mean_gradient_of_its_rollouts_on_its_own_mask(drawn):
    stage, batch = drawn
    stage.batch, stage.step = batch, 2
    with torch.no_grad():  # the policy moves once more, so that ratios are not 1
        for p in stage.model.parameters():
            p.mul_(1.02)
    logps = [scored(stage, stage.model, r, 2) for r in batch]
    losses = [d1.diffu_grpo_loss(logp, r.logp_old[2], r.logp_ref[2], r.advantages, r.live, beta=0.1)[0]
              for logp, r in zip(logps, batch, strict=True)]
    grads = torch.autograd.grad(sum(losses) / 2, stage.params)
    told = stage.update()
    assert told["inner"] == 2 and told["loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    assert told["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-3)
    entropy = [-(logp * r.live).sum().item() / r.live.sum().item() for logp, r in zip(logps, batch, strict=True)]
    assert told["entropy"] == pytest.approx(sum(entropy) / 2, rel=1e-4) and told["entropy"] > 0
    spread = [r.rewards.view(2, 2).std(1).mean().item() for r in batch]
    assert told["reward_std"] == pytest.approx(sum(spread) / 2, rel=1e-5)
