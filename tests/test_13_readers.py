"""Readers of a reply: numbers, expressions, equality of mathematics, hostile text."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import EXAMPLES, PIECES, ROOT

import d1_full as d1


def hostile(size: int = 1_000_000):
    """Strings made to hurt a parser, up to a megabyte each."""
    yield from ("9" * size, "{" * size, "\\boxed{" * (size // 7), "\\boxed{" + "{" * size, "(" * size, " " * size,
                "<answer>" * (size // 8), "<reasoning>" + "</reasoning><answer>" * (size // 20),
                "</answer>" * (size // 9), "<answer>" + "1" * size + "</answer>", "1=" * (size // 2), "1" * size + "x=",
                "<answer>" + "(" * size + "</answer>", "```" * (size // 3), "1" * size + " " * size + "</answer>",
                "<answer>```" + " " * size, "\\frac1{" * (size // 7), "\\sqrt" * (size // 5))
    for inner in ("9**9**9**9", "9^{9^{9^{9}}}", "(1)" * 90, "-" * 290 + "1", "10000!", "\ud800", "\u202e123", "½",
                  "١٢٣٤", "²", "𝟙𝟚", "1e999", "0x10", "1_000", "\x00", "1/0", "()" * 99, "\\frac{1}{0}", "1" * 5000,
                  "\\binom{10000}{5000}", "\\sum_{k=1}^{99999}k", "{" * 300, "1+2+4", "(1+2)*4-5=7", "∞", "nan",
                  "\uff11\uff12"):
        for frame in ("{}", "<answer>\n{}\n</answer>", "<answer>\\boxed{{{}}}</answer>", "\\boxed {}$"):
            yield frame.format(inner)


def readings(name: str, text: str):
    """Every reward and grader of a task on a text."""
    task, example = d1.TASKS[name], EXAMPLES[name]
    row = {"question": example.get("puzzle", "?"), "generations": text, "ground_truth": task.ground_truth(example)}
    yield task.rewards(text, example)
    yield task.rewards(text, example, official=True)
    yield d1.grade_generation(name, row)
    yield d1.grade_generation(name, row, "official")


@pytest.fixture
def in_linear_time():
    """Context that a reader leaves by an error if it takes 2 s of computing, which is 40 times what a megabyte needs.

    A reader that tries again where it stopped takes hours for a megabyte.
    """
    def too_long(number, frame):
        raise TimeoutError("the text takes more than linear time")

    @contextlib.contextmanager
    def limit(seconds=2.0):
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # of this process alone, whatever else the machine does
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    before = signal.signal(signal.SIGVTALRM, too_long)
    yield limit
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize(("found", "gold", "same"), [
    ("0.5", "\\frac{1}{2}", True), ("\\frac{3}{6}", "\\frac12", True), ("(1,2)", "(1, 2)", True),
    ("x+1", "1+x", True), ("\\sqrt{8}", "2\\sqrt{2}", True), ("\\text{C}", "\\text{(C)}", True),
    ("1,234", "1234", True), ("1{,}234", "1234", True), ("10\\%", "10", True), ("[2,3)", "[2,3]", False),
    ("\\frac{1}{3}", "0.5", False), ("x", "y", False), ("", "5", False), ("\\frac{1}{", "5", False),
    ("3\\pi", "3", False), ("-1", "1", False), ("(2,1)", "(1,2)", False),
])
def test_same_mathematics_knows_equal_answers(found, gold, same):
    assert d1.same_mathematics(found, gold) == same
    assert d1.TASKS["math500"].grade(f"so \\boxed{{{found}}}", {"answer": gold}).correct == same


def test_same_mathematics_ends_a_worker_that_takes_too_long_and_grades_the_next():
    assert d1.same_mathematics("x+1", "1+x")
    first = d1.math_worker()
    assert not d1.same_mathematics("(x+1)^{400}", "1+x", limit=0.001)  # no answer in no time
    assert first.poll() is not None and d1.same_mathematics("x+1", "1+x") and d1.math_worker() is not first


def test_math_worker_that_was_killed_is_replaced_and_threads_do_not_meet():
    d1.math_worker().kill()
    assert d1.same_mathematics("\\sqrt{9}", "\\frac{6}{2}")
    pairs = [(f"x+{i % 7}", f"{i % 5}+x") for i in range(60)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda p: d1.same_mathematics(*p), pairs)) == [i % 7 == i % 5 for i in range(60)]


def test_math_worker_starts_from_a_bare_script(tmp_path):
    (tmp_path / "t.py").write_text("import d1_full\nprint(d1_full.same_mathematics('x+1', '1+x'))\n")
    done = subprocess.run([sys.executable, str(tmp_path / "t.py")], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n" and done.returncode == 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_readers_take_linear_time_on_hostile_text_and_raise_nothing(name, in_linear_time):
    d1.math_worker()
    for text in hostile():
        made = readings(name, text)
        for _ in range(4):
            with in_linear_time():
                assert next(made)


def test_readers_that_are_not_linear_are_found(in_linear_time):
    """The limit of the tests around this one ends a pattern of the official code on one of their texts."""
    text = next(text for text in hostile() if text.startswith("<answer><answer>"))
    with pytest.raises(TimeoutError), in_linear_time(0.3):
        re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)


@pytest.mark.parametrize("name", EXAMPLES)
def test_readers_grade_random_text_without_an_exception(name, in_linear_time):
    rng = random.Random(name)
    for i in range(1500):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 25)))
        if i % 4 == 0:
            text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(30))
        with in_linear_time():
            *rewards, strict, official = readings(name, text)
        for paid in rewards:
            assert all(isinstance(value, int | float) for value in paid.values()), text
        for grade in (strict, official):
            assert 0 <= grade.score <= 1 and grade.correct in (False, True), text
            assert isinstance(grade.answer, str | None), text


def test_readers_read_hostile_text_in_time():
    example = {"gsm8k": {"answer": "7"}, "math500": {"answer": "7"}, "count": {"numbers": [1, 2, 3], "target": 6},
               "sudoku": {"puzzle": "0142243142131324", "solution": "3142243142131324"}}
    for text in ("", "<answer>", "</answer><answer>", "\\boxed{" * 3000, "<answer>" * 3000, "9" * 99999, "\ud800"):
        for name, task in d1.TASKS.items():
            for official in (False, True):
                assert all(isinstance(v, float | int) for v in task.rewards(text, example[name], official).values())
            assert not task.grade(text, example[name]).correct


@pytest.mark.parametrize("text,want", [
    ("3*50-7", True), ("(50*3) - 7", True), ("3×50-7", True), ("3\\times 50-7", True), ("7+50*3", False),
    ("3*50", None), ("3*50-7-7", None), ("9**9**9", None), ("3*50-7; import os", None), ("(" * 5000, None),
    ("__import__('os')", None), ("3*50-" + "7" * 100000, None), ("", None), (None, None), ("3/(50-50)-7", None),
    ("-" * 200 + "3*50-7", True), ("３*50-7", True),
])
def test_reaches_reads_countdown_expressions(text, want):
    assert d1.reaches(text, {"numbers": [3, 7, 50], "target": 143}) is want


def test_arithmetic_is_exact_where_floats_are_not():
    assert d1.arithmetic("1/3*3") == 1 and d1.arithmetic("9**9**9") is None
    assert d1.reaches("1/3-1", {"numbers": [1, 1, 3], "target": -0.6666667}) is False
