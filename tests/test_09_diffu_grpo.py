"""Stage 2: frozen reference, distinct masks, the gradient of an inner update."""

import copy

import pytest
import torch
from conftest import LLADA, MASK, grpo, length_reward, network, padded, paid, rng, untimed, updates, weights

import d1_full as d1


@pytest.fixture
def drawn(tiny, quick, tmp_path, monkeypatch):
    """A trainer whose policy has moved away from its reference, and two rollouts of the same problems by it."""
    trainer = grpo(quick(mu=3, group=2, bs_rl=4, grad_accum=2, pmask=0.5, beta=0.1), tiny, tmp_path)
    with torch.no_grad():
        for i, p in enumerate(trainer.model.parameters()):
            p.add_(0.1 * p.std() * torch.randn(p.shape, generator=rng(i)))
    stage, texts = trainer.stage, trainer.stage.prompts
    puzzles = [problem["puzzle"] for problem in texts.problems]
    texts.task.messages = lambda e: [{"role": "user", "content": "x" * (3 + 4 * puzzles.index(e["puzzle"]))}]
    stage.problems = lambda micro: [0, 0, 1, 1]
    found, eos = d1.diffuse_steps, tiny[1].eos_token_id

    def with_eos(*args, **options):
        *_, frame = found(*args, **options)
        frame.ids[:, -12], frame.ids[0, -20] = eos, eos
        yield frame

    monkeypatch.setattr(d1, "diffuse_steps", with_eos)
    return trainer, [stage.roll_out(0, trainer), stage.roll_out(1, trainer)]


def scored(stage, model, r, k):
    """log φ of the live tokens of a rollout on its k-th prompt mask."""
    logp = d1.one_step_logp(model, r.prompt, r.completion, r.prompt_masks[k], stage.mask_id, r.attention_mask)
    return live(r, logp)


def live(r, logp):
    """Log-probabilities of a rollout, 0 where its tokens do not count."""
    return torch.where(r.completion_mask, logp, 0.0)


def test_diffu_grpo_repeats_with_its_seed_and_varies_with_it(tiny, quick, tmp_path, screen):
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        trainer = grpo(quick(seed=seed), tiny, tmp_path / str(i))
        d1.train(trainer, screen)
        runs.append(weights(trainer))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("lora", [None, (4, 8)])
def test_diffu_grpo_has_the_frozen_start_as_reference_and_a_first_ratio_of_one(tiny, quick, tmp_path, lora):
    trainer = grpo(quick(lr_rl=1e-2, mu=3, steps_rl=6), tiny, tmp_path, lora=lora)
    stage, start = trainer.stage, copy.deepcopy(trainer.model)
    made = updates(trainer)
    first = next(made)
    assert first["ratio_max"] == 1 and first["clip_frac"] == 0 and first["kl"] == pytest.approx(0, abs=1e-9)
    assert next(made)["ratio_max"] != 1  # the policy moved
    r = stage.rollouts[0]
    args = (r.prompt, r.completion, r.prompt_masks[0], stage.mask_id, r.attention_mask)
    with torch.no_grad(), stage.reference() as reference:
        assert torch.equal(d1.one_step_logp(reference, *args), d1.one_step_logp(start, *args))
    assert not torch.equal(d1.one_step_logp(stage.model, *args), d1.one_step_logp(start, *args))
    trained = [n for n, p in stage.model.named_parameters() if p.requires_grad]
    assert trained and all(("lora_" in n and ".default." in n) == bool(lora) for n in trained)


def test_diffu_grpo_has_a_prompt_mask_of_its_own_in_each_inner_update(tiny, quick, tmp_path):
    trainer = grpo(quick(mu=5, bs_rl=4, grad_accum=2, pmask=0.5, steps_rl=5), tiny, tmp_path)
    stage = trainer.stage
    rollouts = [stage.roll_out(micro, trainer) for micro in trainer.micro_numbers(0, 2)]
    masks = {tuple(m.flatten().tolist()) for r in rollouts for m in r.prompt_masks}
    assert len(masks) == 10  # official, with accumulation 2, would meet half of them twice
    for r in rollouts:
        assert len(r.logp_old) == len(r.logp_ref) == 5
        for k in range(5):
            with torch.no_grad():
                logp = scored(stage, stage.model, r, k)
            assert r.logp_old[0] is None and torch.allclose(r.logp_ref[k], logp, atol=1e-5)
            assert k == 0 or torch.allclose(r.logp_old[k], logp, atol=1e-5)


