"""What counts as right: cases of replies, graded and paid by one reader, and what a data file may hold."""

import json
import random
import time
from fractions import Fraction

import pytest
from conftest import DATA, PIECES

import d1_full as d1

IN_FULL = {"gsm8k": ("correctness", 2.0), "math500": ("correctness", 2.0), "count": ("countdown", 1.0),
           "sudoku": ("sudoku", 1.0)}  # the main reward of a task, and how much it is
EXAMPLE = {"gsm8k": {"question": "?", "answer": "18"}, "math500": {"problem": "?", "answer": "\\frac{1}{2}"},
           "count": {"numbers": [1, 2, 4], "target": 7},
           "sudoku": {"puzzle": "0142243142131320", "solution": "3142243142131324"}}


def read_both(task, example, reply):
    """Whether a reply is graded right, and whether its main reward is paid in full."""
    name, full = IN_FULL[task]
    return d1.TASKS[task].grade(reply, example).correct, d1.TASKS[task].rewards(reply, example)[name] == full


@pytest.mark.parametrize("file", ["grading.jsonl", "grading_more.jsonl"])
def test_replies_are_graded_and_paid_as_the_cases_say(file):
    cases = [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]
    wrong = [case for case in cases
             if read_both(case["task"], case["example"], case["reply"]) != (case["correct"], case["correct"])]
    assert len(cases) > 200 and not wrong, wrong


@pytest.mark.parametrize(("text", "value"), [
    ("72", 72), ("1,234", 1234), ("$1,234.50", 1234.5), ("-3", -3), ("50%", 50), ("72.", 72), ("７２", 72),
    ("1,23", None), ("7 2", None), ("", None), (None, None), ("1e5", None), ("$", None), ("1 million", 10**6),
    ("1.5 million", 1_500_000), ("1.25 million", None), ("3 dozen", 3), ("-2½", -2.5), ("1/3", Fraction(1, 3)),
    ("9" * 1001, None), ("word " * 190 + "is 5", 5),
])
def test_read_number_reads_one_number(text, value):
    assert d1.read_number(text) == value


@pytest.mark.parametrize(("text", "values"), [
    ("1+2", {"1+2": 3}), ("so 1+2 = 3", {"1+2": 3, "3": 3}), ("3 = 2(4)-5 (= 3)", {"3": 3, "2*(4)-5": 3}), ("1+", {}),
    ("\\frac{1}{2}:4", {"((1)/(2))/4": Fraction(1, 8)}), ("no", {}), (None, {}), ("1+2 or 3", {}), ("2^3", {}),
])
def test_read_expression_reads_parts_and_their_values(text, values):
    assert d1.read_expression(text) == values


@pytest.mark.parametrize(("text", "digits"), [
    ("Row 1: 31\nRow 2: 24", "3124"), ("1) 3 1 4 2\n2) 2 4", "3142224"), ("3|1\n0 5", "3105"), ("4x4: 31", "31"),
    ("３１", "31"), ("", ""), (None, ""), ("1" * 1001, ""),
])
def test_read_grid_reads_digits_and_no_labels(text, digits):
    assert d1.read_grid(text) == digits


def test_rewards_besides_the_main_one_read_the_same_answer():
    gsm8k, count, sudoku = (d1.TASKS[name] for name in ("gsm8k", "count", "sudoku"))
    for answer, pays in (("\\boxed{12}", 0.5), ("$1,200", 0.5), ("12.0", 0.5), ("12.5", 0), ("twelve", 0),
                         ("1 or 2", 0)):
        assert gsm8k.rewards(f"<answer>{answer}</answer>", EXAMPLE["gsm8k"])["int"] == pays, answer
    for answer, pays in (("1+2+4 = 7", 1), ("1+2-4", 0.1), ("1+2+4 = 8", 0.1), ("1+2", 0), ("1+2=3; 3+4=7", 0),
                         ("7", 0)):
        assert count.rewards(f"<answer>{answer}</answer>", EXAMPLE["count"]) == {"countdown": pays}, answer
    solution, puzzle = EXAMPLE["sudoku"]["solution"], EXAMPLE["sudoku"]
    for answer, pays in ((solution, 1), (solution + "1", 15 / 16), (solution[:4] + "1" + solution[5:], 15 / 16),
                         (solution[:15], 0.5), ("2" + solution[1:], 0.5), ("", 0)):
        assert sudoku.rewards(f"<answer>{answer}</answer>", puzzle) == {"sudoku": pays}, answer


