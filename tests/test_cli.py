"""The command line as a user meets it: runs from nothing, what they leave, and one clear line for a mistake."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import d1_full as d1

ROOT = Path(d1.__file__).parent
SMALL = dict(steps_sft=4, bs_sft=4, n_traces=40, steps_rl=4, mu=2, group=2, bs_rl=4, limit=4, eval_lengths="32,64",
             save_steps=2, threads=1)


def run(*flags, out):
    small = [word for k, v in SMALL.items() for word in (f"--{k}", str(v))]
    return d1.main([*small, "--output_dir", str(out), *map(str, flags)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one small `--task sudoku` from nothing."""
    out = tmp_path_factory.mktemp("runs")
    assert run("--task", "sudoku", out=out) == 0
    return out


def test_a_benchmark_from_nothing_leaves_both_rows(trained):
    folder = trained / "sudoku"
    entries = json.loads((folder / "eval.json").read_text())
    assert [(e["row"], e["gen_length"]) for e in entries] == [("sft", 32), ("sft", 64), ("d1", 32), ("d1", 64)]
    for e in entries:
        assert e["n"] == 4 and {"accuracy", "official", "effective_tokens", "cells", "low", "high"} <= e.keys()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage, keys in (("sft", {"loss", "seconds"}), ("diffu_grpo", {"loss", "reward", "kl", "seconds"})):
        rows = [m for m in metrics if m["stage"] == stage and "loss" in m]
        assert [m["step"] for m in rows] == [1, 2, 3, 4] and all(keys <= m.keys() for m in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((folder / "d1_state.json").read_text())
    assert state["stages"] == ["sft", "diffu_grpo"] and state["settings"]["mu"] == 2
    file = json.loads((folder / "generations" / "sudoku_d1_32_16_0_generations.json").read_text())
    assert len(file["generations"]) == 4
    assert {"question", "generations", "ground_truth"} <= file["generations"][0].keys()
    assert not list(folder.glob("*.part")) and not list(folder.glob(".export*"))


def test_the_checkpoint_loads_in_transformers_and_here(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(trained / "sudoku")
    model, tok = d1.load_model(str(trained / "sudoku"), device="cpu")
    ids = torch.tensor([AutoTokenizer.from_pretrained(trained / "sudoku")("123")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    assert tok.mask_token_id == 257 and theirs.config.is_causal is False


def test_eval_only_on_a_data_file(trained, tmp_path, capsys):
    data = tmp_path / "puzzles.csv"
    data.write_text("Puzzle,Solution\n" + "0102200002100320,3142243142131324\n" * 5)
    flags = ("--task", "sudoku", "--eval_only", "--model", trained / "sudoku", "--data", data, "--limit", 0)
    assert run(*flags, out=tmp_path) == 0
    assert "5 test problems" in capsys.readouterr().out
    entries = json.loads((tmp_path / "sudoku" / "eval.json").read_text())
    assert {(e["row"], e["n"], e["data"]) for e in entries} == {("d1", 5, str(data))}
    file = json.loads((tmp_path / "sudoku/generations/sudoku_d1_puzzles_32_16_0_generations.json").read_text())
    for record in file["generations"]:
        for mode in ("strict", "official"):
            d1.grade_generation("sudoku", record, mode)


def test_one_checkpoint_for_all_tasks_then_rl_with_and_without_lora(tmp_path):
    assert run("--task", "sft_only", "--steps_sft", 3, out=tmp_path) == 0
    rows = json.loads((tmp_path / "sft" / "eval.json").read_text())
    assert {e["task"] for e in rows} == set(d1.TASKS) and {e["row"] for e in rows} == {"sft"}
    assert run("--task", "count", "--model", tmp_path / "sft", out=tmp_path) == 0
    rows = json.loads((tmp_path / "count" / "eval.json").read_text())
    assert [e["row"] for e in rows] == ["sft", "sft", "d1", "d1"]  # no second stage 1
    assert run("--task", "gsm8k", "--model", tmp_path / "sft", "--use_lora", "--lora_r", 4, out=tmp_path) == 0
    assert (tmp_path / "gsm8k" / "adapter_model.safetensors").exists()
    assert run("--task", "gsm8k", "--model", tmp_path / "gsm8k", "--eval_only", out=tmp_path / "again") == 0
    first, again = (json.loads((p / "gsm8k" / "eval.json").read_text()) for p in (tmp_path, tmp_path / "again"))
    assert [e["accuracy"] for e in again] == [e["accuracy"] for e in first if e["row"] == "d1"]


def test_resume_continues_and_a_second_run_moves_the_first_aside(tmp_path, capsys):
    base = ("--task", "math500", "--skip_eval")
    assert run(*base, "--steps_rl", 2, out=tmp_path) == 0
    assert run(*base, "--steps_rl", 4, "--resume", out=tmp_path) == 0
    assert "diffu_grpo: resumed after step 2" in capsys.readouterr().out
    steps = [json.loads(line) for line in (tmp_path / "math500/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in steps if m["stage"] == "diffu_grpo" and "loss" in m] == [1, 2, 3, 4]
    assert run(*base, out=tmp_path) == 0
    assert (tmp_path / "math500.old1" / "model.safetensors").exists()


def test_table1(tmp_path, capsys, monkeypatch):
    assert run("--task", "table1", "--eval_lengths", 32, out=tmp_path) == 0
    rows = json.loads((tmp_path / "table1" / "eval.json").read_text())
    assert {(e["task"], e["row"]) for e in rows} == {(t, r) for t in d1.TASKS for r in d1.ROW_TITLES}
    assert all(e["low"] <= e["accuracy"] <= e["high"] and e["n"] == 4 for e in rows)
    shown = capsys.readouterr().out
    assert "+diffu-GRPO" in shown and "gsm8k (stand-in)" in shown and "paper" not in shown
    monkeypatch.setattr(d1, "diffuse_decode", None)  # finished parts are not redone, nor their replies
    assert run("--task", "table1", "--eval_lengths", 32, out=tmp_path) == 0
    assert capsys.readouterr().out.count("trained already") == 9
    monkeypatch.undo()  # another seed is another run
    assert run("--task", "table1", "--eval_lengths", 32, "--seed", 5, "--steps_rl", 2, "--limit", 2, out=tmp_path) == 0
    assert "trained already" not in capsys.readouterr().out


def test_a_non_finite_loss_ends_with_status_1(tmp_path, capsys):
    wild = "--lr_sft", 1e38, "--clip_sft", 0, "--warmup_sft", 0, "--max_skips", 1
    assert run("--task", "sudoku", *wild, out=tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sft step" in error and "SFT rows [" in error


@pytest.mark.parametrize("flags,word", [
    ("", "--task"), ("--task chess", "sudoku"), ("--task sudoku --stepz 3", "unknown argument --stepz"),
    ("--task sudoku --preset big", "tiny"), ("--task sudoku --mu 0", "--mu must be at least 1"),
    ("--task sudoku --pmask 1.5", "--pmask must be between"), ("--task sudoku --pmask -0.1", "--pmask"),
    ("--task sudoku --pmask nan", "--pmask"), ("--task sudoku --group 1", "--group must be at least 2"),
    ("--task sudoku --steps_rl -1", "--steps_rl"), ("--task sudoku --bs_rl 7", "multiple of --group"),
    ("--task sudoku --gen_length 40", "multiple of --block_length"), ("--task sudoku --eval_lengths 32,33", "33"),
    ("--task sudoku --eval_lengths a", "--eval_lengths"), ("--task sudoku --diffusion_steps 33", "--diffusion_steps"),
    ("--task sudoku --mu three", "--mu"), ("--task sudoku --config none.yaml", "none.yaml"),
    ("--task sft_only --eval_only", "benchmark"), ("--task sudoku --model ./nowhere", "no such folder"),
    ("--task sudoku --load_4bit", "random weights"), ("--task sudoku --use_lora", "random weights"),
    ("--task sft_only --skip_sft", "nothing to do"), ("--task table1 --data a.csv", "problems of one benchmark"),
    ("--task sft_only --data a.csv", "--sft_data"), ("--task chat --report_to wandb", "needs a run that trains"),
    ("--task sft_only --patience 2", "needs stage 2"),
    ("--task sudoku --resume", "nothing to resume"), ("--task sudoku --lr_rl inf", "finite"),
    ("--task sudoku --data no.csv --eval_only", "no data file"),
])
def test_wrong_input_is_one_line_and_status_2(flags, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(d1, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert d1.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("d1_full.py: error: ") and error.count("\n") == 1 and word in error, error
    assert "Traceback" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text,word", [
    ("mu: 0", "--mu"), ("betas: 3", "did you mean --beta"), ("mu: three", "'three'"), ("- 1", "flag: value"),
    ("a: [", "config"), ("norm: batch", "sequence"), ("mu: true", "--mu"),
])
def test_wrong_config_file(text, word, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert d1.main(["--task", "sudoku", "--dry_run", "--config", str(tmp_path / "c.yaml")]) == 2
    assert word in capsys.readouterr().err


def test_config_gives_flags_and_the_command_line_wins(tmp_path):
    (tmp_path / "c.yaml").write_text("task: sudoku\nmu: 3\nbeta: 1\n")
    given = d1.read_flags(["--config", str(tmp_path / "c.yaml"), "--mu", "5"])
    cfg, origin = d1.settle(given)
    assert (cfg.task, cfg.mu, cfg.beta, cfg.group) == ("sudoku", 5, 1.0, 8)
    assert (origin["mu"], origin["beta"], origin["group"]) == ("command line", "config", "preset tiny")


def test_presets_hold_the_papers_values(tmp_path):
    def settle(task, **flags):
        flags = {"task": task, "model": "GSAI-ML/LLaDA-8B-Instruct", **flags}
        return d1.settle({k: (v, "") for k, v in flags.items()})[0]

    paper = settle("gsm8k")
    assert paper.preset == "paper"
    assert (paper.group, paper.bs_rl, paper.grad_accum, paper.mu, paper.pmask, paper.eps, paper.beta) == (
        6, 6, 2, 12, 0.15, 0.5, 0.04)
    assert (paper.gen_length, paper.block_length, paper.max_prompt) == (256, 32, 200)
    assert (paper.lr_rl, paper.wd_rl, paper.clip_rl, paper.lora_r, paper.lora_alpha) == (3e-6, 0.1, 0.2, 128, 64)
    steps = {t: settle(t).steps_rl for t in d1.TASKS}
    assert steps == {"gsm8k": 7700, "math500": 6600, "count": 5000, "sudoku": 3800}
    assert (settle("sudoku").temperature, settle("sudoku", preset="official").temperature) == (0.3, 0.9)
    official = settle("count", preset="official")
    assert (official.mu, official.norm) == (8, "token")


@pytest.mark.parametrize("task", [t for t in d1.TASK_CHOICES if t != "custom"])
def test_dry_run_tells_settings_and_cost_and_writes_nothing(task, tmp_path, capsys):
    assert d1.main(["--task", task, "--dry_run", "--output_dir", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "preset tiny" in out and "parameters, of which trained" in out and "FLOPs" in out
    assert not (tmp_path / "o").exists()


def test_import_is_silent_quick_and_needs_no_network():
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    seconds = []
    for _ in range(3):  # CPU seconds, and the best of three, since other work may share the machine
        began = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        command = [sys.executable, "-c", "import d1_full"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        seconds.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - began)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert min(seconds) < 4


def test_debug_shows_the_traceback():
    with pytest.raises(d1.UserError):
        d1.main(["--task", "sudoku", "--mu", "0", "--debug"])


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        d1.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name}" in shown for name in d1.Settings.__dataclass_fields__)


def test_a_resumed_run_is_the_run_that_stopped(tmp_path, capsys):
    assert run("--task", "sudoku", "--skip_eval", out=tmp_path) == 0
    capsys.readouterr()
    kept = (tmp_path / "sudoku" / "model.safetensors").read_bytes()
    assert run("--task", "sudoku", "--skip_eval", "--resume", "--seed", 9, "--lr_rl", 0.01, out=tmp_path) == 2
    error = capsys.readouterr().err
    assert "--seed=0" in error and "--lr_rl=0.0002" in error and error.count("\n") == 1
    assert (tmp_path / "sudoku" / "model.safetensors").read_bytes() == kept


def test_a_mistake_moves_no_earlier_run_aside(trained, tmp_path, capsys):
    shutil.copytree(trained / "sudoku", tmp_path / "sudoku")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n')
    for flags in (["--model", "tests/nothere"], ["--data", bad], ["--sft_data", bad]):
        assert run("--task", "sudoku", *flags, out=tmp_path) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "sudoku" / "model.safetensors").exists() and not list(tmp_path.glob("*.old*"))


@pytest.mark.parametrize("text,name", [("", "e.jsonl"), ("{", "b.jsonl"), ("", "e.csv"), ("x", "b.parquet")])
def test_unreadable_data_is_one_line(text, name, tmp_path, capfd):
    (tmp_path / name).write_text(text)
    assert run("--task", "count", "--eval_only", "--data", tmp_path / name, out=tmp_path / "o") == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_a_csv_from_a_spreadsheet_and_answers_that_are_no_numbers(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("\ufeffPuzzle,Solution\n0102200002100320,3142243142131324\n", encoding="utf-8")
    assert len(d1.TASKS["sudoku"].examples("test", data=str(tmp_path / "p.csv"))) == 1
    (tmp_path / "g.jsonl").write_text('{"question": "?", "answer": "#### abc"}\n')
    with pytest.raises(d1.UserError, match="row 1: no gsm8k problem"):
        d1.TASKS["gsm8k"].examples("test", data=str(tmp_path / "g.jsonl"))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--task", "sudoku", out=tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_kill_before_the_first_checkpoint_leaves_no_step_twice(tmp_path):
    assert run("--task", "sudoku", "--skip_eval", out=tmp_path) == 0
    folder = tmp_path / "sudoku"
    manifest = json.loads((folder / "trainer" / "manifest.json").read_text())
    (folder / "trainer" / "manifest.json").write_text(json.dumps({"sft": manifest["sft"]}))
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"stage": "diffu_g')  # cut short
    assert run("--task", "sudoku", "--skip_eval", "--resume", out=tmp_path) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["stage"] == "diffu_grpo" and "loss" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("flags,stage1,updates", [
    ("--task sudoku", True, 160), ("--task sudoku --model TRAINED", False, 160),  # which has passed stage 1
    ("--task table1", True, 2 * 4 * 160), ("--task table1 --steps_rl 10", True, 2 * 4 * 10),
    ("--task table1 --model llada/llada-8b-instruct --use_lora", True, 2 * 2 * (7700 + 6600 + 5000 + 3800))])
def test_dry_run_counts_the_updates_that_a_run_will_make(flags, stage1, updates, trained, capsys):
    assert d1.main([*flags.replace("TRAINED", str(trained / "sudoku")).split(), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert stage1 == any("SFT: forward" in line for line in lines)
    assert [f"; {updates:,} in the run" in line for line in lines if "RL updates" in line] == [True]
