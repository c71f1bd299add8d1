"""Evaluation: intervals, what is kept and reused, the tables."""

import json

import pytest
from conftest import run

import d1_full as d1


def evaluation(tiny, quick, tmp_path, screen, **changes):
    cfg, task = quick(bs_eval=3, **changes), d1.TASKS["sudoku"]
    return lambda: d1.evaluate(*tiny, task, task.examples("test", 10), cfg, "sft", tmp_path / "run", screen)


def test_wilson_interval_by_hand():
    low, high = d1.wilson(8, 10)  # (8 + 1.92 -+ 1.96 sqrt(1.6 + .9604)) / 13.84
    assert low == pytest.approx(0.4902, abs=2e-4) and high == pytest.approx(0.9433, abs=2e-4)
    assert d1.wilson(0, 10)[0] == 0 and d1.wilson(10, 10)[1] == 1


def test_evaluate_goes_on_where_it_was_stopped(tiny, quick, tmp_path, screen, monkeypatch):
    whole = evaluation(tiny, quick, tmp_path / "a", screen)()
    decode, calls = d1.diffuse_decode, []

    def stops(model, prompt, **options):
        calls.append(len(prompt))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(model, prompt, **options)

    monkeypatch.setattr(d1, "diffuse_decode", stops)
    again = evaluation(tiny, quick, tmp_path / "b", screen)
    with pytest.raises(KeyboardInterrupt):
        again()
    log = next((tmp_path / "b/run/generations").glob("*.parts/0.jsonl"))
    log.write_text(log.read_text()[:-20])  # and the kill cut the last line short
    assert again() == whole and calls == [3, 3, 3, 3, 2]  # two batches were done, less the reply that was cut
    files = [next((tmp_path / f).glob("run/generations/*.json")) for f in "ab"]
    texts = [[r["generations"] for r in json.loads(f.read_text())["generations"]] for f in files]
    assert texts[0] == texts[1] and not log.parent.exists()
    assert again() == whole and len(calls) == 5  # nothing is left to do


def test_evaluate_takes_no_replies_of_other_weights_prompts_or_lengths(tiny, quick, tmp_path, screen, monkeypatch):
    evaluation(tiny, quick, tmp_path, screen)()
    decode, calls = d1.diffuse_decode, []
    monkeypatch.setattr(d1, "diffuse_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    other = d1.load_model("tiny", seed=1)
    evaluation(other, quick, tmp_path, screen)()
    assert len(calls) == 4
    evaluation(other, quick, tmp_path, screen, max_prompt=9)()
    assert len(calls) == 8


def test_evaluate_takes_no_replies_under_another_lora_scaling(tiny, quick, tmp_path, screen, monkeypatch):
    model, tokenizer = d1.load_model("tiny", lora=(4, 8, 0.0, "all"))
    evaluation((model, tokenizer), quick, tmp_path, screen)()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    decode, calls = d1.diffuse_decode, []
    monkeypatch.setattr(d1, "diffuse_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    evaluation((model, tokenizer), quick, tmp_path, screen)()
    assert len(calls) == 4


def test_evaluate_refuses_a_damaged_eval_json_in_one_line(tiny, quick, tmp_path, screen):
    (tmp_path / "run").mkdir()
    for text in ("[{", '[{"task": "sudoku"}]'):
        (tmp_path / "run/eval.json").write_text(text)
        with pytest.raises(d1.UserError, match=r"cannot read .*eval\.json"):
            evaluation(tiny, quick, tmp_path, screen)()


def test_results_table_has_the_papers_figure_beside_the_official_score_of_llada_alone(tmp_path, quick, capsys):
    entry = dict(task="sudoku", row="sft", n=256, accuracy=0.02, low=0, high=0.05, cells=0.12, official=0.12, data="")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").write_text("{}")
    state = tmp_path / "own/d1_state.json"
    for origin, known in (("GSAI-ML/LLaDA-8B-Instruct", True), ("GSAI-ML/LLaDA-8B-Base", False), ("tiny", False)):
        state.write_text(json.dumps({"origin": origin}))  # of a checkpoint: where its training began
        cfg = quick(model=str(tmp_path / "own"), preset="paper")
        d1.results_table(d1.Screen(), [entry | {"gen_length": 128}], cfg)
        lines = capsys.readouterr().out.splitlines()
        beside = [("(paper 16.5*)" in line, "official" in line) for line in lines if "(paper" in line]
        assert beside == [(True, True)] * known
        assert any("known second-hand" in line for line in lines) == known
    assert d1.origin_of("llada/llada-8b-instruct") == "GSAI-ML/LLaDA-8B-Instruct"


def test_evaluate_with_a_cache_and_a_threshold_says_so(tmp_path, capsys):
    flags = "--task sudoku --eval_only --limit 2 --eval_lengths 32 --cache dual --threshold 0.9 --output_dir"
    assert d1.main([*flags.split(), str(tmp_path)]) == 0
    assert "other decoding than the paper's: cache dual, threshold 0.9" in " ".join(capsys.readouterr().out.split())
    entry = json.loads((tmp_path / "sudoku" / "eval.json").read_text())[0]
    assert entry["cache"] == "dual" and entry["threshold"] == 0.9


def test_eval_only_reads_a_data_file(trained, tmp_path, capsys):
    data = tmp_path / "puzzles.csv"
    data.write_text("Puzzle,Solution\n" + "0102200002100320,3142243142131324\n" * 5)
    flags = ("--task", "sudoku", "--eval_only", "--model", trained / "sudoku", "--data", data, "--limit", 0)
    assert run(*flags, out=tmp_path) == 0
    assert "5 test problems" in capsys.readouterr().out
    entries = json.loads((tmp_path / "sudoku" / "eval.json").read_text())
    assert {(e["row"], e["n"], e["data"]) for e in entries} == {("d1", 5, str(data))}
    (path,) = (tmp_path / "sudoku/generations").glob("sudoku_d1_puzzles_*_32_16_0_generations.json")
    file = json.loads(path.read_text())
    for record in file["generations"]:
        for mode in ("strict", "official"):
            d1.grade_generation("sudoku", record, mode)


def test_table1_has_every_row_of_every_task_and_redoes_no_finished_part(tmp_path, capsys, monkeypatch):
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