def test_sudoku_counts_cells_by_the_solution_of_the_file():
    example = {"puzzle": "2100031004211000", "solution": "2143431234211234"}
    grade = d1.TASKS["sudoku"].grade("<answer>2134431234211243</answer>", example)  # another solution
    assert grade.correct and 0 < grade.score < 1


def test_same_mathematics_needs_no_fast_machine(monkeypatch):
    asked = []
    monkeypatch.setattr(d1, "math_verify_says", lambda found, gold, limit: asked.append(limit))
    d1.same_mathematics("x+1", "1+x")
    assert asked == [5.0]  # CPU seconds: the hardest of the recorded replies takes .3 on a slow core
    for found, gold in (("1/2", "0.5"), ("3 1/2", "3.5"), ("x", "x"), ("9^{9^{9}}", "1"), ("(" * 50, "1"),
                        ("x" * 301, "1")):
        d1.same_mathematics(found, gold)
    assert len(asked) == 1  # what needs no process, or is hopeless, is not handed to it


@pytest.mark.parametrize("reply,paid", [
    ("30+100-93", 1.0), ("(30+\n100-93)", 1.0), ("30+\n100-93", 0.1), ("30+100-93\n37", 0.1), ("30 +\t100-93", 1.0),
])
def test_official_countdown_reward_refuses_a_line_break_as_eval_does(reply, paid):
    example = {"numbers": [30, 100, 93], "target": 37}
    reply = f"<answer>\n{reply}\n</answer>"
    assert d1.TASKS["count"].rewards(reply, example, official=True) == {"countdown": paid}


@pytest.mark.parametrize(("task", "row", "example"), [
    ("gsm8k", {"question": "?", "answer": "so\n#### 1,234"}, {"question": "?", "answer": "1234"}),
    ("gsm8k", {"question": "?", "answer": "−0.5"}, {"question": "?", "answer": "-0.5"}),
    ("math500", {"problem": "?", "answer": "so $\\boxed{\\frac{1}{2}}$"}, {"problem": "?", "answer": "\\frac{1}{2}"}),
    ("count", {"numbers": [44, 19, 35], "target": 98}, {"numbers": [44, 19, 35], "target": 98}),
    ("count", {"nums": "[44, 19, 35]", "target": "98"}, {"numbers": [44, 19, 35], "target": 98}),
    ("count", {"numbers": "44 19 35", "target": " 98"}, {"numbers": [44, 19, 35], "target": 98}),
    ("count", {"input": "44,19, 35", "output": "-10"}, {"numbers": [44, 19, 35], "target": -10}),
    ("count", {"numbers": ["44", "19", "35"], "target": 98}, {"numbers": [44, 19, 35], "target": 98}),
    ("sudoku", {"Puzzle": 142243142131320, "Solution": 3142243142131324}, EXAMPLE["sudoku"]),
])
def test_data_files_are_read_by_the_readers(task, row, example):
    assert d1.TASKS[task].parse(row) == example


