"""Rewards as TRL has them, splits that do not leak, figures that stay apart, --data at the door, --grade, --explain."""

import json
import logging
import re
import sys
import warnings

import pytest
import torch
from conftest import ROOT, run

import d1_full as d1

SAYS = {"question": "?", "ground_truth": 18.0}
GOOD = "<reasoning>\nx\n</reasoning>\n<answer>\n18\n</answer>"


def lines(path, rows):
    """Write rows as JSONL: the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward(tmp_path, text, name="pay", tokenizer=None):
    """A task whose reward is `f` in a file of this text."""
    (tmp_path / f"{name}.py").write_text(text)
    task = d1.Custom(f"{tmp_path / name}.py:f")
    task.tokenizer = tokenizer
    return task


def pay(task, texts, examples):
    return [parts["reward"] for parts in task.batch_rewards(texts, examples)]


# ---- the contract of a reward
def test_custom_reward_is_given_ids_and_every_column_of_any_row(tmp_path, tiny, quick):
    tok = tiny[1]
    task = reward(tmp_path, "seen = []\ndef f(prompts, completions, completion_ids, a, b):\n"
                            "    seen.append((completion_ids, a, b))\n    return [0.0] * len(prompts)\n", tokenizer=tok)
    rows = lines(tmp_path / "d.jsonl", [{"prompt": "x", "a": 1}, {"prompt": "y", "b": 2}])
    examples = task.examples("train", data=str(rows))
    pay(task, ["1 2", "3"], examples)
    pay(task, ["1", "2"], examples[:1] * 2)  # a group of one prompt: none of its rows has the other column
    seen = sys.modules["pay"].seen
    assert seen[0] == ([tok.encode(t, add_special_tokens=False) for t in ("1 2", "3")], [1, None], [None, 2])
    assert seen[1][1:] == ([1, 1], [None, None])

    rollouts = d1.TaskRollouts(tok, task, examples, quick(max_prompt=64))
    ids = [rollouts[0], rollouts[1]] and torch.tensor([[5, 6, tok.eos_token_id, 7], [5, 6, 8, 9]])
    rollouts.reward(ids, [0, 1])
    assert seen[2][0] == [[5, 6, tok.eos_token_id], [5, 6, 8, 9]]  # as TRL's: the tokens that were drawn, with the EOS


def test_custom_reward_may_be_async_and_keeps_its_loop(tmp_path):
    task = reward(tmp_path, "import asyncio\nloops = set()\nasync def one(n):\n    await asyncio.sleep(0.2)\n"
                            "    loops.add(asyncio.get_running_loop())\n    return float(n)\n"
                            "async def f(prompts, n, **_):\n    return await asyncio.gather(*map(one, n))\n")
    examples = [{"prompt": "x", "n": n} for n in range(3)]
    assert pay(task, ["a"] * 3, examples) == pay(task, ["a"] * 3, examples) == [0, 1, 2]
    assert len(sys.modules["pay"].loops) == 1  # clients that the file keeps stay usable


def test_custom_reward_of_none_pays_nothing_and_none_alone_is_an_error(tmp_path):
    task = reward(tmp_path, "def f(pays, **_):\n    return pays\n")
    examples = [{"prompt": "x", "pays": p} for p in (1.5, None, 0)]
    assert pay(task, ["a"] * 3, examples) == [1.5, 0, 0]
    assert pay(task, ["a"], examples[1:2]) == [0]  # a reply alone, as evaluation grades it
    with pytest.raises(d1.UserError, match="None for all completions"):
        pay(task, ["a"] * 2, [{"prompt": "x", "pays": None}] * 2)


@pytest.mark.parametrize(("returned", "word"), [
    ("dict(a=1.0, b=2.0)", "numbers in a list, not {'a'"), ("(1.0 for _ in prompts)", "in a list, not <generator"),
    ("[1.0]", "2 completions need as many"), ("['a', 'b']", "must be real number, not str"), ("None", "list, not None"),
    ("[1.0, [2.0]]", "real number"), ("1.0", "in a list, not 1.0"), ("'ab'", "in a list, not ab"),
    ("1 / 0", "line 2: ZeroDivisionError"), ("[][0] if prompts else print('a\\nb')", "IndexError")])
def test_custom_reward_that_returns_no_list_of_numbers_is_one_line(returned, word, tmp_path):
    task = reward(tmp_path, f"def f(prompts, **_):\n    return {returned}\n")
    with pytest.raises(d1.UserError) as error:
        pay(task, ["x", "y"], [{"prompt": "a"}, {"prompt": "b"}])
    assert word in str(error.value) and "\n" not in str(error.value)
    assert "pay.py" in str(error.value) and "--reward_errors zero" in str(error.value)


def test_custom_reward_may_return_an_array_or_a_tensor(tmp_path):
    for made in ("numpy.array([1.0, 2.0])", "torch.tensor([1.0, 2.0])", "[torch.tensor(1.0), numpy.float32(2)]"):
        task = reward(tmp_path, f"import numpy, torch\ndef f(**_):\n    return {made}\n")
        assert pay(task, ["x", "y"], [{"prompt": "a"}] * 2) == [1, 2]


def test_custom_reward_changes_nothing_of_what_it_is_given(tmp_path):
    task = reward(tmp_path, "def f(prompts, completions, tags, **_):\n"
                            "    for p, c, t in zip(prompts, completions, tags):\n"
                            "        p.clear(), c.clear(), t.append(1)\n    return [len(t) for t in tags]\n")
    example = {"prompt": [{"role": "user", "content": "hi"}], "tags": []}
    texts = ["a", "b"]
    assert pay(task, texts, [example] * 2) == [1, 1] == pay(task, texts, [example] * 2)
    assert example == {"prompt": [{"role": "user", "content": "hi"}], "tags": []} and texts == ["a", "b"]


def test_custom_reward_is_a_module_with_neighbours_and_pools(tmp_path):
    for name, value in ("neighbour_1", 1), ("neighbour_2", 2):
        (tmp_path / f"{name}.py").write_text(f"N = {value}\n")
    task = reward(tmp_path, """import dataclasses, multiprocessing, pickle
