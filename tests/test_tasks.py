"""Tasks: generated problems, rewards, both gradings, the tokenizer and the SFT border."""

import json
import random
import re

import pytest

import d1_full as d1

GOOD = "<reasoning>\n1+1=2\nso 2\n</reasoning>\n<answer>\n{}\n</answer>"


@pytest.mark.parametrize("name", d1.TASKS)
def test_splits_share_nothing_and_repeat(name):
    task, sizes = d1.TASKS[name], {"train": 300, "heldout": 100, "test": 100}
    keys = {split: {task.key(e) for e in task.examples(split, n)} for split, n in sizes.items()}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) > 50
    assert task.examples("test", 9) == task.examples("test", 9) != task.examples("test", 9, seed=1)


@pytest.mark.parametrize("name", d1.TASKS)
def test_careful_demonstrations_are_right_and_careless_ones_mostly_wrong(name):
    task, rng = d1.TASKS[name], random.Random(0)
    examples = task.examples("train", 150)
    careful = [task.demonstrate(e, rng, True) for e in examples]
    careless = [task.demonstrate(e, rng, False) for e in examples]
    assert all(task.grade(t, e).correct for t, e in zip(careful, examples, strict=True))
    assert sum(task.grade(t, e).correct for t, e in zip(careless, examples, strict=True)) < 45

    def pay(texts):
        return sum(sum(task.rewards(t, e).values()) for t, e in zip(texts, examples, strict=True))

    assert pay(careful) > 1.3 * pay(careless)


@pytest.mark.parametrize("name", d1.TASKS)
@pytest.mark.parametrize("mode", ["strict", "official"])
def test_records_are_graded_like_replies(name, mode):
    task, rng = d1.TASKS[name], random.Random(1)
    for example in task.examples("test", 20):
        text = task.demonstrate(example, rng, True)
        if mode == "official" and name == "count":  # its parser wants a box
            text = text.replace("<answer>\n", "<answer>\n\\boxed{").replace("\n</answer>", "}\n</answer>")
        row = {"question": task.question(example), "generations": text, "ground_truth": task.ground_truth(example)}
        row = json.loads(json.dumps(row))
        assert d1.grade_generation(name, row, mode).correct
        assert not d1.grade_generation(name, row | {"generations": "<answer>\nno\n</answer>"}, mode).correct


def test_all_288_grids_and_one_solution_each():
    grids = d1.sudoku_grids()
    assert len(set(grids)) == 288
    for e in d1.TASKS["sudoku"].examples("test", 30):
        fits = [g for g in grids if all(p in ("0", c) for p, c in zip(e["puzzle"], g, strict=True))]
        assert fits == [e["solution"]] and e["puzzle"].count("0") == 8


def test_sudoku_reports_cells_and_puzzles():
    e = {"puzzle": "0142243142131320", "solution": "3142243142131324"}
    half = d1.TASKS["sudoku"].grade(GOOD.format("3142243142131321"), e)
    assert (half.correct, half.score) == (False, 0.5)
    assert d1.TASKS["sudoku"].grade(GOOD.format("3142 2431\n4213 1324"), e).correct


@pytest.mark.parametrize("text,want", [
    ("3*50-7", True), ("(50*3) - 7", True), ("3×50-7", True), ("3\\times 50-7", True), ("7+50*3", False),
    ("3*50", None), ("3*50-7-7", None), ("9**9**9", None), ("3*50-7; import os", None), ("(" * 5000, None),
    ("__import__('os')", None), ("3*50-" + "7" * 100000, None), ("", None), (None, None), ("3/(50-50)-7", None),
    ("-" * 200 + "3*50-7", True), ("３*50-7", True),
])
def test_countdown_expressions(text, want):
    assert d1.reaches(text, {"numbers": [3, 7, 50], "target": 143}) is want


def test_countdown_is_exact_where_floats_are_not():
    assert d1.arithmetic("1/3*3") == 1 and d1.arithmetic("9**9**9") is None
    assert d1.reaches("1/3-1", {"numbers": [1, 1, 3], "target": -0.6666667}) is False


