"""The command line as a user meets it: a plan, an explanation, or one clear line."""

import argparse
import contextlib
import dataclasses
import inspect
import io
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, command, run
from hypothesis import given, settings
from hypothesis import strategies as st

import d1_full as d1

SOURCE = (ROOT / "d1_full.py").read_text()
NAMES = [f"--{name}" for name in d1.Settings.__annotations__ if name not in ("dry_run", "debug", "output_dir")]


VALUES = st.one_of(st.integers(-3, 9).map(str), st.floats().map(str), st.text(max_size=8), st.sampled_from(
    ["", "tiny", "nan", "1e999", "-1", "0", "sudoku", "count", "table1", "paper", "../x", "/", "a/b", "128,256", "none",
     "dual", "llada/llada-8b-instruct", "x.py:f", "True", "\x00", "-", "--", "'"]))


TAGS = [*d1.tag_tables()[0], "D1", "d16", "[D3]", "Eq. (4)", "algorithm 2"]


KINDS = {"int": int, "float": float, "str": str}


def check_settled(given, typed):
    """The settings of `given` hold what was typed, {name: text or value}, and are within their bounds."""
    cfg, origin = d1.settle(given)
    for name, value in typed.items():
        kind = d1.Settings.__annotations__[name]
        if kind in KINDS:
            assert getattr(cfg, name) == KINDS[kind](value), name
        assert origin[name] == given[name][1]
    for field in dataclasses.fields(cfg):
        if field.type in ("int", "float"):
            value, high = getattr(cfg, field.name), field.metadata["high"]
            assert field.metadata["low"] <= value <= (sys.float_info.max if high is None else high), field.name


def check_refused(error, words):
    """An error says something, in one line unless what it quotes has more."""
    message = str(error)
    assert message.strip() and ("\n" not in message or any("\n" in word for word in words))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.tuples(st.sampled_from(NAMES), VALUES), st.tuples(VALUES)), max_size=4))
