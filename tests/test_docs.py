"""The form of the file: parts, sizes, tables that agree with the body. The README's commands are commands.

PYTHONPATH=. python tests/test_docs.py prints the README's table of deviations, made from d1_full.py.
"""

import ast
import importlib.util
import io
import json
import re
import shlex
import tokenize

import pytest
import torch
from conftest import ROOT

import d1_full as d1

SOURCE = (ROOT / "d1_full.py").read_text()
LINES = SOURCE.split("\n")
TREE = ast.parse(SOURCE)
HEAD, BODY = d1.__doc__, SOURCE.split('"""', 2)[2]
README, MEASURED = ((ROOT / folder / "README.md").read_text() for folder in ("", "tests"))
SECTIONS = {
    1: "Imports", 2: "Forward process", 3: "Logits", 4: "Masked SFT loss", 5: "MaskedSFT", 6: "One-step estimator",
    7: "diffu-GRPO", 8: "Block decoder", 9: "DiffuGRPO", 10: "The loop", 11: "Settings", 12: "Text and ids",
    13: "Readers", 14: "The four tasks", 15: "Evaluation", 16: "Data", 17: "Models", 18: "Decoder extras",
    19: "Official", 20: "Checkpoints", 21: "Screen", 22: "Chat", 24: "Command line"}
PARTS = {"I": "The method", "II": "The experiments", "III": "The program"}
METHOD = (  # what the paper defines
    "forward_process", "masked_nelbo", "one_step_logp", "group_advantages", "token_objective", "diffu_grpo_loss",
    "diffuse_steps", "MaskedSFT", "DiffuGRPO", "BlockDecoder")
FOREIGN = (  # words of what Part I is to know nothing of
    "edit", "draft", "delete", "shard", "fsdp", "deepspeed", "engine", "dream", "bert", "official", "gradio", "optuna")
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


# ---- measures
def tokens_of(first, last):
    """Names, operators, numbers and texts of the lines first to last, as tokens. A docstring is one."""
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    made = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    return [t for t in made if t.type in kinds and first <= t.start[0] <= last]


def part(number):
    """The first and the last line of a part."""
    marks = {n: LINES.index(f"# %% Part {n}. {title}") + 1 for n, title in PARTS.items()}
    ends = [*marks.values(), len(LINES) + 1]
    place = list(PARTS).index(number)
    return ends[place] + 1, ends[place + 1] - 1


def density(first, last):
    """Tokens, and tokens a line that holds code."""
    found = tokens_of(first, last)
    return len(found), len(found) / len({t.start[0] for t in found})


def definitions():
    """The line where each name of the module is defined first."""
    lines = {}
    for node in TREE.body:
        if isinstance(node, DEFINITIONS):
            names = [node.name]
        else:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [x.id for target in targets if target for x in ast.walk(target) if isinstance(x, ast.Name)]
        for name in names:
            lines.setdefault(name, node.lineno)
    return lines


def annotations(node):
    """The expressions below a node that stand in annotations, which are never executed."""
    hints = [getattr(x, name, None) for x in ast.walk(node) for name in ("annotation", "returns")]
    return {id(x) for hint in hints if hint for x in ast.walk(hint)}


