"""Benchmarks as a user runs them: own tasks, splits of public sets, evaluation that goes on, plateau, protocols."""

import json
import types

import pytest

import d1_full as d1

REWARD = '''
def short(prompts, completions, target, **columns):
    assert len(prompts) == len(completions) == len(target) == len(columns["kind"])
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [1.0 if len(t) <= n else 0.25 for t, n in zip(texts, target)]

def fails(prompts, completions, **columns):
    return [1 / 0]

def few(prompts, completions, **columns):
    return [1.0]

def endless(prompts, completions, **columns):
    return [float("inf")] * len(prompts)

number = 7
'''


@pytest.fixture
def own(tmp_path):
    """Run --task custom with a reward of the file above; prompts are texts, and a chat now and then."""
    (tmp_path / "pay.py").write_text(REWARD)
    rows = [{"prompt": f"Say {i}", "target": 10_000 * (i % 2), "kind": "a"} for i in range(200)]
    for row in rows[::3]:
        row["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def run(reward, *flags):
        return d1.main(["--task", "custom", "--data", str(tmp_path / "own.jsonl"), "--reward", f"{tmp_path}/{reward}",
                        "--steps_rl", "2", "--mu", "2", "--group", "2", "--bs_rl", "8", "--limit", "6",
                        "--eval_lengths", "32", "--output_dir", str(tmp_path / "out"), *flags])

    return run


def test_a_task_of_ones_own(own, tmp_path, capsys):
    assert own("pay.py:short", "--skip_sft") == 0
    base, after = json.loads((tmp_path / "out/custom/eval.json").read_text())
    for e in (base, after):  # even rows allow no character, odd ones any number
        file = tmp_path / f"out/custom/generations/custom_{e['row']}_own_32_16_0_generations.json"
        test = json.loads(file.read_text())["generations"]
        fits = sum(len(r["generations"]) <= r["ground_truth"]["target"] for r in test)
        assert (e["n"], e["accuracy"]) == (6, fits / 6) and e["mean_reward"] == (0.25 * (6 - fits) + fits) / 6
    assert "mean_reward" in capsys.readouterr().out


@pytest.mark.parametrize(("reward", "word"), [
    ("pay.py:fails", "pay.py, line 8: ZeroDivisionError: division by zero"),
    ("pay.py:few", "8 completions need as many"), ("pay.py:endless", "finite"), ("pay.py:none", "'none' (KeyError)"),
    ("no.py:short", "no.py"), ("pay.py", "FILE.py:FUNCTION"), ("pay.py:number", "not callable"),
])
def test_a_reward_that_fails_is_one_line(own, reward, word, capsys):
    assert own(reward, "--skip_sft", "--skip_eval") == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and "Traceback" not in error


def test_reward_errors_zero_goes_on_and_counts(own, capsys):
    assert own("pay.py:fails", "--skip_sft", "--skip_eval", "--reward_errors", "zero") == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[1] for line in said] == [f"paid 0, {n} calls so far" for n in (1, 2, 4, 8)]
    assert "pay.py, line 8: ZeroDivisionError" in said[0]


def test_own_tasks_need_their_parts(own, tmp_path, capsys):
    assert own("pay.py:short") == 2 and "--sft_data" in capsys.readouterr().err
    for flags in ("--task custom", "--task gsm8k --reward a.py:b", "--task custom --reward a:b"):
        assert d1.main([*flags.split(), "--output_dir", str(tmp_path)]) == 2
        assert "--task custom" in capsys.readouterr().err


def test_a_reward_may_not_end_the_program(own, tmp_path, capsys):
    (tmp_path / "exits.py").write_text("import sys\ndef inside(prompts, **_):\n    sys.exit(0)\n")
    (tmp_path / "exit.py").write_text("raise SystemExit(0)")
    for reward in ("exits.py:inside", "exit.py:any"):
        assert own(reward, "--skip_sft", "--skip_eval") == 2 and "SystemExit" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", [], ["hi"], [{"role": "user"}], [{"role": "user", "content": None}], 7, None])
