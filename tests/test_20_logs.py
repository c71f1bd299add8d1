"""Trackers."""

import importlib.machinery
import importlib.util

import pytest
from conftest import logged, run, stop_once, without

import d1_full as d1

pytestmark = pytest.mark.usefixtures("quick_collections")


def interrupt():
    raise KeyboardInterrupt


def test_tracker_tensorboard_has_what_metrics_has_after_a_break_too(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ended, finish = [], TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda t: (ended.append(t), finish(t)))
    stop_once(monkeypatch, 4, interrupt)  # step 3 is logged, and made again from the checkpoint of step 2
    flags = "--task", "sudoku", "--skip_eval", "--report_to", "tensorboard"
    assert run(*flags, out=tmp_path) == 130 and len(ended) == 2
    assert run(*flags, "--resume", out=tmp_path) == 0 and len(ended) == 4
    rows = logged(tmp_path / "sudoku")
    for stage, keys in (("sft", ("loss", "heldout_loss", "lr")), ("diffu_grpo", ("loss", "kl", "heldout_accuracy"))):
        events = EventAccumulator(str(tmp_path / "sudoku" / "logs" / stage / "d1_full")).Reload()
        assert all(tag.startswith(f"{stage}/") for tag in events.Tags()["scalars"])
        for key in keys:
            wanted = [(r["step"], r[key]) for r in rows if r["stage"] == stage and key in r]
            got = [(e.step, e.value) for e in events.Scalars(f"{stage}/{key}")]
            assert [s for s, _ in got] == [s for s, _ in wanted] == sorted({s for s, _ in wanted})
            assert [v for _, v in got] == pytest.approx([v for _, v in wanted], rel=1e-6)


def test_tracker_none_leaves_nothing(tmp_path):
    assert run("--task", "sudoku", "--skip_eval", "--steps_rl", 1, "--steps_sft", 1, out=tmp_path) == 0
    assert not (tmp_path / "sudoku" / "logs").exists()


@pytest.mark.parametrize("name", d1.TRACKERS)
def test_tracker_that_is_not_installed_is_one_line(name, tmp_path, monkeypatch, capsys):
    without(monkeypatch, name)
    assert run("--task", "sudoku", "--report_to", name, out=tmp_path) == 2
    error = capsys.readouterr().err
    assert f"--report_to {name} needs the package {name}: pip install {name}" in error and error.count("\n") == 1


def test_tracker_package_is_no_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").mkdir()  # as wandb leaves one
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.PathFinder.find_spec(
        name, [str(tmp_path)] if name == "wandb" else None))
    assert importlib.util.find_spec("wandb") and run("--task", "sudoku", "--report_to", "wandb", out=tmp_path) == 2
    assert "needs the package wandb" in capsys.readouterr().err
