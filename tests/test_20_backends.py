"""Several processes, each with the whole model or a part of it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, logged
from safetensors.torch import load_file

import d1_full as d1

LAUNCHED = """
import copy, gc, json, os, signal, sys
import accelerate.state as state
import torch
import d1_full as d1

init = state.AcceleratorState.__init__

def sharding(self, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
    # accelerate shards on GPUs only: say here that it does so on the CPU
    init(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
    if fsdp_plugin or deepspeed_plugin:
        self.fsdp_plugin, self.deepspeed_plugins = fsdp_plugin, deepspeed_plugin
        kind = state.DistributedType.FSDP if fsdp_plugin else state.DistributedType.DEEPSPEED
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = kind
    if deepspeed_plugin:
        deepspeed_plugin.set_mixed_precision("no")
        deepspeed_plugin.select(_from_accelerator_state=True)

state.AcceleratorState.__init__ = sharding

class Killed(Exception):
    pass

def main():
    given, lora, kills, goes_on = map(json.loads, sys.argv[1:])
    cfg = d1.settle({k: (v, "") for k, v in given.items()})[0]
    torch.set_num_threads(1)
    screen = d1.Screen()
    out = d1.Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    task = copy.copy(d1.TASKS["sudoku"])
    task.batch_rewards = lambda texts, examples, official: [{"n": float(len(t))} for t in texts]
    rows = d1.sft_rows(cfg, d1.build_tokenizer(), [task], screen)
    save = d1.save_trainer

    def save_and_die(trainer):
        save(trainer)
        if kills and trainer.stage.step == 4:
            raise Killed

    def tuning(model):
        return d1.trainer_for(d1.sft_stage(model, tok, rows, cfg), tok, cfg, out, screen)

    d1.save_trainer = save_and_die
    try:
        if goes_on:
            raise Killed
        model, tok = d1.load_model("tiny", seed=0, lora=lora)
        d1.train(tuning(model), screen)
    except Killed:
        d1.save_trainer = save
        model, tok = d1.load_model("tiny", seed=1, lora=lora)
        if lora:  # the adapter is in the checkpoint, what lies below it is not
            below = dict(d1.load_model("tiny", seed=0, lora=lora)[0].named_parameters())
            for name, p in model.named_parameters():
                p.data.copy_(below[name]) if "lora_" not in name else None
        trainer = tuning(model)
        assert d1.load_trainer(trainer, screen) and trainer.stage.step == 4
        d1.train(trainer, screen)
    if goes_on:
        return
    d1.save_trainer = save
    weight = lambda model: -sum(float(p.detach().double().square().sum()) for p in model.parameters())
    world, drawn = d1.processes().num_processes, []

    def reinforcing(model):
        stage = d1.rl_stage(model, tok, task, task.examples("train", 16), cfg, weight)
        draw = stage.roll_out
        stage.roll_out = lambda *args: drawn.append(draw(*args)) or drawn[-1]
        return d1.trainer_for(stage, tok, cfg, out, screen, stage.prompts)

    trainer = reinforcing(copy.deepcopy(model))
    if world > 1 and not isinstance(trainer.backend, d1.ZeroBackend):
        # the last process is asked to stop between two inner updates
        descend, stage = trainer.descend, trainer.stage

        def and_a_signal(*args):
            if stage.step == 2 and trainer.rank == world - 1:
                signal.raise_signal(15)
            return descend(*args)

        trainer.descend = and_a_signal
        try:
            d1.train(trainer, screen)
        except d1.Stopped as e:
            assert "step 3" in str(e)
        trainer = reinforcing(model)
        assert d1.load_trainer(trainer, screen) and trainer.stage.step == 3 and trainer.stage.rollouts
    d1.train(trainer, screen)
    model = trainer.model
    d1.evaluate(model, tok, task, task.examples("test", 5), cfg, "d1", out, screen)
    texts = [[t for r in drawn for t in d1.reply_texts(tok, r.completion)]]
    gathered = __import__("accelerate").utils.gather_object(texts)
    d1.write_json(out / "texts.json", sorted(t for part in gathered for t in part))
    d1.export_model(model, tok, out, {})


main()
gc.collect()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


SHARDED = {  # what `accelerate launch` puts into the environment
    "ddp": {},
    "fsdp": dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                 FSDP_RESHARD_AFTER_FORWARD="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true"),
    "zero2": dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="2", DS_ACCELERATOR="cpu"),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """launched(processes, kind, lora) -> the folder of a run, made once.

    goes_on: a folder in which stage 1 is resumed after step 4, by so many processes.
    """
    made = {}

    def launch(n, kind="ddp", lora=None, goes_on=None):
        if (n, kind, lora, goes_on) in made:
            return made[n, kind, lora, goes_on]
        out = goes_on or tmp_path_factory.mktemp(f"{kind}{n}")
        (out / "run.py").write_text(LAUNCHED)
        settings = dict(task="sudoku", steps_sft=6, bs_sft=8, rows_sft=2, n_traces=40, steps_rl=4, mu=2, group=2,
                        limit=4, eval_lengths="32", save_steps=2, warmup_sft=2, bs_rl=4,
                        grad_accum=2 if goes_on else 4 // n, logits_gib=5e-5,  # in pieces
                        output_dir=str(out))
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n),
             str(out / "run.py"), json.dumps(settings), json.dumps(lora), json.dumps(kind != "ddp"),
             json.dumps(bool(goes_on))],
            env={**os.environ, **SHARDED[kind], "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        made[n, kind, lora, goes_on] = out
        return out

    return launch


@pytest.mark.parametrize("lora", [None, (4, 8, 0.1, "all")], ids=["full", "lora"])
@pytest.mark.parametrize("kind", SHARDED)
def test_backends_of_two_processes_do_what_one_does(kind, lora, launched):
    """Each holding the model, or with its weights sharded, in a run that is killed in stage 1 and resumed."""
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    folders = launched(1, lora=lora), launched(2, kind, lora)
    one, two = ((logged(f), json.loads((f / "texts.json").read_text())) for f in folders)
    assert one[1] == two[1] and len(one[1]) == 32
    assert len(one[0]) == len(two[0])
    for a, b in zip(one[0], two[0], strict=True):
        assert a.keys() == b.keys()
        for k in set(a) - {"seconds", "stage", "accuracy"}:
            assert b[k] == pytest.approx(a[k], rel=1e-3, abs=1e-5), (a["stage"], a["step"], k)
    evals = [json.loads((f / "eval.json").read_text()) for f in folders]
    for entry in itertools.chain(*evals):
        del entry["stamp"]  # a digest of the weights, which differ by rounding
    assert evals[0] == evals[1] and evals[0][0]["n"] == 5
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    weights = [load_file(f / name) for f in folders]
    assert max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0]) < 1e-4


