"""Settings: presets, what goes before what."""

import dataclasses

import pytest
from conftest import settled

import d1_full as d1


def test_settings_hold_the_papers_values(tmp_path):
    def settle(task, **flags):
        return settled(task=task, model="GSAI-ML/LLaDA-8B-Instruct", **flags)

    paper = settle("gsm8k")
    assert paper.preset == "paper"
    assert (paper.group, paper.bs_rl, paper.grad_accum, paper.mu, paper.pmask, paper.eps, paper.beta) == (
        6, 6, 2, 12, 0.15, 0.5, 0.04)
    assert (paper.gen_length, paper.block_length, paper.max_prompt) == (256, 32, 200)
    assert (paper.lr_rl, paper.wd_rl, paper.clip_rl, paper.lora_r, paper.lora_alpha) == (3e-6, 0.1, 0.2, 128, 64)
    steps = {t: settle(t).steps_rl for t in d1.TASKS}
    assert steps == {"gsm8k": 7700, "math500": 6600, "count": 5000, "sudoku": 3800}
    assert (settle("sudoku").temperature, settle("sudoku", preset="official").temperature) == (0.3, 0.9)
    official = settle("count", preset="official")
    assert (official.mu, official.norm) == (8, "token")


def test_settle_takes_the_config_and_the_command_line_wins(tmp_path):
    (tmp_path / "c.yaml").write_text("task: sudoku\nmu: 3\nbeta: 1\n")
    given = d1.read_flags(["--config", str(tmp_path / "c.yaml"), "--mu", "5"])
    cfg, origin = d1.settle(given)
    assert (cfg.task, cfg.mu, cfg.beta, cfg.group) == ("sudoku", 5, 1.0, 8)
    assert (origin["mu"], origin["beta"], origin["group"]) == ("command line", "config", "preset tiny")


def test_settle_lets_steps_go_before_the_ratio_and_random_weights_have_no_stages(tmp_path):
    def settle(**flags):
        return settled(task="pretrain", model="tiny-bert", **flags)

    assert settle().data_ratio == 2 and settle(steps_sft=7).data_ratio == 0
    assert settle(steps_sft=7, data_ratio=3.0).data_ratio == 3
    (tmp_path / "d1_state.json").write_text('{"stages": ["sft"]}')
    cfg = d1.Settings(model=str(tmp_path), from_scratch=False)
    assert d1.stages_passed(cfg) == ["sft"]
    assert d1.stages_passed(dataclasses.replace(cfg, from_scratch=True)) == []


def test_settings_are_frozen_and_can_be_made_in_a_notebook():
    cfg = d1.Settings(task="sudoku")
    assert (cfg.mu, cfg.steps_rl, cfg.temperature, cfg.preset, cfg.group) == (12, 3800, 0.3, "paper", 6)
    assert (d1.Settings(task="gsm8k").temperature, d1.Settings(task="sudoku", mu=5).mu) == (0.9, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.mu = 8
    with pytest.raises(TypeError, match="moo"):
        d1.Settings(moo=8)
    changed = dataclasses.replace(cfg, mu=8)
    assert (changed.mu, changed.steps_rl, cfg.mu) == (8, 3800, 12)


def test_settings_of_a_preset_differ_from_the_papers_where_its_table_says_so():
    for task in ("sudoku", "count", "sft_only", "pretrain"):
        paper = dataclasses.asdict(d1.Settings(task=task))
        for preset in ("official", "tiny"):
            other = dataclasses.asdict(d1.Settings(task=task, preset=preset))
            changed = {name for name in paper if paper[name] != other[name]} - {"preset"}
            assert changed <= d1.PRESETS[preset].keys() and changed
            assert all(other[name] == d1.Settings.default(name, task, preset) for name in paper if name not in
                       ("task", "preset"))
    assert d1.Settings(task="sudoku", preset="official").mu == 8 and d1.Settings(task="sudoku", preset="tiny").mu == 8


def test_settle_is_what_settings_are():
    """The command line and a notebook come to the same values."""
    for flags in (dict(task="sudoku"), dict(task="count", preset="official", model="a/b"), dict(task="chat", seed=3)):
        made = d1.Settings(**{"preset": "auto"} | flags)
        assert made == settled(**flags) and made.preset in ("tiny", "official")
