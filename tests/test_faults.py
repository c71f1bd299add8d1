"""Kills, damage, full disks, NaNs, second copies and hostile input: what is kept, and what the user reads."""

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
import yaml
from conftest import MASK, ToyModel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stages import grpo, logged, sft, weights

import d1_full as d1


@pytest.fixture
def screen():
    return d1.Screen()


def stage_of(kind, quick, tiny, out, save_steps=100, **changes):
    lora = (4, 8, 0.1) if "lora" in kind else None
    if "sft" in kind:
        return sft(quick(steps_sft=6, save_steps=save_steps, **changes), tiny, out, lora=lora)
    return grpo(quick(steps_rl=8, mu=4, save_steps=save_steps, **changes), tiny, out, lora=lora and lora[:2])


def stop_at(stage, step, number=signal.SIGTERM):
    update = stage.update

    def and_a_signal():
        if stage.step + 1 == step:
            os.kill(os.getpid(), number)
        return update()

    stage.update = and_a_signal


@pytest.mark.parametrize("kind", ["sft", "sft_lora", "grpo", "grpo_lora"])
def test_a_run_stopped_anywhere_and_resumed_is_the_unbroken_one(kind, tiny, quick, tmp_path, screen):
    """Between inner updates too: 1, 2, 3, 5, 6 and 7 of 8, with four to a batch of rollouts."""
    whole = stage_of(kind, quick, tiny, tmp_path / "whole")
    whole.run(screen)
    steps = (1, 3, 4) if "sft" in kind else (1, 2, 3, 5, 6, 7)
    for number in steps:
        part = stage_of(kind, quick, tiny, tmp_path / "parts")
        assert d1.load_trainer(part, screen) == (number != steps[0])
        stop_at(part, number)
        with pytest.raises(d1.Stopped, match=f"SIGTERM after .* step {number}, which is saved") as stopped:
            part.run(screen)
        assert stopped.value.status == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    last = stage_of(kind, quick, tiny, tmp_path / "parts")
    assert d1.load_trainer(last, screen)
    last.run(screen)
    assert torch.equal(weights(whole), weights(last))
    for a, b in zip(whole.optimizer.state.values(), last.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


@pytest.fixture
def interruptible():
    """Ctrl-C as on a terminal; a job in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_acts_at_once(interruptible, tiny, quick, tmp_path, screen, capsys):
    stage = stage_of("sft", quick, tiny, tmp_path)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        assert "saves" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C did nothing")

    stage.update = twice
    with pytest.raises(KeyboardInterrupt):
        stage.run(screen)


def test_a_signal_that_is_ignored_stays_so(tiny, quick, tmp_path, screen):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    stage = stage_of("sft", quick, tiny, tmp_path)
    stop_at(stage, 2, signal.SIGINT)
    stage.run(screen)
    assert stage.step == 6 and signal.signal(signal.SIGINT, before) == signal.SIG_IGN


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"cut": lambda p: p.write_bytes(p.read_bytes()[:-100]), "flipped": flip, "gone": Path.unlink,
          "empty": lambda p: p.write_bytes(b"")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tiny, quick, tmp_path, screen, capsys):
    def make():
        return stage_of("sft", quick, tiny, tmp_path, save_steps=2)

    stage = make()
    stage.run(screen)
    files = sorted(p.name for p in (tmp_path / "trainer").iterdir())
    assert files == ["manifest.json", "sft-4.pt", "sft-6.pt"]  # --save_total_limit 2
    DAMAGE[damage](tmp_path / "trainer" / "sft-6.pt")
    again = make()
    assert d1.load_trainer(again, screen) and again.step == 4
    assert "sft-6.pt is damaged: the checkpoint before step 6 is taken" in " ".join(capsys.readouterr().out.split())
    again.run(screen)
    assert torch.equal(weights(again), weights(stage)) and d1.load_trainer(again, screen) and again.step == 6
    for name in ("sft-4.pt", "sft-6.pt"):
        DAMAGE[damage](tmp_path / "trainer" / name)
    with pytest.raises(d1.UserError, match=r"no checkpoint of sft .* is whole"):
        d1.load_trainer(make(), screen)


def test_exported_weights_are_checked_and_an_index_stays_in_its_folder(tiny, tmp_path):
    d1.export_model(*tiny, tmp_path, {"stages": ["sft"]})
    d1.load_model(str(tmp_path))
    flip(tmp_path / "model.safetensors")
    with pytest.raises(d1.UserError, match=r"model\.safetensors is not the file that was saved"):
        d1.load_model(str(tmp_path))
    d1.export_model(*tiny, tmp_path, {"stages": ["sft"]})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../b.safetensors"}}))
    with pytest.raises(d1.UserError, match="not the file"):
        d1.load_model(str(tmp_path))


def test_changed_flags_are_refused_by_name_unless_allowed(tiny, quick, tmp_path, screen, capsys):
    stage_of("sft", quick, tiny, tmp_path).run(screen)
    with pytest.raises(d1.UserError, match=r"--allow_changed, or the flags of then: --lr_sft=0\.0015"):
        d1.load_trainer(stage_of("sft", quick, tiny, tmp_path, lr_sft=0.1), screen)
    other = stage_of("sft", quick, tiny, tmp_path, lr_sft=0.1, allow_changed=True, save_total_limit=5)
    assert d1.load_trainer(other, screen)
    assert "--lr_sft=0.0015" in capsys.readouterr().out


@pytest.mark.parametrize("step", [4, 8])
def test_a_signal_at_a_checkpoint_saves_before_the_held_out_check_which_is_made_on_resuming(
        step, tiny, quick, tmp_path, screen):
    def make(out):
        stage = stage_of("grpo", quick, tiny, out, save_steps=4)
        stage.heldout = lambda model: float(weights(stage).sum())
        return stage

    whole = make(tmp_path / "whole")
    whole.run(screen)
    part = make(tmp_path / "parts")
    stop_at(part, step)
    with pytest.raises(d1.Stopped):
        part.run(screen)
    assert "heldout_accuracy" not in logged(tmp_path / "parts")[-1]
    last = make(tmp_path / "parts")
    assert d1.load_trainer(last, screen) and last.step == step
    last.run(screen)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts") and last.best[:2] == whole.best[:2]


def test_rollouts_that_no_longer_fit_are_drawn_anew(tiny, quick, tmp_path, screen, capsys):
    part = stage_of("grpo", quick, tiny, tmp_path)
    stop_at(part, 3)
    with pytest.raises(d1.Stopped):
        part.run(screen)
    cfg = quick(steps_rl=8, mu=5, save_steps=100, allow_changed=True)
    other = grpo(cfg, tiny, tmp_path)
    assert d1.load_trainer(other, screen) and not other.batch
    assert "drawn anew" in " ".join(capsys.readouterr().out.split())
    other.run(screen)
    assert other.step == 8


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_one_update_that_is_not_finite_is_left_out_and_kept_for_a_look(
        kind, tiny, quick, tmp_path, screen, monkeypatch):
    stage = stage_of(kind, quick, tiny, tmp_path)
    backward = stage.backward
    stage.backward = lambda loss, share=1.0: backward(loss * (math_nan if stage.step == 2 else 1), share)
    before = []
    advance = screen.advance
    monkeypatch.setattr(screen, "advance", lambda *a: (before.append(weights(stage).clone()), advance(*a)))
    stage.run(screen)
    assert torch.equal(before[1], before[2]) and not torch.equal(before[2], before[3])
    assert logged(tmp_path)[2] == {"skipped": 1, "stage": stage.name, "step": 3}
    kept = torch.load(tmp_path / "trainer" / f"nonfinite-{stage.name}-3.pt", weights_only=True)
    assert kept["name"] and (kind == "sft" or kept["batch"][0]["completion"].shape == (4, 32))
    assert torch.isfinite(weights(stage)).all() and stage.skipped == 0
    d1.plot_curves(tmp_path)  # a step without a loss is no trouble


math_nan = float("nan")


def test_a_policy_that_goes_astray_is_warned_of(tiny, quick, tmp_path, screen, capsys):
    def alike(texts, examples):
        return [{"same": 1.0} for _ in texts]

    stage = grpo(quick(steps_rl=12, mu=2, save_steps=4), tiny, tmp_path, alike)
    stage.run(screen)
    assert "12 updates in which all replies to a prompt earned the same" in capsys.readouterr().out
    for kl, entropy, told in (3.0, 0.001, True), (0.1, 0.5, False):
        usual = {"kl": kl, "entropy": entropy}
        stage.seen = [usual, {"kl": 0.0 if told else 1e3, "entropy": 9.0 if told else 0.0}, usual]  # one outlier
        stage.check(screen)
        shown = capsys.readouterr().out
        assert ("KL 3.0 nats a token" in shown) == ("entropy 0.001" in shown) == told
        assert told or "warning: KL" not in shown


def run(*flags, out):
    small = dict(steps_sft=4, bs_sft=4, n_traces=20, steps_rl=2, mu=2, group=2, bs_rl=4, limit=2, eval_lengths=32,
                 save_steps=2, threads=1, warmup_sft=1)
    words = [str(w) for k, v in small.items() for w in (f"--{k}", v)]
    return d1.main(["--task", "sudoku", *words, *flags, "--output_dir", str(out)])


def test_no_room_for_a_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    assert run(out=tmp_path) == 1
    assert "has room for 0.00 GiB" in capsys.readouterr().err


@pytest.mark.parametrize("when", [1, 2])
def test_a_disk_that_fills_while_a_checkpoint_is_written(when, tmp_path, capsys, monkeypatch):
    saves, save = [], torch.save

    def full(state, path):
        saves.append(path)
        save(state, path)
        if len(saves) == when:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert run("--skip_eval", out=tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and "what was saved before is kept" in said
    folder = tmp_path / "sudoku" / "trainer"
    assert not list(folder.glob("*.part")) and len(list(folder.glob("sft-*.pt"))) == when - 1
    monkeypatch.setattr(torch, "save", save)
    if when == 2:
        assert run("--skip_eval", "--resume", out=tmp_path) == 0


def test_an_unreadable_checkpoint_counts_as_damaged(tmp_path, capsys, monkeypatch):
    assert run("--skip_eval", out=tmp_path) == 0
    opened = Path.open

    def broken(self, *args, **kwargs):
        if self.name == "sft-4.pt":
            raise OSError(errno.EIO, "Input/output error")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    assert run("--skip_eval", "--resume", out=tmp_path) == 1  # nor can the one that is written anew be read back
    shown = capsys.readouterr()
    assert "sft-4.pt is damaged" in " ".join(shown.out.split()) and "sft-4.pt back" in shown.err


def test_out_of_memory_is_one_line_with_advice(tmp_path, capsys, monkeypatch):
    def update(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(d1.MaskedSFT, "update", update)
    assert run(out=tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory (CUDA out of memory" in said and "--rows_sft" in said


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    code = "import filelock, sys; held = filelock.FileLock(sys.argv[1]).acquire(); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".sudoku.lock")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    assert run(out=tmp_path) == 2 and "another run works in" in capsys.readouterr().err
    assert not (tmp_path / "sudoku").exists()
    other.kill()  # the system frees the lock
    other.wait()
    assert run("--skip_eval", out=tmp_path) == 0
    filelock.FileLock(tmp_path / ".sudoku.lock").acquire(timeout=0)  # free again after a run


def test_a_hub_that_is_out_of_reach_or_says_nothing_is_one_line_in_seconds(tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants
    began = time.monotonic()
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
    assert time.monotonic() - began < 20  # not the minutes of a library's retries


# ---- properties
IDS = st.integers(1, 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(IDS, min_size=5, max_size=5), min_size=1, max_size=4), st.floats(1e-3, 1.0),
       st.integers(0, 99), st.integers(0, 5))
def test_forward_process_masks_the_reply_alone_and_leaves_its_input(rows, level, seed, prompt_len):
    x0 = torch.tensor(rows)
    keep = torch.zeros_like(x0, dtype=torch.bool)
    keep[:, :prompt_len] = True
    before, t = x0.clone(), torch.full((len(rows),), level)
    xt, masked = d1.forward_process(x0, t, keep, MASK, torch.Generator().manual_seed(seed))
    assert torch.equal(x0, before) and not (masked & keep).any()
    assert torch.equal(xt == MASK, masked) and torch.equal(torch.where(masked, x0, xt), x0)
    if level == 1.0:
        assert torch.equal(masked, ~keep)
    loss, metrics = d1.masked_nelbo(torch.randn(*x0.shape, 9), x0, masked, t, keep)
    assert loss >= 0 and torch.isfinite(loss) and 0 <= metrics["accuracy"] <= 1
    assert loss > 0 or not masked.any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(0, 99), st.floats(0.0, 0.9), st.floats(0.0, 1.0),
       st.sampled_from(["sequence", "token"]))
def test_the_objective_at_the_old_policy_and_its_bounds(rewards, seed, eps, beta, norm):
    g = torch.Generator().manual_seed(seed)
    n = len(rewards)
    advantages = d1.group_advantages(torch.tensor(rewards), n)
    assert abs(float(advantages.sum())) < 1e-4 * (1 + max(map(abs, rewards)))
    logp, live = -torch.rand(n, 6, generator=g) * 3, torch.ones(n, 6, dtype=torch.bool)
    same, m = d1.diffu_grpo_loss(logp, logp.clone(), logp.clone(), advantages, live, eps=eps, beta=beta, norm=norm)
    assert abs(float(same)) < 1e-4 * (1 + max(map(abs, rewards))) and m["kl"] == 0 and m["ratio_max"] == 1
    other = logp + torch.randn(n, 6, generator=g)
    _, m = d1.diffu_grpo_loss(logp, other, other, advantages, live, eps=eps, beta=beta, norm=norm)
    assert m["kl"] >= 0 and 0 <= m["clip_frac"] <= 1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(8, 8), (8, 4), (8, 2), (12, 4)]), st.integers(1, 20), st.sampled_from([0.0, 0.5, 1.5]),
       st.sampled_from(d1.REMASKING), st.one_of(st.none(), st.floats(0.0, 1.0)), st.booleans(),
       st.integers(0, 99))
def test_whatever_the_decoder_is_told_it_fills_every_position_once(
        size, steps, temperature, remasking, threshold, stop, seed):
    length, block = size
    threshold = threshold if remasking == "low_confidence" else None
    prompt = torch.randint(1, 9, (3, 4), generator=torch.Generator().manual_seed(seed))
    frames = list(d1.diffuse_steps(
        ToyModel(4 + length, 9, seed), prompt, mask_id=MASK, gen_length=length, block_length=block, steps=steps,
        temperature=temperature, remasking=remasking, threshold=threshold, eos_id=3, stop_at_eos=stop,
        generator=torch.Generator().manual_seed(seed)))
    ids = frames[-1].ids
    assert torch.equal(ids[:, :4], prompt) and (ids[:, 4:] != MASK).all()
    assert (sum(f.new.long() for f in frames)[:, 4:] == 1).all()
    assert len(frames) <= max(length, steps) + 1 and all((f.logp <= 0).all() for f in frames)


NAMES = [f"--{name}" for name in d1.Settings.__annotations__ if name not in ("dry_run", "debug", "output_dir")]
VALUES = st.one_of(st.integers(-3, 9).map(str), st.floats().map(str), st.text(max_size=8), st.sampled_from(
    ["", "tiny", "nan", "1e999", "-1", "0", "sudoku", "count", "table1", "paper", "../x", "/", "a/b", "128,256", "none",
     "dual", "llada/llada-8b-instruct", "x.py:f", "True", "\x00", "-", "--", "'"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.tuples(st.sampled_from(NAMES), VALUES), st.tuples(VALUES)), max_size=4))
def test_no_command_line_is_answered_by_a_traceback(words):
    """It is understood, or refused in one line."""
    argv = ["--task", "sudoku", *(w for pair in words for w in pair)]
    with contextlib.suppress(d1.UserError, argparse.ArgumentError):  # what main() prints as one line
        d1.settle(d1.read_flags(argv))


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.sampled_from(NAMES), VALUES))
def test_a_plan_or_one_line(words):
    assert d1.main(["--dry_run", "--task", "sudoku", *words]) in (0, 2)


@settings(max_examples=80, deadline=None)
@given(content=st.one_of(st.text(max_size=60), st.dictionaries(
    st.sampled_from([n[2:] for n in NAMES] + ["nonsense", "eq. 1"]),
    st.one_of(st.none(), st.booleans(), st.integers(-2, 50), st.floats(), st.text(max_size=6), st.lists(st.integers())),
    max_size=3).map(yaml.safe_dump)))
def test_no_config_file_is_answered_by_a_traceback(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(content, encoding="utf-8", errors="replace")
    with contextlib.suppress(d1.UserError, argparse.ArgumentError):
        d1.settle(d1.read_flags(["--task", "sudoku", "--config", str(path)]))


def test_a_yaml_that_would_run_code_or_grow_is_refused(tmp_path, capsys):
    bomb = "a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [*{'b' + str(i - 1) if i else 'a'},*a]\n" for i in range(30))
    for text in ("task: !!python/object/apply:os.system ['touch hacked']", bomb, "task: [sudoku]", "tsak: sudoku"):
        (tmp_path / "c.yaml").write_text(text)
        assert d1.main(["--dry_run", "--task", "sudoku", "--config", str(tmp_path / "c.yaml")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not Path("hacked").exists()
