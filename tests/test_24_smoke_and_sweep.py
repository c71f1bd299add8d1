"""--smoke and --sweep."""

import argparse
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, SMALL, logged, run, without

import d1_full as d1

pytestmark = pytest.mark.usefixtures("quick_collections")


CHECKS = "model", "tokenizer", "data", "forward pass", "masking", "SFT loss, gradient", "decoding", "reward"


def checks_in(shown):
    return [line[2:22].strip() for line in shown.splitlines() if re.match(r"  \S.* s$", line)]


def broken_weights(d1, monkeypatch):
    load = d1.load_model

    def broken(*a, **k):
        model, tokenizer = load(*a, **k)
        model.lm_head.weight.data.fill_(math.nan)
        return model, tokenizer

    monkeypatch.setattr(d1, "load_model", broken)


def broken_gradient(d1, monkeypatch):
    nelbo = d1.nelbo
    monkeypatch.setattr(d1, "nelbo", lambda *a: nelbo(*a) * math.inf)


def broken_masking(d1, monkeypatch):
    forward = d1.forward_process
    monkeypatch.setattr(d1, "forward_process", lambda x0, t, is_prompt, *a: forward(x0, t, is_prompt & False, *a))


def broken_prompt(d1, monkeypatch):
    forward = d1.forward_process

    def first_too(*a):
        xt, masked = forward(*a)
        masked[0, 0], xt[0, 0] = True, d1.build_tokenizer().mask_token_id
        return xt, masked

    monkeypatch.setattr(d1, "forward_process", first_too)


def broken_rate(d1, monkeypatch):
    forward = d1.forward_process
    monkeypatch.setattr(d1, "forward_process", lambda x0, t, *a: forward(x0, t / 2, *a))


def broken_decoder(d1, monkeypatch):
    decode = d1.diffuse_decode
    monkeypatch.setattr(d1, "diffuse_decode", lambda *a, mask_id, **k: decode(*a, mask_id=mask_id, **k).fill_(mask_id))


def broken_reward(d1, monkeypatch):
    monkeypatch.setattr(d1.Sudoku, "rewards", lambda *a: {"sudoku": math.nan})


SPACE = "lr_rl: {low: 1e-5, high: 1e-2, log: true}\nmu: [1, 2]\nsave_steps: {low: 2, high: 9}\n"


def sweep(tmp_path, n, *flags, space=SPACE, task="sudoku"):
    (tmp_path / "space.yaml").write_text(space)
    return run("--task", task, "--sweep", n, "--sweep_space", tmp_path / "space.yaml", *flags, out=tmp_path / "o")


def study_of(tmp_path, task="sudoku"):
    import optuna
    return optuna.load_study(study_name="d1_full", storage=f"sqlite:///{tmp_path / 'o' / f'{task}-sweep' / 'sweep.db'}")


@pytest.fixture
def ran(monkeypatch):
    """The settings of the trials, which run at once and are the better the nearer lr_rl is to 1e-3."""
    pytest.importorskip("optuna")
    came = []

    def at_once(cfg, screen, out):
        assert cfg.skip_eval and not cfg.resume  # the test problems are for after the sweep
        came.append(cfg)
        out.mkdir()
        best = 1 - abs(math.log10(cfg.lr_rl) + 3)
        rows = [dict(heldout_loss=9.0), *(dict(heldout_accuracy=best - less) for less in (0.2, 0, 0.1)), dict(loss=1)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(d1, "run_stages", at_once)
    return came


TRIAL_IN_A_PROCESS = """import os, sys, time
from pathlib import Path
import d1_full as d1
def meet(cfg, screen, out):
    folder = out.parent / "pids"
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    for _ in range(600):
        time.sleep(0.1)
        if len(list(folder.iterdir())) >= int(os.environ["MEET"]):
            break
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"heldout_accuracy": %s}' % cfg.lr_rl)
d1.run_stages = meet
sys.exit(d1.main(sys.argv[1:]))"""


def start(tmp_path, n, meet):
    (tmp_path / "space.yaml").write_text(SPACE)
    flags = ["--task", "sudoku", "--sweep", str(n), "--sweep_space", str(tmp_path / "space.yaml")]
    small = [word for k, v in SMALL.items() for word in (f"--{k}", str(v))]
    command = [sys.executable, "-c", TRIAL_IN_A_PROCESS, *small, *flags, "--output_dir", str(tmp_path / "o")]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "MEET": str(meet)}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("flags,left_out", [
    ("--task sudoku", ()), ("--task sft_only", ()), ("--task table1", ()), ("--task math500 --skip_sft", ()),
    ("--task pretrain", ()), ("--task count --eval_only", ("masking", "SFT loss, gradient"))])
