"""Grading and rewards on any text: equality of mathematics, the official patterns in linear time, hostile strings."""

import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import d1_full as d1

ROOT = Path(d1.__file__).parent
PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "```", "1", "1234", "3142243142131324",
          "\\boxed{", "}", "{", "=", "+2", "(", ")", "x", ".", "<|eot_id|>", "<|endoftext|>", "\\fbox", "\\boxed ", "$"]
EXAMPLES = {"gsm8k": {"question": "?", "answer": "1234"}, "math500": {"problem": "?", "answer": "\\frac{1}{2}"},
            "count": {"numbers": [1, 2, 4], "target": 7},
            "sudoku": {"puzzle": "0142243142131320", "solution": "3142243142131324"}}


@pytest.mark.parametrize(("found", "gold", "same"), [
    ("0.5", "\\frac{1}{2}", True), ("\\frac{3}{6}", "\\frac12", True), ("(1,2)", "(1, 2)", True),
    ("x+1", "1+x", True), ("\\sqrt{8}", "2\\sqrt{2}", True), ("\\text{C}", "\\text{(C)}", True),
    ("1,234", "1234", True), ("1{,}234", "1234", True), ("10\\%", "10", True), ("[2,3)", "[2,3]", False),
    ("\\frac{1}{3}", "0.5", False), ("x", "y", False), ("", "5", False), ("\\frac{1}{", "5", False),
    ("3\\pi", "3", False), ("-1", "1", False), ("(2,1)", "(1,2)", False),
])
def test_equality_of_mathematics(found, gold, same):
    assert d1.same_mathematics(found, gold) == same
    assert d1.TASKS["math500"].grade(f"so \\boxed{{{found}}}", {"answer": gold}).correct == same


def test_an_answer_that_takes_too_long_ends_the_worker_and_the_next_is_graded():
    assert d1.same_mathematics("x+1", "1+x")
    first = d1.math_worker()
    assert not d1.same_mathematics("(x+1)^{400}", "1+x", limit=0.001)  # no answer in no time
    assert first.poll() is not None and d1.same_mathematics("x+1", "1+x") and d1.math_worker() is not first


def test_a_worker_that_was_killed_is_replaced_and_threads_do_not_meet():
    d1.math_worker().kill()
    assert d1.same_mathematics("\\sqrt{9}", "\\frac{6}{2}")
    pairs = [(f"x+{i % 7}", f"{i % 5}+x") for i in range(60)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda p: d1.same_mathematics(*p), pairs)) == [i % 7 == i % 5 for i in range(60)]


def test_the_worker_starts_from_a_bare_script(tmp_path):
    (tmp_path / "t.py").write_text("import d1_full\nprint(d1_full.same_mathematics('x+1', '1+x'))\n")
    done = subprocess.run([sys.executable, str(tmp_path / "t.py")], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n" and done.returncode == 0


def test_official_formats_are_the_official_patterns_on_random_text():
    """The plain patterns of the official rewards and parsers, which take quadratic time, against the linear ones."""
    rng, seen = random.Random(0), {"soft": 0, "strict": 0, "five": 0, "equation": 0, "boxes": 0}
    task, sudoku = d1.TASKS["gsm8k"], d1.TASKS["sudoku"]
    for i in range(6000):
        text = "".join(rng.choices(PIECES[: 8 if i % 2 else len(PIECES)], k=rng.randint(1, 14)))
        if i % 3 == 1:
            text = "<reasoning>" + "".join(rng.choices([*PIECES[1:5], "</reasoning><answer>"], k=rng.randint(1, 8)))
        if i % 3 == 0:
            text = f"<reasoning>\n{text}\n</reasoning>\n<answer>\n1\n</answer>{rng.choice(['', chr(10), 'x'])}"
        for official, flags, final in ((True, 0, "\n$"), (False, re.DOTALL, "\n?$")):
            paid = task.rewards(text, EXAMPLES["gsm8k"], official)
            strict = re.match(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>" + final, text, flags)
            soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text, flags)
            assert (paid["strict_format"], paid["soft_format"]) == (0.5 * bool(strict), 0.5 * bool(soft)), text
            seen["soft"] += bool(soft)
            seen["strict"] += bool(strict)
        patterns = (r"<answer>.*?```\s*([\d\s]+)```", r"<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)",
                    r"</answer>\s*(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)", r"(\d{16})\s*</answer>", r"\b(\d{16})\b")
        hits = [m[1].strip() for m in (re.search(p, text, re.DOTALL) for p in patterns) if m and m[1].strip()]
        assert sudoku.grade(text, EXAMPLES["sudoku"], official=True).answer == (hits[0] if hits else None), text
        seen["five"] += bool(hits)
        blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        assert d1.answers(text) == [block.strip() for block in blocks]
        boxed = "".join(rng.choices(["\\boxed{", "7", "23", "}", "\n", "x", ".5", "-", "{"], k=9))
        boxes = [re.findall(r"-?\d+\.?\d*", content)[:1] for content in re.findall(r"\\boxed{(.*?)}", boxed)]
        number = next((n[0] for n in boxes if n), None)
        if number and "{.5" not in boxed and "{-.5" not in boxed:  # which float() takes as they are
            assert float(task.grade(boxed, EXAMPLES["gsm8k"], official=True).answer) == float(number), boxed
            seen["boxes"] += 1
        sums = "".join(rng.choices(["1", "23", "+", "-", "=", " ", "*", "(", "x", "."], k=9))
        if equation := re.search(r"([0-9+\-*/() ]+)=[0-9. ]+", sums):
            assert d1.TASKS["count"].grade(sums, EXAMPLES["count"], official=True).answer == equation[1].strip(), sums
            seen["equation"] += 1
    assert min(seen.values()) > 100, seen


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


def all_readings(name: str, text: str):
    """Every reward and grader of a task on a text: (what, seconds)."""
    task, example = d1.TASKS[name], EXAMPLES[name]
    row = {"question": example.get("puzzle", "?"), "generations": text, "ground_truth": task.ground_truth(example)}
    for what, call in (("rewards", lambda: task.rewards(text, example)),
                       ("official rewards", lambda: task.rewards(text, example, official=True)),
                       ("strict grade", lambda: d1.grade_generation(name, row)),
                       ("official grade", lambda: d1.grade_generation(name, row, "official"))):
        seconds = []
        while not seconds or (seconds[-1] > 0.05 and len(seconds) < 4):  # again if other work may have been in the way
            began = time.process_time()
            call()
            seconds.append(time.process_time() - began)
        yield what, min(seconds)


@pytest.mark.parametrize("name", EXAMPLES)
def test_hostile_text_takes_no_time_and_raises_nothing(name):
    d1.math_worker()
    read = [(seconds, what, text[:30]) for text in hostile() for what, seconds in all_readings(name, text)]
    assert max(read)[0] < 0.1, max(read)  # 50 ms on a quiet machine


@pytest.mark.parametrize("name", EXAMPLES)
def test_random_text_is_graded_without_an_exception(name):
    rng = random.Random(name)
    for i in range(1500):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 25)))
        if i % 4 == 0:
            text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(30))
        for what, seconds in all_readings(name, text):
            assert seconds < 0.1, (what, text)