@pytest.mark.parametrize(("task", "row", "reason"), [
    *(("gsm8k", {"question": "?", "answer": f"#### {gold}"}, "no plain number") for gold in (
        "1/2", "1e3", "1_000", "70,00", "eighteen", "18 or 19", "18 eggs", "nan", "", "--5", "5-", "2.5.1")),
    *(("math500", {"problem": "?", "answer": gold}, "empty") for gold in (
        "", " ", "\\boxed{}", "\\boxed{7", "x" * 1001)),
    *(("count", {"numbers": numbers, "target": target}, "whole") for numbers, target in (
        ([44, 19, 35], 37.5), ([44, 19, 35], True), ([44, 19, 35], "1e2"), ([44, 19, 35], None), ([44, 1.5, 35], 98),
        ([44, True, 35], 98), ([44, -19, 35], 98), ("441935", 98), ("[441935]", 98), ("44;19", 63), ([44], 44), ([], 1),
        (None, 3), ("44, x, 35", 98), ([44, 19, "9" * 30], 98))),
    *(("sudoku", {"Puzzle": puzzle, "Solution": solution}, "must solve the puzzle") for puzzle, solution in (
        ("0142243142131320", "3142243142131342"), ("1142243142131320", "3142243142131324"), ("01", "3142243142131324"),
        ("0142243142131320", "314224314213132"), ("5142243142131320", "3142243142131324"))),
])
def test_data_files_may_not_hold_what_no_reply_could_match(task, row, reason, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(d1.UserError, match=f"row 1: no {task} problem: .*{reason}"):
        d1.TASKS[task].examples("test", data=str(tmp_path / "rows.jsonl"))


MORE_PIECES = [*PIECES, "18", "7", "1+2+4", "0.5", "\\frac{1}{2}", "½", "²", "−", "×", "÷", "√", "\\sqrt", "\\text{",
               "€", "!", "_", "^", "%", ":", ";", ",", " eggs", " or ", " and ", " for 2", "the answer is ", "Row 1: ",
               "\u2009", "\u200b", "\ud800", "\x00", "３", "٣", "①", "≈", "<", "≥", "\\pm ", "**", "#### ", "\\\\", "'"]


def random_texts(seed, n):
    """Texts of pieces that readers look for, and of any characters at all, most of them in a block or a box."""
    rng = random.Random(seed)
    for i in range(n):
        text = "".join(rng.choices(MORE_PIECES, k=rng.randint(0, 14)))
        if i % 5 == 0:
            text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(40))
        yield ("{}", "<answer>{}</answer>", "\\boxed{{{}}}")[i % 3].format(text)


@pytest.mark.parametrize("name", EXAMPLE)
def test_random_replies_are_graded_right_if_and_only_if_they_are_paid_in_full(name, monkeypatch):
    judged = {}  # math-verify's part is drawn here, and asked below
    monkeypatch.setattr(d1, "math_verify_says", lambda *pair: judged.setdefault(pair, len(judged) % 2 == 0))
    right = 0
    for text in random_texts(name, 25000):
        correct, paid = read_both(name, EXAMPLE[name], text)
        assert correct == paid, text
        right += correct
    assert right > 20  # some are


def test_random_replies_in_math_verify_are_graded_as_they_are_paid():
    assert all(len(set(read_both("math500", EXAMPLE["math500"], text))) == 1 for text in random_texts("verify", 400))


@pytest.mark.parametrize("unit", [
    "1", "1 ", "1,000,", "1 000 ", "=", "1=", "answer:", "-", "- ", "1/", "1st ", "½", "1½", "√", "³", "\\frac",
    "\\frac{1}{", "\\text{", "\\boxed{", "(", "{", "[", "1(", "**", "1**", "1x", "1:", "and ", "1 and ",
    "1 apples for ", "x^{2", "2^", "1!", "\\pm ", "\\in ", "a is ", "1 cm", "Row 1 ", "1\n", " ", "<answer>",
    "</answer>",
])
def test_readers_take_linear_time(unit):
    for size in (990, 1_000_000):
        for frame in ("<answer>{}</answer>", "<answer>\\boxed{{{}}}</answer>", "{}"):
            text = frame.format(unit * (size // len(unit)))
            for name, task in d1.TASKS.items():
                began = time.process_time()
                task.grade(text, EXAMPLE[name])  # quadratic time would take minutes
                assert time.process_time() - began < 2, (name, size, frame)