def test_smoke_shows_every_check_and_leaves_nothing(flags, left_out, tmp_path, capsys, monkeypatch):
    loaded, load = [], d1.load_model
    monkeypatch.setattr(d1, "load_model", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
    assert run(*flags.split(), "--smoke", out=tmp_path / "o") == 0
    shown = capsys.readouterr().out
    assert checks_in(shown) == [name for name in CHECKS if name not in left_out]
    assert "all checks passed" in shown and not list(tmp_path.iterdir())
    fresh = load("tiny", device="cpu", seed=0)[0].state_dict()
    assert all(torch.equal(w, fresh[k]) for k, w in loaded[0][0].state_dict().items())  # nothing was trained
    assert ("train 2, heldout 128, test 4, SFT rows 8 " in shown) == ("sudoku" in flags)
    assert ("train 8, heldout 512, test 16, SFT rows 32 " in shown) == ("table1" in flags)


@pytest.mark.parametrize("break_it,name", [
    (broken_weights, "forward pass"), (broken_gradient, "SFT loss, gradient"), (broken_masking, "masking"),
    (broken_prompt, "masking"), (broken_rate, "masking"), (broken_decoder, "decoding"), (broken_reward, "reward")])
def test_smoke_names_what_is_broken(break_it, name, tmp_path, capsys, monkeypatch):
    break_it(d1, monkeypatch)
    assert run("--task", "sudoku", "--smoke", out=tmp_path / "o") == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"d1_full.py: stopped: --smoke: {name} failed: ") and shown.err.count("\n") == 1
    assert checks_in(shown.out) == list(CHECKS[: CHECKS.index(name)]) and "passed" not in shown.out
    assert not list(tmp_path.iterdir())