def names_down(first, last):
    """Names that the lines first to last use and that the module defines only after them."""
    defined, found = definitions(), set()
    for node in TREE.body:
        if first <= node.lineno <= last:
            inside, skipped = list(ast.walk(node)), annotations(node)
            own = {x.id for x in inside if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
            own |= {x.arg for x in inside if isinstance(x, ast.arg)}
            own |= {x.name for x in inside if isinstance(x, DEFINITIONS)}
            used = {x.id for x in inside if isinstance(x, ast.Name) and id(x) not in skipped} - own
            found |= {name for name in used if defined.get(name, 0) > last}
    return found


def code_lines(function):
    """How many lines a function has from its first statement on, less its docstring."""
    first = function.body[min(int(ast.get_docstring(function) is not None), len(function.body) - 1)]
    return function.end_lineno - first.lineno + 1


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readme_tables():
    """The README's table of deviations."""
    rows = []
    for tag, row in d1.tag_tables()[1].items():
        places = dict.fromkeys(d1.places_of(tag, SOURCE).values())
        rows.append([tag, *row, ", ".join(f"`{name}`" for name in places if name != "Settings")])
    return [markdown(["tag", "here", "official code", "where"], rows)]


def readme_commands():
    """The commands of both READMEs, in blocks and in sentences."""
    found = []
    for text in (README, MEASURED):
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        inline = re.findall(r"`(python d1_full\.py[^`]*)`", text)
        found += [part.strip() for line in [*lines, *inline] for part in line.split("#")[0].split("&&")]
    return [part for part in dict.fromkeys(found) if re.match(r"python d1_full\.py", part)]


def test_equations_stand_in_one_docstring_that_of_their_function():
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
    assert table[:19] == [f"D{i}" for i in range(1, 20)] and table == sorted(set(table), key=lambda tag: int(tag[1:]))
    assert set(re.findall(r"\[(D\d+)\]", BODY)) == set(table)


def test_formulas_stand_on_functions_that_are_called():
    for node in ast.walk(TREE):
        if isinstance(node, DEFINITIONS) and re.search(r"d1 (Eq\.|Algorithm|Sec\.)", ast.get_docstring(node) or ""):
            calls = re.sub(rf"(def|class) {node.name}\b", "", BODY)
            assert re.search(rf"\b{node.name}\(|= {node.name}\b", calls), f"nobody calls {node.name}"


def test_sections_are_in_order_in_three_parts():
    marks = re.findall(r"^# %% (?:Part )?(\w+)\. (.*)$", SOURCE, re.M)
    numbers = [str(n) for n in SECTIONS]
    assert [n for n, _ in marks] == [numbers[0], "I", *numbers[1:10], "II", *numbers[10:15], "III", *numbers[15:]]
    titles = {str(n): title for n, title in SECTIONS.items()} | PARTS
    assert all(title.startswith(titles[n]) for n, title in marks), [t for n, t in marks if not t.startswith(titles[n])]


def test_method_stands_in_part_one():
    first, last = part("I")
    where = {name: line for name, line in definitions().items() if name in METHOD}
    assert where.keys() == set(METHOD) and all(first < line < last for line in where.values())
    tags = [n for n, line in enumerate(LINES[first : first + 60]) if re.search(r"\bq\(x_t|d1 Eq\.", line)]
    assert tags  # the first formula comes soon


def test_method_is_short_and_commented():
    first, last = part("I")
    count, each = density(first, last)
    assert last - first < 1200 and count <= 7800 and each <= 10.5, (last - first, count, each)
    coded = {t.start[0] for t in tokens_of(first, last)}
    assert sum("#" in line for line in LINES[first - 1 : last]) > 0.2 * len(coded)


def test_experiments_and_program_are_short():
    count, each = density(*part("II"))
    assert count <= 9500 and each <= 11.5, (count, each)
    count, each = density(1, len(LINES))
    assert count <= 46_000 and each <= 11.5, (count, each)


def test_method_names_nothing_that_comes_later():
    assert not names_down(1, part("I")[1])


def test_method_knows_nothing_of_the_program():
    names = {t.string.lower() for t in tokens_of(*part("I")) if t.type == tokenize.NAME}
    assert not [name for name in names if any(word in name for word in FOREIGN)]
    assert not [name for name in names if re.search(r"(?<!functools)cache(?!d)", name)]


def test_mathematics_is_pure():
    sections = re.split(r"^# %% (?:Part I{1,3}|\d+)\..*$", BODY, flags=re.M)
    mathematics = "".join(sections[i] for i in (3, 4, 5, 7, 8))
    assert "def forward_process" in mathematics and "def diffu_grpo_loss" in mathematics
    assert not re.search(r"\bimport\b|\bglobal\b|print\(|manual_seed|\bopen\(", mathematics)


def test_functions_are_short_and_have_paragraphs():
    assert max((f.end_lineno - f.lineno + 1, f.name) for f in FUNCTIONS) <= (85, "")
    longer = [f for f in FUNCTIONS if code_lines(f) > 12]
    dense = [f.name for f in longer if all(line.strip() for line in LINES[f.body[0].end_lineno : f.end_lineno])]
    assert len(longer) > 50 and len(dense) <= len(longer) // 10, dense


def test_lines_have_one_idea():
    assert max(map(len, LINES)) <= 120 and not re.search(r"TODO|FIXME|XXX|NotImplementedError|except:", SOURCE)

    def is_text(x):
        return isinstance(x, ast.JoinedStr | ast.List | ast.Tuple) or isinstance(getattr(x, "value", None), str)

    def is_condition(x):
        negated = isinstance(x, ast.UnaryOp) and isinstance(x.op, ast.Not)
        asked = isinstance(x, ast.Call) and getattr(x.func, "id", "") == "bool"
        return isinstance(x, ast.Compare | ast.BoolOp) or negated or asked

    products = [x for x in ast.walk(TREE) if isinstance(x, ast.BinOp) and isinstance(x.op, ast.Mult)]
    pairs = [(x.lineno, (x.left, x.right)) for x in products]
    assert not [line for line, pair in pairs if any(map(is_text, pair)) and any(map(is_condition, pair))]
    hidden = [x.lineno for of in ast.walk(TREE) if isinstance(of, ast.comprehension) for test in of.ifs
              for call in ast.walk(test) if isinstance(call, ast.Call) for x in ast.walk(call)
              if isinstance(x, ast.NamedExpr)]
    assert not hidden  # a value that is named inside of a call inside of a comprehension


def test_readme_tables_are_made_from_the_file():
    for table in readme_tables():
        assert table.count("\n") > 7 and table in README, "PYTHONPATH=. python tests/test_docs.py prints:\n" + table


def test_readme_map_is_that_of_the_head():
    flat = re.sub(r"\n {20,}", " ", HEAD)
    parts = re.findall(r"^    (I+)\. +(The \w+) +(\d.*)$", flat, re.M)
    assert [number for number, *_ in parts] == ["I", "II", "III"]
    shown = []
    for number, title, sections in parts:
        (row,) = re.findall(rf"^\| {number}\. {title}.*\|$", README, re.M)
        for section in sections.split(" · "):
            assert section in row
            shown.append(int(section.split()[0]))
    assert [1, *shown] == list(SECTIONS)
    (method,) = re.findall(r"^\| I\. .*$", README, re.M)
    assert all(name in method for _, name, _ in d1.tag_tables()[0].values())


def test_readme_glossary_has_every_figure_of_a_run(tiny, quick, tmp_path):
    cfg = quick(limit=2)
    d1.run_stages(cfg, d1.Screen(), tmp_path / "sudoku")
    logged = {key for row in d1.read_log(tmp_path / "sudoku" / "metrics.jsonl") for key in row}
    entry = json.loads((tmp_path / "sudoku" / "eval.json").read_text())[0]
    glossary = README.split("| metric | means |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w/]+)`", glossary))
    settings = {*d1.Settings.__annotations__, "task", "row", "model"}
    missing = {key.split("/")[0] for key in logged | entry.keys()} - named - settings
    assert not missing


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
    assert cfg.task or cfg.export or cfg.grade