def test_prompts_that_are_no_chat_are_refused(prompt, tmp_path):
    (tmp_path / "pay.py").write_text(REWARD)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises(d1.UserError, match=r"bad\.jsonl, row 2: no"):
        d1.Custom(f"{tmp_path}/pay.py:short").examples("train", data=str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize(("task", "row", "word"), [
    ("gsm8k", {"question": "a\ud800", "answer": "#### 3"}, "surrogates"),
    ("count", {"numbers": [1, 2, float("inf")], "target": 3}, "row 1"),
    ("count", {"numbers": None, "target": 3}, "row 1"),
    ("sudoku", {"Puzzle": "1", "Solution": "2"}, "16 digits"), ("math500", {"problem": 3, "answer": "1"}, "'problem'"),
])
def test_rows_that_are_no_problem_are_named(task, row, word, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(d1.UserError, match=word):
        d1.TASKS[task].examples("test", data=str(tmp_path / "bad.jsonl"))


def test_the_sum_of_rewards_of_a_batch_is_what_the_function_saw(own, tmp_path):
    task = d1.Custom(f"{tmp_path}/pay.py:short")
    examples = task.examples("train", data=str(tmp_path / "own.jsonl"))[:4]
    assert [p["reward"] for p in task.batch_rewards(["x"] * 4, examples)] == [0.25, 1, 0.25, 1]
    assert task.messages(examples[0])[0]["role"] == "system" and task.messages(examples[1])[0]["content"] == "Say 1"


def evaluation(tiny, quick, tmp_path, screen, **changes):
    cfg, task = quick(bs_eval=3, **changes), d1.TASKS["sudoku"]
    return lambda: d1.evaluate(*tiny, task, task.examples("test", 10), cfg, "sft", tmp_path / "run", screen)


@pytest.fixture
def screen():
    return d1.Screen()


def test_a_stopped_evaluation_goes_on_where_it_was(tiny, quick, tmp_path, screen, monkeypatch):
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


def test_replies_of_other_weights_prompts_or_lengths_are_not_taken(tiny, quick, tmp_path, screen, monkeypatch):
    evaluation(tiny, quick, tmp_path, screen)()
    decode, calls = d1.diffuse_decode, []
    monkeypatch.setattr(d1, "diffuse_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    other = d1.load_model("tiny", seed=1)
    evaluation(other, quick, tmp_path, screen)()
    assert len(calls) == 4
    evaluation(other, quick, tmp_path, screen, max_prompt=9)()
    assert len(calls) == 8


def test_replies_under_another_lora_scaling_are_not_taken(tiny, quick, tmp_path, screen, monkeypatch):
    model, tokenizer = d1.load_model("tiny", lora=(4, 8, 0.0, "all"))
    evaluation((model, tokenizer), quick, tmp_path, screen)()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    decode, calls = d1.diffuse_decode, []
    monkeypatch.setattr(d1, "diffuse_decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    evaluation((model, tokenizer), quick, tmp_path, screen)()
    assert len(calls) == 4


def test_a_damaged_eval_json_is_one_line(tiny, quick, tmp_path, screen):
    (tmp_path / "run").mkdir()
    for text in ("[{", '[{"task": "sudoku"}]'):
        (tmp_path / "run/eval.json").write_text(text)
        with pytest.raises(d1.UserError, match=r"cannot read .*eval\.json"):
            evaluation(tiny, quick, tmp_path, screen)()


def test_patience_stops_at_a_plateau_and_both_accuracies_are_told(tiny, quick, tmp_path, capsys):
    scores, task = iter([0.1, 0.2, 0.5, 0.4, 0.5, 0.9]), d1.TASKS["sudoku"]  # the first of the start
    cfg = quick(steps_rl=20, patience=2, save_steps=2, beta=0.0, output_dir=str(tmp_path))
    stage = d1.DiffuGRPO(*d1.load_model("tiny"), task.examples("train", 4), task.messages, task.batch_rewards, cfg,
                         tmp_path, lambda model: next(scores))
    screen = d1.Screen()
    stage.run(screen)
    assert stage.step == 8 and stage.best[:2] == (0.5, 8)  # .2 .5 .4 .5: the two last were no better
    again = d1.DiffuGRPO(*d1.load_model("tiny"), task.examples("train", 4), task.messages, task.batch_rewards, cfg,
                         tmp_path, lambda model: next(scores))
    assert d1.load_trainer(again, screen) and again.stale == 2
    again.run(screen)  # a resumed run has stopped too
    assert again.step == 8
    again.best = (0.5, 4, again.best[2])
    again.finish(screen)
    shown = capsys.readouterr().out
    assert d1.read_log(tmp_path / "metrics.jsonl")[0] == dict(stage="diffu_grpo", step=0, heldout_accuracy=0.1)
    assert "stopped at step 8" in shown and "weights of step 4 kept: held-out accuracy 50.0 %" in shown


def test_the_papers_figure_stands_beside_the_official_score_of_llada_alone(tmp_path, quick, capsys):
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


def test_a_hub_set_without_texts_is_named_by_row_and_columns(monkeypatch):
    hub_sets(monkeypatch, set={"train": [{"text": "good"}, {"body": "x"}]})
    texts = d1.texts_of("own/set")
    assert next(texts) == "good"
    with pytest.raises(d1.UserError, match="own/set, row 2: no column text; it has body"):
        next(texts)


def hub_sets(monkeypatch, **sets):
    """Stand-ins for public data sets: {name: {split: rows}}."""
    import datasets

    def load(name, config=None, *, split, streaming, data_files=None):
        return iter(sets[name.split("/")[1].replace("-", "_")][split])

    monkeypatch.setattr(datasets, "get_dataset_split_names",
                        lambda name, config=None: list(sets[name.split("/")[1].replace("-", "_")]))
    monkeypatch.setattr(datasets, "load_dataset", load)


def test_splits_of_public_sets(monkeypatch, quick):
    rows = [{"nums": [i, i + 1, i + 2] + [5] * (i % 2 == 0), "target": i} for i in range(400)]
    math = [{"problem": str(i), "answer": "\\boxed{1}"} for i in range(300)]
    hub_sets(monkeypatch, Countdown_Tasks_3to4={"train": rows}, math_500={"train": math, "test": math[:5]},
             MATH_500={"test": math[:7]}, gsm8k={
                 "train": [{"question": str(i), "answer": "#### 1"} for i in range(300)],
                 "test": [{"question": "t", "answer": "#### 2"}] * 3})
    for name, tests in (("count", None), ("math500", 7), ("gsm8k", 3)):
        task, cfg = d1.TASKS[name], quick(name, preset="paper", limit=0)
        splits = {s: d1.problems_of(cfg, task, s) for s in ("train", "heldout", "test")}
        keys = {s: {json.dumps(e) for e in problems} for s, problems in splits.items()}
        assert not keys["train"] & keys["heldout"] and len(keys["heldout"]) > 8
        if name == "count":  # no test split: a share of the rows, only those with three numbers, at most 256
            assert not keys["test"] & (keys["train"] | keys["heldout"]) and sum(map(len, keys.values())) == 200
            assert all(len(e["numbers"]) == 3 for problems in splits.values() for e in problems)
            assert splits["test"] == d1.problems_of(quick(name, preset="paper", limit=0, eval_only=True), task, "test")
            monkeypatch.setattr(type(task), "tests", 4)
            assert d1.problems_of(cfg, task, "test") == splits["test"][:4]
        else:
            assert len(splits["test"]) == tests and len(keys["train"] | keys["heldout"]) == 300


def test_sizes_and_overlap_are_counted():
    said = []
    screen = types.SimpleNamespace(say=said.append)
    a, b = ({"numbers": [n, 2, 3], "target": 6} for n in (1, 4))
    d1.say_sizes(d1.TASKS["count"], {"train": [a, a, b], "test": [{"numbers": [3, 1, 2], "target": 6}]}, screen)
    assert said == ["count problems: train 3 (2 different), test 1 (1 different); in two splits: 1"]


def test_the_official_protocol_asks_an_expert_and_begins_the_reply(tiny, quick):
    task, tokenizer = d1.TASKS["gsm8k"], tiny[1]
    (ours,), _ = d1.evaluation_prompts(tokenizer, task, [{"question": "1+1?"}], quick("gsm8k", max_prompt=500))
    (theirs,), cut = d1.evaluation_prompts(tokenizer, task, [{"question": "1+1?"}], quick("gsm8k", preset="official"))
    ours, theirs = tokenizer.decode(ours), tokenizer.decode(theirs)
    assert d1.SYSTEM in ours and ours.endswith("<|assistant|>") and "expert" not in ours
    assert d1.EXPERT in theirs and theirs.endswith("<|assistant|><reasoning>") and d1.SYSTEM not in theirs and cut == 0
    math, _ = d1.evaluation_prompts(tokenizer, d1.TASKS["count"], [EXAMPLE], quick("count", preset="official"))
    assert d1.EXPERT + "\nUse each given number" in tokenizer.decode(math[0])


EXAMPLE = {"numbers": [1, 2, 3], "target": 6}