def test_rewards_set_right():
    gsm8k, example = d1.TASKS["gsm8k"], {"question": "", "answer": "1234"}
    several_lines = gsm8k.rewards(GOOD.format("1,234"), example)  # [D10] [D14]
    assert several_lines == {"correctness": 2.0, "int": 0.5, "strict_format": 0.5, "soft_format": 0.5,
                             "xmlcount": pytest.approx(0.5, abs=0.1)}
    official = gsm8k.rewards(GOOD.format("1,234"), example, official=True)
    assert (official["correctness"], official["int"], official["strict_format"]) == (0.0, 0.0, 0.0)
    twice = gsm8k.rewards("<reasoning>\na\n</reasoning>\n<answer>\n</answer>\n</answer>\n", example)
    assert twice["xmlcount"] == pytest.approx(0.365)  # ends that share a line break are counted from the left
    count = d1.TASKS["count"]
    e = {"numbers": [3, 7, 50], "target": 143}
    for text, ours, theirs in (("3*50-7", 1.0, 1.0), ("3+50-7", 0.1, 0.1), ("12", 0.0, 0.1)):  # [D11]
        assert count.rewards(GOOD.format(text), e) == {"countdown": ours}
        assert count.rewards(GOOD.format(text), e, official=True) == {"countdown": theirs}
    math = d1.TASKS["math500"].rewards(GOOD.format("\\boxed{7}"), {"problem": "", "answer": "7"})  # [D12]
    assert math == {"correctness": 2.0, "boxed_and_answer_tags": 1.0}


@pytest.mark.parametrize("text,want", [
    ("72", 72), ("1,234", 1234), ("$1,234.50", 1234.5), ("-3", -3), ("50%", 50), ("72.", 72), ("７２", 72),
    ("1,23", None), ("7 2", None), ("", None), (None, None), ("1e5", None), ("$", None), ("9" * 100, None),
])
def test_numbers_as_people_write_them(text, want):
    assert d1.parse_number(text) == want


def test_hostile_text_is_read_in_time():
    example = {"gsm8k": {"answer": "7"}, "math500": {"answer": "7"}, "count": {"numbers": [1, 2, 3], "target": 6},
               "sudoku": {"puzzle": "0142243142131324", "solution": "3142243142131324"}}
    for text in ("", "<answer>", "</answer><answer>", "\\boxed{" * 3000, "<answer>" * 3000, "9" * 99999, "\ud800"):
        for name, task in d1.TASKS.items():
            for official in (False, True):
                assert all(isinstance(v, float | int) for v in task.rewards(text, example[name], official).values())
            assert not task.grade(text, example[name]).correct


def test_data_files_in_their_published_formats(tmp_path):
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


def test_tokenizer_round_trip_and_short_prompts(tiny):
    tok = tiny[1]
    for text in ("Any text: é, 中, \t\n<answer>\n7\n</answer>", GOOD.format(7), d1.SYSTEM):
        assert tok.decode(tok(text)["input_ids"]) == text
    for task in d1.TASKS.values():
        example = task.examples("test", 1)[0]
        assert len(d1.encode_prompt(tok, task.messages(example))) <= 24  # an instruction is one token


def test_the_border_of_prompt_and_reply_is_exact(tiny):
    tok = tiny[1]
    task = d1.TASKS["count"]
    example = task.examples("test", 1)[0]
    reply = task.demonstrate(example, random.Random(0), True)
    ids, n = d1.encode_example(tok, task.messages(example), reply)
    assert ids[:n] == d1.encode_prompt(tok, task.messages(example))
    assert ids[-1] == tok.eos_token_id and tok.decode(ids[n:-1]) == reply


def test_replies_end_at_their_first_eos(tiny):
    import torch

    tok = tiny[1]
    rows = [tok("ab")["input_ids"] + [tok.eos_token_id] + tok("c")["input_ids"], tok("abcd")["input_ids"]]
    assert d1.reply_texts(tok, torch.tensor(rows)) == ["ab", "abcd"]


def test_wilson_interval_by_hand():
    low, high = d1.wilson(8, 10)  # (8 + 1.92 -+ 1.96 sqrt(1.6 + .9604)) / 13.84
    assert low == pytest.approx(0.4902, abs=2e-4) and high == pytest.approx(0.9433, abs=2e-4)
    assert d1.wilson(0, 10)[0] == 0 and d1.wilson(10, 10)[1] == 1


def test_no_eval_in_the_file():
    from pathlib import Path

    assert not re.search(r"(?<![\w.])(eval|exec)\(", Path(d1.__file__).read_text())


def test_strict_grading_of_large_numbers_and_of_decimal_points():
    row = {"question": "", "generations": GOOD.format("1450000"), "ground_truth": 1450000.0}
    assert d1.grade_generation("gsm8k", row).correct and d1.grade_generation("gsm8k", row, "official").correct
    example = {"numbers": [2, 2, 5], "target": 5}
    assert d1.TASKS["count"].rewards(GOOD.format("2.5*2"), example) == {"countdown": 0.0}  # not 2, 5 and 2
    assert d1.TASKS["count"].rewards(GOOD.format("2.5*2"), example, official=True) == {"countdown": 1.0}


