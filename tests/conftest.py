"""Shared toys: a model that is a table of numbers, the tiny model, and settings of a few seconds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may touch the network
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as d1_full.py sets it, before torch is loaded

import pytest
import torch

import d1_full as d1

torch.set_num_threads(1)  # the files are shared out to two processes, see .pytest.ini
MASK = 0


class ToyModel(torch.nn.Module):
    """p(x_k | canvas) from random numbers: every logit depends on the whole canvas. float64, ids < vocab."""

    def __init__(self, length: int, vocab: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(length * vocab, length * vocab, generator=generator, dtype=torch.float64)
        self.weight, self.vocab = torch.nn.Parameter(weight), vocab

    def forward(self, input_ids, attention_mask=None):
        one_hot = torch.nn.functional.one_hot(input_ids, self.vocab).double().flatten(1)
        logits = (one_hot @ self.weight).view(*input_ids.shape, self.vocab)
        return type("Output", (), {"logits": logits})


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the embedded model, untrained."""
    return d1.load_model("tiny", device="cpu")


@pytest.fixture
def quick(tmp_path):
    """quick(task, **settings) -> Settings for a run of seconds in a folder of its own."""

    def make(task="sudoku", **changes):
        small = dict(steps_sft=6, bs_sft=4, n_traces=40, steps_rl=4, mu=2, group=2, bs_rl=4, limit=4, bs_eval=64,
                     eval_lengths="32", save_steps=2, threads=1, warmup_sft=2, output_dir=str(tmp_path))
        flags = {"task": task, **small, **changes}
        return d1.settle({k: (v, "test") for k, v in flags.items()})[0]

    return make
