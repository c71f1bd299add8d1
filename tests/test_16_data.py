"""Data: files, public sets, text, chats, generated problems and demonstrations."""

import copy
import itertools
import json
import random
import re
import types

import pytest
from conftest import run

import d1_full as d1


def hub_sets(monkeypatch, **sets):
    """Stand-ins for public data sets: {name: {split: rows}}."""
    import datasets

    def load(name, config=None, *, split, streaming, data_files=None):
        return iter(sets[name.split("/")[1].replace("-", "_")][split])

    monkeypatch.setattr(datasets, "get_dataset_split_names",
                        lambda name, config=None: list(sets[name.split("/")[1].replace("-", "_")]))
    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.parametrize("name", d1.TASKS)
def test_demonstrations_are_right_if_careful_and_mostly_wrong_if_careless(name):
    task, rng = d1.TASKS[name], random.Random(0)
    examples = task.examples("train", 150)
    careful = [task.demonstrate(e, rng, True) for e in examples]
    careless = [task.demonstrate(e, rng, False) for e in examples]
    assert all(task.grade(t, e).correct for t, e in zip(careful, examples, strict=True))
    assert sum(task.grade(t, e).correct for t, e in zip(careless, examples, strict=True)) < 45

    def pay(texts):
        return sum(sum(task.rewards(t, e).values()) for t, e in zip(texts, examples, strict=True))

    assert pay(careful) > 1.3 * pay(careless)


def test_sudoku_grids_are_288_and_each_puzzle_has_one_solution():
    grids = d1.sudoku_grids()
    assert len(set(grids)) == 288
    for e in d1.TASKS["sudoku"].examples("test", 30):
        fits = [g for g in grids if all(p in ("0", c) for p, c in zip(e["puzzle"], g, strict=True))]
        assert fits == [e["solution"]] and e["puzzle"].count("0") == 8


def test_data_files_are_read_in_their_published_formats(tmp_path):
    files = {
        "gsm8k": ("a.jsonl", json.dumps({"question": "q", "answer": "work\n#### 1,072"}),
                  {"question": "q", "answer": "1072"}),
        "math500": ("a.jsonl", json.dumps({"problem": "p", "answer": "so $\\boxed{\\frac12}$"}),
                    {"problem": "p", "answer": "\\frac12"}),
        "count": ("a.jsonl", json.dumps({"input": "30,100,93", "output": "23"}),
                  {"numbers": [30, 100, 93], "target": 23}),
        "sudoku": ("a.csv", "Puzzle,Solution\n0102200002100320,3142243142131324",
                   {"puzzle": "0102200002100320", "solution": "3142243142131324"}),
    }
    for name, (file, text, want) in files.items():
        (tmp_path / file).write_text(text + "\n")
        assert d1.TASKS[name].examples("test", data=str(tmp_path / file)) == [want]
    with pytest.raises(d1.UserError, match="row 1: no column 'puzzle'; it has x"):
        (tmp_path / "b.jsonl").write_text('{"x": 1}\n')
        d1.TASKS["sudoku"].examples("test", data=str(tmp_path / "b.jsonl"))
    for missing in ("no.csv", "no.jsonl", "folder"):
        with pytest.raises(d1.UserError, match="no data file"):
            d1.TASKS["sudoku"].examples("test", data=missing)