@pytest.mark.parametrize("text,official,strict", [
    ("<answer>1+2+3</answer>", False, True),  # without a box the official parser takes the whole reply
    ("1+2+3", True, False), ("\\boxed{1+2+3}", True, True), ("\\boxed{1+2+3 = 6}", True, True),
    ("<answer>1+2+3</answer> \\boxed{2+", True, True),  # a box that never closes: the answer block
    ("\\boxed 1+2+3$ is it", True, False), ("\\fbox{1+2+3}", False, False), ("\\boxed{2**1+3}", False, False),
])
def test_where_the_official_countdown_parser_looks(text, official, strict):
    row = {"question": "", "generations": text, "ground_truth": [[1, 2, 3], 6]}
    assert d1.grade_generation("count", row, "official").correct is official
    assert d1.grade_generation("count", row).correct is strict


def test_official_countdown_takes_powers_and_does_not_hang():
    row = {"question": "", "generations": "\\boxed{3**2+1}", "ground_truth": [[1, 2, 3], 10]}
    assert d1.grade_generation("count", row, "official").correct and not d1.grade_generation("count", row).correct
    row = {"question": "", "generations": "\\boxed{9**9**9}", "ground_truth": [[9, 9, 9], 10]}
    assert not d1.grade_generation("count", row, "official").correct


@pytest.mark.parametrize("a,b,same", [
    ("50\\%", "50", True), ("50%", "50", False), ("\\frac12", "\\frac{1}{2}", True), ("\\sqrt3", "\\sqrt{3}", True),
    ("\\sqrt\\sqrt3", "\\sqrt{\\}sqrt3", False), ("x=5", "5", True), ("1/2", "\\frac{1}{2}", True), (".5", "0.5", True),
    ("5\\text{ cm}", "5", True), ("\\frac", "\\frac ", False),
])
def test_official_latex_equality(a, b, same):
    assert d1.equal_latex(a, b) is same


def test_which_of_several_answers_boxes_and_numbers_is_read():
    assert d1.last_answer("<answer>1</answer> <answer>2</answer> <answer>3") == "2"  # the last that closes
    assert d1.last_boxed(r"\boxed{1} or \boxed{2}") == "2"
    gsm8k, problem = d1.TASKS["gsm8k"], {"question": "?", "answer": "72"}
    assert gsm8k.grade("<answer>3 boxes, so 72 clips</answer>", problem).correct  # the last number said
    assert not gsm8k.grade("<answer>72 clips in 3 boxes</answer>", problem).correct
    assert gsm8k.grade("<answer>3, so 72</answer><answer>5</answer>", problem, official=True).correct  # of the first
    for answer, pays in (("12", 0.5), ("-12", 0.5), ("1,200", 0.5), ("12.0", 0.5), ("12.5", 0.0), ("twelve", 0.0)):
        assert gsm8k.rewards(f"<answer>{answer}</answer>", problem)["int"] == pays, answer
    math500 = d1.TASKS["math500"]
    beside, inside = r"\boxed{5}<answer>5</answer>", r"<answer>\boxed{5}</answer>"
    for reply, pays in ((beside, 0.75), (inside, 1.0), (r"\boxed{5}", 0.5)):
        assert math500.rewards(reply, {"problem": "?", "answer": "5"})["boxed_and_answer_tags"] == pays
    assert math500.grade(inside + r" \boxed{7}", {"problem": "?", "answer": "5"}).correct  # the answer's own box
    count, three = d1.TASKS["count"], {"numbers": [1, 2], "target": 3}
    unclosed = r"\boxed{ <answer>1+2</answer><answer>9</answer>"
    assert count.grade(unclosed, three, official=True).correct  # the first answer, as the box is none
    sudoku, puzzle = d1.TASKS["sudoku"], {"puzzle": "0102200002100320", "solution": "3142243142131324"}
    assert sudoku.rewards(f"<answer>1</answer><answer>{puzzle['solution']}</answer>", puzzle) == {"sudoku": 1.0}
    other = "3" + puzzle["solution"][1] + "3" + puzzle["solution"][3:]  # an empty cell is wrong
    given = puzzle["solution"][0] + "2" + puzzle["solution"][2:]  # a given one is changed
    assert not any(sudoku.grade(f"<answer>{digits}</answer>", puzzle).correct for digits in (other, given))
    assert sudoku.grade(f"<answer>{given}</answer>", puzzle).score == 1


def test_a_problem_is_the_same_in_any_order_and_in_every_process():
    key = d1.TASKS["count"].key
    assert key({"numbers": [3, 1, 2], "target": 6}) == key({"numbers": [1, 2, 3], "target": 6})
    letters = "".join(d1.split_of(f"count/{i}")[2] for i in range(30))  # of tr(a)in, he(l)dout, te(s)t
    assert letters == "aasaasaaaaaaaaaaalaassssaaaaaa"