def test_smoke_reads_the_data_of_the_run(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("Puzzle,Solution\n" + "0102200002100320,3142243142131324\n" * 5)
    (tmp_path / "bad.csv").write_text("Puzzle,Solution\n12,3\n")
    flags = "--task", "sudoku", "--smoke", "--eval_only", "--data"
    assert run(*flags, tmp_path / "p.csv", "--limit", 0, out=tmp_path / "o") == 0
    assert "test 5, SFT rows 0" in capsys.readouterr().out
    assert run(*flags, tmp_path / "bad.csv", out=tmp_path / "o") == 1
    error = capsys.readouterr().err
    assert "--smoke: data failed" in error and "row 1" in error and error.count("\n") == 1


def test_smoke_shows_a_broken_reward_function_although_the_run_would_pay_zero(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def f(prompts, completions, **columns):\n    return 1 / 0\n")
    (tmp_path / "d.jsonl").write_text("".join(f'{{"prompt": "count to {i}"}}\n' for i in range(60)))
    flags = ("--task", "custom", "--reward", f"{tmp_path / 'r.py'}:f", "--reward_errors", "zero", "--skip_sft",
             "--data", tmp_path / "d.jsonl")
    assert run(*flags, "--smoke", out=tmp_path / "o") == 1
    error = capsys.readouterr().err
    assert "--smoke: reward failed" in error and "ZeroDivisionError" in error and error.count("\n") == 1


def test_sweep_makes_as_many_trials_as_are_missing_and_shows_the_best(ran, tmp_path, capsys):
    assert sweep(tmp_path, 2) == 0 and len(ran) == 2
    assert sweep(tmp_path, 2) == 0 and len(ran) == 2
    capsys.readouterr()
    assert sweep(tmp_path, 3, "--resume") == 0 and len(ran) == 3  # which it does anyway
    trials = study_of(tmp_path).trials
    assert study_of(tmp_path).direction.name == "MAXIMIZE"
    for trial, cfg in zip(trials, ran, strict=True):
        assert trial.params == {"lr_rl": cfg.lr_rl, "mu": cfg.mu, "save_steps": cfg.save_steps}
        assert trial.value == pytest.approx(1 - abs(math.log10(cfg.lr_rl) + 3))  # the best held-out check
        assert 1e-5 <= cfg.lr_rl <= 1e-2 and cfg.mu in (1, 2) and 2 <= cfg.save_steps <= 9
        assert cfg.steps_sft == SMALL["steps_sft"]  # the other flags hold
    assert len({cfg.lr_rl for cfg in ran}) == 3
    best, shown = max(trials, key=lambda t: t.value), capsys.readouterr()
    assert f"best: --lr_rl={best.params['lr_rl']} --mu={best.params['mu']}" in shown.out
    assert "Best of 3 trials" in shown.out and not shown.err


def test_sweep_broken_off_proposes_what_an_unbroken_one_does(ran, tmp_path):
    for name, calls in (("whole", [3]), ("parts", [1, 3])):
        (tmp_path / name).mkdir()
        for n in calls:
            assert sweep(tmp_path / name, n) == 0
    assert [cfg.lr_rl for cfg in ran[:3]] == [cfg.lr_rl for cfg in ran[3:]]


@pytest.mark.parametrize("how", [d1.NonFiniteLoss("NaN in step 3"), d1.UserError("NaN in step 3")])
def test_sweep_counts_a_failed_trial_and_goes_on(how, ran, tmp_path, capsys, monkeypatch):
    at_once = d1.run_stages

    def first_fails(cfg, screen, out):
        if not ran:
            ran.append(cfg)
            raise how
        return at_once(cfg, screen, out)

    monkeypatch.setattr(d1, "run_stages", first_fails)
    assert sweep(tmp_path, 3) == 0 and len(ran) == 3
    shown = capsys.readouterr().out
    assert "failed: NaN in step 3" in shown and "Best of 2 trials" in shown and "1 failed" in shown
    assert [t.state.name for t in study_of(tmp_path).trials] == ["PRUNED", "COMPLETE", "COMPLETE"]


def test_sweep_tries_values_with_the_first_ones_and_what_does_not_fit_fails_its_trial_alone(ran, tmp_path, capsys):
    assert sweep(tmp_path, 8, space="bs_rl: [6, 4]\ngroup: [2, 3]\n") == 0  # --bs_rl 4 alone takes no group of 3
    assert ran and (4, 3) not in {(cfg.bs_rl, cfg.group) for cfg in ran}
    assert "--bs_rl 4 must be a multiple of --group 3" in capsys.readouterr().out
    assert sweep(tmp_path, 1, "--output_dir", tmp_path / "p", space="group: [2, 3]\n") == 2
    assert "must be a multiple of --group 3" in capsys.readouterr().err and not (tmp_path / "p").exists()


def test_sweep_without_a_good_trial_is_status_1(ran, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(d1, "run_stages", lambda cfg, screen, out: None)  # no figures
    assert sweep(tmp_path, 1) == 1 and "no trial of the sweep has gone well" in capsys.readouterr().err


@pytest.mark.parametrize("how,status", [(KeyboardInterrupt(), 130), (d1.Stopped("SIGTERM after sft step 3", 143), 143)])
def test_sweep_ends_by_ctrl_c_and_the_trial_does_not_count(how, status, ran, tmp_path, capsys, monkeypatch):
    at_once = d1.run_stages

    def second_stops(cfg, screen, out):
        if len(ran) == 1:
            ran.append(cfg)
            raise how
        return at_once(cfg, screen, out)

    monkeypatch.setattr(d1, "run_stages", second_stops)
    assert sweep(tmp_path, 3) == status
    assert (said := capsys.readouterr().err).count("\n") == 1
    assert status == 130 or "the same command goes on with the sweep" in said
    assert sweep(tmp_path, 3) == 0
    assert [t.state.name for t in study_of(tmp_path).trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_sweep_is_shared_by_two_processes_and_a_killed_one_does_not_count(tmp_path, ran, capsys):
    both = [start(tmp_path, 4, meet) for meet in (9, 2)]  # the first waits in its trial
    said = both[1].communicate(timeout=120)[0]
    assert both[1].returncode == 0 and "1 under way elsewhere" in said, said
    trials = study_of(tmp_path).trials
    assert sorted(t.state.name for t in trials) == ["COMPLETE"] * 3 + ["RUNNING"]
    assert len({t.params["lr_rl"] for t in trials}) == 4  # no two alike
    both[0].kill()
    both[0].communicate()
    assert sweep(tmp_path, 4) == 0 and not ran  # it was heard of a moment ago
    with sqlite3.connect(tmp_path / "o" / "sudoku-sweep" / "sweep.db") as db:
        assert db.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-50 seconds')").rowcount
    assert sweep(tmp_path, 4) == 0 and len(ran) == 1
    assert sorted(t.state.name for t in study_of(tmp_path).trials) == ["COMPLETE"] * 4 + ["FAIL"]


@pytest.mark.parametrize("task,space,key", [
    ("sft_only", "lr_sft: [1e-6, 0.003]\n", "heldout_loss"), ("sudoku", "mu: [1, 2]\n", "heldout_accuracy")])
def test_sweep_of_whole_runs_by_their_heldout_figure(task, space, key, tmp_path, capsys):
    pytest.importorskip("optuna")
    assert sweep(tmp_path, 2, "--steps_sft", 12, "--seed", 1, space=space, task=task) == 0
    folder = tmp_path / "o" / f"{task}-sweep"
    for trial in study_of(tmp_path, task).trials:
        found = [r[key] for r in logged(folder / str(trial.number)) if key in r]
        assert trial.value == (max(found) if task == "sudoku" else -found[-1])
        settings = json.loads((folder / str(trial.number) / "d1_state.json").read_text())["settings"]
        assert all(settings[name] == value for name, value in trial.params.items())
        assert not (folder / str(trial.number) / "eval.json").exists()
    assert "best: --" in capsys.readouterr().out


def test_sweep_refuses_other_choices_in_the_same_folder(ran, tmp_path, capsys):
    assert sweep(tmp_path, 1) == 0 and sweep(tmp_path, 2, space="mu: [1, 4]\n") == 2
    error = capsys.readouterr().err
    assert "another --sweep_space" in error and error.count("\n") == 1 and len(ran) == 1


def test_sweep_refuses_several_processes_of_accelerate(ran, tmp_path, capsys, monkeypatch):
    two = types.SimpleNamespace(num_processes=2, is_main_process=True)
    monkeypatch.setattr(d1, "processes", lambda: two)
    assert sweep(tmp_path, 1) == 2 and "start the command several times" in capsys.readouterr().err and not ran


@pytest.mark.parametrize("text,word", [
    ("lrr_rl: [1]", "did you mean --lr_rl"), ("mu: [1, two]", "two"), ("mu: {low: 1.5, high: 3}", "1.5"),
    ("mu: {low: 1}", "high"), ("mu: {low: 4, high: 1}", "low"), ("mu: {low: 1, high: 4, lag: true}", "lag"),
    ("lr_rl: {low: 0, high: 1, log: true}", "log"), ("mu: 3", "cannot be swept"), ("norm: token", "cannot be swept"),
    ("mu: []", "cannot be swept"), ("mu: [[1]]", "[1]"), ("mu: [null]", "None"), ("mu: [0]", "at least 1"),
    ("mu: {low: 0, high: 4}", "at least 1"), ("t_low: {low: 0.1, high: 2}", "--t_low"), ("- mu", "a line"),
    ("a: [", "space.yaml"), ("", "a line"), ("norm: {low: 1, high: 2}", "sequence"), ("norm: [batch]", "sequence"),
    ("output_dir: [a, b]", "cannot be swept"), ("task: [count]", "cannot be swept"), ("mu: [true]", "--mu"),
    ("lr_rl: [.inf]", "finite"), ("use_lora: [maybe]", "--use_lora"), ("\x00", "space.yaml"),
    ("{}", "names no setting"),
])
def test_read_space_refuses_a_bad_space_in_one_line(text, word, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises((d1.UserError, argparse.ArgumentError)) as error:
        d1.read_space(str(tmp_path / "space.yaml"), {"task": ("sudoku", "test")})
    assert word in str(error.value) and "\n" not in str(error.value)


def test_sweep_with_a_bad_space_ends_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(d1, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert sweep(tmp_path, 2, space="mu: [1, two]") == 2
    error = capsys.readouterr().err
    assert error.startswith("d1_full.py: error: ") and error.count("\n") == 1 and "space.yaml" in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags,word", [
    ("--task sudoku --sweep 2", "--sweep_space"), ("--task sudoku --sweep_space x.yaml", "--sweep N"),
    ("--task sudoku --sweep 2 --sweep_space none.yaml", "none.yaml"),
    ("--task table1 --sweep 2 --sweep_space x.yaml", "table1"),
    ("--task sudoku --eval_only --sweep 2 --sweep_space x.yaml", "trains"),
    ("--task sudoku --sweep -1 --sweep_space x.yaml", "--sweep must"), ("--smoke --export hf --model x", "--task"),
])
def test_sweep_flags_that_do_not_go_together(flags, word, tmp_path, capsys, monkeypatch):
    if "--sweep " in flags:
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    assert d1.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("d1_full.py: error: ") and error.count("\n") == 1 and word in error, error


def test_sweep_without_optuna_is_one_line(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "optuna")
    assert sweep(tmp_path, 2) == 2
    error = capsys.readouterr().err
    assert "--sweep needs the package optuna: pip install optuna" in error and error.count("\n") == 1
