"""Tasks of one's own: a reward function from a file, and what it may do."""

import json

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


def test_custom_task_is_trained_and_evaluated(own, tmp_path, capsys):
    assert own("pay.py:short", "--skip_sft") == 0
    base, after = json.loads((tmp_path / "out/custom/eval.json").read_text())
    for e in (base, after):  # even rows allow no character, odd ones any number
        (file,) = (tmp_path / "out/custom/generations").glob(f"custom_{e['row']}_own_*_32_16_0_generations.json")
        test = json.loads(file.read_text())["generations"]
        fits = sum(len(r["generations"]) <= r["ground_truth"]["target"] for r in test)
        assert (e["n"], e["accuracy"]) == (6, fits / 6) and e["mean_reward"] == (0.25 * (6 - fits) + fits) / 6
    assert "mean_reward" in capsys.readouterr().out


@pytest.mark.parametrize(("reward", "word"), [
    ("pay.py:fails", "pay.py, line 8: ZeroDivisionError: division by zero"),
    ("pay.py:few", "8 completions need as many"), ("pay.py:endless", "finite"), ("pay.py:none", "'none' (KeyError)"),
    ("no.py:short", "no.py"), ("pay.py", "FILE.py:FUNCTION"), ("pay.py:number", "not callable"),
])
def test_custom_reward_that_fails_is_one_line(own, reward, word, capsys):
    assert own(reward, "--skip_sft", "--skip_eval") == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and "Traceback" not in error


def test_custom_reward_errors_zero_goes_on_and_counts(own, capsys):
    assert own("pay.py:fails", "--skip_sft", "--skip_eval", "--reward_errors", "zero") == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[1] for line in said] == [f"paid 0, {n} calls so far" for n in (1, 2, 4, 8)]
    assert "pay.py, line 8: ZeroDivisionError" in said[0]


def test_custom_task_needs_its_parts(own, tmp_path, capsys):
    assert own("pay.py:short") == 2 and "--sft_data" in capsys.readouterr().err
    for flags in ("--task custom", "--task gsm8k --reward a.py:b", "--task custom --reward a:b"):
        assert d1.main([*flags.split(), "--output_dir", str(tmp_path)]) == 2
        assert "--task custom" in capsys.readouterr().err


def test_custom_reward_may_not_end_the_program(own, tmp_path, capsys):
    (tmp_path / "exits.py").write_text("import sys\ndef inside(prompts, **_):\n    sys.exit(0)\n")
    (tmp_path / "exit.py").write_text("raise SystemExit(0)")
    for reward in ("exits.py:inside", "exit.py:any"):
        assert own(reward, "--skip_sft", "--skip_eval") == 2 and "SystemExit" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", [], ["hi"], [{"role": "user"}], [{"role": "user", "content": None}], 7, None])
def test_custom_prompts_that_are_no_chat_are_refused(prompt, tmp_path):
    (tmp_path / "pay.py").write_text(REWARD)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises(d1.UserError, match=r"bad\.jsonl, row 2: no"):
        d1.Custom(f"{tmp_path}/pay.py:short").examples("train", data=str(tmp_path / "bad.jsonl"))


def test_custom_batch_rewards_are_what_the_function_saw(own, tmp_path):
    task = d1.Custom(f"{tmp_path}/pay.py:short")
    examples = task.examples("train", data=str(tmp_path / "own.jsonl"))[:4]
    assert [p["reward"] for p in task.batch_rewards(["x"] * 4, examples)] == [0.25, 1, 0.25, 1]
    assert task.messages(examples[0])[0]["role"] == "system" and task.messages(examples[1])[0]["content"] == "Say 1"
