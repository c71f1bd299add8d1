"""Stage 1: it learns, from the reply alone, and alike in parts."""

import copy

import pytest
import torch
from conftest import loss_of, sft, untimed, updates, weights

import d1_full as d1


def test_masked_sft_learns(tiny, quick, tmp_path, screen):
    trainer = sft(quick(), tiny, tmp_path, steps_sft=40, bs_sft=16, lr_sft=3e-3)
    d1.train(trainer, screen)
    losses = [r["loss"] for r in untimed(tmp_path) if "loss" in r]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_masked_sft_trains_the_reply_and_eos_alone(tiny, quick, tmp_path):
    stage = sft(quick(), tiny, tmp_path).stage
    ids, n = stage.rows[0]
    x0, is_prompt = stage.collate([stage.rows[0]], 56)
    assert is_prompt[0].tolist() == [True] * n + [False] * (56 - n)
    assert x0[0].tolist() == ids + [tiny[1].eos_token_id] * (56 - len(ids))
    short, _ = stage.collate([stage.rows[0]], len(ids) - 3)
    assert short[0].tolist() == ids[:-3]


def test_masked_sft_learns_nothing_from_rows_without_room_for_a_reply(tiny, quick, tmp_path):
    cfg = quick(sft_length=8, sft_extra=0, rows_sft=4)
    rows = [([1] * 12, 10)] * 3 + [([1] * 12, 2)]
    trainer = d1.Trainer(d1.sft_stage(copy.deepcopy(tiny[0]), tiny[1], rows, cfg))
    loss, _ = loss_of(trainer, [([1] * 12, 10)] * 2, "sft_mask", 0)
    assert loss.item() == 0  # not 0/0, which would count as a broken update


def test_masked_sft_on_a_batch_in_parts_is_that_on_the_batch(tiny, quick, tmp_path, screen):
    trainer = sft(quick(bs_sft=6), tiny, tmp_path)
    with torch.no_grad():
        rows = [(ids, n + 3 * i) for i, (ids, n) in enumerate(trainer.stage.rows[:6])]  # replies of several lengths
        whole = loss_of(trainer, rows, "key")[0].item()
        parts = [loss_of(trainer, rows, "key", part=slice(i, i + 2))[0].item() for i in (0, 2, 4)]
    assert sum(parts) == pytest.approx(whole, rel=1e-5) and len(set(parts)) == 3
    ends = []
    for i, n in enumerate((6, 2)):
        trainer = sft(quick(bs_sft=6, rows_sft=n, steps_sft=3), tiny, tmp_path / str(i))
        d1.train(trainer, screen)
        ends.append((weights(trainer), [r["loss"] for r in untimed(tmp_path / str(i)) if "loss" in r]))
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-5) and ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)


def test_masked_sft_draws_noise_anew_in_each_step_and_the_same_in_each_check(tiny, quick, monkeypatch):
    cfg, drawn, forward = quick(bs_sft=4, rows_sft=4, steps_sft=3, sft_length=16, sft_extra=0), [], d1.forward_process

    def record(*args):
        xt, masked = forward(*args)
        drawn.append(masked.flatten().tolist())
        return xt, masked

    monkeypatch.setattr(d1, "forward_process", record)
    for _ in range(2):
        stage = d1.sft_stage(copy.deepcopy(tiny[0]), tiny[1], [([5] * 12, 4)] * 8, cfg)
        trainer = d1.Trainer(stage)
        for _ in zip(range(3), updates(trainer), strict=False):
            stage.check(trainer)
    made, checks = drawn[::2], drawn[1::2]
    assert made[:3] == made[3:] and len(set(map(tuple, made))) == 3 and len(set(map(tuple, checks))) == 1


@pytest.mark.parametrize(("schedule", "rates"), [
    ("linear", [0.5, 0.75, 0.5, 0.25]), ("cosine", [0.5, 0.853553, 0.5, 0.146447])])
def test_masked_sft_warms_up_and_decays(schedule, rates, tiny, quick):
    cfg = quick(schedule=schedule, lr_sft=1.0, warmup_sft=2, steps_sft=4)
    stage, made = d1.sft_stage(tiny[0], tiny[1], [([1, 2], 1)], cfg), []
    for stage.step in range(4):
        made.append(stage.rate())
    assert made == pytest.approx(rates, abs=1e-6)


def test_masked_sft_logs_means_over_tokens_however_the_batch_is_divided(tiny, quick, tmp_path):
    """Replies of very different lengths, one of which has nothing masked in most draws."""
    rows = [([1] * 4 + [20 + i] * n, 4 if n else 30) for i, n in enumerate((30, 2, 20, 1, 9, 30))]
    made = []
    for at_once in (1, 2, 4, 6):
        cfg = quick(bs_sft=6, rows_sft=at_once, sft_length=34, sft_extra=0)
        trainer = d1.Trainer(d1.sft_stage(copy.deepcopy(tiny[0]), tiny[1], rows * 4, cfg))
        made.append(next(updates(trainer)))
    for figures in made[1:]:
        for name in ("loss", "ce", "accuracy", "grad_norm"):
            assert figures[name] == pytest.approx(made[0][name], rel=1e-4), name