def test_backends_let_one_process_go_on_where_two_stopped(launched, tmp_path):
    """A checkpoint of sharded weights is of the whole, whoever wrote its pieces."""
    folder = tmp_path / "run"
    shutil.copytree(launched(2, "fsdp"), folder)
    manifest = json.loads((folder / "trainer" / "manifest.json").read_text())
    assert list(manifest["sft"]) == ["4", "6"] and sum("__" in name for name in manifest["sft"]["4"]) == 2
    del manifest["sft"]["6"]
    (folder / "trainer" / "manifest.json").write_text(json.dumps(manifest))
    before = [row for row in logged(folder) if row["stage"] == "sft"]
    after = [row for row in logged(launched(1, "fsdp", goes_on=folder)) if row["stage"] == "sft"]
    assert [row["step"] for row in after] == [row["step"] for row in before]
    for a, b in zip(before, after, strict=True):
        assert a.keys() == b.keys()
        assert all(b[k] == pytest.approx(a[k], rel=1e-3, abs=1e-5) for k in a.keys() - {"seconds", "stage"})


@pytest.mark.parametrize(
    ("kind", "stage", "advice"), [("FSDP", None, "fsdp_version: 2"), ("DEEPSPEED", 3, "zero_stage: 2")])
def test_backends_of_fsdp_1_and_zero_3_are_refused(kind, stage, advice, quick, tmp_path, monkeypatch):
    """The launch as accelerate tells of it, since it makes neither on a CPU."""
    state = SimpleNamespace(deepspeed_plugin=stage and SimpleNamespace(zero_stage=stage))
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=False, state=state)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator)
    with pytest.raises(d1.UserError, match=advice):
        d1.make_backend(quick(), tmp_path)
