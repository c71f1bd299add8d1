"""What a run warns of."""

from conftest import grpo, logged

import d1_full as d1


def test_screen_warns_of_a_policy_that_goes_astray(tiny, quick, tmp_path, screen, capsys):
    def alike(texts, examples):
        return [{"same": 1.0} for _ in texts]

    trainer = grpo(quick(steps_rl=12, mu=2, save_steps=4), tiny, tmp_path, alike, screen=screen)
    d1.train(trainer, screen)
    assert "12 updates in which all replies to a prompt earned the same" in capsys.readouterr().out
    shows = d1.RunScreen(screen, tmp_path / "another")
    for kl, entropy, told in (3.0, 0.001, True), (0.1, 0.5, False):
        usual = {"kl": kl, "entropy": entropy}
        shows.seen = [usual, {"kl": 0.0 if told else 1e3, "entropy": 9.0 if told else 0.0}, usual]  # one outlier
        shows.on_check(trainer, {})
        shown = capsys.readouterr().out
        assert ("KL 3.0 nats a token" in shown) == ("entropy 0.001" in shown) == told
        assert told or "warning: KL" not in shown


def test_screen_warns_of_a_rollout_cache_and_its_error_is_logged(quick, tmp_path, capsys):
    flags = "--task sudoku --skip_sft --steps_rl 4 --mu 2 --group 2 --bs_rl 4 --save_steps 2 --limit 4 --skip_eval"
    assert d1.main([*flags.split(), "--rollout_cache", "dual", "--output_dir", str(tmp_path)]) == 0
    rows = logged(tmp_path / "sudoku")
    assert all(r["cache_error"] > 0 for r in rows if "loss" in r)
    assert "off-policy" in capsys.readouterr().out