def test_readme_names_what_is_there():
    assert len(readme_commands()) >= 8 and "python -m pytest tests" in README
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert top - {"ckpt"} == {"d1_full.py", "requirements.txt", "env.yml", "README.md", "tests", "LICENSE"}


def test_readme_extension_runs():
    (code,) = re.findall(r"```python\n(import dataclasses.*?)```", README, re.S)
    names = {}
    exec(code.replace("steps_rl=8", "steps_rl=1, bs_rl=8"), names)  # a smaller batch
    mask_id, prompt = names["ids"]["mask_id"], torch.tensor([names["texts"][0]])
    options = dict(decoder=names["HalfAsLikely"], mask_id=mask_id, gen_length=32)
    reply = d1.diffuse_decode(names["model"], prompt, **options)
    assert not (reply == mask_id).any()
    bare = names["Bare"](torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300))
    assert d1.logits_at(bare, reply, reply >= 0).shape == (reply.numel(), 300)
    assert names["Parity"]().grade("<answer>odd</answer>", {"answer": "odd"}).correct


def test_readme_links_lead_somewhere():
    def anchors(text):
        titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for text, folder in (README, ROOT), (MEASURED, ROOT / "tests"):
        for target in re.findall(r"\]\((?!http)([^)]*)\)", text):
            path, _, anchor = target.partition("#")
            assert not path or (folder / path).exists(), target
            other = (folder / path).read_text() if path.endswith(".md") else text
            assert not anchor or anchor in anchors(other), target


def test_environments_name_the_same_packages():
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = {line.replace("torch==", "pytorch-gpu==") for line in lines if line}
    conda = {line.strip()[2:] for line in (ROOT / "env.yml").read_text().splitlines() if line.startswith("  ")}
    own = {"conda-forge", "python=3.12", "flash-attn>=2.8", "pip", "pip:"}  # pip has what conda-forge may not have
    assert conda - wanted == own and wanted <= conda


def test_file_has_no_eval():
    assert not {"eval", "exec"} & {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}


if __name__ == "__main__":
    print("\n\n".join(readme_tables()))
