"""The four tasks: splits, rewards and grades."""

import json
import random

import pytest
from conftest import GOOD

import d1_full as d1


@pytest.mark.parametrize("name", d1.TASKS)
def test_task_splits_share_nothing_and_repeat(name):
    task, sizes = d1.TASKS[name], {"train": 300, "heldout": 100, "test": 100}
    keys = {split: {task.key(e) for e in task.examples(split, n)} for split, n in sizes.items()}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) > 50
    assert task.examples("test", 9) == task.examples("test", 9) != task.examples("test", 9, seed=1)


@pytest.mark.parametrize("name", d1.TASKS)
@pytest.mark.parametrize("mode", ["strict", "official"])
def test_grade_generation_grades_records_like_replies(name, mode):
    task, rng = d1.TASKS[name], random.Random(1)
    for example in task.examples("test", 20):
        text = task.demonstrate(example, rng, True)
        if mode == "official" and name == "count":  # its parser wants a box
            text = text.replace("<answer>\n", "<answer>\n\\boxed{").replace("\n</answer>", "}\n</answer>")
        row = {"question": task.question(example), "generations": text, "ground_truth": task.ground_truth(example)}
        row = json.loads(json.dumps(row))
        assert d1.grade_generation(name, row, mode).correct
        assert not d1.grade_generation(name, row | {"generations": "<answer>\nno\n</answer>"}, mode).correct


def test_sudoku_reports_cells_and_puzzles():
    e = {"puzzle": "0142243142131320", "solution": "3142243142131324"}
    half = d1.TASKS["sudoku"].grade(GOOD.format("3142243142131321"), e)
    assert (half.correct, half.score) == (False, 0.5)
    assert d1.TASKS["sudoku"].grade(GOOD.format("3142 2431\n4213 1324"), e).correct


def test_task_rewards_are_set_right():
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


def test_grade_generation_reads_large_numbers_and_decimal_points():
    row = {"question": "", "generations": GOOD.format("1450000"), "ground_truth": 1450000.0}
    assert d1.grade_generation("gsm8k", row).correct and d1.grade_generation("gsm8k", row, "official").correct
    example = {"numbers": [2, 2, 5], "target": 5}
    assert d1.TASKS["count"].rewards(GOOD.format("2.5*2"), example) == {"countdown": 0.0}  # not 2, 5 and 2
    assert d1.TASKS["count"].rewards(GOOD.format("2.5*2"), example, official=True) == {"countdown": 1.0}


def test_task_grades_read_one_of_several_answers_boxes_and_numbers():
    assert d1.last_answer("<answer>1</answer> <answer>2</answer> <answer>3") == "2"  # the last that closes
    assert d1.last_boxed(r"\boxed{1} or \boxed{2}") == "2"
    gsm8k, problem = d1.TASKS["gsm8k"], {"question": "?", "answer": "72"}
    assert not gsm8k.grade("<answer>3 boxes, so 72 clips</answer>", problem).correct  # two numbers are a hedge
    assert gsm8k.grade("<answer>72 clips in 3 boxes</answer>", problem).correct  # a number and its unit
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


def test_split_of_a_problem_is_the_same_in_any_order_and_in_every_process():
    key = d1.TASKS["count"].key
    assert key({"numbers": [3, 1, 2], "target": 6}) == key({"numbers": [1, 2, 3], "target": 6})
    letters = "".join(d1.split_of(f"count/{i}")[2] for i in range(30))  # of tr(a)in, he(l)dout, te(s)t
    assert letters == "aasaasaaaaaaaaaaalaassssaaaaaa"


@pytest.mark.parametrize(("task", "row", "word"), [
    ("gsm8k", {"question": "a\ud800", "answer": "#### 3"}, "surrogates"),
    ("count", {"numbers": [1, 2, float("inf")], "target": 3}, "row 1"),
    ("count", {"numbers": None, "target": 3}, "row 1"),
    ("sudoku", {"Puzzle": "1", "Solution": "2"}, "16 digits"), ("math500", {"problem": 3, "answer": "1"}, "'problem'"),
])
def test_task_examples_name_rows_that_are_no_problem(task, row, word, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(d1.UserError, match=word):
        d1.TASKS[task].examples("test", data=str(tmp_path / "bad.jsonl"))
