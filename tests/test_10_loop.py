"""The loop: what is not finite, the best weights, the end of a plateau."""

import dataclasses
import math

import pytest
import torch
from conftest import grpo, sft, stage_of, trainer_of, untimed, weights

import d1_full as d1


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_trainer_stops_on_a_non_finite_loss_with_step_and_batch_and_keeps_the_checkpoint(
        tiny, quick, tmp_path, screen, kind):
    make = sft if kind == "sft" else grpo
    trainer = make(quick(), tiny, tmp_path)
    stage = trainer.stage
    stage.total = 2
    d1.train(trainer, screen)
    kept = (tmp_path / "trainer" / f"{stage.name}-2.pt").read_bytes()
    good = weights(trainer)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    stage.total, stage.rollouts, stage.cfg = 6, [], dataclasses.replace(stage.cfg, save_steps=100)
    with pytest.raises(d1.NonFiniteLoss, match=r"step 5: no finite loss or gradient on .*\[\d+"):
        d1.train(trainer, screen)
    assert (tmp_path / "trainer" / f"{stage.name}-2.pt").read_bytes() == kept
    assert "batch" in torch.load(tmp_path / "trainer" / f"nonfinite-{stage.name}-5.pt", weights_only=True)
    fresh = make(quick(), tiny, tmp_path)
    d1.load_trainer(fresh, screen)
    assert torch.equal(weights(fresh), good)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_trainer_leaves_out_one_update_that_is_not_finite_and_keeps_it_for_a_look(
        kind, tiny, quick, tmp_path, screen, monkeypatch):
    trainer = stage_of(kind, quick, tiny, tmp_path, screen=screen)
    stage, descend = trainer.stage, trainer.descend

    def spoilt(loss, parts):
        def nan(net, part):
            value, figures = loss(net, part)
            return value * math.nan, figures

        return descend(nan if stage.step == 2 else loss, parts)

    trainer.descend = spoilt
    before = []
    advance = screen.advance
    monkeypatch.setattr(screen, "advance", lambda *a: (before.append(weights(trainer).clone()), advance(*a)))
    d1.train(trainer, screen)
    assert torch.equal(before[1], before[2]) and not torch.equal(before[2], before[3])
    assert untimed(tmp_path)[2] == {"skipped": 1, "stage": stage.name, "step": 3}
    kept = torch.load(tmp_path / "trainer" / f"nonfinite-{stage.name}-3.pt", weights_only=True)
    assert kept["name"] and (kind == "sft" or kept["batch"][0]["completion"].shape == (4, 32))
    assert torch.isfinite(weights(trainer)).all() and trainer.skipped == 0
    d1.plot_curves(tmp_path)  # a step without a loss is no trouble


def test_trainer_gives_the_best_held_out_weights_back(tiny, quick, tmp_path, screen):
    trainer = grpo(quick(steps_rl=4, mu=2, save_steps=2), tiny, tmp_path)
    scores, seen = iter([0.5, 0.25]), []
    trainer.stage.heldout = lambda model: (seen.append(weights(trainer)), next(scores))[1]
    d1.train(trainer, screen)
    assert torch.equal(weights(trainer), seen[0]) and not torch.equal(seen[0], seen[1])


def test_trainer_with_patience_stops_at_a_plateau_and_both_accuracies_are_told(quick, tmp_path, screen, capsys):
    scores, task = iter([0.1, 0.2, 0.5, 0.4, 0.5, 0.9]), d1.TASKS["sudoku"]  # the first of the start
    cfg = quick(steps_rl=20, patience=2, save_steps=2, beta=0.0, output_dir=str(tmp_path))

    def make():
        model, tok = d1.load_model("tiny")
        stage = d1.rl_stage(model, tok, task, task.examples("train", 4), cfg, lambda model: next(scores))
        return trainer_of(stage, tok, cfg, tmp_path, screen)

    trainer = make()
    d1.train(trainer, screen)
    assert trainer.stage.step == 8 and trainer.best[:2] == (0.5, 8)  # .2 .5 .4 .5: the two last were no better
    again = make()
    assert d1.load_trainer(again, screen) and again.stale == 2
    d1.train(again, screen)  # a resumed run has stopped too
    assert again.stage.step == 8
    again.best = (0.5, 4, again.best[2])
    again.finish()
    shown = capsys.readouterr().out
    assert d1.read_log(tmp_path / "metrics.jsonl")[0] == dict(stage="diffu_grpo", step=0, heldout_accuracy=0.1)
    assert "stopped at step 8" in shown and "weights of step 4 kept: held-out accuracy 50.0 %" in shown