@pytest.mark.parametrize("text,name", [("", "e.jsonl"), ("{", "b.jsonl"), ("", "e.csv"), ("x", "b.parquet")])
def test_data_files_that_cannot_be_read_are_one_line(text, name, tmp_path, capfd):
    (tmp_path / name).write_text(text)
    assert run("--task", "count", "--eval_only", "--data", tmp_path / name, out=tmp_path / "o") == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_data_files_from_a_spreadsheet_and_answers_that_are_no_numbers(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("\ufeffPuzzle,Solution\n0102200002100320,3142243142131324\n", encoding="utf-8")
    assert len(d1.TASKS["sudoku"].examples("test", data=str(tmp_path / "p.csv"))) == 1
    (tmp_path / "g.jsonl").write_text('{"question": "?", "answer": "#### abc"}\n')
    with pytest.raises(d1.UserError, match="row 1: no gsm8k problem"):
        d1.TASKS["gsm8k"].examples("test", data=str(tmp_path / "g.jsonl"))


def test_pack_keeps_text_whole_with_an_end_after_each(tiny):
    _, tokenizer = tiny
    texts = ["abc", "defgh", "ij"]
    rows = d1.pack(iter(texts), tokenizer, 4, 1000)
    eos = tokenizer.eos_token_id
    flat = [i for t in texts for i in (*tokenizer.encode(t, add_special_tokens=False), eos)]
    assert rows.shape == (3, 4) and rows.flatten().tolist() == flat[:12]
    endless = d1.pack(itertools.repeat("abc"), tokenizer, 8, 100)
    assert endless.shape == (12, 8)
    with pytest.raises(d1.UserError, match="not one row"):
        d1.pack(["a"], tokenizer, 4, 10)


def test_texts_of_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("plain text")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe")
    assert list(d1.texts_of(str(tmp_path))) == ["plain text", "one", "two"]
    assert list(d1.texts_of(str(tmp_path / "b.txt"))) == ["plain text"]
    (tmp_path / "e.csv").write_text("other\n1\n")
    with pytest.raises(d1.UserError, match="row 1: no column text"):
        list(d1.texts_of(str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(d1.UserError, match="holds no"):
        list(d1.texts_of(str(tmp_path / "empty")))


def test_texts_of_a_hub_set_are_streamed_as_far_as_they_are_needed(monkeypatch, tiny):
    import datasets
    asked, given = [], []
    def load_dataset(*name, split, streaming):
        assert name == ("some/corpus", "en") and split == "train" and streaming
        for i in itertools.count():
            given.append(i)
            yield {"text": f"document {i}"}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(d1, "ask_hub", lambda name, kind: asked.append((name, kind)))
    rows = d1.pack(d1.texts_of("some/corpus:en"), tiny[1], 16, 500)
    assert 480 <= rows.numel() <= 520 and len(given) < 60 and asked == [("some/corpus", "dataset")]


def test_texts_of_a_hub_set_without_texts_are_refused_by_row_and_columns(monkeypatch):
    hub_sets(monkeypatch, set={"train": [{"text": "good"}, {"body": "x"}]})
    texts = d1.texts_of("own/set")
    assert next(texts) == "good"
    with pytest.raises(d1.UserError, match="own/set, row 2: no column text; it has body"):
        next(texts)


def test_chat_turns_are_a_row_for_every_turn_of_the_assistant_that_ends_there(tiny):
    _, tokenizer = tiny
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "A1"}, {"role": "user", "content": "more"},
            {"role": "assistant", "content": "A2"}]
    first, second = d1.chat_turns(tokenizer, chat, 50)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(second[0]) == whole and tokenizer.decode(second[0][second[1] :]) == "A2<|endoftext|>"
    assert tokenizer.decode(first[0]) == whole[: whole.index("<|user|>more")]
    for bad in ("text", [{"role": "user"}], [{"role": "assistant", "content": "A"}], [1], None):
        assert d1.chat_turns(tokenizer, bad, 50) == [([], 50)]


def test_chat_turns_of_a_chat_that_the_template_refuses_are_a_malformed_row(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert d1.chat_turns(tokenizer, chat, 50) == [([], 50)]


def test_world_texts_hold_what_the_chat_asks_and_splits_share_no_question():
    text = " ".join(itertools.islice(d1.world_texts(0), 4000))
    task = d1.Talk()
    splits = {s: {task.key(e): e for e in task.examples(s, 600)} for s in ("train", "test")}
    assert not splits["train"].keys() & splits["test"].keys() and len(splits["test"]) > 20
    for example in splits["test"].values():  # nobody is asked for what the text does not tell
        told = example["question"].startswith(("Where", "Who", "I am"))
        assert not told or all(s.strip(". ") in text for s in re.findall(r"The \w+ [^.]*\.", example["answer"]))


def test_problems_of_public_sets_are_split(monkeypatch, quick):
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


def test_say_sizes_counts_problems_and_overlap():
    said = []
    screen = types.SimpleNamespace(say=said.append)
    a, b = ({"numbers": [n, 2, 3], "target": 6} for n in (1, 4))
    d1.say_sizes(d1.TASKS["count"], {"train": [a, a, b], "test": [{"numbers": [3, 1, 2], "target": 6}]}, screen)
    assert said == ["count problems: train 3 (2 different), test 1 (1 different); in two splits: 1"]
