"""The official readers and protocol, kept as they are."""

import random
import re

import pytest
import torch
from conftest import EXAMPLES, PIECES, grpo

import d1_full as d1

EXAMPLE = {"numbers": [1, 2, 3], "target": 6}


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


@pytest.mark.parametrize("text,official,strict", [
    ("<answer>1+2+3</answer>", False, True),  # without a box the official parser takes the whole reply
    ("1+2+3", True, False), ("\\boxed{1+2+3}", True, True), ("\\boxed{1+2+3 = 6}", True, True),
    ("<answer>1+2+3</answer> \\boxed{2+", True, True),  # a box that never closes: the answer block
    ("\\boxed 1+2+3$ is it", True, False), ("\\fbox{1+2+3}", False, True), ("\\boxed{2**1+3}", False, False),
])
def test_official_countdown_parser_looks_here(text, official, strict):
    row = {"question": "", "generations": text, "ground_truth": [[1, 2, 3], 6]}
    assert d1.grade_generation("count", row, "official").correct is official
    assert d1.grade_generation("count", row).correct is strict


def test_official_countdown_takes_powers_and_does_not_hang():
    row = {"question": "", "generations": "\\boxed{3**2+1}", "ground_truth": [[1, 2, 3], 10]}
    assert d1.grade_generation("count", row, "official").correct and not d1.grade_generation("count", row).correct
    row = {"question": "", "generations": "\\boxed{9**9**9}", "ground_truth": [[9, 9, 9], 10]}
    assert not d1.grade_generation("count", row, "official").correct


def test_official_sudoku_looks_at_the_empty_cells_alone():
    solution = "3142243142131324"
    row = {"question": "Solve: 0142243142131320", "ground_truth": solution}
    for digits, official, strict in ((solution, True, True), ("3242" + solution[4:], True, False),
                                     ("1" + solution[1:], False, False)):  # a given cell is changed; an empty one
        reply = row | {"generations": f"<answer>\n{digits}\n</answer>"}
        assert d1.grade_generation("sudoku", reply, "official").correct is official
        assert d1.grade_generation("sudoku", reply).correct is strict


@pytest.mark.parametrize("a,b,same", [
    ("50\\%", "50", True), ("50%", "50", False), ("\\frac12", "\\frac{1}{2}", True), ("\\sqrt3", "\\sqrt{3}", True),
    ("\\sqrt\\sqrt3", "\\sqrt{\\}sqrt3", False), ("x=5", "5", True), ("1/2", "\\frac{1}{2}", True), (".5", "0.5", True),
    ("5\\text{ cm}", "5", True), ("\\frac", "\\frac ", False),
])
def test_official_latex_equality(a, b, same):
    assert d1.equal_latex(a, b) is same


def test_official_protocol_asks_an_expert_and_begins_the_reply(tiny, quick):
    task, tokenizer = d1.TASKS["gsm8k"], tiny[1]
    (ours,), _ = d1.evaluation_prompts(tokenizer, task, [{"question": "1+1?"}], quick("gsm8k", max_prompt=500))
    (theirs,), cut = d1.evaluation_prompts(tokenizer, task, [{"question": "1+1?"}], quick("gsm8k", preset="official"))
    ours, theirs = tokenizer.decode(ours), tokenizer.decode(theirs)
    assert d1.SYSTEM in ours and ours.endswith("<|assistant|>") and "expert" not in ours
    assert d1.EXPERT in theirs and theirs.endswith("<|assistant|><reasoning>") and d1.SYSTEM not in theirs and cut == 0
    math, _ = d1.evaluation_prompts(tokenizer, d1.TASKS["count"], [EXAMPLE], quick("count", preset="official"))
    assert d1.EXPERT + "\nUse each given number" in tokenizer.decode(math[0])


@pytest.mark.parametrize("preset", ["auto", "official"])
def test_official_preset_alone_shares_no_prompt_masks_in_a_group(preset, tiny, quick, tmp_path):
    trainer = grpo(quick(mu=3, bs_rl=4, pmask=0.5, preset=preset, beta=0.0, gen_length=32), tiny, tmp_path)
    masks = trainer.stage.roll_out(0, trainer).prompt_masks
    shared = [torch.equal(masks[:, i], masks[:, i + 1]) for i in (0, 2)]
    assert shared == [preset == "auto"] * 2
    assert not torch.equal(masks[:, 1], masks[:, 2]) and not torch.equal(masks[0], masks[1])