def test_settle_holds_what_a_command_line_says_or_refuses_it_in_one_line(words):
    argv = ["--task", "sudoku", *(w for pair in words for w in pair)]
    try:
        check_settled(d1.read_flags(argv), {"task": "sudoku"} | {flag[2:]: value for flag, *[value] in words})
    except (d1.UserError, argparse.ArgumentError) as error:  # what main() prints as one line
        check_refused(error, argv)


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.sampled_from(NAMES), VALUES))
def test_dry_run_is_a_plan_or_one_line(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = d1.main(["--dry_run", "--task", "sudoku", *words])
    if status == 0:
        shown = out.getvalue()
        assert "What the run needs" in shown or (words[0] == "--explain" and not err.getvalue())
    else:
        assert status == 2 and err.getvalue().startswith("d1_full.py: error: ") and "What the run" not in out.getvalue()
        check_refused(err.getvalue()[:-1], words)


CONTENTS = st.dictionaries(
    st.sampled_from([n[2:] for n in NAMES] + ["nonsense", "eq. 1"]),
    st.one_of(st.none(), st.booleans(), st.integers(-2, 50), st.floats(), st.text(max_size=6), st.lists(st.integers())),
    max_size=3)


@settings(max_examples=80, deadline=None)
@given(content=st.one_of(st.text(max_size=60), CONTENTS))
def test_settle_holds_what_a_config_file_says_or_refuses_it_in_one_line(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        given = d1.read_flags(["--task", "sudoku", "--config", str(path)])
        filed = {} if isinstance(content, str) else {k: v for k, v in content.items() if k not in ("task", "config")}
        if filed.get("explain") is True:  # the flag alone
            filed["explain"] = "tags"
        check_settled(given, filed)
    except (d1.UserError, argparse.ArgumentError) as error:
        check_refused(error, [text, *map(str, content)])


def test_config_words_refuse_a_yaml_that_would_run_code_or_grow(tmp_path, capsys):
    bomb = "a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [*{'b' + str(i - 1) if i else 'a'},*a]\n" for i in range(30))
    for text in ("task: !!python/object/apply:os.system ['touch hacked']", bomb, "task: [sudoku]", "tsak: sudoku"):
        (tmp_path / "c.yaml").write_text(text)
        assert d1.main(["--dry_run", "--task", "sudoku", "--config", str(tmp_path / "c.yaml")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not Path("hacked").exists()


@pytest.mark.parametrize("text,word", [
    ("mu: 0", "--mu"), ("betas: 3", "did you mean --beta"), ("mu: three", "'three'"), ("- 1", "flag: value"),
    ("a: [", "config"), ("norm: batch", "sequence"), ("mu: true", "--mu"),
])
def test_config_words_of_a_wrong_file_are_refused(text, word, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert d1.main(["--task", "sudoku", "--dry_run", "--config", str(tmp_path / "c.yaml")]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("flags,word", [
    ("", "--task"), ("--task chess", "sudoku"), ("--task sudoku --stepz 3", "unknown argument --stepz"),
    ("--task sudoku --preset big", "tiny"), ("--task sudoku --mu 0", "--mu must be at least 1"),
    ("--task sudoku --pmask 1.5", "--pmask must be between"), ("--task sudoku --pmask -0.1", "--pmask"),
    ("--task sudoku --pmask nan", "--pmask"), ("--task sudoku --group 1", "--group must be at least 2"),
    ("--task sudoku --steps_rl -1", "--steps_rl"), ("--task sudoku --bs_rl 7", "multiple of --group"),
    ("--task sudoku --gen_length 40", "multiple of --block_length"), ("--task sudoku --eval_lengths 32,33", "33"),
    ("--task sudoku --eval_lengths a", "--eval_lengths"), ("--task sudoku --diffusion_steps 33", "--diffusion_steps"),
    ("--task sudoku --mu three", "--mu"), ("--task sudoku --config none.yaml", "none.yaml"),
    ("--task sft_only --eval_only", "benchmark"), ("--task sudoku --model ./nowhere", "no such folder"),
    ("--task sudoku --load_4bit", "random weights"), ("--task sudoku --use_lora", "random weights"),
    ("--task sft_only --skip_sft", "nothing to do"), ("--task table1 --data a.csv", "problems of one benchmark"),
    ("--task sft_only --data a.csv", "--sft_data"), ("--task chat --report_to wandb", "needs a run that trains"),
    ("--task sft_only --patience 2", "needs stage 2"),
    ("--task sudoku --resume", "nothing to resume"), ("--task sudoku --lr_rl inf", "finite"),
    ("--task sudoku --data no.csv --eval_only", "no data file"),
])
def test_main_answers_wrong_input_in_one_line_and_status_2(flags, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(d1, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert d1.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("d1_full.py: error: ") and error.count("\n") == 1 and word in error, error
    assert "Traceback" not in error and not list(tmp_path.iterdir())


def test_main_ends_with_status_1_on_a_non_finite_loss(tmp_path, capsys):
    wild = "--lr_sft", 1e38, "--clip_sft", 0, "--warmup_sft", 0, "--max_skips", 1
    assert run("--task", "sudoku", *wild, out=tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sft step" in error and "SFT rows [" in error


def test_main_shows_the_traceback_with_debug():
    with pytest.raises(d1.UserError):
        d1.main(["--task", "sudoku", "--mu", "0", "--debug"])


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        d1.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name}" in shown for name in d1.Settings.__dataclass_fields__)


def test_import_is_silent_quick_and_needs_no_network():
    """What would make it slow is not loaded, and nothing is asked of a network."""
    code = """if True:
        import socket, sys
        asked = []
        socket.socket.connect = lambda *args: asked.append(args)
        import d1_full
        libraries = ("accelerate", "datasets", "gradio", "huggingface_hub", "matplotlib", "optuna", "pandas", "peft",
                     "rich", "tokenizers", "transformers")
        sys.exit(str([name for name in libraries if name in sys.modules] + asked))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "[]\n")


def test_main_answers_a_place_that_cannot_be_written_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--task", "sudoku", out=tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_main_answers_out_of_memory_in_one_line_with_advice(tmp_path, capsys, monkeypatch):
    def descend(trainer, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(d1.Trainer, "descend", descend)
    assert run("--task", "sudoku", out=tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory (CUDA out of memory" in said and "--rows_sft" in said


def test_main_lets_no_two_runs_share_a_folder(tmp_path, capsys):
    code = "import filelock, sys; held = filelock.FileLock(sys.argv[1]).acquire(); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".sudoku.lock")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    assert run("--task", "sudoku", out=tmp_path) == 2 and "another run works in" in capsys.readouterr().err
    assert not (tmp_path / "sudoku").exists()
    other.kill()  # the system frees the lock
    other.wait()
    assert run("--task", "sudoku", "--skip_eval", out=tmp_path) == 0
    filelock.FileLock(tmp_path / ".sudoku.lock").acquire(timeout=0)  # free again after a run


def test_main_answers_a_hub_that_is_out_of_reach_or_says_nothing_in_one_line(tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        for port in (9, mute.getsockname()[1]):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            monkeypatch.setattr(d1, "HUB_SECONDS", 0.3)
            for flags, advice in (["--model", "an/id"], "give --model a local folder"), (
                    ["--data", "an/id"], "give a local file"):
                assert d1.main(["--task", "gsm8k", *flags, "--output_dir", str(tmp_path)]) == 2
                said = capsys.readouterr().err
                assert said.count("\n") == 1 and advice in said
        mute.setblocking(False)
        tries = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                mute.accept()[0].close()
                tries += 1
    assert tries == 2  # one a command, none of a library's retries, which take minutes


@pytest.mark.parametrize("task", [t for t in d1.TASK_CHOICES if t != "custom"])
def test_dry_run_tells_settings_and_cost_and_writes_nothing(task, tmp_path, capsys):
    assert d1.main(["--task", task, "--dry_run", "--output_dir", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "preset tiny" in out and "parameters, of which trained" in out and "FLOPs" in out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags,stage1,updates", [
    ("--task sudoku", True, 160), ("--task sudoku --model TRAINED", False, 160),  # which has passed stage 1
    ("--task table1", True, 2 * 4 * 160), ("--task table1 --steps_rl 10", True, 2 * 4 * 10),
    ("--task table1 --model llada/llada-8b-instruct --use_lora", True, 2 * 2 * (7700 + 6600 + 5000 + 3800))])
def test_dry_run_counts_the_updates_that_a_run_will_make(flags, stage1, updates, trained, capsys):
    assert d1.main([*flags.replace("TRAINED", str(trained / "sudoku")).split(), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert stage1 == any("SFT: forward" in line for line in lines)
    assert [f"; {updates:,} in the run" in line for line in lines if "RL updates" in line] == [True]


def test_dry_run_of_llada_8b_needs_no_network(capsys, tmp_path):
    command("--model", "llada/llada-8b-instruct", "--use_lora", "--task", "gsm8k", "--skip_sft", "--dry_run",
            "--output_dir", tmp_path / "o")
    out = capsys.readouterr().out
    assert "8,351,125,504" in out and "335,544,320" in out and "memory: peak" in out
    assert not (tmp_path / "o").exists()


def test_plan_counts_what_backward_keeps():
    """The formula against the tensors that autograd saves for a small Llama in bf16 with LoRA."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                                      num_attention_heads=4, is_causal=False, use_cache=False)
    model = d1.adapt_with_lora(transformers.LlamaForCausalLM(config).bfloat16(), 16, 8)
    model.get_output_embeddings().weight.requires_grad_(False)
    kept, fixed = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in fixed:
            kept[storage._cdata] = (storage.nbytes(), t)
        return t

    ids = torch.randint(0, 64, (2, 96))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.base_model.model.model(ids)
    adapters = sum(2 * p.numel() for n, p in model.named_parameters() if "lora_" in n)  # their bf16 copies
    measured = (sum(n for n, _ in kept.values()) - adapters) / ids.numel()
    assert d1.bytes_per_token(config, 16, False) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("tag", TAGS)
def test_explain_prints_formula_code_and_deviations(tag, capsys):
    assert d1.main(["--explain", tag]) == 0
    shown, (equations, deviations) = capsys.readouterr().out, d1.tag_tables()
    key = d1.tag_key(tag)
    if key in equations:
        place, name, _ = equations[key]
        doc = inspect.getdoc(getattr(d1, name))
        assert place in shown and all(line.strip() in shown for line in doc.splitlines())  # with the formula
        for part in d1.code_of(key):
            assert f"def {part.split('.')[-1]}(" in shown
    else:
        key = key.upper()
        assert all(text in shown for text in deviations[key]) and f"[{key}]" in shown
        assert all(f"{name}, line {n}" in shown for n, name in d1.places_of(key, SOURCE).items())


def test_explain_shows_what_an_equation_is_made_of(capsys):
    d1.main(["--explain", "eq4"])
    shown = capsys.readouterr().out
    assert "kl = ratio(logp_ref, logp) - d - 1" in shown and "[D1]" in shown and "--explain eq3" in shown
    d1.main(["--explain", "eq1"])
    assert "(ce * weight).sum()" in capsys.readouterr().out  # of the function that it calls
    d1.main(["--explain", "alg1"])
    assert "self.roll_out(" in (shown := capsys.readouterr().out) and "trainer.descend(" in shown


def test_explain_alone_lists_the_tags_and_a_wrong_one_names_them(capsys):
    assert d1.main(["--explain"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for table in d1.tag_tables() for tag, row in table.items() for name in (tag, *row))
    assert d1.main(["--explain", "eq5"]) == 2
    assert "eq1" in (wrong := capsys.readouterr().err) and "D19" in wrong and wrong.count("\n") == 1
