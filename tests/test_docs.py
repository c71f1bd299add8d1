"""Tables and body agree; the README's commands are commands.

PYTHONPATH=. python tests/test_docs.py prints the README's tables, made from d1_full.py.
"""

import ast
import importlib.util
import json
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


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readme_tables():
    """The README's tables of equations, sections and deviations."""
    (equations, deviations), rules = d1.tag_tables(), re.findall(r"^# %% (\d+)\. (.*?) — (.*)$", SOURCE, re.M)
    functions = {tag: dict.fromkeys(d1.places_of(tag, SOURCE).values()) for tag in deviations}
    places = {tag: ", ".join(f"`{n}`" for n in found if n != "Settings") for tag, found in functions.items()}
    return [markdown(["tag", "paper", "here", "what"],
                     [[tag, place, f"`{name}`", what] for tag, (place, name, what) in equations.items()]),
            markdown(["section", "holds", "source, or what for"], [list(rule) for rule in rules]),
            markdown(["tag", "here", "official code", "where"],
                     [[tag, *row, places[tag]] for tag, row in deviations.items()])]


def test_readmes_tables_are_made_from_the_file():
    for table in readme_tables():
        assert table.count("\n") > 7 and table in README, "PYTHONPATH=. python tests/test_docs.py prints:\n" + table


TAGS = [*d1.tag_tables()[0], "D1", "d16", "[D3]", "Eq. (4)", "algorithm 2"]


@pytest.mark.parametrize("tag", TAGS)
def test_explain_prints_formula_code_and_deviations(tag, capsys):
    assert d1.main(["--explain", tag]) == 0
    shown, (equations, deviations) = capsys.readouterr().out, d1.tag_tables()
    key = d1.tag_key(tag)
    if key in equations:
        place, name, _ = equations[key]
        doc = ast.get_docstring(d1.definitions(SOURCE)[name])
        assert place in shown and doc in shown  # the formula is in the docstring
        for part in d1.code_of(key, SOURCE)[0]:
            assert f"def {part.split('.')[-1]}(" in shown
    else:
        key = key.upper()
        assert all(text in shown for text in deviations[key]) and f"[{key}]" in shown
        assert all(f"{name}, line {n}" in shown for n, name in d1.places_of(key, SOURCE).items())


def test_explain_shows_what_an_equation_is_made_of(capsys):
    d1.main(["--explain", "eq4"])
    shown = capsys.readouterr().out
    assert "kl = d.exp() - d - 1" in shown and "[D1]" in shown and "--explain eq3" in shown
    d1.main(["--explain", "eq1"])
    assert "(ce * weight).sum()" in capsys.readouterr().out  # of the function that it calls
    d1.main(["--explain", "alg1"])
    assert "diffuse_steps(" in (shown := capsys.readouterr().out) and "self.apply_gradient()" in shown


def test_explain_alone_lists_the_tags_and_a_wrong_one_names_them(capsys):
    assert d1.main(["--explain"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for table in d1.tag_tables() for tag, row in table.items() for name in (tag, *row))
    assert d1.main(["--explain", "eq5"]) == 2
    assert "eq1" in (wrong := capsys.readouterr().err) and "D19" in wrong and wrong.count("\n") == 1


def test_every_figure_of_a_run_is_in_the_readmes_glossary(tiny, quick, tmp_path):
    cfg = quick(limit=2)
    d1.run_stages(cfg, d1.Screen(), tmp_path / "sudoku")
    logged = {key for row in d1.read_log(tmp_path / "sudoku" / "metrics.jsonl") for key in row}
    entry = json.loads((tmp_path / "sudoku" / "eval.json").read_text())[0]
    glossary = README.split("| metric | means |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w/]+)`", glossary))
    settings = {*d1.Settings.__annotations__, "task", "row", "model"}
    missing = {key.split("/")[0] for key in logged | entry.keys()} - named - settings
    assert not missing


def test_functions_are_short_documented_and_free_of_dead_ends():
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name
    assert SOURCE.count("\n") <= 3750 and not re.search(r"TODO|FIXME|XXX|NotImplementedError|except:", SOURCE)


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`(python d1_full\.py[^`]*)`", README)
    parts = [p.strip() for line in [*lines, *inline] for p in line.split("#")[0].split("&&")]
    return [p for p in parts if re.match(r"python d1_full\.py", p)]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_parse(command, monkeypatch):
    monkeypatch.setattr(d1, "resolve_checkpoint", lambda name: (name, name))  # a checkpoint comes from an earlier line
    monkeypatch.setattr(d1, "check_source", lambda source, kinds=(): source)
    monkeypatch.setattr(d1, "config_words", lambda path: [])
    here = importlib.util.find_spec("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here)  # optional packages
    if "--explain" in command or "--help" in command:
        return
    cfg, _ = d1.settle(d1.read_flags(shlex.split(command)[2:]))
    assert cfg.task or cfg.export


def test_readme_names_what_is_there():
    assert len(readme_commands()) >= 8 and "python -m pytest tests" in README
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert top - {"ckpt"} == {"d1_full.py", "requirements.txt", "env.yml", "README.md", "tests", "LICENSE"}


def test_both_environments_name_the_same_packages():
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = {line.replace("torch==", "pytorch-gpu==") for line in lines if line}
    conda = {line.strip()[2:] for line in (ROOT / "env.yml").read_text().splitlines() if line.startswith("  ")}
    own = {"conda-forge", "python=3.12", "flash-attn>=2.8", "pip", "pip:"}  # pip has what conda-forge may not have
    assert conda - wanted == own and wanted <= conda


if __name__ == "__main__":
    print("\n\n".join(readme_tables()))
