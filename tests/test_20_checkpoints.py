"""Kills, damage, full disks and signals: what is kept, and what a resumed run is."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import flip, grpo, run, sft, stage_of, stop_at, untimed, weights

import d1_full as d1


@pytest.fixture
def interruptible():
    """Ctrl-C as on a terminal; a job in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


DAMAGE = {"cut": lambda p: p.write_bytes(p.read_bytes()[:-100]), "flipped": flip, "gone": Path.unlink,
          "empty": lambda p: p.write_bytes(b"")}


@pytest.mark.parametrize("kind", ["sft", "sft_lora", "grpo", "grpo_lora"])
def test_load_trainer_makes_a_resumed_run_the_unbroken_one(tiny, quick, tmp_path, screen, kind):
    def make(out, steps):
        if "sft" in kind:
            return sft(quick(steps_sft=6, save_steps=3), tiny, out, lora=(4, 8, 0.5) if kind == "sft_lora" else None)
        return grpo(quick(steps_rl=steps, save_steps=4), tiny, out, lora=(4, 8) if kind == "grpo_lora" else None)

    total = 6 if "sft" in kind else 8
    whole = make(tmp_path / "whole", total)
    d1.train(whole, screen)
    first = make(tmp_path / "parts", total)
    planned = make(tmp_path / "planned", total).stage  # the first half of a longer run has that run's learning rates

    def rate():
        planned.step = first.stage.step
        return planned.rate()

    first.stage.total, first.stage.rate = total // 2, rate
    d1.train(first, screen)
    second = make(tmp_path / "parts", total)
    assert d1.load_trainer(second, screen) and second.stage.step == total // 2
    d1.train(second, screen)
    assert torch.equal(weights(whole), weights(second))
    for a, b in zip(whole.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")


@pytest.mark.parametrize("kind", ["sft", "sft_lora", "grpo", "grpo_lora"])
def test_load_trainer_makes_a_run_stopped_anywhere_the_unbroken_one(kind, tiny, quick, tmp_path, screen):
    """Between inner updates too: 1, 2, 3, 5, 6 and 7 of 8, with four to a batch of rollouts."""
    whole = stage_of(kind, quick, tiny, tmp_path / "whole")
    d1.train(whole, screen)
    steps = (1, 3, 4) if "sft" in kind else (1, 2, 3, 5, 6, 7)
    for number in steps:
        part = stage_of(kind, quick, tiny, tmp_path / "parts")
        assert d1.load_trainer(part, screen) == (number != steps[0])
        stop_at(part, number)
        with pytest.raises(d1.Stopped, match=f"SIGTERM after .* step {number}, which is saved") as stopped:
            d1.train(part, screen)
        assert stopped.value.status == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    last = stage_of(kind, quick, tiny, tmp_path / "parts")
    assert d1.load_trainer(last, screen)
    d1.train(last, screen)
    assert torch.equal(weights(whole), weights(last))
    for a, b in zip(whole.optimizer.state.values(), last.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")


def test_stop_signals_act_at_once_the_second_time(interruptible, tiny, quick, tmp_path, screen, capsys):
    trainer = stage_of("sft", quick, tiny, tmp_path)

    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        assert "saves" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C did nothing")

    trainer.descend = twice
    with pytest.raises(KeyboardInterrupt):
        d1.train(trainer, screen)


def test_stop_signals_leave_a_signal_that_is_ignored(tiny, quick, tmp_path, screen):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = stage_of("sft", quick, tiny, tmp_path)
    stop_at(trainer, 2, signal.SIGINT)
    d1.train(trainer, screen)
    assert trainer.stage.step == 6 and signal.signal(signal.SIGINT, before) == signal.SIG_IGN


@pytest.mark.parametrize("damage", DAMAGE)
def test_load_trainer_takes_the_checkpoint_before_a_damaged_one(damage, tiny, quick, tmp_path, screen, capsys):
    def make():
        return stage_of("sft", quick, tiny, tmp_path, save_steps=2)

    trainer = make()
    d1.train(trainer, screen)
    files = sorted(p.name for p in (tmp_path / "trainer").iterdir())
    assert files == ["manifest.json", "sft-4.pt", "sft-6.pt"]  # --save_total_limit 2
    DAMAGE[damage](tmp_path / "trainer" / "sft-6.pt")
    again = make()
    assert d1.load_trainer(again, screen) and again.stage.step == 4
    assert "sft-6.pt is damaged: the checkpoint before step 6 is taken" in " ".join(capsys.readouterr().out.split())
    d1.train(again, screen)
    assert torch.equal(weights(again), weights(trainer)) and d1.load_trainer(again, screen) and again.stage.step == 6
    for name in ("sft-4.pt", "sft-6.pt"):
        DAMAGE[damage](tmp_path / "trainer" / name)
    with pytest.raises(d1.UserError, match=r"no checkpoint of sft .* is whole"):
        d1.load_trainer(make(), screen)


def test_load_trainer_refuses_changed_flags_by_name_unless_allowed(tiny, quick, tmp_path, screen, capsys):
    d1.train(stage_of("sft", quick, tiny, tmp_path), screen)
    with pytest.raises(d1.UserError, match=r"--allow_changed, or the flags of then: --lr_sft=0\.0015"):
        d1.load_trainer(stage_of("sft", quick, tiny, tmp_path, lr_sft=0.1), screen)
    other = stage_of("sft", quick, tiny, tmp_path, lr_sft=0.1, allow_changed=True, save_total_limit=5)
    assert d1.load_trainer(other, screen)
    assert "--lr_sft=0.0015" in capsys.readouterr().out


@pytest.mark.parametrize("step", [4, 8])
def test_save_trainer_at_a_signal_comes_before_the_held_out_check_which_is_made_on_resuming(
        step, tiny, quick, tmp_path, screen):
    def make(out):
        trainer = stage_of("grpo", quick, tiny, out, save_steps=4)
        trainer.stage.heldout = lambda model: float(weights(trainer).sum())
        return trainer

    whole = make(tmp_path / "whole")
    d1.train(whole, screen)
    part = make(tmp_path / "parts")
    stop_at(part, step)
    with pytest.raises(d1.Stopped):
        d1.train(part, screen)
    assert "heldout_accuracy" not in untimed(tmp_path / "parts")[-1]
    last = make(tmp_path / "parts")
    assert d1.load_trainer(last, screen) and last.stage.step == step
    d1.train(last, screen)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts") and last.best[:2] == whole.best[:2]


def test_load_trainer_has_rollouts_that_no_longer_fit_drawn_anew(tiny, quick, tmp_path, screen, capsys):
    part = stage_of("grpo", quick, tiny, tmp_path)
    stop_at(part, 3)
    with pytest.raises(d1.Stopped):
        d1.train(part, screen)
    cfg = quick(steps_rl=8, mu=5, save_steps=100, allow_changed=True)
    other = grpo(cfg, tiny, tmp_path)
    assert d1.load_trainer(other, screen) and not other.stage.rollouts
    assert "drawn anew" in " ".join(capsys.readouterr().out.split())
    d1.train(other, screen)
    assert other.stage.step == 8


def test_save_trainer_without_room_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    assert run("--task", "sudoku", out=tmp_path) == 1
    assert "has room for 0.00 GiB" in capsys.readouterr().err


@pytest.mark.parametrize("when", [1, 2])
def test_save_trainer_on_a_disk_that_fills_keeps_what_was_saved(when, tmp_path, capsys, monkeypatch):
    saves, save = [], torch.save

    def full(state, path):
        saves.append(path)
        save(state, path)
        if len(saves) == when:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert run("--task", "sudoku", "--skip_eval", out=tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and "what was saved before is kept" in said
    folder = tmp_path / "sudoku" / "trainer"
    assert not list(folder.glob("*.part")) and len(list(folder.glob("sft-*.pt"))) == when - 1
    monkeypatch.setattr(torch, "save", save)
    if when == 2:
        assert run("--task", "sudoku", "--skip_eval", "--resume", out=tmp_path) == 0


def test_load_trainer_takes_an_unreadable_checkpoint_for_a_damaged_one(finished, capsys, monkeypatch):
    opened = Path.open

    def broken(self, *args, **kwargs):
        if self.name == "sft-4.pt":
            raise OSError(errno.EIO, "Input/output error")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    # nor can the one that is written anew be read back
    assert run("--task", "sudoku", "--skip_eval", "--resume", out=finished) == 1
    shown = capsys.readouterr()
    assert "sft-4.pt is damaged" in " ".join(shown.out.split()) and "sft-4.pt back" in shown.err