def test_diffu_grpo_draws_groups_of_one_prompt_whose_completions_differ(tiny, quick, tmp_path):
    trainer = grpo(quick(group=2, bs_rl=4), tiny, tmp_path)
    r = trainer.stage.roll_out(0, trainer)
    assert torch.equal(r.prompt[0], r.prompt[1]) and not torch.equal(r.prompt[1], r.prompt[2])
    assert not torch.equal(r.completion[0], r.completion[1])
    assert r.advantages.view(2, 2).sum(1).abs().max() < 1e-6


def test_diffu_grpo_makes_the_reward_go_up(tiny, quick, tmp_path, screen):
    """A token that earns a point is written more often: the loss has the right sign."""
    def likes_a(texts, examples):
        return [{"a": float(t.count("a"))} for t in texts]

    cfg = quick(steps_rl=24, mu=4, group=8, bs_rl=32, lr_rl=3e-3, beta=0.0, save_steps=100)
    d1.train(grpo(cfg, tiny, tmp_path, likes_a), screen)
    rewards = [r["reward"] for r in untimed(tmp_path) if "reward" in r]
    assert rewards[-1] > rewards[0] + 1


def test_rollout_holds_what_its_names_say(drawn):
    trainer, (r, later) = drawn
    stage = trainer.stage
    assert not (r.prompt_masks & ~r.attention_mask).any() and (~r.attention_mask).any() and r.prompt_masks.any()
    assert r.completion_mask.sum(1).tolist() == [13, 21, 21, 21]  # with the EOS, of 32 tokens
    assert not torch.equal(r.completion[:, :12], later.completion[:, :12])  # each has streams of its own
    assert torch.equal(r.advantages, d1.group_advantages(r.rewards, 2)) and r.advantages.any()
    with torch.no_grad():
        for k in (1, 2):
            assert torch.allclose(live(r, r.logp_old[k]), scored(stage, stage.model, r, k), atol=1e-5)
            with stage.reference() as reference:
                assert torch.allclose(live(r, r.logp_ref[k]), scored(stage, reference, r, k), atol=1e-5)
            assert not torch.allclose(live(r, r.logp_ref[k]), live(r, r.logp_old[k]), atol=1e-2)


def test_diffu_grpo_updates_by_the_mean_gradient_of_its_rollouts_on_one_mask(drawn):
    trainer, rollouts = drawn
    stage = trainer.stage
    stage.rollouts, stage.step = rollouts, 2
    with torch.no_grad():  # the policy moves once more, so that ratios are not 1
        for p in stage.model.parameters():
            p.mul_(1.02)
    logps = [scored(stage, stage.model, r, 2) for r in rollouts]
    losses = [d1.diffu_grpo_loss(logp, r.logp_old[2], r.logp_ref[2], r.advantages, r.completion_mask, beta=0.1)[0]
              for logp, r in zip(logps, rollouts, strict=True)]
    grads = torch.autograd.grad(sum(losses) / 2, trainer.params)
    told = next(stage.updates(trainer))
    assert told["inner"] == 2 and told["loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    assert told["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-3)
    entropy = [-logp.sum().item() / r.completion_mask.sum().item() for logp, r in zip(logps, rollouts, strict=True)]
    assert told["entropy"] == pytest.approx(sum(entropy) / 2, rel=1e-4) and told["entropy"] > 0
    spread = [r.rewards.view(2, 2).std(1).mean().item() for r in rollouts]
    assert told["reward_std"] == pytest.approx(sum(spread) / 2, rel=1e-5)


