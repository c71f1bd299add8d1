"""Runs from the command line: what they leave, and how they go on."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import SHORT, command, grpo, logged, run, stop_once

import d1_full as d1

pytestmark = pytest.mark.usefixtures("quick_collections")


def test_task_rollouts_cut_the_beginning_of_long_prompts(tiny, quick, tmp_path):
    cfg, task = quick(max_prompt=10), d1.TASKS["sudoku"]
    trainer, tok = grpo(cfg, tiny, tmp_path), tiny[1]
    drawn = trainer.stage.roll_out(0, trainer)
    problems = trainer.stage.prompts.problems
    whole = d1.encode_prompt(tok, task.messages(problems[trainer.stage.problems(0)[0]]))
    assert drawn.prompt[0].tolist() == whole[-10:] and drawn.figures["prompts_cut"] == 1
    asked = d1.evaluation_prompts(tok, task, problems[:3], cfg)
    assert asked[1] == 3 and [len(p) for p in asked[0]] == [10] * 3
    assert tok.decode(asked[0][0]).endswith("<|eot|><|assistant|>")


def test_run_of_a_benchmark_from_nothing_leaves_both_rows(trained):
    folder = trained / "sudoku"
    entries = json.loads((folder / "eval.json").read_text())
    assert [(e["row"], e["gen_length"]) for e in entries] == [("sft", 32), ("sft", 64), ("d1", 32), ("d1", 64)]
    for e in entries:
        assert e["n"] == 4 and {"accuracy", "official", "effective_tokens", "cells", "low", "high"} <= e.keys()
    metrics = logged(folder)
    for stage, keys in (("sft", {"loss", "seconds"}), ("diffu_grpo", {"loss", "reward", "kl", "seconds"})):
        rows = [m for m in metrics if m["stage"] == stage and "loss" in m]
        assert [m["step"] for m in rows] == [1, 2, 3, 4] and all(keys <= m.keys() for m in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((folder / "d1_state.json").read_text())
    assert state["stages"] == ["sft", "diffu_grpo"] and state["settings"]["mu"] == 2
    (path,) = (folder / "generations").glob("sudoku_d1_*_32_16_0_generations.json")
    file = json.loads(path.read_text())
    assert len(file["generations"]) == 4
    assert {"question", "generations", "ground_truth"} <= file["generations"][0].keys()
    assert not list(folder.glob("*.part")) and not list(folder.glob(".export*"))


def test_run_of_sft_only_then_rl_with_and_without_lora(tmp_path):
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


def test_run_resumes_and_a_second_run_moves_the_first_aside(tmp_path, capsys):
    base = ("--task", "math500", "--skip_eval")
    assert run(*base, "--steps_rl", 2, out=tmp_path) == 0
    assert run(*base, "--steps_rl", 4, "--resume", out=tmp_path) == 0
    assert "diffu_grpo: resumed after step 2" in capsys.readouterr().out
    steps = [json.loads(line) for line in (tmp_path / "math500/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in steps if m["stage"] == "diffu_grpo" and "loss" in m] == [1, 2, 3, 4]
    assert run(*base, out=tmp_path) == 0
    assert (tmp_path / "math500.old1" / "model.safetensors").exists()


def test_run_with_resume_is_the_run_that_stopped(finished, capsys):
    capsys.readouterr()
    kept = (finished / "sudoku" / "model.safetensors").read_bytes()
    assert run("--task", "sudoku", "--skip_eval", "--resume", "--seed", 9, "--lr_rl", 0.01, out=finished) == 2
    error = capsys.readouterr().err
    assert "--seed=0" in error and "--lr_rl=0.0002" in error and error.count("\n") == 1
    assert (finished / "sudoku" / "model.safetensors").read_bytes() == kept


def test_run_with_a_mistake_moves_no_earlier_run_aside(trained, tmp_path, capsys):
    shutil.copytree(trained / "sudoku", tmp_path / "sudoku")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n')
    for flags in (["--model", "tests/nothere"], ["--data", bad], ["--sft_data", bad]):
        assert run("--task", "sudoku", *flags, out=tmp_path) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "sudoku" / "model.safetensors").exists() and not list(tmp_path.glob("*.old*"))


def test_run_killed_before_the_first_checkpoint_leaves_no_step_twice(finished):
    folder = finished / "sudoku"
    manifest = json.loads((folder / "trainer" / "manifest.json").read_text())
    (folder / "trainer" / "manifest.json").write_text(json.dumps({"sft": manifest["sft"]}))
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"stage": "diffu_g')  # cut short
    assert run("--task", "sudoku", "--skip_eval", "--resume", out=finished) == 0
    rows = logged(folder)
    assert [r["step"] for r in rows if r["stage"] == "diffu_grpo" and "loss" in r] == [1, 2, 3, 4]


def test_run_with_auto_resume_starts_then_resumes_and_is_the_unbroken_run(tmp_path, monkeypatch, capsys):
    flags = "--task", "sudoku", "--skip_eval"
    assert run(*flags, out=tmp_path / "whole") == 0
    stop_once(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(*flags, "--auto_resume", out=tmp_path / "parts") == 143
    assert "resumed" not in capsys.readouterr().out
    assert run(*flags, "--auto_resume", out=tmp_path / "parts") == 0
    assert "diffu_grpo: resumed after step 3" in capsys.readouterr().out
    whole, parts = ((tmp_path / name / "sudoku" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts and not list((tmp_path / "parts").glob("*.old*"))
    assert run(*flags, "--resume", out=tmp_path / "parts") == 0  # the flag is no change of the run
    assert run(*flags, "--resume", out=tmp_path / "none") == 2  # and --resume stays strict
    assert run(*flags, "--auto_resume", "--seed", 5, out=tmp_path / "parts") == 2  # another run is not continued
    assert "--seed=0" in capsys.readouterr().err


@pytest.mark.parametrize("there", [False, True])
def test_run_of_table1_with_auto_resume_resumes_what_is_there(there, tmp_path, monkeypatch):
    came = []

    def trained(cfg, screen, out, before):
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").touch()  # so that it can be named as --model
        came.append((out, cfg.resume))
        return []

    monkeypatch.setattr(d1, "run_stages", trained)
    if there:
        (tmp_path / "table1" / "count_d1" / "trainer").mkdir(parents=True)
    assert run("--task", "table1", "--auto_resume", out=tmp_path) == 0
    assert [out.name for out, resumed in came if resumed] == ["count_d1"] * there and len(came) == 10


@pytest.mark.parametrize("kind", ["llada", "llada 4-bit", "bert", "modernbert", "qwen"])
def test_run_of_sft_saves_an_adapter_rl_starts_from_it_and_evaluation_runs(
        kind, folders, traces, problems, tmp_path, capsys):
    four = ["--load_4bit"] if "4-bit" in kind else []
    if four:
        pytest.importorskip("bitsandbytes")
    base = folders[kind.split()[0]]
    common = ["--use_lora", "--preset", "paper", "--output_dir", tmp_path, *SHORT, *four]
    command("--model", base, "--task", "sft_only", "--sft_data", traces, *common)
    said = capsys.readouterr().out
    assert "1 left out, malformed or without room for a reply: row 4" in said
    assert "1 cut at --sft_length 420: row 6" in said
    assert "LoRA r 8, alpha 16 on " in said and " x2" in said and "mask " in said
    folder = tmp_path / "sft"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    command("--model", folder, "--task", "gsm8k", "--data", problems, *common, "--max_prompt", 12)
    said = capsys.readouterr().out
    assert "LoRA r 128, alpha 64" in said and "over --max_prompt 12: cut on the left" in said
    entries = json.loads((tmp_path / "gsm8k" / "eval.json").read_text())
    assert [e["row"] for e in entries] == ["sft", "d1"] and entries[0]["prompts_cut"] == 2
    saved = json.loads((tmp_path / "gsm8k" / "adapter_config.json").read_text())
    assert saved["r"] == 8 + 128 and Path(saved["base_model_name_or_path"]) == Path(base).resolve()
    assert json.loads((tmp_path / "gsm8k" / "d1_state.json").read_text())["stages"] == ["sft", "diffu_grpo"]
    command("--model", tmp_path / "gsm8k", "--task", "gsm8k", "--eval_only", "--data", problems, "--preset", "paper",
            "--output_dir", tmp_path, *SHORT, *four)


def test_run_of_pretraining_then_chat_with_edits(tmp_path, quick, capsys):
    """Both commands, the token for edits in the vocabulary, the ratio as stop rule, cosine, evaluation on the chat."""
    small = ["--threads", "1", "--output_dir", str(tmp_path), "--edit_rate", "0.2", "--edit_start", "0.5",
             "--warmup_sft", "2", "--save_steps", "5"]
    pre = ["--task", "pretrain", "--model", "tiny-modernbert", "--data_ratio", "0.02", "--bs_sft", "8", "--rows_sft",
           "4", "--sft_length", "64", *small]
    assert d1.main(pre) == 0
    rows = logged(tmp_path / "pretrain")
    rates = [r["lr"] for r in rows if "lr" in r]
    n = math.ceil(0.02 * 898_265 / (8 * 64))
    assert abs(len(rates) - n) <= 1 and rates[0] == 0.00075 and rates[-1] < 0.02 * max(rates)
    assert abs(rates[len(rates) // 2] / 0.0015 - (1 + math.cos(math.pi * (len(rates) // 2) / len(rates))) / 2) < 1e-6
    state = json.loads((tmp_path / "pretrain" / "d1_state.json").read_text())
    assert state["stages"] == ["pretrain"] and state["preset"] == "tiny"
    sft = ["--task", "sft_only", "--model", str(tmp_path / "pretrain"), "--sft_data", "talk",
           "--steps_sft", "4", "--bs_sft", "8", "--n_traces", "50", "--limit", "6", "--eval_lengths", "32",
           "--allow_edits", *small]
    assert d1.main(sft) == 0
    assert "talk" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "sft" / "eval.json").read_text())
    assert entry["task"] == "talk" and entry["row"] == "sft" and entry["allow_edits"] is True
    model, tokenizer = d1.load_model(str(tmp_path / "sft"), device="cpu")
    assert tokenizer.convert_tokens_to_ids(d1.DELETE) < model.get_input_embeddings().num_embeddings
    assert json.loads((tmp_path / "sft" / "d1_state.json").read_text())["stages"] == ["pretrain", "sft"]
