"""Tables and body agree; the README's commands are commands."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import d1_full as d1

ROOT = Path(d1.__file__).parent
SOURCE = (ROOT / "d1_full.py").read_text()
HEAD, BODY = d1.__doc__, SOURCE.split('"""', 2)[2]
README = (ROOT / "README.md").read_text()
SECTIONS = ["Imports", "Settings", "Forward process", "Masked SFT loss", "One-step estimator", "diffu-GRPO",
            "Block decoder", "Models", "Tokenizer", "Tasks", "The two stages", "Evaluation", "Checkpoint", "Screen",
            "Chat", "Main"]


def test_each_equation_stands_in_one_docstring_that_of_its_function():
    table = dict(re.findall(r"^    d1 (\S.*?\S)  +(\w+)", HEAD, re.M))
    assert len(table) == 7
    docs = {n.name: " ".join((ast.get_docstring(n) or "").split()) for n in ast.walk(ast.parse(SOURCE))
            if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    tagged = {}
    for name, doc in docs.items():
        for tag in re.findall(r"d1 ((?:(?:Eq\. \(\d\)|Algorithm \d), )?Sec\. \d(?:\.\d)?)", doc):
            assert tag not in tagged, f"{tag} stands in {tagged[tag]} and {name}"
            tagged[tag] = name
    assert tagged == table


def test_deviation_tags_of_table_and_body_are_the_same():
    table = re.findall(r"^    (D\d+)  ", HEAD, re.M)
    assert table == [f"D{i}" for i in range(1, 20)]
    assert set(re.findall(r"\[(D\d+)\]", BODY)) == set(table)


def test_sections_in_order_and_the_mathematics_short_and_pure():
    rules = re.findall(r"^# %% (\d+)\. (.*)$", SOURCE, re.M)
    assert [int(n) for n, _ in rules] == [*range(1, 17)]
    assert all(title.startswith(want) for (_, title), want in zip(rules, SECTIONS, strict=True))
    parts = re.split(r"^# %% \d+\..*$", SOURCE, flags=re.M)
    mathematics = "".join(parts[3:7])
    assert mathematics.count("\n") < 300 and not re.search(r"\bimport\b|\bglobal\b|print\(", mathematics)
    assert not re.search(r"manual_seed|\bopen\(", mathematics)


def test_functions_are_short_documented_and_free_of_dead_ends():
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name
    assert SOURCE.count("\n") <= 3550 and not re.search(r"TODO|FIXME|XXX|NotImplementedError|except:", SOURCE)


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [p.strip() for line in lines for p in line.split("#")[0].split("&&")]
    return [p for p in parts if re.match(r"python d1_full\.py", p)]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_parse(command, monkeypatch):
    monkeypatch.setattr(d1, "resolve_checkpoint", lambda name: (name, name))  # a checkpoint comes from an earlier line
    monkeypatch.setattr(d1, "check_source", lambda source, kinds=(): source)
    monkeypatch.setattr(d1, "config_words", lambda path: [])
    here = importlib.util.find_spec("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here)  # optional packages
    cfg, _ = d1.settle(d1.read_flags(shlex.split(command)[2:]))
    assert cfg.task or cfg.export


def test_readme_names_what_is_there():
    assert len(readme_commands()) >= 8 and "python -m pytest tests" in README
    for tag in re.findall(r"^    (D\d+)  ", HEAD, re.M):
        assert re.search(rf"\b{tag}\b", README)
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert top - {"ckpt"} == {"d1_full.py", "requirements.txt", "env.yml", "README.md", "tests", "LICENSE"}


def test_both_environments_name_the_same_packages():
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = {line.replace("torch==", "pytorch-gpu==") for line in lines if line}
    conda = {line.strip()[2:] for line in (ROOT / "env.yml").read_text().splitlines() if line.startswith("  ")}
    own = {"conda-forge", "python=3.12", "flash-attn>=2.8", "pip", "pip:"}  # pip has what conda-forge may not have
    assert conda - wanted == own and wanted <= conda