@pytest.mark.parametrize("lora", [None, (4, 8, 0.5, "all")])
def test_diffu_grpo_is_the_same_under_gradient_checkpointing_and_without_dropout(lora, quick):
    losses, grads = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, tok = d1.load_model(str(LLADA), device="cpu", lora=lora)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:  # so that dropout would show
                    p.normal_(std=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        task = paid(length_reward)
        stage = d1.rl_stage(model, tok, task, task.examples("train", 8), quick())
        trainer = d1.Trainer(stage, listener=stage.prompts)
        recomputed = []
        layer = next(m for m in model.modules() if type(m).__name__ == "LlamaAttention")
        layer.register_forward_pre_hook(lambda *a: recomputed.append(torch.is_grad_enabled()))  # noqa: B023
        trainer.backend.step = lambda optimizer, params, clip: 0.0
        row = next(stage.updates(trainer))
        losses.append(row["loss"])
        grads.append([p.grad.clone() for p in trainer.params])
        assert row["ratio_max"] == 1.0 and sum(recomputed) == 1 + checkpointing
        assert row["kl"] == pytest.approx(0, abs=1e-9)  # the reference has no dropout
    assert losses[0] == losses[1] and all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_diffu_grpo_scores_many_masks_in_one_pass_as_one_by_one():
    model, passes = network(), []
    model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    prompt, real = padded()
    completion, live = torch.randint(1, 50, (3, 5), generator=rng(4)), torch.rand(3, 5, generator=rng(1)) < 0.7
    r = d1.Rollout(prompt, real, completion, live, rewards=None, advantages=None, figures={})
    prompt_masks = torch.rand(5, 3, 7, generator=rng(5)) < 0.3
    with torch.no_grad():
        want = [d1.one_step_logp(model, prompt, completion, m, MASK, real) * live for m in prompt_masks]
        for size, rows in ((1, [3] * 5), (2, [6, 6, 3]), (5, [15]), (9, [15])):
            passes.clear()
            cfg = d1.Settings(task="sudoku", logits_gib=(size * completion.numel() + 0.5) * 50 / 2**28)
            stage = d1.MasksTogether(model, [], None, cfg, mask_id=MASK, eos_id=1, mask_group=1)
            got = stage.logps(model, r, prompt_masks)
            assert len(got) == 5 and torch.allclose(torch.stack(got) * live, torch.stack(want), atol=1e-5)
            assert passes == rows and len(stage.logps(model, r, prompt_masks[:0])) == 0
    plain = d1.DiffuGRPO(model, [], None, cfg, mask_id=MASK, eos_id=1).logps(model, r, prompt_masks)
    assert torch.allclose(torch.stack(plain) * live, torch.stack(want), atol=1e-5)


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_diffu_grpo_makes_the_same_update_however_its_rollouts_are_divided(tiny, quick, tmp_path, monkeypatch, norm):
    """16 x 1 and 4 x 4: the norm and the logged means are over the tokens of the whole update."""
    found, eos = d1.diffuse_steps, tiny[1].eos_token_id

    def with_eos(model, prompt, generator=None, **options):
        *_, frame = found(model, prompt, generator=generator, **options)
        for row, stream in zip(frame.ids, generator, strict=True):  # replies of very different lengths
            row[prompt.shape[1] + stream.initial_seed() % 30] = eos
        yield frame

    monkeypatch.setattr(d1, "diffuse_steps", with_eos)
    made = []
    for size, times in ((16, 1), (4, 4)):
        cfg = quick(norm=norm, bs_rl=size, grad_accum=times, group=2, mu=3, lr_rl=1e-3, beta=0.1)
        trainer = grpo(cfg, tiny, tmp_path / str(size))
        steps = updates(trainer)
        made.append(([next(steps), next(steps)], weights(trainer)))
    (few, one), (many, other) = made
    for a, b in zip(few, many, strict=True):
        for name in set(a) - {"ratio_max"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    assert (one - other).abs().max() < 1e-5 and few[0]["length"] > 2