from neighbour_1 import N
@dataclasses.dataclass
class Point:
    x: float
def score(text):
    import neighbour_2
    return Point(len(text) + N + neighbour_2.N)
def f(completions, **_):
    assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return [point.x for point in pool.map(score, completions)]
""", "reward_of_mine")
    assert pay(task, ["a", "bb"], [{"prompt": "x"}] * 2) == [4, 5]
    assert task.function.__module__ == "reward_of_mine" and task.function is sys.modules["reward_of_mine"].f


def test_main_lets_a_reward_be_heard_and_leaves_loggers_and_warnings_as_they_were(tmp_path, caplog):
    (tmp_path / "pay.py").write_text("import logging\nlog = logging.getLogger('pay')\nlog.error('read')\n"
                                     "def f(prompts, **_):\n    log.warning('paid')\n    return [0.0] * len(prompts)\n")
    data = lines(tmp_path / "d.jsonl", [{"prompt": f"Say {i}"} for i in range(60)])
    names = "accelerate", "bitsandbytes", "torch"
    before = [logging.getLogger(name).level for name in names], logging.root.manager.disable, list(warnings.filters)
    assert run("--task", "custom", "--reward", f"{tmp_path / 'pay.py'}:f", "--data", data, "--eval_only",
               "--eval_lengths", 32, out=tmp_path / "o") == 0
    heard = {(r.levelname, r.message) for r in caplog.records if r.name == "pay"}
    assert heard == {("ERROR", "read"), ("WARNING", "paid")}
    now = [logging.getLogger(name).level for name in names], logging.root.manager.disable, list(warnings.filters)
    assert now == before and logging.getLogger("another").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids"])
def test_custom_rows_with_a_column_that_the_script_gives_are_refused(column, tmp_path):
    data = lines(tmp_path / "d.jsonl", [{"prompt": "a"}, {"prompt": "b", column: [1]}])
    with pytest.raises(d1.UserError, match=rf"d\.jsonl, row 2: no custom problem: column '{column}' has the name"):
        reward(tmp_path, "def f(**_): ...\n").examples("train", data=str(data))


def test_custom_chats_may_be_in_parts_have_an_empty_system_text_or_be_begun(tmp_path, tiny):
    tok = tiny[1]
    task = reward(tmp_path, "seen = []\ndef f(prompts, completions, **_):\n    seen.append((prompts, completions))\n"
                            "    return [0.0] * len(prompts)\n")
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": parts}]
    begun = [*chat, {"role": "assistant", "content": "It is"}]
    data = lines(tmp_path / "d.jsonl", [{"prompt": chat}, {"prompt": begun}])
    examples = task.examples("train", data=str(data))
    plain = [{"role": "system", "content": ""}, {"role": "user", "content": "What is this?"}]
    assert task.messages(examples[0]) == plain
    whole, open_end = (tok.decode(d1.encode_prompt(tok, task.messages(e))) for e in examples)
    assert open_end == whole + "It is" and not whole.endswith("It is")
    pay(task, [" x", " a dog"], examples)
    [(prompts, completions)] = sys.modules["pay"].seen
    assert prompts == [chat, chat]  # as given; a turn that is begun belongs to the completion, as in TRL
    assert completions == [[{"role": "assistant", "content": text}] for text in (" x", "It is a dog")]
    row = d1.chat_turns(tok, [*chat, {"role": "assistant", "content": [{"type": "text", "text": "A1"}]}], 90)[0]
    assert tok.decode(row[0][: row[1]]) == whole and tok.decode(row[0]).startswith(whole + "A1")


def test_encode_example_keeps_two_turns_of_the_assistant_apart(tiny):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A1"},
            {"role": "assistant", "content": "A2"}]
    ids, n = d1.encode_example(tiny[1], chat[:2], "A2")
    assert tiny[1].decode(ids[:n]) == tiny[1].apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)


# ---- splits
def test_task_key_is_what_a_problem_asks(tmp_path):
    task = reward(tmp_path, "def f(**_): ...\n")
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi  you"}]}]
    same = [{"prompt": "hi you", "id": 1}, {"prompt": "hi you", "id": 2}, {"prompt": parts}]
    assert len({task.key(e) for e in same}) == 1 != len({task.key(e) for e in (same[0], {"prompt": "hi me"})})
    count, gsm = d1.TASKS["count"], d1.TASKS["gsm8k"]
    assert count.key({"numbers": [44, 19, 35], "target": 98}) == count.key({"numbers": [19, 44, 35], "target": 98})
    assert count.key({"numbers": [44, 19, 35], "target": 98}) != count.key({"numbers": [44, 19, 35], "target": 97})
    assert gsm.key({"question": "a b", "answer": "1"}) == gsm.key({"question": "a\n b ", "answer": "2"})


def test_problems_of_a_file_of_repeated_questions_share_nothing(tmp_path, quick, screen, capsys):
    rows = [{"prompt": f"question {i % 40}", "id": i} for i in range(400)]
    data = lines(tmp_path / "d.jsonl", rows)
    task = reward(tmp_path, "def f(**_): ...\n")
    cfg = quick("custom", data=str(data), reward=f"{tmp_path / 'pay.py'}:f", limit=0)
    splits = {name: d1.problems_of(cfg, task, name) for name in ("train", "heldout", "test")}
    asked = {name: {e["prompt"] for e in rows} for name, rows in splits.items()}
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 40
    d1.say_sizes(task, splits, screen)
    assert "in two splits: 0" in capsys.readouterr().out


def stage_on(tiny, quick, rows):
    return d1.sft_stage(*tiny, rows, quick(sft_length=128, sft_extra=0))


def test_sft_stage_holds_out_whole_chats(tmp_path, tiny, quick, screen):
    chats = []
    for i in range(20):
        turns = [{"role": r, "content": f"{r} {i} {k}"} for k in range(3) for r in ("user", "assistant")]
        chats += [{"messages": turns[: 2 * n]} for n in (3, 1)]  # once more, as a shorter chat
    data = lines(tmp_path / "c.jsonl", chats)
    rows = d1.sft_rows(quick(sft_data=str(data), sft_length=128), tiny[1], [], screen)
    stage = stage_on(tiny, quick, rows)
    of_chat = [{re.search(r"user (\d+) 0", tiny[1].decode(ids))[1] for ids, _ in part}
               for part in (stage.heldout, stage.rows)]
    assert not of_chat[0] & of_chat[1] and of_chat[0] and len(of_chat[1]) > 15
    assert len(stage.heldout) + len(stage.rows) == len(rows) == 80


def test_sft_stage_holds_out_no_row_that_is_trained(tmp_path, tiny, quick, screen):
    pairs = [([1, 2, i // 4, 5], 2) for i in range(400)]  # each row four times
    stage = stage_on(tiny, quick, pairs)
    held, trained = ({str(row) for row in part} for part in (stage.heldout, stage.rows))
    assert len(stage.heldout) == 4 and len(stage.rows) == 396 and not held & trained
    rows = d1.sft_rows(quick(n_traces=900), tiny[1], [d1.TASKS["count"]], screen)
    stage = stage_on(tiny, quick, rows)
    held, trained = ({str(row) for row in part} for part in (stage.heldout, stage.rows))
    assert len(stage.heldout) == 9 and len(stage.rows) == 891 and not held & trained


def test_sft_stage_without_repeated_rows_holds_out_what_it_always_did(tiny, quick):
    rows = [([1, 2, i, 5], 2) for i in range(300)]
    order = d1.visits(quick().seed, "sft_heldout", 0, 300, 300)
    stage = stage_on(tiny, quick, rows)
    assert stage.heldout == [rows[i] for i in order[:3]] and stage.rows == [rows[i] for i in order[3:]]
    alike = stage_on(tiny, quick, rows[:1] * 8)  # nothing can be apart
    assert len(alike.heldout) == 1 and len(alike.rows) == 7


# ---- files
def test_read_rows_takes_a_parquet_name_as_it_is_and_needs_no_cache(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet
    for name, value in ("rows1", 1), ("rows[1]", 2), ("run [2]", 3), ("a*", 4):
        parquet.write_table(pyarrow.table({"text": [str(value)], "nums": [[1, value]]}), tmp_path / f"{name}.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name, value in ("rows[1]", 2), ("run [2]", 3), ("rows1", 1), ("a*", 4):
        assert d1.read_rows(str(tmp_path / f"{name}.parquet"), "train") == [{"text": str(value), "nums": [1, value]}]


def test_data_with_a_row_that_cannot_be_won_is_refused_before_anything_is_decoded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(d1, "diffuse_decode", None)
    good = {"numbers": [1, 2, 3], "target": 6}
    for wrong in ({"numbers": [1, 2, 3], "target": 37.5}, {"numbers": [1, 2, True], "target": 6}):
        data = lines(tmp_path / "d.jsonl", [good, wrong, good])
        assert run("--task", "count", "--eval_only", "--limit", 1, "--data", data, out=tmp_path / "o") == 2
        error = capsys.readouterr().err
        assert f"{data}, row 2: no count problem" in error and error.count("\n") == 1


def test_data_of_sudokus_says_how_many_have_several_solutions(tmp_path, capsys):
    open_one, closed = "3040413004000304", "0102200002100320"
    assert len(d1.solutions(open_one)) == 2 and d1.solutions(closed) == ["3142243142131324"]
    assert sorted(d1.solutions("0" * 16)) == sorted(d1.sudoku_grids()) and len(d1.sudoku_grids()) == 288
    rows = [(p, d1.solutions(p)[0]) for p in (open_one, closed, closed)]
    (tmp_path / "p.csv").write_text("Puzzle,Solution\n" + "".join(f"{p},{s}\n" for p, s in rows))
    assert run("--task", "sudoku", "--eval_only", "--limit", 3, "--eval_lengths", 32, "--data", tmp_path / "p.csv",
               out=tmp_path / "o") == 0
    assert "1 of 2 puzzles have several solutions" in capsys.readouterr().out


# ---- figures
def entries_in(folder):
    return json.loads((folder / "eval.json").read_text())


def test_evaluate_replaces_no_figure_by_another(tiny, quick, tmp_path, screen):
    task, out = d1.TASKS["sudoku"], tmp_path / "run"

    def evaluated(n=6, model=tiny, examples=None, **changes):
        examples = (examples or task.examples("test", 6))[:n]
        return d1.evaluate(*model, task, examples, quick(**changes), "d1", out, screen)[0]

    first = evaluated()
    kept = {path: path.read_bytes() for path in (out / "generations").iterdir()}
    for folder in "ab":  # files of one name with other puzzles
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.csv").touch()
    others = [
        evaluated(4, limit=4), evaluated(block_length=8), evaluated(model=d1.load_model("tiny", seed=1)),
        evaluated(seed=3), evaluated(max_prompt=30), evaluated(threshold=0.9),
        evaluated(examples=task.examples("train", 6), data=str(tmp_path / "a" / "test.csv")),
        evaluated(examples=task.examples("heldout", 6), data=str(tmp_path / "b" / "test.csv")),
    ]
    entries, files = entries_in(out), list((out / "generations").glob("*.json"))
    assert len(entries) == len(files) == 9 and entries[0] == first and entries[1:] == others
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert evaluated() == first and len(entries_in(out)) == 9  # the same figure again is one
    for entry in entries:
        [file] = [file for file in files if f"_{entry['stamp']}_32_16_0_generations.json" in file.name]
        assert file.name.startswith("sudoku_d1_") and len(json.loads(file.read_text())["generations"]) == entry["n"]
        assert {"model", "data", "limit", "block_length", "max_prompt", "preset", "seed"} <= entry.keys()
    assert sum("_test_" in file.name for file in files) == 2 and any("threshold_0.9" in file.name for file in files)


def test_evaluate_keeps_the_entries_of_an_earlier_version(tiny, quick, tmp_path, screen):
    old = [dict(task="sudoku", row="d1", gen_length=32, data=name, accuracy=0.5) for name in ("", "x.csv")]
    (tmp_path / "eval.json").write_text(json.dumps(old))
    task = d1.TASKS["sudoku"]
    new = d1.evaluate(*tiny, task, task.examples("test", 2), quick(), "d1", tmp_path, screen)
    assert entries_in(tmp_path) == old + new


def test_screen_writes_a_mean_reward_as_no_percentage(tmp_path, capsys):
    (tmp_path / "pay.py").write_text("n = 0\ndef f(prompts, **_):\n    global n\n    n += 1\n"
                                     "    return [29.9 if n <= 6 else 1.25] * len(prompts)\n")
    data = lines(tmp_path / "d.jsonl", [{"prompt": f"Say {i}"} for i in range(200)])
    assert run("--task", "custom", "--reward", f"{tmp_path / 'pay.py'}:f", "--data", data, "--skip_sft", "--skip_eval",
               "--limit", 6, "--steps_rl", 2, out=tmp_path / "o") == 0
    shown = capsys.readouterr().out
    assert "weights of step 0 kept: held-out mean reward 29.900, the best; the last, of step 2, had 1.250" in shown
    assert "%" not in shown.split("kept:")[1].splitlines()[0]


# ---- --grade
def graded(capsys, *flags):
    """The cells of the table that --grade prints, by file."""
    assert d1.main(["--grade", *map(str, flags)]) == 0
    rows = [re.findall(r"│? ([^│]+) │", line) for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_grade_reads_json_jsonl_names_and_the_files_of_several_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(d1, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    right, wrong = SAYS | {"generations": GOOD}, SAYS | {"generations": "<answer>17</answer>"}
    lines(tmp_path / "gsm8k_128.jsonl", [right, wrong, wrong, wrong])
    (tmp_path / "sub").mkdir()
    for i, rows in enumerate(([right, wrong], [right, right])):  # the official code, on two GPUs
        (tmp_path / "sub" / f"gsm8k_LLaDA_256_128_{i}_generations.json").write_text(json.dumps({"generations": rows}))
    ours = [right | {"effective_tokens": n, "ended": True} for n in (10, 11)]
    (tmp_path / "sub" / "gsm8k_d1_ab_64_32_0_generations.json").write_text(json.dumps({"generations": ours}))
    count = {"question": "?", "generations": "<answer>\\boxed{1+2}</answer>", "ground_truth": [[1, 2], 3]}
    lines(tmp_path / "countdown_x.jsonl", [count])
    (tmp_path / "config.json").write_text("{}")  # what else a folder may hold
    assert graded(capsys, tmp_path) == {
        "countdown_x": ["count", "1", "100.0 [21, 100]", "100.0 [21, 100]", "-"],
        "gsm8k_128": ["gsm8k", "4", "25.0 [5, 70]", "25.0 [5, 70]", "-"],
        "sub/gsm8k_LLaDA_256_128": ["gsm8k", "4", "75.0 [30, 95]", "75.0 [30, 95]", "-"],
        "sub/gsm8k_d1_ab_64_32": ["gsm8k", "2", "100.0 [34, 100]", "100.0 [34, 100]", "10.5"],
    }
    (tmp_path / "mine.jsonl").write_text((tmp_path / "gsm8k_128.jsonl").read_text())
    assert graded(capsys, "mine.jsonl", "--task", "gsm8k") == {"mine": ["gsm8k", "4", *["25.0 [5, 70]"] * 2, "-"]}
    assert list(graded(capsys, tmp_path, "--task", "count")) == ["countdown_x"]


@pytest.mark.parametrize(("name", "text", "word"), [
    ("gsm8k_x.jsonl", "{", "line 1"), ("gsm8k_x.json", "[1]", "gsm8k_x.json"), ("gsm8k_x.json", "{}", "generations"),
    ("gsm8k_x.json", '{"generations": {"a": 1}}', "no generations file"), ("gsm8k_x.jsonl", "", "no generations file"),
    ("gsm8k_x.jsonl", '{"question": "?", "generations": 5, "ground_truth": 1.0}\n', "no generations file of gsm8k"),
    ("gsm8k_x.jsonl", '{"question": "?"}\n', "ground_truth"), ("sudoku_x.json", "\xff", "sudoku_x.json"),
    ("other.json", "{}", "--task"), ("gsm8k.csv", "a,b\n1,2\n", "gsm8k.csv")])
def test_grade_of_what_is_no_generations_file_is_one_line(name, text, word, tmp_path, capsys):
    (tmp_path / name).write_text(text, encoding="latin-1")
    assert d1.main(["--grade", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and error.startswith("d1_full.py: error: ")


def test_grade_refuses_tasks_without_such_files_and_folders_without_any(tmp_path, capsys):
    for flags, word in ([tmp_path, "--task", "chat"], "not to chat"), ([tmp_path], "no file there"), (
            [tmp_path / "none.json"], "no file there"):
        assert d1.main(["--grade", *map(str, flags)]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1


def test_grade_of_the_published_generations(capsys):
    folder = ROOT.parent / "shared" / "data" / "generations"
    if not folder.is_dir():
        pytest.skip("the published generations are not here")
    table = graded(capsys, folder)
    official = {cells[0]: cells[3].split()[0] for cells in table.values()}
    assert official == {"count": "20.7", "gsm8k": "69.3", "math500": "26.0", "sudoku": "11.7"}
    assert {cells[0]: cells[1] for cells in table.values()} == {
        "count": "256", "gsm8k": "1130", "math500": "500", "sudoku": "256"}


# ---- --explain
@pytest.mark.parametrize("tag", ["eq1", "eq4", "sec3.1", "alg1", "alg2"])
def test_explain_prints_a_docstring_once(tag, capsys):
    assert d1.main(["--explain", tag]) == 0
    shown = capsys.readouterr().out
    place, name, _ = d1.tag_tables()[0][tag]
    for line in filter(None, map(str.strip, getattr(d1, name).__doc__.splitlines())):
        assert shown.count(line) == 1, line
    assert place in shown
