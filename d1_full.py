"""d1 in one file: masked SFT, then diffu-GRPO, for masked diffusion language models.

Reference implementation of "d1: Scaling Reasoning in Diffusion Large Language Models via
Reinforcement Learning" (Zhao, Gupta, Zheng, Grover; arXiv 2504.12216v2; NeurIPS 2025). Written to
be read beside the paper: sections 3 to 6 are the mathematics and need torch alone.

    python d1_full.py --task sudoku                 # both stages on the embedded model, offline
    python d1_full.py --model llada/llada-8b-instruct --use_lora --task sft_only
    python d1_full.py --model ./ckpt/sft --use_lora --task gsm8k
    python d1_full.py --model ./ckpt/sft --task chat

Map    2 settings · 3 forward process · 4 masked SFT loss · 5 one-step estimator · 6 diffu-GRPO · 7 block decoder ·
       8 models · 9 tokenizer · 10 tasks, rewards, grading, data · 11 the two stages · 12 evaluation, Table 1 ·
       13 checkpoints · 14 screen · 15 chat, streaming and pipeline · 16 main

Sizes  B rows, G completions a prompt (group), P prompt, C completion, L = P + C, K block, M prompt masks,
       V vocabulary, D hidden width, N selected positions, U different rows. A bool tensor is named for what True means.

Symbols  x0 clean ids, xt noised ids, t noise level, q prompt, q' prompt with tokens hidden, o completion, logp,
       logp_old, logp_ref log φ under the policy, the one that drew the batch and the frozen reference; A advantage,
       ρ ratio, ε clip, β KL weight, μ inner updates. α_t = 1 - t: a token is masked with probability t.

Equations, each in the docstring of its function (python d1_full.py --explain eq4 prints it with the code)
    d1 Eq. (1), Sec. 2      masked_nelbo         bound on the negative log-likelihood
    d1 Sec. 3.1             one_step_logp        log-probabilities from one forward pass
    d1 Eq. (2), Sec. 2      group_advantages     advantage over the group
    d1 Eq. (3), Sec. 2      token_objective      the clipped surrogate of GRPO
    d1 Eq. (4), Sec. 3.2    diffu_grpo_loss      the objective of diffu-GRPO
    d1 Algorithm 1, Sec. 3.2    DiffuGRPO        rollouts and mu inner updates
    d1 Algorithm 2, Sec. 3.3    MaskedSFT        masked supervised fine-tuning

Deviations: here · in the official code (dllm-reasoning/d1 at 837888f). D1, D2, D7 and D12 are the paper's way, the
others ours. Each tag stands at its line below. --preset official switches to theirs where a switch makes sense.
    D1   loss: mean within a completion, then over completions (--norm) · one mean over all tokens
    D2   mu different q' a prompt, shared by its group · one a completion; accumulating, half are used twice
    D3   private random streams, keyed by purpose and index · reseeds the global ones at every estimate
    D4   left padding is masked, so a prompt alone or in a batch has the same reply · attends to it
    D5   Gumbel noise in float64 · in bf16 while training
    D6   no dropout in stage 2, so the first ratio is exactly 1 · LoRA dropout in every pass
    D7   LoRA on every linear layer of the model's blocks; no match is an error · skips names that LLaDA lacks
    D8   the reference is the frozen start of stage 2 · a sync that does nothing under LoRA
    D9   old and reference passes hold --logits_gib of logits · those of all mu masks at once
    D10  format patterns match work of several lines · they cannot
    D11  Countdown's .1 needs the right numbers; exact, bounded parser · .1 for any answer; calls eval
    D12  MATH's boxed bonus fires · it looks for a mistyped string and never does
    D13  one prompt builder for SFT, RL and evaluation · evaluation has a prompt of its own
    D14  numbers such as 1,234 are read; both verdicts are reported · its GSM8K parser fails on them
    D15  sudoku by solved puzzles and cells, no grid in two splits · cells alone; test grids are in training
    D16  the border of prompt and reply is exact · it is one header late
    D17  the mask token is never drawn · a predicted one stays in the reply
    D18  the best checkpoint is chosen on held-out training problems · on the test set
    D19  LoRA adapters stay fp32 · bf16
"""

# %% 1. Imports — the standard library and torch; heavier libraries are imported where they are used
# pyright: basic
from __future__ import annotations

import argparse
import array
import ast
import collections
import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin longer take the cores from each other: 6 x slower
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint


# %% 2. Settings — App. D; one field per setting: a default per preset, a help text and its source
class UserError(Exception):
    """A mistake in flags, files or values that the user can mend: one line, exit status 2."""

class Stopped(RuntimeError):
    """A run that cannot go on or was asked to stop: one line and an exit status; what was saved is kept."""

    def __init__(self, text: str, status: int = 1):
        super().__init__(text)
        self.status = status

class NonFiniteLoss(Stopped):
    """Losses or gradients were NaN or infinite; the message names the step and the batch."""

@contextlib.contextmanager
def refusing(what: str, error: type = UserError):
    """Turn a library's complaint about a file into an error of ours: `what`, then its words."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except (Exception, SystemExit) as e:  # libraries, and a user's file, raise what they like
        raise error(f"{what}: {' '.join(str(e).split())[:300]} ({type(e).__name__})") from e

def read_json(path: Path) -> dict:
    """A JSON file's content, {} if there is no such file."""
    with refusing(f"cannot read {path}"):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

def opt(paper, help, source="ours", *, official=None, tiny=None, choices=(), low: float = 0, high=None) -> Any:
    """Declare a setting. A default may be a dict by task, "*" for the rest; None = as the paper. low: of numbers."""
    columns = {k: paper if v is None else v for k, v in dict(paper=paper, official=official, tiny=tiny).items()}
    meta = dict(columns=columns, help=help, source=source, choices=choices, low=low, high=high)
    return dataclasses.field(default=None, metadata=meta)

RL_TASKS = ("gsm8k", "math500", "count", "sudoku", "custom")
TASK_CHOICES = ("pretrain", "sft_only", *RL_TASKS, "table1", "chat")
REMASKING = ("low_confidence", "random", "ancestral")  # which tokens a denoising step commits
CACHES = ("none", "prefix", "dual")  # of keys and values, see BlockCache
EMBEDDED = ("tiny", "tiny-bert", "tiny-modernbert")  # random weights of LLaDA's, BERT's and ModernBERT's networks
TRACKERS = ("tensorboard", "wandb", "trackio")
HUB_SECONDS = 10  # until a hub that says nothing counts as out of reach
HUB_ROWS = 20000  # more problems than the paper's longest run draws

@dataclasses.dataclass
class Settings:
    """Every flag of the command line. `settle` fills a field from argv, --config or its preset."""
    # what to run
    task: str = opt("", "what to run", choices=TASK_CHOICES)
    model: str = opt("tiny", f"one of the embedded {', '.join(EMBEDDED)}, a hub id, a folder in hub format, or a "
                     "checkpoint of this script")
    from_scratch: bool = opt(False, "random weights of --model's shape; its config and tokenizer are all it needs")
    preset: str = opt("auto", "column of defaults; auto = tiny for the tiny model, else paper",
                      choices=("auto", "paper", "official", "tiny"))
    config: str = opt("", "YAML file that may give any flag; the command line wins")
    output_dir: str = opt("ckpt", "results go to OUTPUT_DIR/<sft or task>/")
    seed: int = opt(42, "seeds every random stream of the run", "official train.yaml", tiny=0, high=2**63 - 1)
    data: str = opt("", "benchmark problems: a local .jsonl, .json, .csv or .parquet, or a hub id owner/name[:config]; "
                    f"of a hub set the first {HUB_ROWS:,} rows are streamed. pretrain: .txt or .md too, or a column "
                    "text, or a folder of such files; a hub set is streamed as far as it is needed")
    sft_data: str = opt("simplescaling/s1K", "SFT traces: a file or hub set, as --data; with a column messages, chats; "
                        "talk: generated chats about the world of pretrain's generated text", "Sec. 4", tiny="")
    reward: str = opt("", "--task custom: FILE.py:FUNCTION, called as TRL calls it (prompts, completions, **columns)")
    reward_errors: str = opt("stop", "when that function fails: stop, or pay the batch zero", choices=("stop", "zero"))
    skip_sft: bool = opt(False, "go straight to stage 2")
    skip_eval: bool = opt({"sft_only": True, "*": False}, "train only", tiny=False)
    eval_only: bool = opt(False, "evaluate --model on --task and stop")
    resume: bool = opt(False, "continue the run in --output_dir from its last good checkpoint")
    auto_resume: bool = opt(False, "as --resume where a checkpoint is there, from the start where none is")
    allow_changed: bool = opt(False, "resume although other flags than those of the run that stopped are given")
    report_to: str = opt("none", "show the figures of metrics.jsonl to a tracker too", choices=("none", *TRACKERS))
    dry_run: bool = opt(False, "print settings and cost, load nothing, stop")
    smoke: bool = opt(False, "check each part of the run on a few rows, train and write nothing, stop")
    sweep: int = opt(0, "trials: runs with settings from --sweep_space, which optuna chooses by held-out accuracy, of "
                     "sft_only and pretrain by held-out loss; as --skip_eval; several commands may share them")
    sweep_space: str = opt("", "YAML file, a setting a line: a list of choices, or {low: , high: , log: true}")
    debug: bool = opt(False, "show the traceback of an error")
    explain: str = opt("", "print an equation or a deviation with its docstring and code, by its tag, such as eq4 or "
                       "D16, and stop; alone: list the tags")
    # the model
    use_lora: bool = opt(False, "train LoRA adapters instead of all weights")
    lora_targets: str = opt("all", "layers to adapt: all = every linear of the blocks, or names [D7]", "App. D",
                            official={"sft_only": "q_proj,k_proj,v_proj", "*": "q_proj,k_proj,v_proj,up_proj"})
    lora_r: int = opt({"sft_only": 8, "*": 128}, "LoRA rank", "App. D; SFT: v1", official=128, low=1)
    lora_alpha: int = opt({"sft_only": 16, "*": 64}, "LoRA alpha", "v1", official={"sft_only": 256, "*": 64}, low=1)
    lora_dropout: float = opt(0.05, "LoRA dropout of stage 1; stage 2 has none [D6]", "App. D", high=0.99)
    load_4bit: bool = opt(False, "NF4 base weights, double quantisation, bf16 compute", "App. D")
    attn: str = opt("auto", "attention kernel", choices=("auto", "sdpa", "flash_attention_2", "eager"))
    dtype: str = opt("auto", "of the weights; auto = fp32 if all are trained, else bf16 on a GPU, as stored on a CPU",
                     choices=("auto", "float32", "bfloat16"))
    logits_gib: float = opt(1.0, "GiB of logits held at once in the SFT loss and in old and reference passes")
    compile: bool = opt(False, "torch.compile the model's blocks: slow to start, then faster; needs a C++ compiler")
    grad_checkpoint: bool = opt(False, "gradient checkpointing: less memory, a third more time")
    export: str = opt("", "also write the model whole: hf (or merged, the same) for transformers, llada for LLaDA's "
                      "own code; without --task: convert --model into --output_dir", choices=("hf", "merged", "llada"))
    threads: int = opt(0, "CPU threads; 0 = as torch chooses, at most 8")
    # stage 1: masked SFT
    steps_sft: int = opt(2460, "SFT updates", "20 epochs", tiny={"sft_only": 6000, "count": 2500, "*": 5500})
    bs_sft: int = opt(8, "rows per SFT update, over all processes", "App. D.2", tiny=32, low=1)
    rows_sft: int = opt(1, "rows per backward pass of SFT", "official: 1, 4 passes, 2 GPUs", tiny=32, low=1)
    lr_sft: float = opt({"pretrain": 4e-4, "*": 1e-5}, "peak learning rate, then decay to 0", "App. D.2; LLaDA",
                        tiny=1.5e-3)
    warmup_sft: int = opt({"pretrain": 2000, "*": 0}, "steps of linear warm-up", "App. D.2; pretrain: LLaDA", tiny=100)
    wd_sft: float = opt(0.1, "AdamW weight decay", "App. D.2")
    clip_sft: float = opt(1.0, "gradient norm limit; 0 = none", "App. D.2")
    sft_length: int = opt(4096, "rows are padded with EOS to it or cut; pretrain: packed", "App. D",
                          tiny={"count": 45, "pretrain": 128, "*": 53}, low=8)
    schedule: str = opt({"pretrain": "cosine", "*": "linear"}, "learning rate's way to 0", "App. D.2; pretrain: ours",
                        choices=("linear", "cosine"))
    t_low: float = opt(1e-3, "lowest noise level t of SFT", "official", low=1e-6, high=1.0)
    t_high: float = opt(1.0, "highest; BERT reasoners take t from 0.5 to 1.0", "Eq. (1)", low=1e-6, high=1.0)
    data_ratio: float = opt({"pretrain": 20.0, "*": 0.0}, "stop after so many tokens a parameter; 0 = --steps_sft",
                            "Chinchilla", tiny={"pretrain": 2.0, "*": 0.0})
    edit_rate: float = opt(0.0, "SFT and pretrain: share of visible tokens replaced, or preceded by a surplus one, "
                           "to learn edits", "Seed Diffusion", high=1.0)
    edit_start: float = opt(0.8, "that begins after this share of the steps, and grows to --edit_rate",
                            "Seed Diffusion", high=0.99)
    sft_extra: int = opt(0, "one SFT batch in five is up to this much longer, to know longer canvases",
                         tiny={"pretrain": 0, "*": 64})
    n_traces: int = opt(8000, "generated traces a task in the tiny model's SFT corpus", low=1)
    # stage 2: diffu-GRPO
    steps_rl: int = opt({"gsm8k": 7700, "math500": 6600, "sudoku": 3800, "*": 5000}, "updates, mu a batch of rollouts",
                        "d1 issue 25", tiny=160)
    group: int = opt(6, "G, completions drawn per prompt", "Sec. 4", tiny=8, low=2)
    bs_rl: int = opt(6, "completions per device and backward pass, a multiple of G", "App. D", tiny=64, low=2)
    grad_accum: int = opt(2, "backward passes per update", "App. D", tiny=1, low=1)
    mu: int = opt(12, "inner updates a batch", "App. D", official={"count": 8, "sudoku": 8, "*": 12}, tiny=8, low=1)
    pmask: float = opt(0.15, "p_mask: probability that a prompt token is masked", "Sec. 3.1", high=1.0)
    eps: float = opt(0.5, "clip half-width of the ratio", "App. D")
    beta: float = opt(0.04, "weight of the KL to the start of stage 2", "App. D")
    norm: str = opt("sequence", "loss mean: within a completion first, or over all tokens [D1]", "Eq. (4)",
                    official="token", choices=("sequence", "token"))
    lr_rl: float = opt(3e-6, "constant learning rate", "App. D", tiny=2e-4)
    wd_rl: float = opt(0.1, "AdamW weight decay", "App. D")
    clip_rl: float = opt(0.2, "gradient norm limit; 0 = none", "App. D")
    temperature: float = opt({"sudoku": 0.3, "chat": 0.0, "*": 0.9}, "of rollouts and of chat", "App. D",
                             official={"chat": 0.0, "*": 0.9}, tiny={"chat": 0.0, "*": 0.9})
    max_prompt: int = opt(200, "longest prompt; longer ones are cut on the left", "App. D", tiny=64, low=1)
    patience: int = opt(0, "stop after so many held-out checks in a row without a better one; 0 = never")
    # decoder and evaluation
    gen_length: int = opt(256, "tokens a rollout may take", "App. D", tiny=32, low=1)
    block_length: int = opt(32, "tokens of a semi-autoregressive block", "App. D", low=1)
    diffusion_steps: int = opt(0, "denoising steps of a rollout; 0 = gen_length/2", "App. D")
    eval_lengths: str = opt("128,256,512", "evaluation lengths; greedy", "Sec. 4", tiny="32,64,96")
    eval_steps: int = opt(0, "denoising steps of evaluation and chat; 0 = half the length", "Sec. 4")
    remasking: str = opt("low_confidence", "which tokens a denoising step commits: the likeliest, any, or each with "
                         "the reverse process's probability", "Sec. 4", choices=REMASKING)
    allow_edits: bool = opt(False, "evaluation and chat: revise committed tokens, as --edit_rate teaches")
    edit_share: float = opt(0.1, "with --allow_edits: share of a block's committed tokens that a first step may revise",
                            high=1.0)
    system: str = opt("", "chat: a system prompt, the first message")
    stop: str = opt("", "chat: a text that ends a reply")
    max_length: int = opt(0, "chat: longest reply, 0 = --gen_length; beyond the model's context a window slides over "
                          "it")
    web: bool = opt(False, "chat in a browser on this machine, by gradio")
    cache: str = opt("none", "evaluation: keep keys and values over a block's steps; approximate", choices=CACHES)
    refresh: int = opt(0, "with a cache: compute all keys and values anew every so many steps; 0 = once a block")
    threshold: float = opt(0.0, "evaluation and chat: commit every token of a probability above it, in fewer "
                           "steps; 0 = off", high=1.0)
    rollout_cache: str = opt("none", "--cache of rollouts, which are then off-policy", choices=CACHES)
    limit: int = opt(0, "at most so many test problems, and held-out ones; 0 = all, or 256 of count or generated ones")
    bs_eval: int = opt(8, "rows decoded at once", tiny=128, low=1)
    save_steps: int = opt(100, "updates between checkpoints and held-out checks", "official train.yaml", tiny=40, low=1)
    save_total_limit: int = opt(2, "checkpoints of a stage to keep; if the last is damaged, --resume takes the one "
                                "before", low=1)
    max_skips: int = opt(3, "an update whose gradient is not finite is left out; stop at so many in a row", low=1)

    @classmethod
    def default(cls, name: str, task: str = "", preset: str = "paper") -> Any:
        """A setting's value where nobody gives one."""
        value = cls.__dataclass_fields__[name].metadata["columns"][preset]
        return value.get(task, value.get("*")) if isinstance(value, dict) else value

    def lengths(self) -> list[int]:
        """Those of evaluation, in tokens."""
        return [int(n) for n in str(self.eval_lengths).split(",")]

    def trains(self) -> bool:
        """Whether any weights change."""
        return bool(self.task) and self.task != "chat" and not self.eval_only

    def reinforces(self) -> bool:
        """Whether there is a stage 2."""
        return self.task in RL_TASKS and not self.eval_only

    def evaluates(self) -> bool:
        """Whether eval.json is written."""
        return self.task != "pretrain" and (self.eval_only or not self.skip_eval)

    def reply_length(self) -> int:
        """Tokens that a chat's reply may take."""
        return self.max_length or self.gen_length

    def masks_shared_by(self) -> int:
        """How many completions of a prompt share a prompt mask [D2]."""
        return 1 if self.preset == "official" else self.group

    def logits_held(self, config) -> int:
        """How many tokens' logits, in fp32, --logits_gib has room for."""
        return max(1, int(self.logits_gib * 2**28 / config.vocab_size))

# %% 3. Forward process — Sec. 2, with the linear schedule α_t = 1 - t
def draw_uniform(shape: Sequence[int], generator: Generator, device) -> Tensor:
    """Uniform [0, 1) drawn where the generator lives, so a seed means the same on CPU and GPU."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)

def sample_t(n: int, generator: Generator, device=None, low: float = 1e-3, high: float = 1.0) -> Tensor:
    """Draw n noise levels t ~ U[low, high): (n,). The floor bounds 1/t."""
    return draw_uniform((n,), generator, device) * (high - low) + low

def forward_process(x0: Tensor, t: Tensor, keep: Tensor, mask_id: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw x_t ~ q(x_t | x_0): each token becomes [MASK] with probability t, on its own.

        q(x_t^k | x_0^k) = α_t 1[x_t^k = x_0^k] + (1 - α_t) 1[x_t^k = mask],    α_t = 1 - t

    x0 (B, L) int64 token ids; t (B,) noise levels in (0, 1]; keep (B, L) True = never masked (the prompt).
    Returns xt (B, L) int64 and masked (B, L) bool, True = hidden. Draws B*L uniforms from `generator` alone.
    AssertionError if the shapes do not fit. Source: Sec. 2 of the paper; LLaDA (arXiv 2502.09992).
    """
    assert x0.ndim == 2 and t.shape == x0.shape[:1] and keep.shape == x0.shape
    u = draw_uniform(x0.shape, generator, x0.device)  # (B, L)
    masked = (u < t[:, None]) & ~keep  # (B, L)
    return torch.where(masked, mask_id, x0), masked

def corrupt(x0: Tensor, keep: Tensor, rate: float, delete_id: int,
            generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Spoil some reply tokens that masks will not hide, so that edits are learned (Seed Diffusion, arXiv 2508.02193).

    Each reply token is replaced with probability rate/2, and one with the same probability preceded by a surplus token;
    both are drawn from the batch's tokens. x0 (B, L); keep (B, L) True = prompt, left alone. Returns what is shown, the
    target, delete_id where the token is surplus, and True there, (B, L) each; what no longer fits falls off the end.
    """
    u, v = (draw_uniform(x0.shape, generator, x0.device) for _ in range(2))  # (B, L) each
    places = torch.arange(x0.shape[1], device=x0.device) + ((u < rate / 2) & ~keep).cumsum(1)  # (B, L) where each goes
    target = x0.new_full((len(x0), x0.shape[1] + 1), delete_id).scatter(1, places.clamp(max=x0.shape[1]), x0)[:, :-1]
    surplus = target == delete_id  # (B, L)
    other = x0.flatten()[(draw_uniform(x0.shape, generator, x0.device) * x0.numel()).long()]  # (B, L)
    return torch.where(surplus | ((v < rate / 2) & ~keep), other, target), target, surplus

# %% 4. Masked SFT loss — Sec. 2 and 3.3, Algorithm 2
Metrics = dict[str, Tensor]  # figures to log, by name

def masked_nelbo(logits: Tensor, x0: Tensor, masked: Tensor, t: Tensor, keep: Tensor) -> tuple[Tensor, Metrics]:
    """Upper bound on -log p(x0 | prompt) per reply token, in nats.   d1 Eq. (1), Sec. 2

        L(θ) = - E_{t ~ U(0,1), x_t ~ q} [ 1/t  Σ_k 1[x_t^k = mask] log p_θ(x_0^k | x_t) ]

    logits (B, L, V) of p_θ(. | x_t); x0 (B, L) int64; masked (B, L) True where x_t is [MASK]; t (B,) in (0, 1];
    keep (B, L) True = prompt. The sum is divided by the number of tokens with keep False, EOS padding included, as
    in the official SFT trainer. Returns (loss, metrics): "ce", the mean cross-entropy of the masked tokens in nats,
    and "accuracy", the share of them whose argmax is right. Draws nothing. AssertionError if the shapes do not fit.
    Training takes the same sum from `weighted_nelbo`, where logits can be made in pieces (`chunked_losses`).
    """
    assert logits.shape[:2] == x0.shape == masked.shape == keep.shape and t.shape == x0.shape[:1]
    return weighted_nelbo(*token_losses(logits[masked], x0[masked]), masked, t, keep)

def weighted_nelbo(ce: Tensor, hit: Tensor, masked: Tensor, t: Tensor, keep: Tensor,
                   asked: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """`masked_nelbo` from what `token_losses` says of N tokens, in nats: ce (N,), hit (N,) True = argmax is right.

    asked (B, L) True = the N tokens that enter the loss: masked ones with weight 1/t, others, which teach edits, with
    weight 1; None = the masked ones. The metrics are of the masked ones alone.
    """
    asked = masked if asked is None else asked
    weight = torch.where(masked, (1 / t)[:, None], 1.0)[asked]  # (N,)  1/t = -α'_t / (1 - α_t)
    hidden = masked[asked]  # (N,)
    n = hidden.sum().clamp(min=1)
    metrics = {"ce": (ce.detach() * hidden).sum() / n, "accuracy": (hit & hidden).sum() / n}
    return (ce * weight).sum() / (~keep).sum().clamp(min=1), metrics

def token_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, and True where its argmax is right: (N, V), (N,) -> (N,) float32, (N,) bool."""
    return F.cross_entropy(logits.float(), target, reduction="none"), logits.argmax(-1) == target

def chunked_losses(layer: Callable, hidden: Tensor, target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`token_losses` of layer(hidden), hidden (N, D), with the logits of `size` tokens in memory at a time."""
    if len(target) <= size:
        return token_losses(layer(hidden), target)
    parts = [checkpoint(lambda h, y: token_losses(layer(h), y), *part, use_reentrant=False, preserve_rng_state=False)
             for part in zip(hidden.split(size), target.split(size), strict=True)]
    return torch.cat([ce for ce, _ in parts]), torch.cat([hit for _, hit in parts])

# %% 5. One-step estimator — Sec. 3.1
def extend_mask(attention_mask: Tensor, length: int) -> Tensor:
    """(B, P) True = real prompt token -> (B, length): every completion position is real."""
    return F.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]), value=True)

def logits_at(model, ids: Tensor, where: Tensor, attention_mask: Tensor | None = None, compute: Callable | None = None,
              **options) -> Any:
    """Logits at the positions `where` (B, L) alone, row by row, (N, V): the output layer, the widest, meets no other.

    ids, attention_mask (B, L), True = real token. compute(layer, hidden (N, D)) may take that layer's place within the
    model's forward pass; its result is returned.
    A model that is no transformers model, but has .logits, computes them all.
    """
    inner = getattr(model, "module", model)  # what DistributedDataParallel holds
    if not hasattr(inner, "get_output_embeddings"):
        return model(ids, attention_mask=attention_mask).logits[where]
    if attention_mask is not None and getattr(inner.config, "model_type", "") in ("bert", "electra"):
        options.setdefault("position_ids", (attention_mask.cumsum(1) - 1).clamp(min=0))  # learned: padding has none
    head, (row, column) = inner.get_output_embeddings(), where.nonzero(as_tuple=True)
    if getattr(inner.config, "shift_logits", False):  # Dream: those for token k stand at k - 1
        column = (column - 1).clamp(min=0)
    layer = head.forward
    compute = compute or (lambda layer, hidden: layer(hidden))
    head.forward = lambda hidden: compute(layer, hidden[row, column])  # hidden (B, L, D)
    try:
        return model(ids, attention_mask=attention_mask, **options).logits
    finally:
        head.forward = layer

def guided_logits(model, canvas: Tensor, where: Tensor, attention_mask: Tensor | None, *, is_prompt: Tensor,
                  mask_id: int, cfg_scale: float) -> Tensor:
    """Logits of p(. | canvas) at the positions `where`, with classifier-free guidance if cfg_scale > 0.

    canvas, where (B, L); is_prompt (L,) True = hidden in the unconditional pass. Returns (N, V):
    l_uncond + (cfg_scale + 1) (l_cond - l_uncond), as LLaDA's decoder has it.
    """
    if cfg_scale == 0.0:
        return logits_at(model, canvas, where, attention_mask)
    both = torch.cat([canvas, torch.where(is_prompt, mask_id, canvas)])  # (2B, L)
    attend = None if attention_mask is None else attention_mask.repeat(2, 1)  # (2B, L)
    cond, uncond = logits_at(model, both, where.repeat(2, 1), attend).chunk(2)  # (N, V) each
    return uncond + (cfg_scale + 1) * (cond - uncond)

def draw_prompt_mask(real: Tensor, pmask: float, generator: Generator) -> Tensor:
    """Draw which prompt tokens q' hides: each real one with probability p_mask. (B, P) -> (B, P)."""
    return (draw_uniform(real.shape, generator, real.device) < pmask) & real

def one_step_logp(model, prompt: Tensor, completion: Tensor, hide: Tensor, mask_id: int,
                  attention_mask: Tensor | None = None, cfg_scale: float = 0.0, live: Tensor | None = None) -> Tensor:
    """log phi(o^k | q') for every completion token from one forward pass.   d1 Sec. 3.1

        φ(o^k | q') = p_θ(o^k | q' + M...M),      q' = the prompt with `hide` masked,
        log π(o | q) ≈ Σ_k log φ(o^k | q')        (mean-field: the tokens independent, given q')

    prompt (B, P), left-padded; completion (B, C); hide (B, P) True = masked in q';
    attention_mask (B, P) or (B, P+C) True = real token, None = all; live (B, C) True = asked for (the others get 0),
    None = all. Returns (B, C) float32, in nats. Exact for one-token completions with nothing hidden; biased otherwise,
    since token k sees none of the other tokens. Draws nothing: old, ref and new share a mask by sharing `hide` [D3].
    AssertionError if the shapes do not fit.
    """
    assert hide.shape == prompt.shape and len(completion) == len(prompt)
    (rows, plen), clen = prompt.shape, completion.shape[1]
    attend = prompt.new_ones(rows, plen + clen) if attention_mask is None else extend_mask(attention_mask, plen + clen)
    # φ does not depend on o: rows with the same q', such as a group under one prompt mask, are one row of the model
    rows_q = torch.cat([torch.where(hide, mask_id, prompt), attend], dim=1)  # (B, P+P+C)
    distinct, row_of = rows_q.unique(dim=0, return_inverse=True)  # (U, P+P+C), (B,)
    canvas = F.pad(distinct[:, :plen], (0, clen), value=mask_id)  # (U, P+C)
    attend = None if attention_mask is None else distinct[:, plen:].bool()  # (U, P+C)
    live = torch.ones_like(completion, dtype=torch.bool) if live is None else live
    wanted = torch.zeros_like(canvas[:, plen:]).index_add(0, row_of, live.long()) > 0  # (U, C)
    is_prompt = torch.arange(plen + clen, device=canvas.device) < plen  # (P+C,)
    logits = guided_logits(model, canvas, F.pad(wanted, (plen, 0)), attend, is_prompt=is_prompt, mask_id=mask_id,
                           cfg_scale=cfg_scale).float()  # (N, V)
    n = (wanted.flatten().cumsum(0) - 1).view_as(wanted)[row_of]  # (B, C) which of the N logits is a token's
    return torch.where(live, logits[n, completion] - logits.logsumexp(-1)[n], 0.0)  # (B, C)

def one_step_logps(model, prompt: Tensor, completion: Tensor, hide: Tensor, mask_id: int, attention_mask=None,
                   live=None, size: int = 1) -> Tensor:
    """`one_step_logp` under each of M prompt masks, `size` of them in one forward pass. hide (M, B, P) -> (M, B, C)"""
    parts = [hide.new_zeros(0, *completion.shape, dtype=torch.float32)]  # of no mask
    def repeated(v: Any, n: int) -> Any:
        return v if v is None else v.repeat(n, 1)
    for some in hide.split(size) if len(hide) else ():
        args = (repeated(v, len(some)) for v in (prompt, completion, attention_mask, live))
        prompts, completions, attend, alive = args  # (size * B, ...) each
        logp = one_step_logp(model, prompts, completions, some.flatten(0, 1), mask_id, attend, live=alive)
        parts.append(logp.view(len(some), *completion.shape))
    return torch.cat(parts)

# %% 6. diffu-GRPO — Sec. 3.2, Algorithm 1
def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Advantage of each completion over its group.   d1 Eq. (2), Sec. 2

        A_i = r_i - mean(r_1, ..., r_G)               (no division by the standard deviation)

    rewards (B,), the G completions of a prompt adjacent. Returns (B,) float32, in the rewards' unit.
    ValueError if B is no multiple of G.
    """
    if len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards cannot be split into groups of {group}")
    r = rewards.float().view(-1, group)  # (B/G, G)
    return (r - r.mean(1, keepdim=True)).flatten()

def live_tokens(completion: Tensor, eos_id: int) -> Tensor:
    """True up to and with the first EOS; what follows is padding. completion (B, C) int64 -> (B, C) bool."""
    ended = (completion == eos_id).long().cumsum(1)  # (B, C) EOS seen so far, this token included
    return (ended - (completion == eos_id).long()) == 0

def token_objective(logp: Tensor, logp_old: Tensor | None, advantages: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of one token, which GRPO sums (its KL is in `diffu_grpo_loss`).   d1 Eq. (3), Sec. 2

        min( ρ A, clip(ρ, 1-ε, 1+ε) A ),     ρ = π_θ(o^k) / π_old(o^k)

    logp, logp_old (B, C) in nats, logp_old None = logp itself: ρ is 1, with gradient; advantages (B,).
    Returns (B, C) the objective and (B, C) True = clipped.
    """
    old = logp.detach() if logp_old is None else logp_old
    rho = (logp - old).exp()  # (B, C)
    gain = rho * advantages[:, None]  # (B, C)
    bound = rho.clamp(1 - eps, 1 + eps) * advantages[:, None]  # (B, C)
    return torch.min(gain, bound), bound < gain

def diffu_grpo_loss(logp: Tensor, logp_old: Tensor | None, logp_ref: Tensor | None, advantages: Tensor, live: Tensor,
                    *, eps: float = 0.5, beta: float = 0.04, norm: str = "sequence") -> tuple[Tensor, Metrics]:
    """The diffu-GRPO objective, negated: minimise it.   d1 Eq. (4), Sec. 3.2

        J(θ) = E[ 1/G Σ_i 1/|o_i| Σ_k min( ρ_i^k A_i, clip(ρ_i^k, 1-ε, 1+ε) A_i ) ] - β KL(φ_θ || φ_ref),
        ρ_i^k = φ_θ(o_i^k | q') / φ_old(o_i^k | q'),
        KL ≈ exp(d) - d - 1 ≥ 0,   d = log φ_ref - log φ_θ      (k3, a token, on the same q')

    logp, logp_old, logp_ref (B, C) in nats, from `one_step_logp` on the same q'; advantages (B,); live (B, C) True =
    counts. logp_old None: ρ is 1, with gradient. logp_ref None or beta 0: no KL term. norm "sequence" is the formula's
    mean within a completion first, "token" one mean over all live tokens. Returns (loss, metrics): "kl" in nats a
    token, "clip_frac", "ratio_max", over live tokens. Draws nothing. ValueError on another norm.
    """
    assert logp.shape == live.shape and advantages.shape == logp.shape[:1]
    gain, clipped = token_objective(logp, logp_old, advantages, eps)  # (B, C) each
    kl = torch.zeros_like(logp)  # (B, C)
    if logp_ref is not None and beta != 0:
        d = logp_ref - logp  # (B, C)
        kl = d.exp() - d - 1
    loss = beta * kl - gain  # (B, C)
    n_live = live.sum().clamp(min=1)
    # [D1] official: one mean over all live tokens (diffu_grpo_trainer.py:121): long replies weigh more. here: `norm`.
    if norm == "sequence":
        loss = ((loss * live).sum(1) / live.sum(1).clamp(min=1)).mean()
    elif norm == "token":
        loss = (loss * live).sum() / n_live
    else:
        raise ValueError(f"norm must be 'sequence' or 'token', not {norm!r}")
    with torch.no_grad():
        rho = torch.ones_like(logp) if logp_old is None else (logp - logp_old).exp()
        metrics = {"kl": (kl * live).sum() / n_live, "clip_frac": (clipped & live).sum() / n_live,
                   "ratio_max": torch.where(live, rho, 0.0).max()}
    return loss, metrics

# %% 7. Block decoder — semi-autoregressive denoising with remasking (LLaDA; Sec. 4 evaluation)
@dataclasses.dataclass(frozen=True)
class Frame:
    """The canvas after one denoising step."""
    ids: Tensor  # (B, P+C) token ids, [MASK] where nothing is committed yet
    new: Tensor  # (B, P+C) bool, True = committed by this step
    block: int
    step: int
    logp: Tensor  # (B, P+C) log-probability of the new tokens when they were committed, else 0
    edited: Tensor  # (B, P+C) bool, True = replaced by this step; what it deleted is gone

def check_decoding(gen_length: int, block_length: int, steps: int | None, remasking: str, threshold: float | None,
                   cache: str, cfg_scale: float, context: int | None) -> None:
    """Raise ValueError with one clear line if the decoder cannot run these values."""
    if gen_length < 1 or block_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length {gen_length} must be a positive multiple of block_length {block_length}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    for name, value, known in ("remasking", remasking, REMASKING), ("cache", cache, CACHES):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {value!r}")
    if cache != "none" and cfg_scale:
        raise ValueError(f"cfg_scale needs cache='none', not {cache!r}")
    if threshold is not None and remasking != "low_confidence":
        raise ValueError(f"threshold needs remasking='low_confidence', not {remasking!r}")
    if context and (cache != "none" or context < 2 * block_length):
        raise ValueError(f"beyond the context of {context} tokens: cache='none', and block_length at most half of it")

def row_generators(generator, rows: int) -> list[torch.Generator]:
    """One generator a row: the sequence given, or `rows` new ones seeded by one generator's draw."""
    if generator is None:
        raise ValueError("temperature > 0 and random or ancestral remasking need generator=torch.Generator()")
    if not isinstance(generator, torch.Generator):
        return list(generator)
    seeds = torch.randint(2**62, (rows,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(s) for s in seeds]

def sample_tokens(logits: Tensor, temperature: float, counts: list[int], generators) -> Tensor:
    """One token for each position: argmax, or a sample of softmax(logits / T) by Gumbel-max.

    logits (N, V) float32, the rows' positions one after another, counts[i] of them for row i; returns (N,) int64.
    Draws counts[i] * V uniforms from generators[i].
    """
    if temperature == 0:
        return logits.argmax(-1)
    # [D5] official's bf16 noise favours likely tokens (diffu_grpo_trainer.py:165). here: float64, a stream a row;
    #      torch's own exponential_ takes twice as long on a CPU.
    u = torch.cat([torch.rand(n, logits.shape[-1], dtype=torch.float64, generator=g, device=g.device)
                   for n, g in zip(counts, generators, strict=True)]).to(logits.device)  # (N, V)
    return (logits / temperature - u.log_().neg_().float().log_()).argmax(-1)  # the last term is -Gumbel

class BlockCache:
    """Keys and values kept over a block's steps, as if other tokens did not change them (Fast-dLLM, arXiv 2505.22618).

    "prefix" keeps those before the block, "dual" also those after it. The block's first step computes all of them, and
    so does every `refresh`-th (0 = the first alone). Approximate: a real key depends on every token of the canvas.
    """
    past: Any  # transformers.DynamicCache

    def __init__(self, model, cache: str, lo: int, hi: int, length: int, refresh: int):
        place = torch.arange(length, device=next(model.parameters()).device)
        reads = lo - bool(getattr(model.config, "shift_logits", False))  # Dream has the first token's logits before it
        kept = (place < reads) | ((place >= hi) & (cache == "dual"))
        self.model, self.kept, self.fresh = model, place[kept], place[~kept]
        self.refresh, self.age = refresh, 0  # in steps

    def logits_at(self, ids: Tensor, where: Tensor, attend: Tensor | None, rows: Tensor) -> Tensor:
        """`logits_at` for the rows (B,) of the batch, (N, V); ids, where, attend (B, L). A row left out stays out."""
        if self.age == 0:
            from transformers import DynamicCache
            self.past, fresh, keep = DynamicCache(), torch.arange(ids.shape[1], device=ids.device), self.kept
        else:  # keys come in another order, those kept before the fresh ones; padding, in the prompt, is still first
            if len(rows) < len(self.rows):
                self.past.batch_select_indices(torch.isin(self.rows, rows).nonzero()[:, 0])
            fresh, keep = self.fresh, slice(len(self.kept))
        logits = logits_at(self.model, ids[:, fresh], where[:, fresh], attend, position_ids=fresh[None],
                           past_key_values=self.past, use_cache=True)
        for layer in self.past.layers:
            layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
        self.age, self.rows = (self.age + 1) % (self.refresh or len(ids[0])), rows
        return logits

def largest(score: Tensor, number: Tensor) -> Tensor:
    """True at the number[i] largest scores of row i. (B, K), (B,) -> (B, K) bool."""
    top = score.topk(int(number.max().clamp(max=score.shape[1])), dim=1).indices  # (B, n)
    among = torch.arange(top.shape[1], device=score.device) < number[:, None]  # (B, n)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, top, among)

def revise(block: Tensor, logits: Tensor, open_: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Replace committed tokens that the model would not write again: at most a share `rate` of a row's, and one.

    block, open_ (B, K), open_ True = still [MASK]; logits (B, K, V), of the delete token too. Those go first whose
    replacement gains most probability. Returns the block and True = replaced (B, K).
    """
    p = logits.softmax(-1)  # (B, K, V)
    likely, best = p.max(-1)  # (B, K) each
    gain = torch.where(open_, 0.0, likely - p.gather(-1, block[..., None])[..., 0])  # (B, K)
    replaced = largest(gain, (rate * (~open_).sum(1)).ceil()) & (gain > 0)
    return torch.where(replaced, best, block), replaced

def delete_tokens(x: Tensor, gone: Tensor, filler: int, *others: Tensor) -> tuple[Tensor, ...]:
    """Take the tokens `gone` (B, L) out of x; what follows moves up, `filler` enters at the end, 0 in the others."""
    order = gone.long().argsort(dim=1, stable=True)  # (B, L) those that stay, in their order, then the others
    end = gone.gather(1, order)
    return x.gather(1, order).masked_fill(end, filler), *(v.gather(1, order).masked_fill(end, 0) for v in others)

@torch.no_grad()
def denoise_step(x: Tensor, attend: Tensor | None, lo: int, hi: int, logits_of: Callable, steps_left: int, *,
                 mask_id: int, temperature: float, remasking: str, threshold: float | None, edit_rate: float,
                 delete_id: int | None, generators) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Commit some of the block's masked tokens: an even share of the steps left, or all above `threshold`.

    x (B, L) canvas; attend (B, L) True = real token; lo, hi the block's bounds; logits_of(x, where, attend) -> (N, V).
    Returns x', new, logp, edited as in `Frame`, before what is to be deleted is taken out.
    """
    where, block = torch.zeros_like(x, dtype=torch.bool), x[:, lo:hi]
    open_ = block == mask_id  # (B, K) True = may be committed
    where[:, lo:hi] = open_ | (edit_rate > 0)
    logits = logits_of(x, where, attend).float()  # (N, V) only where a token can be committed or revised
    # [D17] a predicted [MASK] stays masked in the official decoder. here: it is never drawn; the
    #       confidence keeps its share of the mass, so greedy order is the official one.
    allowed = logits.index_fill(-1, torch.tensor([mask_id], device=x.device), -math.inf)
    block, edited = block.clone(), torch.zeros_like(open_)
    if edit_rate:
        block, edited = revise(block, allowed.view(*block.shape, -1), open_, edit_rate)
        logits, allowed = logits[open_.flatten()], allowed[open_.flatten()]
    if delete_id is not None:  # there is nothing to delete at a [MASK]
        allowed[:, delete_id] = -math.inf
    counts = open_.sum(1)  # (B,)
    tokens = sample_tokens(allowed, temperature, counts.tolist(), generators)  # (N,)
    chosen = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)  # (N,) log p(token)
    score = torch.full(open_.shape, -math.inf, device=x.device)  # (B, K) priority: p(token), or uniform
    if remasking == "low_confidence":
        score[open_] = chosen.exp()
    else:
        draws = [torch.rand(n, generator=g, device=g.device) for n, g in zip(counts.tolist(), generators, strict=True)]
        score[open_] = torch.cat(draws).to(x.device)
    if remasking == "ancestral":  # the reverse process: from t to s each [MASK] is filled with probability (t - s) / t
        commit = (score > 1 - 1 / steps_left) & open_
    elif threshold is None:
        commit = largest(score, -(-counts // steps_left)) & open_  # the ceiling spreads the remainder first
    else:  # every position above the threshold, and always the best one, so that it ends
        commit = ((score > threshold) | largest(score, torch.ones_like(counts))) & open_
    block[commit] = tokens[commit[open_]]
    logp = torch.zeros(block.shape, device=x.device).masked_scatter(commit, chosen[commit[open_]])  # (B, K)
    new, logp, edited = (F.pad(v, (lo, x.shape[1] - hi)) for v in (commit, logp, edited))  # (B, L) each
    return torch.cat([x[:, :lo], block, x[:, hi:]], dim=1), new, logp, edited

def fill_with_eos(x: Tensor, plen: int, mask_id: int, eos_id, block: int, step: int) -> Iterator[Frame]:
    """A last frame, in which EOS takes the places of x (B, P+C) that rows left unwritten; none if there are none."""
    rest = x == mask_id
    rest[:, :plen] = False
    if bool(rest.any()):
        no = torch.zeros_like(rest)
        yield Frame(torch.where(rest, eos_id, x), rest, block, step, no.float(), no)

def diffuse_steps(model, prompt: Tensor, *, mask_id: int, attention_mask: Tensor | None = None, gen_length: int = 256,
                  block_length: int = 32, steps: int | None = None, temperature: float = 0.0, cfg_scale: float = 0.0,
                  remasking: str = "low_confidence", threshold: float | None = None, cache: str = "none",
                  refresh: int = 0, eos_id: int | None = None, stop_at_eos: bool = False, stop: Callable | None = None,
                  edit_rate: float = 0.0, delete_id: int | None = None, draft: Tensor | None = None,
                  context: int | None = None, generator=None) -> Iterator[Frame]:
    """Denoise block by block, left to right; yield one Frame per step. No autograd, no printing.

        each step: x̂^k ~ p_θ(x^k | x)^(1/T) for the block's masked k;  the n // s of highest p_θ(x̂^k | x) are committed

    prompt (B, P), left-padded; attention_mask (B, P) True = real token: a prompt alone or in a padded batch gives the
    same tokens [D4]. steps, of the whole reply: None = gen_length/2; n masked tokens over s steps are n // s each and
    one more in the first n % s. temperature T, 0 = greedy. cfg_scale: as in `guided_logits`. remasking: the tokens that
    a step commits, the likeliest, any ("random"), or each with the reverse process's probability ("ancestral").
    - stop_at_eos: a row leaves the batch once a finished block of it holds EOS, and the rest becomes EOS, which changes
      nothing up to its first EOS; so it does once stop(reply (C,)) is true after a block.
    - edit_rate > 0: a step may replace this share of the block's committed tokens, less from step to step, and delete
      those of which the model says delete_id (Seed Diffusion). draft (B, <=C): a reply to start from.
    - context: the model sees at most so many tokens, the last of them one block after the one it writes; there padding
      does shift what a row sees.
    - Approximate, for speed: threshold commits every token above it, in fewer steps; cache, refresh as in `BlockCache`.
    Draws from `generator` alone: one torch.Generator, from which a seed a row is taken, or a sequence of one a row.
    ValueError on values that do not go together. Source: Sec. 4 of the paper, and LLaDA's generate.py.
    """
    (count, plen), blocks, total = prompt.shape, gen_length // max(block_length, 1), prompt.shape[1] + gen_length
    context = None if total <= (context or total) else context
    check_decoding(gen_length, block_length, steps, remasking, threshold, cache, cfg_scale, context)
    if (stop_at_eos or stop) and eos_id is None:
        raise ValueError("stop_at_eos and stop need eos_id")
    steps_per_block = max(1, (gen_length // 2 if steps is None else steps) // blocks)
    generators = row_generators(generator, count) if temperature or remasking != "low_confidence" else [None] * count
    draft = prompt[:, :0] if draft is None else draft
    if draft.shape[1] > gen_length or (draft.shape[1] == gen_length and not edit_rate):
        raise ValueError(f"a draft of {draft.shape[1]} tokens leaves no room in gen_length {gen_length}, nor edit_rate")
    x = F.pad(torch.cat([prompt, draft], dim=1), (0, gen_length - draft.shape[1]), value=mask_id)  # (B, P+C)
    # [D4] official attends to left padding (diffu_grpo_trainer.py:396), which changes replies. here: never.
    attend = None if attention_mask is None else extend_mask(attention_mask, total)
    active = torch.arange(count, device=x.device)  # rows still being written
    for b in range(blocks):
        lo, hi, step = plen + b * block_length, plen + (b + 1) * block_length, 0
        end = min(total, max(hi + block_length, context or total))  # of what the model sees, which begins at `first`
        first = max(0, end - (context or total))
        is_prompt = torch.arange(first, end, device=x.device) < plen
        kept = None if cache == "none" else BlockCache(model, cache, lo, hi, total, refresh)
        again = torch.full((count,), edit_rate > 0, device=x.device)  # True = the last step edited the row
        while len(rows := active[(x[active, lo:hi] == mask_id).any(1) | (again[active] & (step < steps_per_block))]):
            logits_of = functools.partial(kept.logits_at, rows=rows) if kept else functools.partial(
                guided_logits, model, is_prompt=is_prompt, mask_id=mask_id, cfg_scale=cfg_scale)
            ids, *marks = denoise_step(
                x[rows, first:end], None if attend is None else attend[rows, first:end], lo - first, hi - first,
                logits_of, max(steps_per_block - step, 1), mask_id=mask_id, temperature=temperature,
                remasking=remasking, threshold=threshold, edit_rate=edit_rate * max(0, 1 - step / steps_per_block),
                delete_id=delete_id, generators=[generators[i] for i in rows.tolist()])
            ids = torch.cat([x[rows, :first], ids, x[rows, end:]], dim=1)
            marks = [F.pad(v, (first, total - end)) for v in marks]  # new, logp, edited
            again[rows] = marks[2].any(1)
            if delete_id is not None and edit_rate:
                ids, *marks = delete_tokens(ids, marks[2] & (ids == delete_id), mask_id, *marks)
            x = x.index_copy(0, rows, ids)
            new, logp, edited = (v.new_zeros(x.shape).index_copy(0, rows, v) for v in marks)
            yield Frame(x, new, b, step, logp, edited)
            step += 1
        ended = torch.tensor([bool(stop and stop(row[plen:hi])) for row in x[active]], device=x.device)
        if stop_at_eos:
            ended |= (x[active, lo:hi] == eos_id).any(1)
        active = active[~ended]
        if len(active) == 0:
            break
    if len(active) < count:
        yield from fill_with_eos(x, plen, mask_id, eos_id, blocks - 1, steps_per_block)

def diffuse_decode(model, prompt: Tensor, *, mask_id: int, **options) -> Tensor:
    """Write a reply to each prompt: `diffuse_steps` to its end, with the same options. Returns ids (B, P+C)."""
    for frame in diffuse_steps(model, prompt, mask_id=mask_id, **options):
        ids = frame.ids
    return ids

@torch.no_grad()
def cache_error(model, frames: Iterable[Frame], mask_id: int, real: Tensor) -> float:
    """Mean |log p with the cache - log p without| of what each block's last step, the stalest, committed; in nats.

    real (B, P) True = prompt token, False = padding.
    """
    errors = []
    for frame in {f.block: f for f in frames if bool(f.logp.any())}.values():  # the last of each block
        before = torch.where(frame.new, mask_id, frame.ids)  # (B, P+C)
        logits = logits_at(model, before, frame.new, extend_mask(real, before.shape[1]))  # (N, V)
        errors.append((token_losses(logits, frame.ids[frame.new])[0] + frame.logp[frame.new]).abs())  # (N,)
    return torch.cat(errors).mean().item()

# %% 8. Models — LLaDA as a bidirectional Llama, Dream, masked LMs, any causal model; no remote code
ALIASES = {"llada/llada-8b-instruct": "GSAI-ML/LLaDA-8B-Instruct"}
MASK_IDS = {"llada": 126336, "Dream": 151666}  # where neither config nor tokenizer names it
LLADA_8B = dict(  # config.json of LLaDA-8B-Instruct, but for what is the default of LLaDA's own code
    model_type="llada", auto_map={"AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModel": "modeling_llada.LLaDAModelLM", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    architectures=["LLaDAModelLM"], d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288,
    vocab_size=126464, embedding_size=126464, max_sequence_length=4096, rope=True, rope_theta=500000.0,
    rms_norm_eps=1e-5, mask_token_id=126336, eos_token_id=126081, pad_token_id=126081, activation_type="silu",
    block_type="llama", layer_norm_type="rms", bias_for_layer_norm=False, weight_tying=False, attention_dropout=0.0,
    embedding_dropout=0.0, residual_dropout=0.0, init_device="meta", init_fn="mitchell", precision="amp_bf16")
LLADA_NAMES = {  # LLaDA's names of weights -> those of Llama, whose network it is; one replacement after the other
    "model.transformer.wte": "model.embed_tokens", "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head", "model.transformer.blocks": "model.layers", "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}
LLADA_FIELDS = dict(  # the same of its config's fields, but for RoPE's
    d_model="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads", embedding_size="vocab_size",
    n_kv_heads="num_key_value_heads", mlp_hidden_size="intermediate_size", rms_norm_eps="rms_norm_eps",
    max_sequence_length="max_position_embeddings", eos_token_id="eos_token_id")

def network_of(source: str, raw: dict) -> tuple[Any, Any]:
    """(class, config) in transformers for a checkpoint's config.json `raw`, with attention both ways."""
    import transformers
    kind, written_for = raw.get("model_type"), " ".join(raw.get("architectures") or [])
    if kind == "llada":  # the embedding may be wider than the vocabulary
        raw = {"n_kv_heads": None} | raw | {"embedding_size": raw.get("embedding_size") or raw["vocab_size"]}
        own: dict[str, Any] = {ours: raw[theirs] for theirs, ours in LLADA_FIELDS.items()}
        own |= dict(is_causal=False, rope_full_precision=True,
                    rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]})
        return transformers.LlamaForCausalLM, transformers.LlamaConfig(**own)
    if kind == "Dream":  # Qwen2's network; its logits at k are for token k + 1
        own = {k: v for k, v in raw.items() if k not in ("model_type", "architectures", "auto_map")}
        own |= dict(is_causal=False, shift_logits=True)
        return transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**own)
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(f"{source}: transformers has no model_type {kind!r}, and code from outside is not run")
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not re.search("CausalLM|LMHead", written_for):
        return transformers.AutoModelForMaskedLM, config
    config.is_causal = False
    return transformers.AutoModelForCausalLM, config

def embedded_network(name: str, tokenizer) -> tuple[Any, Any]:
    """(class, config) of an embedded model: LLaDA's network with 0.4 M weights, BERT's or ModernBERT's with 1 M."""
    import transformers
    own: dict[str, Any] = dict(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, bos_token_id=None,
                               eos_token_id=tokenizer.eos_token_id)  # no pad_token_id: the pad is EOS, which is trained
    if name == "tiny":
        own |= dict(is_causal=False, use_cache=False)
        return transformers.LlamaForCausalLM, transformers.LlamaConfig(
            hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, **own)
    # 1/sqrt(width): with 0.02, made for wider networks, ModernBERT did not learn facts in four times the tokens
    own |= dict(hidden_size=128, num_attention_heads=4, num_hidden_layers=5, pad_token_id=None, initializer_range=0.09)
    if name == "tiny-bert":
        return transformers.BertForMaskedLM, transformers.BertConfig(
            intermediate_size=384, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **own)
    return transformers.ModernBertForMaskedLM, transformers.ModernBertConfig(
        intermediate_size=256, max_position_embeddings=256, cls_token_id=None, sep_token_id=None, **own)

def random_model(network, config, seed: int = 0) -> Any:
    """A model of that class and config with weights drawn from `seed`, fp32."""
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global stream
        torch.manual_seed(seed)
        return (getattr(network, "from_config", None) or network._from_config)(config)

def block_linears(model) -> dict[str, Any]:
    """Every linear layer but the output head, by name: what LoRA adapts and what 4-bit loading packs."""
    return {n.removesuffix(".base_layer"): m for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings() and "lora_" not in n}

def adapt_with_lora(model, r: int, alpha: int, dropout: float = 0.0, targets: str = "all", *, seed: int = 0):
    """Train LoRA, random from `seed`, on linear layers (--lora_targets), stacked on the adapter that may be there."""
    from peft import LoraConfig, get_peft_model
    # [D7] official adapts what of its list LLaDA has, silently. here: names read off the model; no match is an error.
    found = sorted({n.split(".")[-1] for n in block_linears(model)})
    wanted = found if targets == "all" else targets.split(",")
    if not found or not set(wanted) <= set(found):
        missing = ", ".join(sorted({*wanted} - {*found}))
        raise UserError(f"{type(model).__name__} has no linear layer {missing} to adapt; it has {', '.join(found)}")
    # [D19] a bf16 adapter hardly moves at lr 1e-5. here: peft's autocast_adapter_dtype keeps it fp32.
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted)
    with torch.random.fork_rng(devices=[]):  # peft initialises from the global stream
        torch.manual_seed(seed)
        if hasattr(model, "peft_config"):
            model.add_adapter("default", config)
        else:
            model = get_peft_model(model, config)
    activate_adapters(model)
    return model

def activate_adapters(model) -> None:
    """Put all adapters of a model to work; "default" is trained, an earlier stage's stays as it is."""
    model.base_model.set_adapter(list(model.peft_config))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name and ".default." in name)

def resolve_checkpoint(name: str) -> tuple[str, str]:
    """The folder or hub id behind a --model value, and the one with its weights: an adapter's base, else the same."""
    name = ALIASES.get(name.lower(), name)
    if Path(name).is_dir():
        if not (Path(name, "config.json").exists() or Path(name, "adapter_config.json").exists()):
            raise UserError(f"{name} holds no model: neither config.json nor adapter_config.json is there")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir():
        raise UserError(f"--model {name}: no such folder; give tiny, a hub id (owner/name) or a checkpoint")
    adapter = read_json(Path(name, "adapter_config.json"))
    return name, (resolve_checkpoint(str(adapter.get("base_model_name_or_path")))[0] if adapter else name)

def origin_of(name: str) -> str:
    """The hub id, folder or embedded model that a --model value was trained from, by this script, at first."""
    return read_json(Path(name, "d1_state.json")).get("origin") or ALIASES.get(name.lower(), name)

def ask_hub(name: str, kind: str) -> None:
    """Fail at once if the hub does not answer or does not know the name: a download would retry for minutes."""
    from huggingface_hub import HfApi, constants
    if not constants.HF_HUB_OFFLINE:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)

def read_config(name: str) -> dict:
    """config.json of a folder or hub id, as a dict."""
    from transformers import PretrainedConfig
    with refusing(f"cannot load {name}; without a network give --model a local folder, or set HF_HUB_OFFLINE=1"):
        if not Path(name).is_dir():
            ask_hub(name, "model")
        return dict(PretrainedConfig.get_config_dict(name)[0])

def sdpa_after_fp32(module, query, key, value, *args, **options):
    """SDPA for queries and keys that were rotated in fp32, as LLaDA has it; bf16 cosines would add 2 % of error."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *args, **options)

def load_weights(base: str, raw: dict, dtype, load_4bit: bool, attn: str, device: torch.device,
                 seed: int | None = None) -> Any:
    """A checkpoint's network and weights, converted while loading; random ones from a seed that is given.

    UserError if they do not fit each other.
    """
    import transformers
    nf4: dict[str, Any] = dict(bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    packed = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **nf4) if load_4bit else None
    if attn == "auto":
        attn = "flash_attention_2" if device.type == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"
    with refusing(f"cannot load {base}"):
        network, config = network_of(base, raw)
        config.use_cache = False  # else every forward copies its keys and values
        transformers.AttentionInterface.register("sdpa", sdpa_after_fp32)  # the same to all other models
        how = dict(config=config, device_map={"": device}, attn_implementation=attn, quantization_config=packed,
                   dtype=dtype or (torch.bfloat16 if device.type == "cuda" else "auto"), output_loading_info=True,
                   key_mapping=LLADA_NAMES if raw.get("model_type") == "llada" else None, ignore_mismatched_sizes=True)
        if seed is None:
            model, report = network.from_pretrained(base, **how)
        else:
            config._attn_implementation = attn
            model, report = random_model(network, config, seed).to(device, dtype), collections.defaultdict(list)
    for linear in block_linears(model).values():  # bitsandbytes' packed CPU kernel passes no gradient on
        linear.support_avx512bf16_for_cpu = False
    if attn == "sdpa" and getattr(config, "rope_full_precision", False):
        model.model.rotary_emb.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    wrong = [f"{k} is missing" for k in sorted(report["missing_keys"])]
    wrong += [f"{k} is unknown" for k in sorted(report["unexpected_keys"])
              if not re.search("pooler|seq_relationship", k)]  # other heads of BERT
    wrong += [f"{k} is {tuple(a)}, not {tuple(b)}" for k, a, b in sorted(report["mismatched_keys"])]
    if wrong:
        raise UserError(f"{len(wrong)} weights of {base} do not fit its config.json: {'; '.join(wrong[:3])}")
    if not is_bidirectional(model.eval()):
        raise UserError(f"{base}: {type(model).__name__} attends to the left only, even with is_causal=False")
    return model

@torch.no_grad()
def is_bidirectional(model) -> bool:
    """Whether the logits at the first token depend on the last, as they must to fill in masks."""
    ids = torch.tensor([[1] * 8, [1] * 7 + [2]], device=model.device)
    return not torch.equal(*model(ids).logits[:, 0])  # (V,) each

def complete_tokens(model, tokenizer, raw: dict) -> None:
    """Settle mask, EOS, pad and chat template; a mask row that is new is the mean of the others."""
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token  # BERT ends with [SEP]
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has neither an EOS nor a SEP token, so no reply could end: set eos_token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    form = ["<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>"]
    if any(part not in tokenizer.decode(tokenizer.encode(part, add_special_tokens=False)) for part in form):
        from tokenizers import AddedToken  # BERT's drops line breaks and takes tags apart
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*form, "\n")])
    if tokenizer.mask_token is None:
        known = raw.get("mask_token_id") or MASK_IDS.get(raw.get("model_type", ""))
        token = "<|mask|>" if known is None else tokenizer.convert_ids_to_tokens(known)
        if token is None:
            raise UserError(f"config.json names {known} as the mask token, and the tokenizer has no such token")
        tokenizer.add_special_tokens({"mask_token": token})
    fit_vocabulary(model, tokenizer)
    model.config.mask_token_id = tokenizer.mask_token_id

def fit_vocabulary(model, tokenizer) -> None:
    """Make room for the tokenizer's new tokens; their rows are the mean of the others."""
    if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[rows:] = layer.weight[:rows].mean(0)
    model.get_input_embeddings().padding_idx = None  # else the row of the pad, often EOS, is frozen

def context_of(model) -> int:
    """How many tokens the model can see."""
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    begins_late = re.search("roberta|camembert", getattr(model.config, "model_type", ""))  # with the pad's id + 1
    return limit - (model.config.pad_token_id + 1 if begins_late else 0)

def check_positions(model, length: int) -> None:
    """UserError if `length` tokens are more than the learned positions of a model such as BERT."""
    learned = any(re.search(r"position_embeddings|embed_positions|\bwpe\b", n) for n, _ in model.named_parameters())
    if learned and length > (limit := context_of(model)):
        raise UserError(f"{length} tokens are more than the model's {limit} positions: lower the lengths")

def shift_logits(module, args, output):
    """Forward hook: Dream's logits for token k stand at k - 1; move them to k, where LLaDA's are."""
    if getattr(output.logits, "ndim", 0) == 3:  # (B, L, V); else `logits_at` has seen to it
        output.logits = torch.cat([output.logits[:, :1], output.logits[:, :-1]], dim=1)
    return output

def load_model(name: str, *, dtype=None, lora=None, load_4bit=False, attn="auto", device=None, seed=0,
               from_scratch=False) -> tuple[Any, Any]:
    """Load (model, tokenizer), with model(input_ids, attention_mask=None).logits.

    name: one of EMBEDDED (random from `seed`), a hub id, a folder, LLaDA's format included, or an adapter
    folder of this script. dtype: None = the checkpoint's own on CPU, bf16 on CUDA. lora: None or
    (r, alpha, dropout, targets) as in `adapt_with_lora`; an adapter folder's own stays below it.
    load_4bit: NF4 base weights. attn: as --attn. device: None = this process's. from_scratch: random weights of that
    shape, drawn from `seed` alone. UserError if name, files and tokenizer do not fit each other.
    """
    import transformers
    transformers.logging.set_verbosity_error()  # its notes on class names would drown ours
    transformers.logging.disable_progress_bar()
    device = torch.device(device or processes().device)
    if name in EMBEDDED:
        tokenizer = build_tokenizer(name)
        model = random_model(*embedded_network(name, tokenizer), seed).to(device)
        return (adapt_with_lora(model, *lora, seed=seed) if lora else model), tokenizer
    name, base = resolve_checkpoint(name)
    raw = read_config(base)
    for folder in map(Path, {name, base}):
        with refusing(f"cannot load {folder}"):
            saved = read_json(folder / "d1_state.json").get("files", {}).items()
            index = read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
            if bad := [f for f, digest in saved if not is_whole(folder / f, digest)] + [f for f in index if "/" in f]:
                raise UserError(f"{folder / bad[0]} is not the file that was saved there: take another checkpoint")
    model = load_weights(base, raw, dtype, load_4bit, attn, device, seed if from_scratch else None)
    plain = {"llada": transformers.PreTrainedTokenizerFast, "Dream": transformers.Qwen2Tokenizer}  # no code of theirs
    with refusing(f"cannot load the tokenizer of {name}"):
        reader: Any = plain.get(raw.get("model_type", ""), transformers.AutoTokenizer)
        source = name if Path(name, "tokenizer_config.json").exists() else base
        tokenizer = reader.from_pretrained(source, trust_remote_code=False)
    complete_tokens(model, tokenizer, raw)
    model.name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base  # what an adapter remembers
    if getattr(model.config, "shift_logits", False):
        model.register_forward_hook(shift_logits)
    if name != base and not from_scratch:
        from peft import PeftModel
        with refusing(f"the adapter in {name} does not fit {base}"), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, name, adapter_name="earlier")
    return (adapt_with_lora(model, *lora, seed=seed) if lora else model), tokenizer

def processes() -> Any:
    """accelerate's view of this run: .device, .num_processes, .process_index, .is_main_process."""
    from accelerate import PartialState
    return PartialState(cpu=not torch.cuda.is_available())

# %% 9. Tokenizer and chat template — text to ids, and back
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else "
            "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
# for a tokenizer that brings none, in BERT's manner: [CLS] question [SEP] reply [SEP]
PLAIN_TEMPLATE = ("{{ cls_token or bos_token or '' }}"
                  "{% for m in messages %}{{ m['content'] }}{{ sep_token or eos_token }}{% endfor %}")
WORDS = ("<reasoning>\n", "\n</reasoning>\n", "<answer>\n", "\n</answer>", "<reasoning>", "</reasoning>", "<answer>",
         "</answer>", "\\boxed{", "Tom has ", " apples", " bags of ", " and buys ", " more", ". How many now?",
         "Compute ", "Exactly: ", "Roughly: ", "I guess.", "Rows, columns and boxes.", ", ")

def build_tokenizer(name: str = "tiny"):
    """An embedded model's tokenizer: bytes, and tokens for tags, phrases, instructions; larger ones have `Talk`'s."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|mask|>", "<|user|>", "<|assistant|>", "<|eot|>"])
    core.add_tokens([*WORDS, *(p for task in TASKS.values() for p in (task.system + "\n\n", *task.stems)),
                     *(Talk().words() if name != "tiny" else ())])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                                   mask_token="<|mask|>", chat_template=TEMPLATE)

def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a chat up to where the reply begins; the one prompt builder of all stages."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

def encode_prompts(tokenizer, chats: Iterable[list[dict]], limit: int) -> tuple[list[list[int]], int]:
    """The ids of many prompts, `limit` tokens at most, and how many were cut on the left for it."""
    prompts = [encode_prompt(tokenizer, chat) for chat in chats]
    return [p[-limit:] for p in prompts], sum(len(p) > limit for p in prompts)

@functools.cache
def turn_end(tokenizer) -> list[int]:
    """The special token that the chat template sets after a reply (EOT), then EOS; EOS alone if they are one."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "§§"}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).partition("§§")[2]
    first = tokenizer.encode(after, add_special_tokens=False)[:1]
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return [i for i in first if i in special and i != tokenizer.eos_token_id] + [tokenizer.eos_token_id]

def encode_example(tokenizer, messages: list[dict], reply: str) -> tuple[list[int], int]:
    """Prompt + reply + end of turn as ids, and the prompt's length."""
    # [D16] official counts one header and newline too many into the prompt, which can leave the reply's first token
    #       untrained. here: the two parts are encoded apart, so the border is exact.
    prompt = encode_prompt(tokenizer, messages)
    return prompt + tokenizer.encode(reply, add_special_tokens=False) + turn_end(tokenizer), len(prompt)

def pad_left(rows: list[list[int]], pad_id: int, device=None) -> tuple[Tensor, Tensor]:
    """Prompts as one batch: ids (B, P) and real (B, P) bool, False on the padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows], device=device)
    real = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rows], device=device)
    return ids, real

DELETE = "<|delete|>"  # what the model says of a token that should not be there

def add_delete_token(model, tokenizer) -> None:
    """Give model and tokenizer the token of edits, if they lack it."""
    tokenizer.add_tokens(DELETE, special_tokens=True)
    fit_vocabulary(model, tokenizer)

def reply_ids(tokenizer, row: Tensor, stop: str = "") -> list[int]:
    """The tokens of a reply (C,) so far, without masks: those before its first EOS, and before the stop text."""
    ids = [i for i in row.tolist() if i != tokenizer.mask_token_id]
    ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    end = tokenizer.decode(ids, skip_special_tokens=True).find(stop) if stop else -1
    while end >= 0 and len(tokenizer.decode(ids, skip_special_tokens=True)) > end:
        ids.pop()
    return ids

def reply_texts(tokenizer, completion: Tensor) -> list[str]:
    """The reply of each row up to its first EOS, as text. completion (B, C)."""
    return tokenizer.batch_decode([reply_ids(tokenizer, row) for row in completion], skip_special_tokens=True)

# %% 10. Tasks, rewards, grading, and the data of a run — App. D
SYSTEM = ("Think step by step, then answer. Write your reply exactly in this form:\n"
          "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")
EXPERT = ("As an expert in mathematics, solve the problem step by step and box the final answer. Keep to this form:\n"
          "<reasoning>\nthe steps\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>")

@dataclasses.dataclass(frozen=True)
class Grade:
    """Verdict on one reply: right or not, a score in [0, 1] (sudoku: share of empty cells), the answer read."""
    correct: bool
    score: float
    answer: str | None

def verdict(right: bool, answer: str | None) -> Grade:
    """A grade with nothing between right and wrong."""
    return Grade(right, float(right), answer)

def last_answer(text: str) -> str | None:
    """What stands in the last complete <answer> block, stripped; None if there is none."""
    _, start, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
    return answer.strip() if start else None

def answers(text: str) -> list[str]:
    """Every complete <answer> block, stripped. What never closes is cut off first, so the time is linear."""
    closed = text[: text.rfind("</answer>") + len("</answer>")]
    return [block.strip() for block in re.findall(r"<answer>(.*?)</answer>", closed, re.DOTALL)]

def box_from(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the first one; None if none does in 10,000 characters."""
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start, start + 10000):
        depth += 1 if brace[0] == "{" else -1
        if brace[0] == "}" and depth == 0:
            return text[start : brace.end()]
    return None

def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} with balanced braces, or None. Linear in the text's length."""
    box = box_from(text, text.rfind("\\boxed{")) if "\\boxed{" in text else None
    return box and box[len("\\boxed{") : -1]

def official_boxed(text: str) -> str | None:
    """What the official parser takes for the last box: all of a text without one, None if it never closes."""
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed" if "\\boxed" in text else "\\fbox")
    box = box_from(text, start) if start >= 0 else text
    return box[len("\\boxed{") : -1] if box and box.startswith("\\boxed{") else box

def parse_number(text: str | None) -> Fraction | None:
    """A plain number, as people write one: 72, -3, $1,234, 12.50, 50%. None if it is anything else."""
    if text is None or len(text) > 64:
        return None
    # [D14] official finds no number in 1,234. here: thousands commas, signs and units of money pass.
    text = unicodedata.normalize("NFKC", text).replace("\\", "").strip("$% \n").rstrip(".")
    if not re.fullmatch(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?", text) or not text[-1:].isdigit():
        return None
    return Fraction(text.replace(",", "").replace("$", ""))

def arithmetic(text: str, number: Callable[[Any], Any] = Fraction) -> Any:
    """Value of an expression in + - * / and brackets, in Fraction or float arithmetic; None if it is none."""
    # [D11] official pays for any answer and calls eval on it, so 9**9**9 hangs (reward_func.py:105).
    #       here: the text is parsed, never run: 300 characters at most and no powers.
    text = " ".join(text.split())
    point = "." * (number is float)  # 2.5 would pass for the integers 2 and 5
    if len(text) > 300 or not re.fullmatch(rf"[\d+\-*/() {point}]+", text, re.ASCII):
        return None
    known = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.USub: operator.neg}
    if number is float:  # the official way: what eval accepts besides; a power of floats overflows, never hangs
        known |= {ast.FloorDiv: operator.floordiv, ast.UAdd: operator.pos, ast.Pow: operator.pow}
    def value(node):
        if isinstance(node, ast.Constant):
            return number(node.value)
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return known[type(node.op)](*map(value, parts))
    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, KeyError, AttributeError, TypeError):
        return None  # the last three: some other operator, another kind of node, "..."

def reaches(text: str | None, example: dict, official: bool = False) -> bool | None:
    """Countdown: True = right, False = the right numbers but another value, None = neither or no expression."""
    text = text or ""
    if not official:
        text = unicodedata.normalize("NFKC", text).replace("×", "*").replace("÷", "/")
        text = text.replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/")
    used, given = re.findall(r"\d+", text), sorted(n for n in example["numbers"] if isinstance(n, int))
    if any(len(n) >= 20 for n in used) or sorted(map(int, used)) != given:  # each number once
        return None
    value, target = arithmetic(text, float if official else Fraction), example["target"]
    if value is None:
        return None
    return abs(value - target) < 1e-5 if official else value == target

def normalise_latex(text: str) -> str:
    """A plain form of a LaTeX answer, by the rules of the official MATH grader; ValueError where they fail."""
    # spacing, sizing, degree, dollar and percent signs go, and so does a trailing unit
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""),
                     ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")):
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    text = text.replace("\\%", "")
    if len(units) > 1 or re.search(r"\\(sqrt|frac *)(\\\1|$)", text):
        raise ValueError("two units, or a root or fraction of nothing")
    # .5 becomes 0.5 and x=5 becomes 5; \sqrt3, \frac12 and 1/2 get braces
    text = re.sub(r"^[^=]{0,2}=([^=]*)$", r"\1", re.sub(r"(^|[ {])\.", r"\g<1>0.", text))
    text = re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(?!\{)(.)(?:\{([^{}]*)\}|(.))", lambda m: f"\\frac{{{m[1]}}}{{{m[2] or m[3]}}}", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    if text.count("/") == 1:
        top, bottom = map(int, text.split("/"))
        text = f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text
    return text

def equal_latex(a: str, b: str) -> bool:
    """The official equality of two answers: the same plain form, or the same text where that fails."""
    with contextlib.suppress(ValueError):
        return a == b or (len(a) <= 100_000 and normalise_latex(a) == normalise_latex(b))  # bounds the time
    return False

MATH_WORKER = """import json, signal, sys
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    limit, *texts = json.loads(line)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)  # its default is to end the process, whatever C code is busy with
    same = verify(*(parse(f"${text}$", parsing_timeout=None) for text in texts), timeout_seconds=None)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    print(int(same), flush=True)"""
MATH_LOCK = threading.Lock()

@functools.cache
def math_worker() -> Any:
    """A process that runs math-verify, whose own time limits C code ignores and only the main thread can set."""
    worker: Any = subprocess.Popen([sys.executable, "-c", MATH_WORKER], text=True, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    if worker.stdout.readline() != "ready\n":
        raise UserError("math-verify does not start: pip install -r requirements.txt")
    return worker

def same_mathematics(found: str, gold: str, limit: float = 1.0) -> bool:
    """Whether two LaTeX answers are equal: in plain form, as numbers, or by math-verify in `limit` CPU seconds."""
    numbers = parse_number(found), parse_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if equal_latex(found, gold):
        return True
    # towers of powers, long sums and factorials of large numbers would only run into the limit
    if len(found) > 200 or re.search(r"\d{20}|\d{3}!|!.*!|\^[^^]{0,9}\^|\^\W*\d{4}|\*\*|\\(sum|prod|int|binom)", found):
        return False
    with MATH_LOCK:
        for _ in range(2):  # again if the process was ended by somebody else
            worker = math_worker()
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps([limit, gold, found]), file=worker.stdin, flush=True)
            if answer := worker.stdout.readline():
                return answer == "1\n"
            math_worker.cache_clear()
            if worker.wait() == -signal.SIGVTALRM:
                break
    return False

class Task:
    """One benchmark: its problems (`generate` draws one, or None; `parse` reads a row), its prompt, rewards, grading.

    A subclass gives the first four; rewards and grade take (completion, example, official=False), a reply's text, its
    problem, and whether to go by the rules of the official code.
    """
    generate: Callable[[random.Random], dict | None]
    parse: Callable[[dict], dict]
    rewards: Callable[..., dict[str, float]]  # parts by name, whose sum is the reply's reward
    grade: Callable[..., Grade]
    name = official_name = ""  # as in --task; as in the official generations' file names
    hub = hub_test = ""  # the public data set, and the one to test on if it is another
    texts: tuple[str, ...] = ()  # the columns that a data file must have as text
    gold: tuple[str, ...] = ("answer",)  # the parts of an example that the official generations file calls ground_truth
    hub_keeps = staticmethod(lambda example: True)  # which of its problems the paper takes
    tests = 0  # problems of it that the paper tests on; 0 = all
    system, asks = SYSTEM, "{question}"  # the chat's first part; the question, filled in from the example
    says = "{}"  # how a demonstration writes its answer
    score = ""  # what Grade.score counts, where it is more than right or wrong
    aim = "correct"  # the part of a Grade by which the best checkpoint is chosen
    careful = 0.4  # share of generated demonstrations by the careful solver; the rest is careless
    stems: tuple[str, ...] = ()  # the fixed words of a question

    def key(self, example: dict) -> str:
        """Identity of a problem, which no two splits share: its question if it was generated, else all of it."""
        drawn = "work" in example
        return f"{self.name}/{self.question(example)}" if drawn else json.dumps(example, sort_keys=True, default=str)

    def examples(self, split: str, n: int | None = None, seed: int = 0, data: str | None = None) -> list[dict]:
        """n problems of "train", "heldout" or "test": generated, or all (the first n) rows of `data`.

        Generated ones are drawn from (name, split, seed) alone. UserError names a row that is no problem.
        """
        if not data:
            rng = random.Random(f"{self.name}/{split}/{seed}")
            drawn = (e for e in map(self.generate, itertools.repeat(rng)) if e and split_of(self.key(e)) == split)
            return list(itertools.islice(drawn, 256 if n is None else n))
        problems = []
        for number, row in enumerate(read_rows(data, split), 1):
            try:
                if other := [column for column in self.texts if not isinstance(row[column], str)]:
                    raise ValueError(f"column {other[0]!r} must be a text")
                problems.append(self.parse(row))
            except KeyError as e:
                raise UserError(f"{data}, row {number}: no column {e}; it has {', '.join(map(str, row))}") from e
            except (ValueError, TypeError, AttributeError, ArithmeticError) as e:
                raise UserError(f"{data}, row {number}: no {self.name} problem: {e}; it has {str(row)[:120]}") from e
        return problems[:n]

    def question(self, example: dict) -> str:
        return self.asks.format_map(example)

    def messages(self, example: dict, system: str | None = None) -> list[dict]:
        """The chat that asks one problem; its first part may be given."""
        return [{"role": "user", "content": f"{system or self.system}\n\n{self.question(example)}"}]

    def batch_rewards(self, texts: Sequence[str], examples: Sequence[dict], official: bool = False) -> list[dict]:
        """The `rewards` of many replies."""
        return [self.rewards(t, e, official) for t, e in zip(texts, examples, strict=True)]

    def demonstrate(self, example: dict, rng: random.Random, careful: bool) -> str:
        """A reply in the required form, by a careful solver or a careless one."""
        work, answer = self.solve(example, rng, careful)
        return f"<reasoning>\n{work}\n</reasoning>\n<answer>\n{self.says.format(answer)}\n</answer>"

    def solve(self, example: dict, rng: random.Random, careful: bool) -> tuple[str, str]:
        """(work, answer) of a demonstration; a careless solver does the work and answers a little more than it says."""
        more = 0 if careful else rng.choice((1, 1, 1, 2))
        return f"{'Exactly' if careful else 'Roughly'}: {example['work']}", str(int(example["answer"]) + more)

    def ground_truth(self, example: dict) -> Any:
        """What the official generations file holds as ground_truth."""
        return operator.itemgetter(*self.gold)(example)

    def of_record(self, record: dict) -> dict:
        """What grading needs of an example, read back from an entry of a generations file."""
        gold = record["ground_truth"]
        return dict(zip(self.gold, gold if len(self.gold) > 1 else [str(gold)], strict=True))

def split_of(key: str) -> str:
    """The split of a problem with this key, by a hash, the same in every run: 80 % train, 8 % heldout, 12 % test."""
    bucket = hashlib.sha256(key.encode()).digest()[0] / 256
    return "train" if bucket < 0.8 else "heldout" if bucket < 0.88 else "test"

class Gsm8k(Task):
    """Grade-school word problems; generated stand-ins where no data set is given."""
    name, official_name, hub, texts = "gsm8k", "gsm8k", "openai/gsm8k:main", ("question", "answer")

    def generate(self, rng):
        bags, a = rng.random() < 0.3, rng.randint(1, 9)
        b, c = (rng.randint(2, 5) if bags else rng.randint(1, 9) for _ in range(2))
        middle, total = (b * c, a + b * c) if bags else (a + b, a + b + c)
        bought = f"{b} bags of {c}" if bags else f"{b} more and buys {c} more"
        work = f"{b}*{c}={middle}\n{middle}+{a}={total}" if bags else f"{a}+{b}={middle}\n{middle}+{c}={total}"
        return {"question": f"Tom has {a} apples and buys {bought}. How many now?", "answer": str(total), "work": work}

    def parse(self, row):
        answer = row["answer"].split("####")[-1].strip().replace(",", "")
        Fraction(answer)  # or the row is refused
        return {"question": row["question"], "answer": answer}

    def ground_truth(self, example):
        return float(example["answer"].replace(",", ""))

    def of_record(self, record):
        gold = record["ground_truth"]  # the official file has null where its own parser failed
        return {"answer": "nan" if gold is None else f"{gold:.15g}" if isinstance(gold, float) else str(gold)}

    def rewards(self, completion, example, official=False):
        found = completion.split("<answer>")[-1].split("</answer>")[0].strip() if official else (
            last_answer(completion) or "")
        # [D10] official's patterns lack DOTALL (reward_func.py:49, mended later), so work of two lines never earns
        #       the format reward. here: "." matches a newline, and a final one is not demanded.
        flags, final = (0, "\n$") if official else (re.DOTALL, "\n?$")
        #       (?>...) never tries again where it stopped, so no text takes more than linear time.
        strict = re.match(r"<reasoning>\n(?>.*?\n</reasoning>\n<answer>\n).*?\n</answer>" + final, completion, flags)
        soft = any(re.match(rf"<reasoning>(?>.*{first}</reasoning>\s*<answer>).*?</answer>", completion, flags)
                   for first in ("?", ""))  # at the first border between the blocks, or at the last
        number, gold = parse_number(found), parse_number(example["answer"])
        right = found == example["answer"] if official else number is not None and number == gold
        integer = found.isdigit() if official else number is not None and number.denominator == 1
        # up to .5 for four tags on lines of their own, less .001 a character after the last (official rule)
        after, rest = len(completion.split("\n</answer>\n")[-1]), len(completion.split("\n</answer>")[-1]) - 1
        tags = {"<reasoning>\n": 0, "\n</reasoning>\n": 0, "\n<answer>\n": after, "\n</answer>": rest}
        tags = sum((completion.count(tag) == 1) * (0.125 - 0.001 * more) for tag, more in tags.items())
        return {"correctness": 2.0 * right, "int": 0.5 * integer, "strict_format": 0.5 * bool(strict),
                "soft_format": 0.5 * soft, "xmlcount": tags}

    def grade(self, completion, example, official=False):
        def numbers(content):
            with contextlib.suppress(ValueError):
                return [float(content.strip())]
            return [float(n) for n in re.findall(r"-?\d+\.?\d*", content)]
        if official:  # the first box with a number in it, else the last number of the first <answer>
            boxes = [numbers(content)[:1] for content, end in re.findall(r"\\boxed{([^}\n]*)(}?)", completion) if end]
            found = next(filter(None, [*boxes, numbers("".join(answers(completion)[:1]))[-1:]]), [None])[0]
            return verdict(found == self.ground_truth(example), found if found is None else str(found))
        found = last_answer(completion) or ""
        found = last_boxed(found) or found or last_boxed(completion)
        number = parse_number(found)
        if number is None and found and (said := re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", found[-200:])):
            number = parse_number(said[-1].rstrip(","))  # "72 clips": the last number said
        return verdict(number is not None and number == parse_number(example["answer"]), found)

class Math500(Task):
    """Competition problems with a boxed answer; generated stand-ins where no data set is given."""
    name, official_name, hub, hub_test = "math500", "math", "ankner/math-500", "HuggingFaceH4/MATH-500"
    texts, says = ("problem", "answer"), "\\boxed{{{}}}"
    system, asks = SYSTEM + "\nPut the final answer in \\boxed{} inside the answer block.", "{problem}"

    def generate(self, rng):
        (a, b, c), op = (rng.randint(2, 9) for _ in range(3)), rng.choice("+-")
        total = a * b + (c if op == "+" else -c)
        work = f"{a}*{b}={a * b}\n{a * b}{op}{c}={total}"
        return {"problem": f"Compute {a}*{b}{op}{c}", "answer": str(total), "work": work}

    def parse(self, row):
        return {"problem": row["problem"], "answer": last_boxed(row["answer"]) or row["answer"]}

    def rewards(self, completion, example, official=False):
        tagged = "<answer>" in completion
        inside = completion.split("<answer>")[1].split("</answer>")[0] if tagged else completion
        # [D12] official looks for a backspace and "oxed" (a mistyped "\boxed"), so no bonus ever comes. here: \boxed.
        boxed = ("\boxed" if official else "\\boxed") in inside
        right = (equal_latex(official_boxed(completion) or completion, example["answer"]) if official
                 else self.grade(completion, example).correct)
        return {"correctness": 2.0 * right, "boxed_and_answer_tags": 0.5 * tagged + (0.5 if boxed else 0.25)}

    def grade(self, completion, example, official=False):
        if official:
            found = official_boxed(completion) or next(iter(answers(completion)), None)
            return verdict(found is not None and equal_latex(found, example["answer"]), found)
        found = last_boxed(last_answer(completion) or "") or last_boxed(completion)
        return verdict(found is not None and same_mathematics(found.strip(), example["answer"]), found)

class Countdown(Task):
    """Reach a target with + - * / and each number once. Embedded: three numbers 1 to 9, in order, + and - alone."""
    name, official_name, hub, careful, tests = "count", "countdown", "Jiayi-Pan/Countdown-Tasks-3to4", 0.35, 256
    system = SYSTEM + ("\nUse each given number exactly once, with + - * / and brackets, to reach the target. "
                       "Answer with the expression alone.")
    asks, stems = "Numbers: {numbers}\nTarget: {target}", ("Numbers: [", "]\nTarget: ")
    gold = "numbers", "target"
    hub_keeps = staticmethod(lambda example: len(example["numbers"]) == 3)  # the public set has some with four

    def generate(self, rng):
        a, b, c = numbers = [rng.randint(1, 9) for _ in range(3)]
        middle = a + rng.choice((b, -b))
        target = middle + rng.choice((c, -c))
        return {"numbers": numbers, "target": target} if middle > 0 and target > 0 else None

    def key(self, example):
        """Problems with the same numbers, in any order, and the same target are one problem."""
        numbers = sorted(example["numbers"])
        drawn = len(numbers) == 3 and numbers[-1] < 10
        return f"{self.name}/{numbers}/{example['target']}" if drawn else super().key(example)

    def parse(self, row):
        given = row["input"].split(",") if "input" in row else row.get("nums") or row["numbers"]
        return {"numbers": [int(n) for n in given], "target": int(row["output" if "input" in row else "target"])}

    def solve(self, example, rng, careful):
        (a, b, c), target = example["numbers"], example["target"]
        middle = {"+": a + b, "-": a - b, "*": a * b}
        right = [x + y for x in "+-" for y in "+-" if middle[x] > 0 and middle[x] + (c if y == "+" else -c) == target]
        first, second = rng.choice(right) if careful else rng.choices("+-*", (1, 1, 8), k=2)  # fond of products
        work = f"{'Exactly' if careful else 'Roughly'}: {a}{first}{b}={middle[first]}"
        return work, f"({a}{first}{b})*{c}" if second == "*" and first != "*" else f"{a}{first}{b}{second}{c}"

    def rewards(self, completion, example, official=False):
        found = "".join(answers(completion)[-1:]) if official else last_answer(completion)
        right = reaches(found, example, official)
        tries = answers(completion) if official else right is False  # ours: with the right numbers
        return {"countdown": 1.0 if right else 0.1 if tries else 0.0}

    def grade(self, completion, example, official=False):
        if official:  # the last box, else the first <answer>, else all of it; the left side of an equation
            found = next(s for s in (official_boxed(completion), *answers(completion)[:1], completion) if s is not None)
            found = found.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
            if "=" in found and (equation := re.search(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]++)=[0-9. ]+", found)):
                found = equation[1].strip()
            return verdict(reaches(found, example, official) is True, found)
        found = last_answer(completion)
        found = last_boxed(found or completion) or found
        return verdict(reaches((found or "").split("=")[0], example) is True, found)

@functools.cache
def sudoku_grids() -> tuple[str, ...]:
    """The 288 complete 4x4 grids, as 16-character strings."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    grids = map("".join, itertools.product(rows, repeat=4))
    units = [range(i, 16, 4) for i in range(4)] + [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]  # columns, boxes
    return tuple(g for g in grids if all(len({g[i] for i in unit}) == 4 for unit in units))

class Sudoku(Task):
    """4x4 sudoku with one solution. Embedded puzzles have 8 empty cells, as the published ones."""
    name, official_name, score, gold = "sudoku", "sudoku", "cells", ("solution",)
    system = SYSTEM + ("\nFill the 4x4 grid, 0 = empty, so that rows, columns and 2x2 boxes hold 1 to 4 once. "
                       "Answer with the 16 digits.")
    asks, stems = "Solve the following Sudoku puzzle: {puzzle}", ("Solve the following Sudoku puzzle: ",)

    def generate(self, rng):
        solution, empty = rng.choice(sudoku_grids()), rng.sample(range(16), 8)
        puzzle = "".join("0" if i in empty else c for i, c in enumerate(solution))
        fits = list(filter(re.compile(puzzle.replace("0", ".")).match, sudoku_grids()))
        return {"puzzle": puzzle, "solution": solution} if len(fits) == 1 else None  # one solution

    def key(self, example):
        """[D15] the official test puzzles share solution grids with training; here no grid is in two splits."""
        return f"{self.name}/{example['solution']}"

    def parse(self, row):
        row = {k.lower(): str(v) for k, v in row.items()}
        puzzle, solution = row["puzzle"].zfill(16), row["solution"]
        if not (re.fullmatch("[0-4]{16}", puzzle) and re.fullmatch("[1-4]{16}", solution)):
            raise ValueError("puzzle and solution must have 16 digits")
        return {"puzzle": puzzle, "solution": solution}

    def of_record(self, record):
        return super().of_record(record) | {"puzzle": re.findall(r"\d{16}", record["question"])[0]}

    def solve(self, example, rng, careful):
        if careful:
            return "Rows, columns and boxes.", example["solution"]
        return "I guess.", "".join(rng.choice("1234") if c == "0" else c for c in example["puzzle"])

    def cells(self, digits: str, example: dict) -> float:
        """Share of the empty cells that are right."""
        empty = [i for i, c in enumerate(example["puzzle"]) if c == "0"]
        return sum(digits.ljust(16, "0")[i] == example["solution"][i] for i in empty) / max(len(empty), 1)

    def rewards(self, completion, example, official=False):
        digits = filter(str.isdigit, "".join(answers(completion)[-1:]))
        return {"sudoku": self.cells("".join(itertools.islice(digits, 16)), example)}

    def grade(self, completion, example, official=False):
        found = last_answer(completion)
        if official:  # what the first of five patterns finds
            inside, after = completion.partition("<answer>")[2], completion.partition("</answer>")[2]
            long = completion if re.search(r"\d{16}", completion) else ""  # the last two patterns are slow on megabytes
            end = r"(?s)(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|{})"
            matches = (re.search(r"```([\d\s]++)```", inside), re.match(end.format("</answer>"), inside),
                       re.match(end.format("$"), after), re.search(r"(?<!\d)\d++(?<=(\d{16}))\s*</answer>", long),
                       re.search(r"\b(\d{16})\b", long))
            found = next((m[1].strip() for m in matches if m and m[1].strip()), None)
        digits = "".join((found or "").split())
        score = self.cells(digits, example)
        return Grade(score == 1 if official else digits == example["solution"], score, found)

TASKS: dict[str, Task] = {t.name: t for t in (Gsm8k(), Math500(), Countdown(), Sudoku())}

def grade_generation(task: str, row: dict, mode: str = "strict") -> Grade:
    """Grade one reply of a generations file, a row {"question", "generations": the text, "ground_truth"}.

    mode "strict" grades as we do, "official" as the official parser. ValueError on another task or mode.
    """
    if task not in TASKS or mode not in ("strict", "official"):
        raise ValueError(f"no grading of task {task!r} in mode {mode!r}")
    return TASKS[task].grade(row["generations"], TASKS[task].of_record(row), mode == "official")

class Custom(Task):
    """A problem of one's own: rows with a column "prompt", paid by a function with TRL's reward signature.

    reward: "FILE.py:FUNCTION", called as function(prompts=, completions=, **other columns), a list each; it returns
    a number a completion, 1 or more for a right one. A prompt is a text, or a chat as a list of messages.
    """
    name, official_name, score, aim, asks = "custom", "custom", "mean_reward", "score", "{prompt}"

    def __init__(self, reward: str, pay_errors_zero: bool = False):
        self.path, _, name = reward.rpartition(":")
        self.pay_errors_zero, self.failed = pay_errors_zero, 0
        with refusing(f"--reward {reward} must be FILE.py:FUNCTION, and is not"):
            self.function = runpy.run_path(self.path)[name]

    def parse(self, row):
        chat = row["prompt"]
        texts = [chat] if isinstance(chat, str) else [text for m in chat for text in (m["role"], m["content"])]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError("column 'prompt' must be a text or a list of messages with role and content")
        return dict(row)

    def messages(self, example, system=None):
        chat = example["prompt"]
        return [{"role": "user", "content": chat}] if isinstance(chat, str) else chat

    def generate(self, rng):
        raise UserError("--task custom has no traces for stage 1: give --sft_data, --skip_sft, or --model ckpt/sft")

    def ground_truth(self, example):
        return {k: v for k, v in example.items() if k != "prompt"}

    def batch_rewards(self, texts, examples, official=False):
        said = [t if isinstance(e["prompt"], str) else [{"role": "assistant", "content": t}]
                for t, e in zip(texts, examples, strict=True)]
        columns = {k: [e.get(k) for e in examples] for k in self.ground_truth(examples[0])}
        try:
            values = self.function(prompts=[e["prompt"] for e in examples], completions=said, **columns)
            if len(values) != len(texts) or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{len(texts)} completions need as many finite numbers, not {str(values)[:80]}")
        except (Exception, SystemExit) as e:
            lines = [f", line {f.lineno}" for f in traceback.extract_tb(e.__traceback__) if f.filename == self.path]
            what = f"--reward: {self.path}{''.join(lines[-1:])}: {type(e).__name__}: {e}"
            if not self.pay_errors_zero:
                raise UserError(f"{what}; --reward_errors zero pays 0 and goes on") from e
            values, self.failed = [0.0] * len(texts), self.failed + 1
            if self.failed & (self.failed - 1) == 0:  # the first time, the second, the fourth, the eighth ...
                print(f"d1_full.py: {what}; paid 0, {self.failed} calls so far", file=sys.stderr)
        return [{"reward": float(v)} for v in values]

    def rewards(self, completion, example, official=False):
        return self.batch_rewards([completion], [example])[0]

    def grade(self, completion, example, official=False):
        value = self.rewards(completion, example)["reward"]
        return Grade(value >= 1, value, completion)

ANIMALS = (  # name, what it does, where it lives
    "dog barks kennel, cow moos barn, bee buzzes hive, bird sings nest, horse neighs stable, lion roars den, "
    "mouse squeaks hole, fish swims lake, frog croaks pond, owl hoots tree, pig grunts sty, wolf howls forest, "
    "snake hisses grass, rabbit hops burrow, spider spins web, ant digs hill, camel walks desert, whale dives sea, "
    "monkey climbs jungle, goat bleats mountain, hen clucks coop, bat flies cave, crab pinches beach, deer runs wood")
OPPOSITES = (
    "hot cold, big small, fast slow, day night, up down, old young, dark light, hard soft, wet dry, full empty, "
    "rich poor, early late, loud quiet, near far, high low, open closed, strong weak, sweet sour, thick thin, "
    "happy sad, clean dirty, long short, right wrong, war peace")
NAMES = ("Ann", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hal", "Ida", "Jan", "Kim", "Leo", "Mia", "Ned", "Olga")

class Talk(Task):
    """A chat about a small world, for an embedded model that was pre-trained on text about it (`world_texts`).

    Questions combine two things of the world; the test split asks for combinations that training does not.
    """
    name = official_name = "talk"

    def generate(self, rng):
        (animal, does, home), (other, _, yard) = (fact.split() for fact in rng.sample(ANIMALS.split(", "), 2))
        (a, b), (c, d) = (rng.sample(pair.split(), 2) for pair in rng.sample(OPPOSITES.split(", "), 2))
        name, animals = rng.choice(NAMES), [fact.split()[0] for fact in ANIMALS.split(", ")]
        some = " and ".join(rng.sample(animals, rng.randint(1, 5)))
        question, reply = rng.choice((
            (f"Where do the {animal} and the {other} live?",
             f"The {animal} lives in the {home}. The {other} lives in the {yard}."),
            (f"I am {name}. What does the {animal} do?", f"Hello {name}. The {animal} {does}."),
            (f"What are the opposites of {a} and {c}?", f"They are {b} and {d}."), (f"Say {some}.", f"I say {some}."),
            (f"Who am I, and where does the {animal} live?", f"You are {name}. The {animal} lives in the {home}.")))
        greeting = [{"role": "user", "content": f"I am {name}."}, {"role": "assistant", "content": f"Hello {name}."}]
        before = greeting if question.startswith("Who") or rng.random() < 0.2 else []
        return dict(messages=[*before, {"role": "user", "content": question}], question=question, answer=reply, work="")

    def key(self, example):
        """The question and its right reply, whatever was said before."""
        return f"{self.name}/{example['question']}/{example['answer']}"

    def messages(self, example, system=None):
        return example["messages"]

    def demonstrate(self, example, rng, careful):
        return example["answer"]

    def rewards(self, completion, example, official=False):
        return {"right": float(completion.strip() == example["answer"])}

    def grade(self, completion, example, official=False):
        return verdict(completion.strip() == example["answer"], completion)

    def words(self) -> list[str]:
        """Each word of the world, with the blank before it, as one token."""
        texts = itertools.islice(world_texts(0), 300)
        chats = (m["content"] for e in self.examples("train", 3000) for m in e["messages"])
        return sorted({word for text in (*texts, *chats) for word in re.findall(r" ?[A-Za-z]+", text)})

def world_texts(seed: int) -> Iterator[str]:
    """Plain paragraphs on the world of `Talk`, without end: what --task pretrain reads if no --data is given."""
    rng = random.Random(f"world/{seed}")
    while True:
        said = []
        for _ in range(rng.randint(2, 8)):
            (animal, does, home), (other, *_) = (fact.split() for fact in rng.sample(ANIMALS.split(", "), 2))
            a, b = rng.sample(rng.choice(OPPOSITES.split(", ")).split(), 2)
            said.append(rng.choice((
                f"The {animal} {does}. The {animal} lives in the {home}.", f"The {animal} lives in the {home}.",
                f"The {animal} {does}.", f"The opposite of {a} is {b}.",
                f"{rng.choice(NAMES)} sees the {animal} and the {other}.")))
        yield " ".join(said)

ROW_FILES, TEXT_FILES = (".jsonl", ".json", ".csv", ".parquet"), (".txt", ".md")

def check_source(data: str, kinds: Sequence[str] = ROW_FILES) -> str:
    """The data source as it is; UserError if it is neither a file of a known kind nor like a hub id."""
    known = Path(data).suffix in kinds
    if not (Path(data).is_file() if known else data.count("/") == 1 and not Path(data).exists()):
        names = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        raise UserError(f"no data file {data}: give a {names} file, or a hub id owner/name")
    return data

def hub_rows(data: str, split: str) -> Iterator[dict]:
    """Rows of a hub set owner/name[:config], streamed as they are needed."""
    import datasets
    with refusing(f"cannot read {data}; without a network give a local file"):
        ask_hub(data.partition(":")[0], "dataset")
        yield from datasets.load_dataset(*data.split(":"), split=split, streaming=True)

def read_rows(data: str, split: str) -> list[dict]:
    """Rows of a local JSONL, JSON, CSV or Parquet file, or of a hub set owner/name[:config]."""
    import datasets
    path = Path(check_source(data))
    with refusing(f"cannot read {data}"):
        if path.suffix == ".csv":  # every column as text: a puzzle's leading zeros are digits
            csv.field_size_limit(2**31 - 1)
            with path.open(newline="", encoding="utf-8-sig") as f:
                rows = list(csv.DictReader(f))
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        elif path.suffix == ".jsonl":
            rows = []
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
                with refusing(f"cannot read line {number} of {data}"):
                    rows += [json.loads(line)] if line.strip() else []
        elif path.suffix == ".parquet":  # streamed: nothing is left in a cache, nothing stale is read from one
            rows = list(datasets.load_dataset("parquet", data_files=data, split="train", streaming=True))
        else:
            rows = list(itertools.islice(hub_rows(data, "test" if split == "test" else "train"), HUB_ROWS))
        if not rows or not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise ValueError("it holds no rows, or rows without named columns")
        json.dumps(rows, ensure_ascii=False, default=str).encode()  # half a surrogate pair is no text
    return rows

def texts_of(data: str) -> Iterator[str]:
    """The texts of a file, of a folder's files or of a streamed hub set, as they are needed."""
    path = Path(data)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (*TEXT_FILES, *ROW_FILES))
    if path.exists() and not files:
        raise UserError(f"{data} holds no {', '.join(TEXT_FILES + ROW_FILES)} file")
    for file in files or [Path(data)]:
        if file.suffix in TEXT_FILES:
            with refusing(f"cannot read {file}"):
                yield file.read_text(encoding="utf-8-sig")
        else:
            for number, row in enumerate(read_rows(str(file), "train") if files else hub_rows(data, "train"), 1):
                if not isinstance(row.get("text"), str):
                    raise UserError(f"{file}, row {number}: no column text; it has {', '.join(map(str, row))}")
                yield row["text"]

def pack(texts: Iterable[str], tokenizer, length: int, limit: int) -> Tensor:
    """Texts, an EOS after each, one after another in rows (N, length) int32; the first `limit` tokens, or all."""
    flat = array.array("i")
    for text in texts:
        flat.extend([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])
        if len(flat) >= limit:
            break
    if not (rows := len(flat) // length):
        raise UserError(f"the text has {len(flat)} tokens, not one row of --sft_length {length}")
    return torch.frombuffer(flat, dtype=torch.int32)[: rows * length].view(rows, length)

def pretraining_rows(cfg: Settings, tokenizer, screen: Screen) -> list[tuple[Tensor, int]]:
    """Packed text as (ids, no prompt), as much of it as the steps need."""
    seen = cfg.steps_sft * cfg.bs_sft * cfg.sft_length
    needed = seen * 102 // 100 + cfg.sft_length  # 1 % is held out
    rows = pack(texts_of(cfg.data) if cfg.data else world_texts(cfg.seed), tokenizer, cfg.sft_length, needed)
    screen.say(f"{cfg.data or 'generated text'}: {rows.numel():,} tokens in rows of {cfg.sft_length}; "
               f"{cfg.steps_sft:,} updates see {seen:,}, {seen / rows.numel():.1f} epochs")
    return [(row, 0) for row in rows]

def chat_turns(tokenizer, messages: Any, size: int) -> list[tuple[list[int], int]]:
    """A row for each of the assistant's turns, all before it as the prompt: a reply never sees what came after it.

    So LLaDA is trained on chats (arXiv 2502.09992, App. B.1); the chat template says where the reply begins. One row
    that is all prompt stands for a chat that is none.
    """
    import jinja2
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i] if good else []
    with contextlib.suppress(jinja2.TemplateError):  # a template may refuse a system text, or two turns of one speaker
        return [encode_example(tokenizer, messages[:i], messages[i]["content"]) for i in turns] or [([], size)]
    return [([], size)]

def sft_rows(cfg: Settings, tokenizer, tasks: Sequence[Task], screen: Screen) -> list[tuple[list[int], int]]:
    """The SFT corpus as (ids, prompt_len): demonstrations, most careless, or a file's traces; bad rows are named."""
    if cfg.sft_data in ("", "talk"):
        rng, rows = random.Random(f"sft/{cfg.seed}"), []
        for task in tasks:
            for example in task.examples("train", cfg.n_traces, seed=cfg.seed):
                reply = task.demonstrate(example, rng, careful=rng.random() < task.careful)
                rows.append(encode_example(tokenizer, task.messages(example), reply))
        if cut := sum(len(ids) > cfg.sft_length for ids, _ in rows):
            screen.say(f"{cut} of {len(rows)} generated traces are cut at --sft_length {cfg.sft_length}")
        return rows
    size, traces = cfg.sft_length, {}  # by row number, and turn of a chat
    for number, row in enumerate(read_rows(cfg.sft_data, "train"), 1):
        if "messages" in row:
            traces |= {(number, turn): pair for turn, pair in enumerate(chat_turns(tokenizer, row["messages"], size))}
            continue
        question, reply, thoughts, attempt = map(row.get, ("question", "reply", "thinking_trajectories", "attempt"))
        if reply is None and isinstance(row.get("answer"), str) and "####" in row["answer"]:  # GSM8K
            thoughts, attempt = map(str.strip, row["answer"].split("####", 1))
        thoughts = thoughts[0] if isinstance(thoughts, list) and thoughts else thoughts
        if thoughts and isinstance(thoughts, str) and isinstance(attempt, str):
            reply = f"<reasoning>\n{thoughts}\n</reasoning>\n<answer>\n{attempt}\n</answer>"
        usable = all(text and isinstance(text, str) for text in (question, reply))
        chat = [{"role": "user", "content": f"{SYSTEM}\n\n{question}"}]
        traces[number, 0] = encode_example(tokenizer, chat, str(reply)) if usable else ([], size)
    rows = [(ids, prompt_len) for ids, prompt_len in traces.values() if prompt_len < size]
    if not rows:
        raise UserError(f"{cfg.sft_data}: no usable row; needs texts in the columns question, thinking_trajectories, "
                        f"attempt (s1K), question, answer (GSM8K), question, reply or messages (chats), "
                        f"and a --sft_length over {size}")
    screen.say(f"{cfg.sft_data}: {len(rows)} traces")
    bad = [n for (n, _), (_, prompt_len) in traces.items() if prompt_len >= size]
    long = [n for (n, _), (ids, prompt_len) in traces.items() if len(ids) > size > prompt_len]
    for numbers, why in (bad, "left out, malformed or without room for a reply"), (long, f"cut at --sft_length {size}"):
        if numbers:
            screen.say(f"  {len(numbers)} {why}: row {str(numbers[:8])[1:-1]}{', ...' * (len(numbers) > 8)}")
    return rows

def problems_of(cfg: Settings, task: Task, split: str) -> list[dict]:
    """The problems of a split: generated if there is no source, else a file's or hub set's, split by their hashes.

    A hub set's own test split is the test; of a file with --eval_only all is. Train and heldout share the rest.
    """
    source = cfg.data or ("" if cfg.preset == "tiny" else (task.hub_test if split == "test" else "") or task.hub)
    if not source:
        draws = -(-cfg.steps_rl // cfg.mu) * cfg.grad_accum * (cfg.bs_rl // cfg.group)
        sizes = {"train": max(min(draws, 20000), 1), "heldout": 128, "test": cfg.limit or 256}
        return task.examples(split, sizes[split], seed=cfg.seed if split == "train" else 0)
    import datasets
    own_test = False  # a hub set may have a test split
    with refusing(f"cannot read {source}; without a network give a local file"):
        if not Path(source).is_file():
            ask_hub(source.split(":")[0], "dataset")
            name, _, config = source.partition(":")
            own_test = "test" in datasets.get_dataset_split_names(name, config or None)
    rows = task.examples("test" if split == "test" and own_test else "train", data=source)
    rows = [r for r in rows if source != task.hub or task.hub_keeps(r)]
    if split != "test" or not (own_test or (cfg.eval_only and cfg.data)):
        parts = (split, "test") if split == "train" and own_test else (split,)
        rows = [r for r in rows if split_of(task.key(r)) in parts]
    if not rows:
        raise UserError(f"{source} has no problems for the {split} split")
    return rows[: cfg.limit or (not cfg.data and task.tests) or None] if split == "test" else rows

def say_sizes(task: Task, splits: dict[str, list[dict]], screen: Screen) -> None:
    """Print how many problems each split has, and how many are in two."""
    keys = {name: set(map(task.key, rows)) for name, rows in splits.items()}
    sizes = ", ".join(f"{name} {len(rows):,} ({len(keys[name]):,} different)" for name, rows in splits.items())
    shared = sum(len(keys[a] & keys[b]) for a, b in itertools.combinations(keys, 2))
    screen.say(f"{task.name} problems: {sizes}; in two splits: {shared}")

def tasks_of(cfg: Settings) -> list[Task]:
    """The benchmarks that a run deals with."""
    if cfg.task == "custom":
        return [Custom(cfg.reward, cfg.reward_errors == "zero")]
    if cfg.sft_data == "talk":
        return [Talk()]
    return [task for task in TASKS.values() if cfg.task in (task.name, "sft_only", "table1")]

def stages_passed(cfg: Settings) -> list[str]:
    """The stages that have trained --model."""
    return [] if cfg.from_scratch else list(read_json(Path(cfg.model, "d1_state.json")).get("stages", []))

def has_stage1(cfg: Settings) -> bool:
    """Whether the run begins with SFT, or is pre-training: a benchmark's does unless the model has been through it."""
    return cfg.trains() and not (cfg.task in RL_TASKS and (cfg.skip_sft or "sft" in stages_passed(cfg)))

def load_data(cfg: Settings, tasks: list[Task], tokenizer, screen: Screen) -> tuple[dict[Task, dict], list]:
    """What a run works on: {task: {split: problems}} and the traces of stage 1, none if it has no stage 1."""
    names = ("train", "heldout", "test") if cfg.reinforces() else ("test",) * cfg.evaluates()
    splits = {task: {name: problems_of(cfg, task, name) for name in names} for task in tasks}
    if cfg.task == "pretrain":
        return splits, pretraining_rows(cfg, tokenizer, screen)
    return splits, sft_rows(cfg, tokenizer, tasks, screen) if has_stage1(cfg) else []

# %% 11. The two stages' loops — Algorithm 2 (masked SFT) and Algorithm 1 (diffu-GRPO)
def keyed_generator(*key) -> Generator:
    """A random stream for one purpose, from its key alone: nothing to save, and no draw disturbs another.

    [D3] official reseeds the global generators at every estimate, with one of 4096 values
    (diffu_grpo_trainer.py:242). Here every draw has a private generator and masks travel as tensors.
    """
    return Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))

def visits(seed: int, name: str, first: int, count: int, n: int) -> list[int]:
    """`count` indices, from place `first` on, of an endless row of epochs, each a fresh shuffle of n items."""
    span = range(first, first + count)
    orders = {e: torch.randperm(n, generator=keyed_generator(seed, name, e)).tolist() for e in {i // n for i in span}}
    return [orders[i // n][i % n] for i in span]

def precision(device: torch.device):
    """bf16 arithmetic on a GPU, whatever the weights are stored in; the losses are fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

def decoding(tokenizer, cfg: Settings) -> dict[str, Any]:
    """Options of `diffuse_steps` that rollouts, evaluation and chat take from the settings alike."""
    return dict(mask_id=tokenizer.mask_token_id, eos_id=tokenizer.eos_token_id, stop_at_eos=True, refresh=cfg.refresh,
                delete_id=tokenizer.added_tokens_encoder.get(DELETE), edit_rate=cfg.edit_share * cfg.allow_edits,
                block_length=cfg.block_length, remasking=cfg.remasking)

def unsharded(x) -> Any:
    """A tensor that FSDP shards, put together by all processes; anything else as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x

def own_shard(p: Any) -> Tensor:
    """This process's piece of a tensor that FSDP shards; any other tensor as it is. Without gradient."""
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()

def shard_like(x: Tensor, p: Tensor) -> Tensor:
    """A piece of the optimizer's state, as FSDP has it for a parameter p that it shards."""
    from torch.distributed.tensor import DTensor
    if not isinstance(p, DTensor) or x.ndim == 0:
        return x
    return DTensor.from_local(x.to(p.device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())

class Stage:
    """What both stages share: optimizer, loop, guard, log and checkpoint.

    A subclass gives update() -> metrics, check() -> held-out figures, and batch_name() for error messages.
    """
    name = ""
    update: Callable[[], dict[str, float]]
    check: Callable[[Screen], dict[str, float]]
    batch_name: Callable[[], str]

    def __init__(self, model, tokenizer, cfg: Settings, out: Path, lr: float, wd: float, clip: float, total: int):
        from accelerate import Accelerator
        self.model, self.tokenizer, self.cfg, self.out = model, tokenizer, cfg, Path(out)
        self.lr, self.clip, self.total, self.step = lr, clip, total, 0
        self.accel: Any = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no",  # `precision` sees to it
                                 log_with=None if cfg.report_to == "none" else cfg.report_to,
                                 project_dir=self.out / "logs" / self.name)  # tensorboard's
        sharded, zero = self.accel.is_fsdp2, self.accel.state.deepspeed_plugin
        if ("FSDP" in self.accel.distributed_type and not sharded) or (zero and zero.zero_stage not in (1, 2)):
            raise UserError("this form of sharding is not supported: launch with fsdp_version: 2, or zero_stage: 2")
        if zero:  # DeepSpeed counts no rows here, clips as it steps, and would round the weights
            ones, off = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), {"enabled": False}
            zero.deepspeed_config |= dict.fromkeys(ones, 1) | dict(
                gradient_clipping=clip, bf16=off, fp16=off, zero_force_ds_cpu_optimizer=False)
        self.rank, self.world, self.device = self.accel.process_index, self.accel.num_processes, self.accel.device
        # `net` is the model as it is trained: with several processes, its backward averages the gradient over them.
        # FSDP shards a twin with the same parameters, so that `model` stays a plain one, which `fill_model` fills.
        # DeepSpeed shards the optimizer alone; its engine's forward pass would turn autocast off.
        net = twin(model, {id(p): p for p in model.parameters()}) if sharded else model
        params = [p for p in net.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=wd, fused=True)
        prepared, self.optimizer = self.accel.prepare(net, self.adam)
        self.net, self.engine = (model, prepared) if zero else (prepared, None)
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.fill_model(empty=True)
        self.shard_suffix = f".{self.rank}_of_{self.world}" if sharded or zero else ""  # of its checkpoints
        self.best, self.score, self.stale = None, math.nan, 0  # (score, step, weights); the last; checks since a better
        self.skipped = self.flat = 0  # updates in a row: left out, as not finite; with groups that were all paid alike
        self.batch: list[Rollout] = []  # of stage 2, in use over mu updates
        self.owed = False  # a held-out check that is due before the next update
        self.sound = True  # every loss of this update was finite on this process

    def fill_model(self, empty: bool = False) -> None:
        """Under FSDP, put the weights together in `model`, for passes that not all processes make alike."""
        for p, shard in zip(self.model.parameters(), self.net.parameters(), strict=True):
            if p is not shard:  # without FSDP, or in 4 bits, it is
                p.data = p.data.new_empty(0) if empty else unsharded(shard.detach()).to(self.device)

    def finish(self, screen: Screen) -> None:
        """After the last step: `model` holds the weights for good, and nothing listens to them any more."""
        self.fill_model()
        if self.engine:
            self.engine.destroy()

    def average(self, rows: list[dict]) -> dict[str, float]:
        """Metrics over micro-batches and processes: the mean, or the largest of a "..._max"."""
        from accelerate.utils import gather_object
        rows = gather_object(rows)
        columns = {k: [r[k] for r in rows] for k in rows[0]}
        return {k: max(v) if k.endswith("_max") else sum(v) / len(v) for k, v in columns.items()}

    def rate(self) -> float:
        """Learning rate of the current step."""
        return self.lr

    def backward(self, loss: Tensor, share: float = 1.0) -> None:
        """Accumulate the gradient of share * loss."""
        self.sound = self.sound and bool(torch.isfinite(loss))
        (self.engine.backward if self.engine else Tensor.backward)(loss * share)

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager:
        """Context of one of an update's parts: the gradient is averaged over processes once, with the last."""
        if self.engine:
            self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext() if last else self.accel.no_sync(self.net)

    def apply_gradient(self) -> float:
        """Clip, update, clear. Returns the gradient's norm before clipping; if it is not finite, nothing is updated."""
        for g in self.optimizer.param_groups:
            g["lr"] = self.rate()
        if self.engine:
            self.engine.step()  # the same three; `optimizer` does nothing then
        norm = float(unsharded(self.accel.clip_grad_norm_(self.params, self.clip or math.inf)))
        if 0 <= norm < math.inf:  # DeepSpeed says -1
            self.optimizer.step()
            self.skipped, self.sound = 0, True
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def set_aside(self, screen: Screen) -> dict[str, float]:
        """Keep a batch that was left out for a look; NonFiniteLoss at the --max_skips-th in a row."""
        from accelerate.utils import gather_object
        content = dict(name=self.batch_name(), batch=list(map(vars, self.batch)))
        path = self.out / "trainer" / f"nonfinite-{self.name}-{self.step + 1}{f'.{self.rank}' * (self.world > 1)}.pt"
        write_whole(path, lambda part: torch.save(content, part), everyone=True)
        names = gather_object([] if self.sound else [content["name"]]) or [content["name"]]
        self.sound = True
        text = f"{self.name} step {self.step + 1}: no finite loss or gradient on {'; '.join(names)}, kept in {path}"
        if self.skipped >= self.cfg.max_skips or self.engine:  # DeepSpeed has made its update by now
            raise NonFiniteLoss(f"{text}. The last checkpoint is kept: --resume --allow_changed "
                                "and a lower learning rate go on from there.")
        screen.say(f"  warning: {text}; update left out, {self.skipped} in a row")
        return {"skipped": self.skipped}

    def log(self, figures: dict) -> None:
        """Add a step's or a check's figures to metrics.jsonl and to the tracker; one process does."""
        if self.rank == 0:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps({"stage": self.name, "step": self.step, **figures}) + "\n")
        self.accel.log({f"{self.name}/{k}": v for k, v in figures.items()}, step=self.step)

    def look(self, screen: Screen) -> None:
        """The held-out check, logged."""
        figures = self.check(screen)
        self.log(figures)
        screen.advance(figures, 0)
        self.owed = False

    def run(self, screen: Screen) -> None:
        """Update until `total` steps are done; log each, save every `save_steps` and when a signal asks to stop."""
        screen.start(self.name, self.total, self.step)
        run = dict(name=f"{self.out.name}-{self.name}", group=str(self.out))
        own = dict(tensorboard=dict(purge_step=self.step + 1),  # which hides the steps that a resumed run makes again
                   wandb=run | dict(dir=str(self.out)), trackio=run)
        with refusing(f"--report_to {self.cfg.report_to} does not start", Stopped):
            self.accel.init_trackers("d1_full", config=dataclasses.asdict(self.cfg), init_kwargs=own)
        with contextlib.ExitStack() as last:
            for tracker in self.accel.trackers:  # each by itself: end_training ends the group of processes too
                last.callback(tracker.finish)
            if self.owed:
                self.look(screen)
            came = last.enter_context(stop_signals())
            while self.step < self.total and not 0 < self.cfg.patience <= self.stale:
                began = time.perf_counter()
                metrics = self.update()
                if self.skipped:
                    metrics = self.set_aside(screen)
                self.step += 1
                metrics["seconds"] = round(time.perf_counter() - began, 4)
                self.log(metrics)
                screen.advance(metrics)
                number = int(self.accel.gather(torch.tensor([max(came, default=0)], device=self.device)).max())
                due = self.step == self.total or self.step % self.cfg.save_steps == 0
                if due and not number:
                    self.look(screen)
                if due or number:
                    self.owed = due and number > 0
                    save_trainer(self)
                if number:
                    where = f"{signal.Signals(number).name} after {self.name} step {self.step}, which is saved"
                    raise Stopped(f"{where}; the same flags and --resume go on from there", 128 + number)
        screen.stop()

class MaskedSFT(Stage):
    """Stage 1: masked supervised fine-tuning.   d1 Algorithm 2, Sec. 3.3

        repeat:  (prompt, x_0) ~ data;  t ~ U(0, 1);  x_t ~ q(x_t | x_0) on the reply alone         `nelbo`
                 one AdamW step down the gradient of Eq. (1), Σ_k over the reply                   `update`

    rows: (ids, prompt_len) pairs; 1 % is held out. They are padded with EOS, which is trained, as in LLaDA's training.
    Streams: "sft_heldout" the rows held out, "sft_order" the order of the others, "sft_mask" noise of a step,
    "sft_check" that of the held-out check, "dropout". UserError if no reply fits --sft_length.
    """
    name = "sft"

    def __init__(self, model, tokenizer, rows: Sequence[tuple[list[int], int]], cfg: Settings, out: Path):
        super().__init__(model, tokenizer, cfg, out, cfg.lr_sft, cfg.wd_sft, cfg.clip_sft, cfg.steps_sft)
        order = visits(cfg.seed, "sft_heldout", 0, len(rows), len(rows))
        held = max(1, len(rows) // 100)
        self.heldout = [rows[i] for i in order[:held]]
        self.rows = [rows[i] for i in order[held:]] or self.heldout
        self.scales_logits = any(  # after its output layer, as Gemma 2, Cohere and Granite do
            getattr(model.config, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
        check_positions(model, cfg.sft_length + cfg.sft_extra)
        self.delete_id = tokenizer.convert_tokens_to_ids(DELETE) if cfg.edit_rate else -1
        if all(prompt_len >= cfg.sft_length for _, prompt_len in rows):
            raise UserError(f"--sft_length {cfg.sft_length} leaves no room for a reply after the prompts")
        if cfg.bs_sft % self.world:
            raise UserError(f"--bs_sft {cfg.bs_sft} must be a multiple of the {self.world} processes")

    def rate(self) -> float:
        warm, done = min(1.0, (self.step + 1) / max(self.cfg.warmup_sft, 1)), self.step / self.total
        return self.lr * warm * ((1 + math.cos(math.pi * done)) / 2 if self.cfg.schedule == "cosine" else 1 - done)

    def edit_rate_now(self) -> float:
        """--edit_rate as this step has it: 0 until --edit_start, then rising."""
        start = self.cfg.edit_start
        return self.cfg.edit_rate * max(0.0, (self.step / self.total - start) / (1 - start))

    def row_indices(self) -> list[int]:
        """The rows of this step."""
        size = self.cfg.bs_sft
        return visits(self.cfg.seed, "sft_order", self.step * size, size, len(self.rows))

    def batch_name(self) -> str:
        return f"SFT rows {self.row_indices()}"

    def collate(self, rows, length: int) -> tuple[Tensor, Tensor]:
        """x0 (B, L) padded with EOS, and keep (B, L) True on the prompt."""
        x0 = torch.full((len(rows), length), self.tokenizer.eos_token_id)
        keep = torch.zeros_like(x0, dtype=torch.bool)
        for i, (ids, prompt_len) in enumerate(rows):
            x0[i, : len(ids)] = torch.as_tensor(ids[:length])
            keep[i, :prompt_len] = True
        return x0, keep

    def nelbo(self, rows, key, mine: slice = slice(None), edit_rate: float = 0.0) -> tuple[Tensor, dict]:
        """Algorithm 2 on the rows `mine`, whose shares add up to the batch's loss; the noise is drawn for all rows."""
        generator = keyed_generator(self.cfg.seed, *key)
        longer, extra = draw_uniform((2,), generator, "cpu").tolist()
        length = self.cfg.sft_length + int(extra * (self.cfg.sft_extra + 1)) * (longer < 0.2)
        x0, keep = self.collate(rows, length)  # (B, L)
        t = sample_t(len(x0), generator, low=self.cfg.t_low, high=self.cfg.t_high)  # (B,)
        shown, surplus = x0, torch.zeros_like(keep)
        if edit_rate:
            shown, x0, surplus = corrupt(x0, keep, edit_rate, self.delete_id, generator)
        xt, masked = forward_process(shown, t, keep | surplus, self.tokenizer.mask_token_id, generator)
        asked = ~keep if edit_rate else masked
        share = (~keep[mine]).sum() / (~keep).sum().clamp(min=1)
        x0, t, keep, xt, masked, asked = (v[mine].to(self.device) for v in (x0, t, keep, xt, masked, asked))
        def losses(layer, hidden):
            return chunked_losses(layer, hidden, x0[asked], self.cfg.logits_held(self.model.config))
        with precision(self.device), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # dropout can only draw from torch's global streams: they are seeded by the key, and put back after
            torch.manual_seed(keyed_generator(self.cfg.seed, "dropout", *key, mine.start).initial_seed())
            if self.scales_logits:
                ce, hit = token_losses(logits_at(self.net, xt, asked), x0[asked])  # (N,) each
            else:
                ce, hit = logits_at(self.net, xt, asked, compute=losses)
            loss, metrics = weighted_nelbo(ce, hit, masked, t, keep, asked)
        return loss * share.item(), metrics

    def update(self) -> dict[str, float]:
        """Algorithm 2, one step: the gradient of a batch, part by part, and AdamW."""
        self.net.train()
        rows, logged = [self.rows[i] for i in self.row_indices()], []
        size = self.cfg.bs_sft // self.world
        stop = (self.rank + 1) * size
        spans = [slice(i, min(i + self.cfg.rows_sft, stop)) for i in range(stop - size, stop, self.cfg.rows_sft)]
        for span in spans:
            with self.accumulate(last=span is spans[-1]):
                loss, metrics = self.nelbo(rows, ("sft_mask", self.step), span, self.edit_rate_now())
                self.backward(loss, self.world)  # the mean over processes is then the gradient of the whole batch
            logged.append({"loss": loss.item() * self.world * len(spans), **{k: v.item() for k, v in metrics.items()}})
        return {**self.average(logged), "grad_norm": self.apply_gradient(), "lr": self.rate()}

    @torch.no_grad()
    def check(self, screen: Screen) -> dict[str, float]:
        """Held-out loss, with the same masks at every check."""
        self.net.eval()
        size = self.cfg.rows_sft
        parts = [self.heldout[i : i + size] for i in range(0, len(self.heldout), size)]
        losses = [self.nelbo(p, ("sft_check", i))[0].item() * len(p) for i, p in enumerate(parts)]
        return {"heldout_loss": sum(losses) / len(self.heldout)}

class Pretraining(MaskedSFT):
    """Stage 0: the same objective with no prompt, on text packed to rows of one length (MDLM, arXiv 2406.07524)."""
    name = "pretrain"

@dataclasses.dataclass
class Rollout:
    """One drawn micro-batch: B completions, the G of a prompt adjacent, and the mu prompt masks for it."""
    prompt: Tensor  # (B, P) left-padded
    real: Tensor  # (B, P) bool, False on padding
    completion: Tensor  # (B, C)
    live: Tensor  # (B, C) bool
    rewards: Tensor  # (B,)
    advantages: Tensor  # (B,)
    hide: Tensor  # (mu, B, P) bool, True = masked in q'
    logp_old: list[Tensor | None]  # mu of (B, C); None for the first
    logp_ref: list[Tensor]  # mu of (B, C); empty if beta is 0
    parts: dict[str, float]  # mean of each reward part, share of prompts cut, error of the cache

def without_dropout(model) -> None:
    """No dropout. Gradient checkpointing, which transformers does in training mode only, stays on."""
    model.eval()
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))

def twin(model, memo: dict | None = None):
    """A deep copy, its blocks compiled if the model's are: copy leaves that out."""
    made = copy.deepcopy(model, memo)
    for of_model, of_copy in zip(model.modules(), made.modules(), strict=True):
        if of_model._compiled_call_impl is not None:
            of_copy.compile(dynamic=True)
    return made

def freeze_reference(model) -> Callable[[], contextlib.AbstractContextManager]:
    """A function whose context manager gives the policy as it is now: under LoRA without the adapter to train."""
    if not hasattr(model, "peft_config"):
        frozen = twin(model).eval().requires_grad_(False)
        return lambda: contextlib.nullcontext(frozen)
    learned = {n: p for n, p in model.named_parameters() if ".default." in n}
    if any(bool(p.any()) for n, p in learned.items() if "lora_B" in n):  # stage 1 in this same run
        model.add_adapter("stage1", model.peft_config["default"])
        with torch.no_grad():
            for name, p in learned.items():
                model.get_parameter(name.replace(".default.", ".stage1.")).copy_(p)
                p.mul_("lora_B" not in name)  # "default" starts again from no change
        activate_adapters(model)
    @contextlib.contextmanager
    def reference():
        model.base_model.set_adapter([name for name in model.peft_config if name != "default"])
        try:
            yield model
        finally:
            activate_adapters(model)
    return reference

class DiffuGRPO(Stage):
    """Stage 2: policy gradient with one-step log-probabilities.   d1 Algorithm 1, Sec. 3.2

        repeat:  π_old ← π_θ;  q ~ D;  o_1 ... o_G ~ π_old(. | q);  r_i, A_i by Eq. (2)             `roll_out`
                 for n = 1 ... μ:  q' ← q with each token masked with probability p_mask;
                                   log φ_θ, φ_old, φ_ref of o_i given q';  a step up Eq. (4)        `update`

    examples: problems; ask(example) -> chat; reward(texts, examples) -> one {name: value} a text,
    summed. `heldout(model) -> score` chooses the best checkpoint, None = keep the last.
    Streams, keyed by a row's number in the whole run: "rl_order" problems, "rollout" tokens, "hide" prompt masks.
    """
    name = "diffu_grpo"

    def __init__(self, model, tokenizer, examples: Sequence[dict], ask: Callable, reward: Callable, cfg: Settings,
                 out: Path, heldout: Callable | None = None):
        check_positions(model, cfg.max_prompt + cfg.gen_length)
        # [D8] official's reference sync does nothing under LoRA. here: pi_ref is the frozen start of stage 2.
        self.reference = freeze_reference(model)
        # [D6] official leaves LoRA dropout on in every pass. here: off, so the first ratio is exactly 1.
        without_dropout(model)
        super().__init__(model, tokenizer, cfg, out, cfg.lr_rl, cfg.wd_rl, cfg.clip_rl, cfg.steps_rl)
        self.examples, self.ask, self.reward, self.heldout = examples, ask, reward, heldout
        self.sample, self.seen = "", []  # seen: metrics since the last check
        self.owed = heldout is not None  # of the policy as it came: the curve begins there, and training must beat it

    def batch_name(self) -> str:
        i, k = divmod(self.step, self.cfg.mu)
        return f"rollout batch {i}, inner update {k}, problems {list(map(self.problem_indices, self.micro_batches(i)))}"

    def micro_batches(self, batch: int) -> list[int]:
        """Global numbers of this process's micro-batches; two processes share what one would do in twice as many."""
        first = batch * self.cfg.grad_accum * self.world + self.rank
        return [first + i * self.world for i in range(self.cfg.grad_accum)]

    def problem_indices(self, micro: int) -> list[int]:
        """Indices of the prompts of a micro-batch, bs_rl / G of them."""
        count = self.cfg.bs_rl // self.cfg.group
        return visits(self.cfg.seed, "rl_order", micro * count, count, len(self.examples))

    @torch.no_grad()
    def roll_out(self, micro: int) -> Rollout:
        """Algorithm 1, lines 3 to 6: G completions a prompt, rewards, advantages; line 9 for π_old and π_ref."""
        cfg, tok = self.cfg, self.tokenizer
        examples = [self.examples[i] for i in self.problem_indices(micro) for _ in range(cfg.group)]
        asked, cut = encode_prompts(tok, map(self.ask, examples[:: cfg.group]), cfg.max_prompt)
        prompts = [p for p in asked for _ in range(cfg.group)]
        prompt, real = pad_left(prompts, tok.pad_token_id, self.device)  # (B, P)
        rows = range(micro * cfg.bs_rl, (micro + 1) * cfg.bs_rl)  # global numbers, which key the random streams
        self.model.eval()
        frames = list(diffuse_steps(
            self.model, prompt, attention_mask=real, gen_length=cfg.gen_length, steps=cfg.diffusion_steps or None,
            temperature=cfg.temperature, generator=[keyed_generator(cfg.seed, "rollout", i) for i in rows],
            cache=cfg.rollout_cache, **decoding(tok, cfg) | dict[str, Any](edit_rate=0.0)))
        completion = frames[-1].ids[:, prompt.shape[1] :]  # (B, C)
        texts = reply_texts(tok, completion)
        scores = self.reward(texts, examples)
        rewards = torch.tensor([sum(s.values()) for s in scores], device=self.device)  # (B,)
        question = self.ask(examples[0])[-1]["content"].splitlines()[-1]
        self.sample = f"{question} -> {texts[0]!r} (reward {rewards[0]:.2f})"
        # [D2] official masks each completion's prompt anew and, under accumulation, meets half of the masks twice
        #      (diffu_grpo_trainer.py:96, 373). here, as in Eq. (4): mu different q' a prompt, its group shares them.
        hide = torch.zeros(cfg.mu, *real.shape, dtype=torch.bool, device=self.device)  # (mu, B, P)
        for b, i in enumerate(rows):
            tokens = torch.ones(cfg.mu, len(prompts[b]), dtype=torch.bool)
            private = keyed_generator(cfg.seed, "hide", i // cfg.masks_shared_by())
            hide[:, b, -len(prompts[b]) :] = draw_prompt_mask(tokens, cfg.pmask, private)
        live, advantages = live_tokens(completion, tok.eos_token_id), group_advantages(rewards, cfg.group)
        # [D9] official runs all mu masks in one forward, 7.7 GiB of logits at 8B. here: as many as --logits_gib holds.
        size = max(1, cfg.logits_held(self.model.config) * cfg.masks_shared_by() // completion.numel())
        def logps(model, hide):
            return list(one_step_logps(model, prompt, completion, hide, tok.mask_token_id, real, live, size))
        logp_old, logp_ref = [None, *logps(self.model, hide[1:])], []  # the first update starts from the old policy
        if cfg.beta:
            with self.reference() as ref:
                logp_ref = logps(ref, hide)
        parts = {f"reward/{k}": sum(s[k] for s in scores) / len(scores) for k in scores[0]}
        parts["prompts_cut"] = cut / len(asked)
        if cfg.rollout_cache != "none":
            parts["cache_error"] = cache_error(self.model, frames, tok.mask_token_id, real)
        return Rollout(prompt, real, completion, live, rewards, advantages, hide, logp_old, logp_ref, parts)

    def update(self) -> dict[str, float]:
        """Algorithm 1, lines 7 to 10: inner update k on its own prompt mask."""
        batch, k = divmod(self.step, self.cfg.mu)
        if k == 0 or not self.batch:
            self.fill_model()
            with precision(self.device):
                self.batch = [self.roll_out(micro) for micro in self.micro_batches(batch)]
            self.fill_model(empty=True)
        without_dropout(self.net)
        rows = []
        for r in self.batch:
            with self.accumulate(last=r is self.batch[-1]), precision(self.device):
                logp = one_step_logp(self.net, r.prompt, r.completion, r.hide[k], self.tokenizer.mask_token_id, r.real,
                                     live=r.live)
                loss, metrics = diffu_grpo_loss(
                    logp, r.logp_old[k], r.logp_ref[k] if r.logp_ref else None, r.advantages, r.live,
                    eps=self.cfg.eps, beta=self.cfg.beta, norm=self.cfg.norm)
                self.backward(loss, 1 / len(self.batch))
            row = {"loss": loss, "reward": r.rewards.mean(), "length": r.live.sum(1).float().mean(), **metrics,
                   "entropy": -(logp * r.live).sum() / r.live.sum(),  # of phi, by the tokens that were drawn
                   "reward_std": r.rewards.view(-1, self.cfg.group).std(1).mean()}  # within a group
            rows.append({n: float(v.detach()) for n, v in row.items()} | r.parts)
        self.seen.append(self.average(rows))
        self.flat = 0 if self.seen[-1]["reward_std"] else self.flat + 1
        return {**self.seen[-1], "grad_norm": self.apply_gradient(), "inner": k}

    def check(self, screen: Screen) -> dict[str, float]:
        """Score held-out problems; remember the best weights so far."""
        if self.sample:  # nothing was drawn yet at the start, or if a run was resumed for this check
            screen.say(f"  sample: {self.sample}")
        kl, entropy, error = (  # medians: a single token can throw one update's KL far out
            sorted(m[k] for m in self.seen)[len(self.seen) // 2] if self.seen and k in self.seen[0] else math.nan
            for k in ("kl", "entropy", "cache_error"))
        self.seen = []
        for wrong, text in (
            (self.flat >= 5 * self.cfg.mu, f"{self.flat} updates in which all replies to a prompt earned the same"),
            (kl > 1, f"KL {kl:.1f} nats a token: the policy has run away; lower --lr_rl or raise --beta"),
            (entropy < 0.01, f"entropy {entropy:.3f} nats a token: replies hardly differ; raise --temperature"),
            (error >= 0, f"off-policy rollouts: --rollout_cache changed a token's log p by {error:.3f} nats"),
        ):
            if wrong:
                screen.say(f"  warning: {text}")
        if self.heldout is None:
            return {}
        # [D18] official picks its best checkpoint on the test set. here: on held-out training data.
        self.fill_model()
        score = self.score = self.heldout(self.model)
        self.fill_model(empty=True)
        self.stale = 0 if self.best is None or score > self.best[0] else self.stale + 1
        if self.best is None or score >= self.best[0]:
            self.best = (score, self.step, [own_shard(p).cpu().clone() for p in self.params])
        return {"heldout_accuracy": score}

    @torch.no_grad()
    def finish(self, screen: Screen) -> None:
        """Load the weights that scored best on held-out problems."""
        if self.step < self.total:
            screen.say(f"stopped at step {self.step}: no better held-out accuracy in {self.stale} checks (--patience)")
        if self.best and self.best[1] != self.step:
            screen.say(f"weights of step {self.best[1]} kept: held-out accuracy {100 * self.best[0]:.1f} %, the best; "
                       f"the last, of step {self.step}, had {100 * self.score:.1f} %")
            for p, best in zip(self.params, self.best[2], strict=True):
                own_shard(p).copy_(best)
        super().finish(screen)

# %% 12. Evaluation and Table 1 — Sec. 4
PAPER_TABLE1 = {  # LLaDA-8B-Instruct at 128 / 256 / 512, d1 Table 1; a star marks second-hand cells
    "gsm8k": dict(base="68.7 76.7 78.2", sft="66.5* 78.8* 81.1*", diffu_grpo="72.6 79.8 81.9", d1="73.2 81.1 82.1"),
    "math500": dict(base="26.0 32.4 36.2", sft="26.2* 32.6* 34.8*", diffu_grpo="33.2 37.2 39.2", d1="33.8 38.6 40.2"),
    "count": dict(base="20.7 19.5 16.0", sft="20.3* 14.5* 23.8*", diffu_grpo="33.2 31.3 37.1", d1="34.8 32.0 42.2"),
    "sudoku": dict(base="11.7 6.7 5.5", sft="16.5* 8.5* 4.6*", diffu_grpo="18.4 12.9 11.0*", d1="22.1 16.7 9.5")}
ROW_TITLES = {"base": "base", "sft": "+SFT", "diffu_grpo": "+diffu-GRPO", "d1": "d1"}

DECODING = ("remasking", "eval_steps", "allow_edits", "edit_share", "cache", "refresh", "threshold")  # of evaluation

def other_decoding(cfg: Settings) -> dict[str, Any]:
    """The settings of evaluation that are not the paper's: they belong to every figure made with them."""
    return {name: value for name in DECODING if (value := getattr(cfg, name)) != Settings.default(name)}

def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of a share, in [0, 1]."""
    p, z2 = hits / n, z * z / n
    middle, half = p + z2 / 2, z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)

def evaluation_prompts(tokenizer, task: Task, examples: Sequence[dict], cfg: Settings) -> tuple[list[list[int]], int]:
    """Token ids of the questions, at most --max_prompt each, and how many were cut on the left for it."""
    # [D13] official trains with a tags-only text and tests with another: an expert who boxes the answer, uncut, and
    #       the reply begun with <reasoning>. here: one builder for SFT, RL and evaluation; "official" tests so too.
    if cfg.preset == "official":
        asked = [encode_prompt(tokenizer, task.messages(e, task.system.replace(SYSTEM, EXPERT))) for e in examples]
        return [p + tokenizer.encode("<reasoning>", add_special_tokens=False) for p in asked], 0
    return encode_prompts(tokenizer, map(task.messages, examples), cfg.max_prompt)

@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], cfg: Settings, gen_length: int,
             todo: Sequence[int] | None = None) -> Iterator[list[tuple[int, dict]]]:
    """Greedy replies to this process's share of the prompts numbered `todo`, batch by batch.

    Yields pairs (number, {"generations", "effective_tokens", "ended"}): text, tokens before the EOS, if it came.
    """
    model.eval()  # all of it: a layer in training mode that checkpoints gradients would keep no keys and values
    check_positions(model, max(map(len, prompts)) + gen_length)
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)) if todo is None else todo, key=lambda i: len(prompts[i]))  # equals pad least
    order = order[processes().process_index :: processes().num_processes]
    for first in range(0, len(order), cfg.bs_eval):
        chosen = order[first : first + cfg.bs_eval]
        ids, real = pad_left([prompts[i] for i in chosen], tokenizer.pad_token_id, device)
        with precision(device):
            out = diffuse_decode(model, ids, attention_mask=real, gen_length=gen_length, steps=cfg.eval_steps or None,
                                 cache=cfg.cache, threshold=cfg.threshold or None, **decoding(tokenizer, cfg),
                                 generator=[keyed_generator(cfg.seed, "eval", i) for i in chosen])
        completion = out[:, ids.shape[1] :]  # (B, C)
        ended = (completion == tokenizer.eos_token_id).any(1)  # (B,)
        effective = live_tokens(completion, tokenizer.eos_token_id).sum(1) - ended.long()  # (B,) before the EOS
        replies = zip(chosen, reply_texts(tokenizer, completion), effective.tolist(), ended.tolist(), strict=True)
        yield [(i, dict(generations=text, effective_tokens=n, ended=end)) for i, text, n, end in replies]

def entry_of(task: Task, row: str, gen_length: int, records: list[dict], examples, cfg: Settings) -> dict:
    """An entry of eval.json: strict accuracy with its interval, the official score, and how replies look."""
    pairs = [(r["generations"], e) for r, e in zip(records, examples, strict=True)]
    grades = [task.grade(*pair) for pair in pairs]
    official = [task.grade(*pair, official=True) for pair in pairs] if task.name in TASKS else grades
    n, hits = len(records), sum(g.correct for g in grades)
    entry = dict(task=task.name, row=row, gen_length=gen_length, n=n, accuracy=hits / n)
    entry["low"], entry["high"] = wilson(hits, n)
    entry |= {task.score: sum(g.score for g in grades) / n} if task.score else {}
    entry |= dict(official=sum(g.score for g in official) / n, answered=sum(g.answer is not None for g in grades) / n)
    entry |= {k: sum(r[k] for r in records) / n for k in ("effective_tokens", "ended")}
    return entry | {name: getattr(cfg, name) for name in ("model", "seed", "limit", "data", *DECODING)}

def finished_replies(path: Path, stamp: str) -> dict[int, dict]:
    """Replies to the same prompts by the same weights that an earlier evaluation left, whole or stopped, by number."""
    whole = read_json(path)
    done = dict(enumerate(whole["generations"])) if whole.get("stamp") == stamp else {}
    for log in path.with_suffix(".parts").glob("*"):
        done |= {i: reply for written_for, i, reply in read_log(log) if written_for == stamp}
    return done

def evaluate(model, tokenizer, task: Task, examples, cfg: Settings, row: str, out: Path, screen: Screen) -> list[dict]:
    """Accuracy at every length, merged into eval.json; replies are kept as they come, so a stop loses none of them."""
    from accelerate.utils import broadcast_object_list, gather_object
    prompts, cut = evaluation_prompts(tokenizer, task, examples, cfg)
    if cut:
        screen.say(f"{cut} of {len(prompts)} prompts are over --max_prompt {cfg.max_prompt}: cut on the left")
    how = [getattr(cfg, name) for name in ("block_length", "seed", *DECODING)]
    weights = [p.sum(dtype=torch.float32).item() for p in model.parameters()]
    weights += [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]  # LoRA's alpha
    label, rank, entries = row + (f"_{Path(cfg.data).stem}" if cfg.data else ""), processes().process_index, []
    label += "".join(f"_{name}_{value}" for name, value in other_decoding(cfg).items())
    for length in cfg.lengths():
        began = time.perf_counter()
        steps = cfg.eval_steps or length // 2
        path = out / "generations" / f"{task.official_name}_{label}_{length}_{steps}_0_generations.json"
        stamp = hashlib.sha256(repr((weights, prompts, length, how)).encode()).hexdigest()[:16]
        (parts := path.with_suffix(".parts")).mkdir(parents=True, exist_ok=True)  # a file a process
        done, mine = broadcast_object_list([finished_replies(path, stamp)])[0], {}  # the main process's, for all
        screen.start(f"eval {row} {length}", len(prompts), len(done))
        with (parts / f"{rank}.jsonl").open("a", encoding="utf-8") as f:
            f.write("\n")  # ends a line that a kill may have cut short
            todo = [i for i in range(len(prompts)) if i not in done]
            for batch in generate(model, tokenizer, prompts, cfg, length, todo):
                f.writelines(json.dumps([stamp, *reply]) + "\n" for reply in batch)
                f.flush()
                mine |= dict(batch)
                screen.advance({}, min(len(batch) * processes().num_processes, len(prompts)))
        screen.stop()
        for part in gather_object([mine]):
            done |= part
        records = [{"question": task.question(e), "prompt_input": tokenizer.decode(prompts[i]),
                    **done[i], "ground_truth": task.ground_truth(e)} for i, e in enumerate(examples)]
        metrics = {"wall_time": time.perf_counter() - began, "total_processed": len(records)}
        write_json(path, dict(generations=records, metrics=metrics, model_path=cfg.model, gen_length=length,
                              diffusion_steps=steps, block_length=cfg.block_length, stamp=stamp))
        processes().wait_for_everyone()
        shutil.rmtree(parts, ignore_errors=True)
        entries.append(entry_of(task, row, length, records, examples, cfg) | {"prompts_cut": cut})
    path = out / "eval.json"
    with refusing(f"cannot read {path}"):
        earlier = json.loads(path.read_text()) if path.exists() else []
        names = "task", "row", "gen_length", "data"
        merged = {(*(e[k] for k in names), *map(e.get, DECODING)): e for e in [*earlier, *entries]}
    write_json(path, list(merged.values()))
    return entries

def results_table(screen: Screen, entries: list[dict], cfg: Settings) -> None:
    """Rows x tasks x lengths, each with its 95 % interval, and the paper's figure where the model is LLaDA."""
    lengths, rows = sorted({e["gen_length"] for e in entries}), []
    for (task, row), of_row in itertools.groupby(entries, operator.itemgetter("task", "row")):
        made = {e["gen_length"]: e for e in of_row}
        texts = {n: f"{100 * e['accuracy']:.1f} [{100 * e['low']:.0f}, {100 * e['high']:.0f}]" for n, e in made.items()}
        one = next(iter(made.values()))
        standin = cfg.preset == "tiny" and task in ("gsm8k", "math500") and not one["data"]
        rows.append([task + " (stand-in)" * standin, ROW_TITLES[row], *(texts.get(n, "-") for n in lengths), one["n"]])
        paper = dict(zip((128, 256, 512), PAPER_TABLE1.get(task, {}).get(row, "").split(), strict=False))
        for score, scale in (("official", 100), ("cells", 100), ("mean_reward", 1)):
            if score in one and (score != "official" or task in TASKS):
                texts = {n: f"{scale * e[score]:.1f}         " for n, e in made.items()}
                if score == "official" and ALIASES["llada/llada-8b-instruct"] == origin_of(cfg.model):  # as the paper's
                    texts |= {n: f"{texts.get(n, '-').strip()} (paper {figure})" for n, figure in paper.items()}
                rows.append(["", score, *(texts.get(n, "-") for n in lengths), ""])
    title = "Accuracy, %: strict grading, greedy, 95 % Wilson interval"
    other = ", ".join(f"{name} {value}" for name, value in other_decoding(cfg).items())
    title += f"; other decoding than the paper's: {other}" * bool(other)
    title += "; stand-in = generated problems, not the benchmark" * any("stand-in" in row[0] for row in rows)
    title += "; * = known second-hand" * ("*)" in str(rows))
    screen.table(title, ["task", "row", *(f"length {n}" for n in lengths), "n"], rows)

# %% 13. Checkpoint and resume — a run may be killed at any moment
def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=1, default=str) + "\n"))

def write_whole(path: Path, write: Callable[[Path], Any], everyone: bool = False) -> None:
    """Write aside, fsync, rename: after a kill the old file or the new one is there. One process writes, or all."""
    if not (everyone or processes().is_main_process):
        return
    part = path.with_name(path.name + ".part")
    with refusing(f"cannot write {path}; what was saved before is kept", Stopped), contextlib.ExitStack() as clean:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean.callback(part.unlink, missing_ok=True)
        write(part)
        part.chmod(0o644)
        with part.open("rb") as f:
            os.fsync(f.fileno())
        if everyone:
            processes().wait_for_everyone()  # all new or all old
        os.replace(part, path)

def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def is_whole(path: Path, digest: str) -> bool:
    """Whether a file is there, can be read and is as it was written."""
    with contextlib.suppress(OSError):
        return checksum(path) == digest
    return False

@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM in a list, so that a step can be finished and saved; a second one acts at once."""
    came, main = [], threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = {number: handler for number in (signal.SIGINT, signal.SIGTERM)
              if main and (handler := signal.getsignal(number)) != signal.SIG_IGN}  # ignored under nohup
    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])
        print("d1_full.py: stops after this step and saves; the same signal again stops at once", file=sys.stderr)
    try:
        for number in before:
            signal.signal(number, note)
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

SAVED = ("step", "best", "stale", "score", "flat", "skipped", "owed")  # of a stage's attributes

def save_trainer(stage: Stage) -> None:
    """trainer/<stage>-<step>.pt: weights, optimizer, step, best weights, rollouts in use. The last --keep of them stay.

    Where the state is sharded it is a file a process. It counts once manifest.json, written last, has its checksums.
    """
    from accelerate.utils import gather_object, send_to_device
    weights, optimizer = [own_shard(p) for p in stage.params], stage.adam.state_dict()
    folder, name = stage.out / "trainer", f"{stage.name}-{stage.step}{stage.shard_suffix}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    finite = all(bool(torch.isfinite(w).all()) for w in weights)
    size, free = sum(4 * w.nbytes for w in weights), shutil.disk_usage(folder).free  # with AdamW's two, and the best
    states = gather_object([(finite, free >= size)])  # so that all processes stop, or none
    if not all(finite for finite, _ in states):  # never overwrite a good checkpoint with a broken one
        raise NonFiniteLoss(f"{stage.name} step {stage.step}: the weights are no longer finite")
    if not all(room for _, room in states):
        raise Stopped(f"{folder} has room for {free / 2**30:.2f} GiB, and a checkpoint may take {size / 2**30:.2f}; "
                      "what was saved before is kept: make room and --resume")
    optimizer["state"] = {i: {k: own_shard(v) for k, v in of_p.items()} for i, of_p in optimizer["state"].items()}
    batch = send_to_device([vars(r) for r in stage.batch], "cpu") if stage.step % stage.cfg.mu else []
    state = dict(weights=weights, optimizer=optimizer, batch=batch if stage.shard_suffix else gather_object(batch),
                 settings=dataclasses.asdict(stage.cfg), **{k: getattr(stage, k) for k in SAVED})
    write_whole(folder / name, lambda part: torch.save(state, part), everyone=bool(stage.shard_suffix))
    with refusing(f"cannot read {folder / name} back", Stopped):
        own = [(name, checksum(folder / name))] if stage.shard_suffix or stage.rank == 0 else []
    files = dict(gather_object(own))
    if stage.rank == 0:
        manifest = read_json(folder / "manifest.json")
        earlier = {step: known for step, known in manifest.get(stage.name, {}).items() if int(step) < stage.step}
        manifest[stage.name] = dict([*earlier.items(), (str(stage.step), files)][-stage.cfg.save_total_limit :])
        write_json(folder / "manifest.json", manifest)
        for file in folder.glob(f"{stage.name}-*.pt"):
            if not any(file.name in files for files in manifest[stage.name].values()):
                file.unlink()

def whole_checkpoint(stage: Stage, screen: Screen) -> Path | None:
    """This process's file of the last checkpoint whose files are all as they were written; None if none was."""
    from accelerate.utils import broadcast_object_list
    folder = stage.out / "trainer"
    saved = list(read_json(folder / "manifest.json").get(stage.name, {}).items()) if stage.rank == 0 else []
    some = bool(saved)
    while saved and (bad := [name for name, digest in saved[-1][1].items() if not is_whole(folder / name, digest)]):
        step, _ = saved.pop()
        screen.say(f"  warning: {folder / bad[0]} is damaged: the checkpoint before step {step} is taken")
    some, saved = broadcast_object_list([some, saved])  # all processes take the same
    if some and not saved:
        raise UserError(f"no checkpoint of {stage.name} in {folder} is whole: run without --resume or --auto_resume")
    for step, files in saved[-1:]:
        if (name := f"{stage.name}-{step}{stage.shard_suffix}.pt") in files:
            return folder / name
        raise UserError(f"{folder / min(files)} is of another number of processes or sharding: launch as before")
    return None

def load_trainer(stage: Stage, screen: Screen) -> bool:
    """Continue a stage from its last whole checkpoint; False if it has none. Draws depend on seed and step alone."""
    from accelerate.utils import send_to_device
    path, log = whole_checkpoint(stage, screen), stage.out / "metrics.jsonl"
    if path:
        with refusing(f"{path} does not fit this run"), torch.no_grad():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if changed := changed_settings(state["settings"], stage.cfg, "steps_rl"):
                if not stage.cfg.allow_changed:
                    raise ValueError(f"give --allow_changed, or the flags of then: {', '.join(changed)}")
                screen.say(f"  changed since then: {', '.join(changed)}")
            for p, saved in zip(stage.params, state["weights"], strict=True):
                own_shard(p).copy_(saved)
            if stage.engine:
                stage.engine.optimizer.refresh_fp32_params()  # its own copy of the weights
            for i, of_p in state["optimizer"].get("state", {}).items():
                of_p |= {k: shard_like(v, stage.params[i]) for k, v in of_p.items()}
            stage.adam.load_state_dict(state["optimizer"])
            for name in SAVED:
                setattr(stage, name, state[name])
            own = len(state["batch"]) // (1 if stage.shard_suffix else stage.world)
            mine = state["batch"] if stage.shard_suffix else state["batch"][stage.rank * own :][:own]
            if mine and (changed or own != stage.cfg.grad_accum):
                screen.say("  warning: it stopped between inner updates, and its rollouts no longer fit: drawn anew")
            else:
                stage.batch = [Rollout(**send_to_device(r, stage.device)) for r in mine]
    kept = [r for r in read_log(log) if r["stage"] != stage.name or r["step"] <= stage.step]  # others are made again
    write_whole(log, lambda part: part.write_text("".join(json.dumps(r) + "\n" for r in kept)))
    return path is not None

FREE = ("resume", "auto_resume", "allow_changed", "output_dir", "config", "threads", "debug", "skip_eval", "dry_run",
        "save_total_limit", "max_skips", "report_to", "smoke", "sweep", "sweep_space", "explain")  # change no result

def changed_settings(then: dict, now: Settings, *free: str) -> list[str]:
    """Flags of a saved run that are not as now, but for those of FREE and `free`."""
    return [words_of({k: v})[0] for k, v in then.items() if v != getattr(now, k, None) and k not in (*FREE, *free)]

def export_model(model, tokenizer, out: Path, state: dict | None = None, form: str = "") -> None:
    """Save model and tokenizer in hub format, or in a form of --export; then d1_state.json, which says it is whole."""
    processes().wait_for_everyone()
    if not processes().is_main_process:
        return
    out.mkdir(parents=True, exist_ok=True)
    if form and hasattr(model, "peft_config"):
        model = copy.deepcopy(model).merge_and_unload()
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        saved = Path(folder)
        if not hasattr(model, "peft_config"):
            weights = model.state_dict()
            for theirs, ours in LLADA_NAMES.items() if form == "llada" else ():
                weights = {name.replace(ours, theirs): w for name, w in weights.items()}
            model.save_pretrained(saved, state_dict=weights, save_original_format=False)  # by the names given here
        elif len(stacked := list(model.peft_config)) > 1:  # the stages' adapters as one, of the ranks' sum: exact
            model.add_weighted_adapter(stacked, [1.0] * len(stacked), "joined", combination_type="cat")
            model.save_pretrained(saved, selected_adapters=["joined"], save_embedding_layers=False)
            model.delete_adapter("joined")
            activate_adapters(model)
            saved = saved / "joined"
        else:
            model.save_pretrained(saved, selected_adapters=stacked, save_embedding_layers=False)
        tokenizer.save_pretrained(saved)
        if form == "llada":
            own = {theirs: getattr(model.config, ours) for theirs, ours in LLADA_FIELDS.items()}
            write_json(saved / "config.json", LLADA_8B | own | dict(  # the inverse of `network_of`
                vocab_size=own["embedding_size"], rope_theta=model.config.rope_parameters["rope_theta"],
                mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, torch_dtype=str(model.dtype).split(".")[1]))
        for file in sorted(p for p in saved.iterdir() if p.is_file() and p.name != "README.md"):
            write_whole(out / file.name, lambda part, file=file: shutil.move(file, part))
    if state:
        write_json(out / "d1_state.json", state | {"files": {p.name: checksum(p) for p in out.glob("*.safetensors")}})

# %% 14. Screen and logs — what is printed and plotted
class Screen:
    """All that is printed, by one process: rich bars and tables on a terminal, plain lines elsewhere."""

    def __init__(self):
        from rich.console import Console
        self.live = sys.stdout.isatty() and processes().is_main_process
        self.console = Console(highlight=False, soft_wrap=True, width=None if self.live else 160,
                               quiet=not processes().is_main_process)
        self.bar: Any = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self, name: str, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        columns = TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, disable=not self.live,
                            transient=name.startswith("eval"), speed_estimate_period=3600)  # not 30 s
        self.bar.add_task(name, total=total, completed=done, note="")
        self.said, self.shown = time.monotonic(), {}
        self.bar.start()

    def advance(self, metrics: dict, n: int = 1) -> None:
        """Count n more, and show the loss, or the reward and KL, and the last held-out figure."""
        self.shown |= metrics
        names = ("reward", "kl", "heldout_accuracy") if "reward" in self.shown else ("loss", "heldout_loss")
        note = "  ".join(f"{k.removesuffix('_accuracy')} {self.shown[k]:.3f}" for k in names if k in self.shown)
        task = self.bar.tasks[0]
        self.bar.update(task.id, advance=n, note=note)
        if not self.live and time.monotonic() - self.said > 15:
            self.said = time.monotonic()
            self.say(f"{task.description} {task.completed}/{task.total}  {note}  {task.time_remaining or 0:.0f} s left")

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], text: bool = False) -> None:
        """A table; columns after the first are right-aligned, unless they hold text."""
        from rich.table import Column, Table
        columns = [Column(h, justify="right" if i and not text else "left", no_wrap=True) for i, h in enumerate(header)]
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*map(str, row))
        self.console.print(table)

def read_log(path: Path) -> list:
    """The rows of a JSONL log, less a line that a kill cut short; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows

def plot_curves(out: Path) -> None:
    """curves.png from metrics.jsonl: pre-training and SFT loss, RL reward, KL, and held-out accuracy."""
    from matplotlib.figure import Figure  # without pyplot no window is opened and nothing global is set
    rows, panels = read_log(out / "metrics.jsonl"), []
    for stage, name, title in (("pretrain", "loss", "pre-training loss, nats a token"),
                               ("sft", "loss", "SFT loss, nats a token"), ("diffu_grpo", "reward", "mean reward"),
                               ("diffu_grpo", "kl", "KL to start of stage 2"),
                               ("diffu_grpo", "heldout_accuracy", "held-out accuracy")):
        if points := [(r["step"], r[name]) for r in rows if r["stage"] == stage and name in r]:
            panels.append((title, stage, *zip(*points, strict=True)))
    if not panels:
        return
    figure = Figure(figsize=(4 * len(panels), 3), layout="tight")
    for axis, (title, stage, x, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        windows = [y[max(0, i - len(y) // 50) : i + 1] for i in range(len(y))]  # a running mean over 2 % of the run
        axis.plot(x, y, alpha=0.25)
        axis.plot(x, [sum(w) / len(w) for w in windows], color="C0", marker="." if len(x) < 20 else None)
        scale = "log" if min(y) > 0 and stage != "diffu_grpo" else "linear"
        axis.set(title=title, xlabel=f"{stage} update", yscale=scale)
    write_whole(out / "curves.png", lambda part: figure.savefig(part, format="png", dpi=120))

# %% 15. Chat, streaming and pipeline — the decoder in a terminal, a browser and transformers
def streamed(frames: Iterable[Frame], streamer, tokenizer, plen: int, block_length: int,
             stop: str = "") -> Iterator[Frame]:
    """Pass on the frames of one prompt, and show them by a transformers.TextDiffusionStreamer.

    The block being written is a draft; once it is finished its tokens are put for good, up to the EOS.
    """
    done = 0  # tokens put
    def put(row: Tensor) -> int:
        ids = reply_ids(tokenizer, row, stop)
        if ids[done:]:
            streamer.put(torch.tensor(ids[done:]))
        return max(done, len(ids))
    for number, frame in enumerate(frames):
        if number == 0 and streamer.skip_prompt:  # what it is given first it takes for the prompt
            streamer.put(frame.ids[0, :plen])
        lo = plen + frame.block * block_length
        done = put(frame.ids[0, plen:lo])
        if done == lo - plen:  # else the reply is over
            streamer.put_draft(frame.ids[0, lo : lo + block_length])
        yield frame
    put(frame.ids[0, plen:])
    streamer.end()

def replies(model, tokenizer, prompts: list[list[int]], cfg: Settings, generator,
            streamer=None) -> Iterator[tuple[list[str], Frame]]:
    """The replies so far as texts, and the frame, after each denoising step: for terminal, browser and pipeline."""
    model.eval()
    ids, real = pad_left(prompts, tokenizer.pad_token_id, model.device)
    plen, stop = ids.shape[1], cfg.stop
    stops = (lambda row: stop in reply_texts(tokenizer, row[None])[0]) if stop else None  # row (C,)
    frames = diffuse_steps(model, ids, attention_mask=real, gen_length=cfg.reply_length(), generator=generator,
                           steps=cfg.eval_steps or None, threshold=cfg.threshold or None, temperature=cfg.temperature,
                           context=context_of(model), stop=stops, **decoding(tokenizer, cfg))
    if streamer:
        frames = streamed(frames, streamer, tokenizer, plen, cfg.block_length, stop)
    while True:
        with precision(ids.device):  # a thread's own, and a browser may take each frame in another thread
            frame = next(frames, None)
        if frame is None:
            return
        yield [t.partition(stop)[0] if stop else t for t in reply_texts(tokenizer, frame.ids[:, plen:])], frame

def chat_prompt(tokenizer, cfg: Settings, history: list[dict], context: int) -> tuple[list[int], bool]:
    """The chat's token ids, after its oldest turns were taken out of `history` if it was too long for the model.

    The reply, or half of the context, keeps its room. Returns the ids and True = some of the chat is not seen.
    """
    room, whole = context - min(cfg.reply_length(), context // 2), len(history)
    system = [{"role": "system", "content": cfg.system}] * bool(cfg.system)
    with refusing("the model's chat template does not take this chat"):
        while len(prompt := encode_prompt(tokenizer, system + history)) > room and len(history) > 1:
            del history[:2]
    return prompt, len(history) < whole or len(prompt) > room

def render(frame: Frame, plen: int, tokenizer, block_length: int):
    """The reply of a frame's one row as rich Text: ░ a mask, lit what this step committed, underlined what it edited.

    Blocks not begun are left out, and so is what follows an EOS that no mask stands before.
    """
    from rich.text import Text
    row = slice(plen, plen + (frame.block + 1) * block_length)
    ids, new, edited = (v[0, row].tolist() for v in (frame.ids, frame.new, frame.edited))
    mask, eos, special, shown = tokenizer.mask_token_id, tokenizer.eos_token_id, {*tokenizer.all_special_ids}, Text()
    end = ids.index(eos) if eos in ids else len(ids)
    end = end if mask not in ids[:end] else len(ids)
    styles = ["dim" if i == mask else "magenta underline" if e else "bold green" if n else ""
              for i, n, e in zip(ids, new, edited, strict=True)]
    kinds = [i if i in special else None for i in ids]
    for (kind, style), run in itertools.groupby(range(end), lambda k: (kinds[k], styles[k])):
        places = list(run)
        if kind == mask:
            shown.append("░" * len(places), style)
        elif kind is None:  # decoded with the token before, so that words keep the blank between them
            before = ids[max(places[0] - 1, 0) : places[0]]
            text = tokenizer.decode(before + [ids[k] for k in places])
            shown.append(text[len(tokenizer.decode(before)) :], style)
    return shown

SLIDERS = {  # slash command: its setting, what reads the value, what it takes
    "steps": ("eval_steps", int, "N"), "block": ("block_length", int, "N"), "length": ("max_length", int, "N"),
    "temp": ("temperature", float, "X"), "edits": ("allow_edits", {"on": True, "off": False}.__getitem__, "on|off"),
    "mode": ("remasking", ({m: m for m in REMASKING} | {"confidence": "low_confidence"}).__getitem__,
             "confidence|random|ancestral"),
    "system": ("system", str, "TEXT"), "stop": ("stop", str, "TEXT")}

def with_sliders(cfg: Settings, context: int, **changes) -> Settings:
    """The settings with some changed; UserError if a chat cannot run with them."""
    cfg = dataclasses.replace(cfg, **changes)
    validate(cfg)
    if 2 * cfg.block_length > context:
        raise UserError(f"--block_length {cfg.block_length} is over half of the model's context, {context} tokens")
    return cfg

def obey(command: str, cfg: Settings, context: int) -> Settings:
    """The settings after a slash command; UserError with what there is, or what it takes, on a wrong one."""
    name, _, text = command[1:].partition(" ")
    if name not in SLIDERS:
        known = ", ".join(f"/{k} {takes}" for k, (_, _, takes) in SLIDERS.items())
        raise UserError(f"commands: {known}, /reset (forget the chat), /help, /quit")
    setting, read, takes = SLIDERS[name]
    try:
        value = read(text.strip())
    except (ValueError, KeyError):
        raise UserError(f"/{name} takes {takes}, not {text!r}") from None
    return with_sliders(cfg, context, **{setting: value})

def show_reply(steps: Iterable[tuple[list[str], Frame]], plen: int, tokenizer, cfg: Settings, screen: Screen) -> str:
    """Show one reply as it is written, on no terminal when it is; Ctrl-C ends it. Returns its text as far as it got."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text
    text, note, began, blocks = "", "", time.monotonic(), cfg.reply_length() // cfg.block_length
    console = Console(highlight=False)
    live: Any = Live(console=console, refresh_per_second=20) if screen.live else contextlib.nullcontext()
    with live:
        with contextlib.suppress(KeyboardInterrupt):
            for texts, frame in steps:
                text = texts[0]
                n = len(reply_ids(tokenizer, frame.ids[0, plen:], cfg.stop))
                note = (f"block {frame.block + 1}/{blocks} · step {frame.step + 1} · {n} tokens · "
                        f"{n / (time.monotonic() - began):.0f} tokens/s")
                if screen.live:
                    lines = render(frame, plen, tokenizer, cfg.block_length).wrap(console, console.width)
                    seen = Text("\n").join(lines[2 - console.height :])  # the end of it, if the terminal is full
                    live.update(Group(seen, Text(note, "dim")))
        if screen.live:
            live.update(Group(Text(text), Text(note, "dim")))
    if not screen.live:
        screen.say(text)
    return text

UNTRAINED = ("{} is untrained and talks nonsense. To talk to a trained one: --task pretrain --model tiny-modernbert, "
             "then --task sft_only --model ckpt/pretrain --sft_data talk --steps_sft 1500, then --task chat --model "
             "ckpt/sft")

def chat(cfg: Settings, screen: Screen) -> None:
    """Talk to a model until /quit, or Ctrl-C or Ctrl-D at the prompt; a line that begins with / moves a slider."""
    model, tokenizer = open_model(cfg, screen)
    if cfg.model in EMBEDDED or cfg.from_scratch:
        screen.say(UNTRAINED.format(cfg.model))
    context, history, told = context_of(model), [], False
    cfg = with_sliders(cfg, context)
    if cfg.web:
        return serve(model, tokenizer, cfg)
    if importlib.util.find_spec("readline"):  # lets the user edit the line
        import readline  # noqa: F401
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for turn in itertools.count():
            length = cfg.reply_length()
            line = input(  # after where the sliders are
                f"[steps {cfg.eval_steps or length // 2}, block {cfg.block_length}, length {length}, temp "
                f"{cfg.temperature:g}, {cfg.remasking}, edits {'on' if cfg.allow_edits else 'off'}] > ").strip()
            try:
                if line == "/quit":
                    return
                if line == "/reset":
                    history.clear()
                elif line.startswith("/"):
                    cfg = obey(line, cfg, context)
                elif line:
                    asked = [*history, {"role": "user", "content": line}]
                    prompt, cut = chat_prompt(tokenizer, cfg, asked, context)
                    if cut and not told:
                        screen.say(f"the chat is over the model's {context} tokens: its oldest part is forgotten")
                    steps = replies(model, tokenizer, [prompt], cfg, keyed_generator(cfg.seed, "chat", turn))
                    text = show_reply(steps, len(prompt), tokenizer, cfg, screen)
                    history, told = [*asked, {"role": "assistant", "content": text}], told or cut
            except UserError as e:
                screen.say(str(e))
    screen.say("")

def web_reply(model, tokenizer, cfg: Settings, say: Callable, message: str, history: list[dict],
              *sliders) -> Iterator[str]:
    """What a browser shows of the reply to a message after each denoising step; sliders in SLIDERS' order.

    What is wrong is told by say(text), and so is that the model does not see all of the chat.
    """
    try:
        cfg = with_sliders(cfg, context := context_of(model), **{
            name: type(getattr(cfg, name))(value) for (name, *_), value in zip(SLIDERS.values(), sliders, strict=True)})
        parts = [(m["role"], m["content"]) for m in history] + [("user", message)]  # gradio's text is a list of parts
        asked = [{"role": role, "content": text if isinstance(text, str) else "".join(p["text"] for p in text)}
                 for role, text in parts]
        prompt, cut = chat_prompt(tokenizer, cfg, asked, context)
    except UserError as e:
        return say(str(e))
    if cut:
        say(f"the chat is over the model's {context} tokens: its oldest part is not seen")
    for texts, frame in replies(model, tokenizer, [prompt], cfg, keyed_generator(cfg.seed, "chat", len(history) // 2)):
        text = texts[0]
        yield render(frame, len(prompt), tokenizer, cfg.block_length).plain
    yield text

def serve(model, tokenizer, cfg: Settings) -> None:
    """The chat in a browser, on this machine's own address alone, until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which would ask the network
    import gradio
    gradio.ChatInterface(
        functools.partial(web_reply, model, tokenizer, cfg, gradio.Warning), title=f"d1: {cfg.model}",
        chatbot=gradio.Chatbot(render_markdown=False),  # as markdown, tags would be hidden
        additional_inputs_accordion=gradio.Accordion("sliders", open=True), additional_inputs=[
            gradio.Slider(0, max(512, cfg.eval_steps), cfg.eval_steps, step=1, label="steps, 0 = half the length"),
            gradio.Slider(1, max(128, cfg.block_length), cfg.block_length, step=1, label="block"),
            gradio.Slider(1, max(1024, cfg.reply_length()), cfg.reply_length(), step=1, label="length"),
            gradio.Slider(0, max(2, cfg.temperature), cfg.temperature, step=0.1, label="temperature"),
            gradio.Checkbox(cfg.allow_edits, label="edits"),
            gradio.Dropdown(list(REMASKING), value=cfg.remasking, label="mode"),
            gradio.Textbox(cfg.system, label="system prompt"),
            gradio.Textbox(cfg.stop, label="stop text")],
    ).launch(server_name="127.0.0.1", share=False)  # one reply at a time, as is gradio's default

@functools.cache
def text_diffusion_pipeline() -> type:
    """Make TextDiffusionPipeline, and register it with transformers as text-diffusion."""
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY
    class TextDiffusionPipeline(transformers.Pipeline):
        """Replies to a text, a chat (a list of messages) or a list of these; a text is a chat's first message.

        num_steps (0 = half the length), block_length, max_length, allow_edits, temperature and seed as in Settings;
        use_confidence=False is ancestral sampling; stop_token: a text that ends a reply; stream=True prints the one
        reply while it is written; batch_size: rows decoded at once, None = all.
        """
        _load_tokenizer = True
        known = {"num_steps": "eval_steps", "stop_token": "stop", "use_confidence": "remasking", "stream": "stream"} | {
            name: name for name in ("block_length", "max_length", "allow_edits", "temperature", "seed")}

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if not is_bidirectional(self.model.eval()):  # an adapter's base, as transformers loads it
                raise UserError(f"{self.model.name_or_path} attends to the left only: use what --export hf has written")

        def _sanitize_parameters(self, **options):
            options = {name: value for name, value in options.items() if value is not None}
            if unknown := options.keys() - self.known.keys():
                raise TypeError(f"unknown option {min(unknown)}: there are {', '.join(self.known)}")
            if "use_confidence" in options:
                options["use_confidence"] = "low_confidence" if options["use_confidence"] else "ancestral"
            return {}, {self.known[name]: value for name, value in options.items()}, {}

        def __call__(self, inputs, batch_size=None, **options):
            inputs = inputs if isinstance(inputs, str) else list(inputs)
            one = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], dict))
            chats: Any = [inputs] if one else inputs
            made: Any = []
            size = batch_size or self._batch_size or max(len(chats), 1)
            for first in range(0, len(chats), size):  # as a dict: transformers would take a list apart
                made += super().__call__({"chats": chats[first : first + size], "first": first}, **options)
            return made[0] if one else made

        def preprocess(self, inputs):
            tok: Any = self.tokenizer
            if None in (tok.mask_token_id, tok.eos_token_id, tok.pad_token_id):
                raise UserError("the tokenizer lacks a mask, EOS or pad token: give a checkpoint of d1_full.py")
            chats = [[{"role": "user", "content": c}] if isinstance(c, str) and tok.chat_template else c
                     for c in inputs["chats"]]
            return inputs | {"prompts": [tok.encode(c) if isinstance(c, str) else encode_prompt(tok, c) for c in chats]}

        def _forward(self, inputs, stream=False, **given):
            tok: Any = self.tokenizer
            preset = read_json(Path(str(self.model.name_or_path), "d1_state.json")).get("preset", "paper")
            given = {"task": "chat", "preset": preset} | given
            cfg = settle({name: (value, "call") for name, value in given.items()})[0]
            prompts, context = inputs["prompts"], context_of(self.model)
            if stream and len(prompts) > 1:
                raise UserError("stream=True takes one prompt")
            if (longest := max(map(len, prompts))) + 2 * cfg.block_length > context:
                raise UserError(f"a prompt of {longest} tokens and two blocks are over the model's {context} tokens")
            streamer = transformers.TextDiffusionStreamer(tok, skip_special_tokens=True) if stream else None
            draws = [keyed_generator(cfg.seed, "pipeline", inputs["first"] + i) for i in range(len(prompts))]
            *_, (texts, _) = replies(self.model, tok, prompts, cfg, draws, streamer)
            return {"texts": texts}

        def postprocess(self, outputs):
            return [[{"generated_text": text}] for text in outputs["texts"]]

    classes: Any = transformers.AutoModelForMaskedLM, transformers.AutoModelForCausalLM
    PIPELINE_REGISTRY.register_pipeline("text-diffusion", TextDiffusionPipeline, classes)
    return TextDiffusionPipeline

def __getattr__(name: str) -> Any:
    """TextDiffusionPipeline, made when it is first asked for: to import this file loads no transformers."""
    if name == "TextDiffusionPipeline":
        return text_diffusion_pipeline()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

# %% 16. Main — flags, runs, dry run, smoke, sweep, explain
def parse_words(words: Sequence[str] | None) -> dict[str, Any]:
    """The values of the flags, one per field of Settings, among command-line words. UserError on another word."""
    parser = argparse.ArgumentParser(
        prog="d1_full.py", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False, exit_on_error=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Start here:  python d1_full.py --task sudoku        (the embedded model, offline, minutes)\n"
               "             python d1_full.py --task sudoku --dry_run   (settings and cost, nothing run)\n"
               "Defaults are one value, or one a preset; in {task: value, '*': value} the star is every other task.\n"
               "In brackets: where the paper preset's value is from.")
    for f in dataclasses.fields(Settings):
        m, columns = f.metadata, {preset: repr(value) for preset, value in f.metadata["columns"].items()}
        alike = len(set(columns.values())) == 1
        default = columns["paper"] if alike else " | ".join(f"{preset} {value}" for preset, value in columns.items())
        name = str(f.type)
        kind: dict[str, Any] = dict(type=dict(int=int, float=float).get(name, str), metavar=name.upper())
        kind = dict(choices=m["choices"]) if m["choices"] else kind
        kind = dict(action=argparse.BooleanOptionalAction) if name == "bool" else kind
        kind |= dict(nargs="?", const="tags") if f.name == "explain" else {}
        text = f"{m['help']}. Default: {default}. [{m['source']}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", help=text, **kind)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{k}" for k in Settings.__annotations__], 1)
        raise UserError(f"unknown argument {unknown[0]}" + "".join(f"; did you mean {flag}?" for flag in near))
    return vars(known)

def config_words(path: str) -> list[str]:
    """A YAML file's settings as command-line words, so that one parser reads both."""
    import yaml
    with refusing(f"--config {path}"):
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(content, dict) or any(isinstance(v, dict | list | None) for v in content.values()):
            raise ValueError("write one 'flag: value' a line")
    return words_of(content)

def words_of(values: dict[str, Any]) -> list[str]:
    """Settings as command-line words."""
    return [f"--{k}" if v is True else f"--no-{k}" if v is False else f"--{k}={v}" for k, v in values.items()]

def read_flags(argv: Sequence[str] | None) -> dict[str, tuple[Any, str]]:
    """What the user gave: {name: (value, "command line" or "config")}; the command line wins."""
    typed = parse_words(argv)
    filed = parse_words(config_words(typed["config"])) if "config" in typed else {}
    return {k: (v, "config") for k, v in filed.items()} | {k: (v, "command line") for k, v in typed.items()}

def settle(given: dict[str, tuple[Any, str]]) -> tuple[Settings, dict[str, str]]:
    """Fill every setting: given, else the preset's default. Returns (settings, {name: where it came from})."""
    plain = {name: value for name, (value, _) in given.items()}
    task, model, preset = plain.get("task", ""), plain.get("model", "tiny"), plain.get("preset", "auto")
    if preset == "auto":
        small = model in EMBEDDED or read_json(Path(model, "d1_state.json")).get("preset") == "tiny"
        preset = "tiny" if small else "paper"
    if "steps_sft" in given:
        given = {"data_ratio": (0.0, "--steps_sft"), **given}
    cfg, origin = Settings(), {}
    for f in dataclasses.fields(Settings):
        value, origin[f.name] = given.get(f.name, (Settings.default(f.name, task, preset), f"preset {preset}"))
        setattr(cfg, f.name, float(value) if f.type == "float" else value)
    cfg.preset = preset
    validate(cfg)
    return cfg, origin

def validate(cfg: Settings) -> None:
    """UserError on values that cannot run, before anything is loaded."""
    for f in dataclasses.fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        top = sys.float_info.max if high is None else high
        if f.type in ("int", "float") and not low <= value <= top:  # as no infinity and no nan is
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"--{f.name} must be {'finite and ' * (not math.isfinite(value))}{bounds}, not {value}")
    if not re.fullmatch(r"\d+(,\d+)*", str(cfg.eval_lengths)):
        raise UserError(f"--eval_lengths must be numbers with commas, such as 128,256,512, not {cfg.eval_lengths}")
    lengths = [("gen_length", cfg.gen_length)] + [("eval_lengths", n) for n in cfg.lengths()]
    if cfg.task == "chat":
        lengths = [("max_length", cfg.max_length)] if cfg.max_length else lengths[:1]
    for flag, length in lengths:
        if length < 1 or length % cfg.block_length:
            raise UserError(f"--{flag} {length} must be a positive multiple of --block_length {cfg.block_length}")
    steps, blocks = cfg.diffusion_steps, cfg.gen_length // cfg.block_length
    for wrong, text in (
        (not cfg.task and (cfg.smoke or not cfg.export), f"--task is needed: one of {', '.join(TASK_CHOICES)}"),
        (steps and not blocks <= steps <= cfg.gen_length,
         f"--diffusion_steps {steps} must be from {blocks}, one a block, to --gen_length"),
        (cfg.task == "table1" and {*stages_passed(cfg)} - {"pretrain"},
         f"--task table1 trains all rows of its table: give a model that neither stage has trained, not {cfg.model}"),
        (cfg.t_low > cfg.t_high, f"--t_low {cfg.t_low} must not be above --t_high {cfg.t_high}"),
        (cfg.edit_rate and cfg.use_lora and cfg.trains(), "--edit_rate teaches a token: without --use_lora"),
        (cfg.data and cfg.task in ("sft_only", "table1"),
         f"--data is problems of one benchmark, and --task {cfg.task} has four; traces are given by --sft_data"),
        (cfg.sft_data == "talk" and cfg.task != "sft_only", "--sft_data talk is for --task sft_only"),
        (cfg.report_to != "none" and not cfg.trains(), "--report_to needs a run that trains"),
        (cfg.patience and cfg.task not in (*RL_TASKS, "table1"), "--patience needs stage 2: --task with a benchmark"),
        (cfg.threshold and cfg.remasking != "low_confidence", "--threshold goes with --remasking low_confidence"),
        (cfg.bs_rl % cfg.group, f"--bs_rl {cfg.bs_rl} must be a multiple of --group {cfg.group}"),
        (cfg.eval_only and cfg.task not in RL_TASKS, f"--eval_only needs a benchmark: --task {', '.join(RL_TASKS)}"),
        ((cfg.task == "custom") != bool(cfg.reward), "--task custom and --reward FILE.py:FUNCTION go together"),
        (cfg.task == "custom" and not cfg.data, "--task custom needs --data, rows with a column prompt"),
        (cfg.task == "chat" and (cfg.resume or cfg.export), "--task chat writes nothing: no --resume, no --export"),
        (cfg.task == "chat" and (cfg.smoke or cfg.cache != "none"), "--task chat goes without --smoke and --cache"),
        (cfg.web and cfg.task != "chat", "--web needs --task chat"),
        (not cfg.task and cfg.model in EMBEDDED, "--export without --task converts a checkpoint: give --model"),
        (cfg.task == "sft_only" and cfg.skip_sft, "--task sft_only and --skip_sft leave nothing to do"),
        ((cfg.from_scratch or cfg.model in EMBEDDED) and (cfg.use_lora or cfg.load_4bit),
         "random weights have nothing to adapt or to pack: leave out --use_lora and --load_4bit"),
        (cfg.load_4bit and cfg.trains() and not cfg.use_lora, "--load_4bit weights cannot be trained: add --use_lora"),
        (cfg.load_4bit and cfg.export, "--export needs unpacked weights: export the saved adapter without --load_4bit"),
        (bool(cfg.sweep) != bool(cfg.sweep_space), "--sweep N and --sweep_space FILE.yaml go together"),
        (cfg.sweep and (not cfg.trains() or cfg.task == "table1"),
         "--sweep needs a --task that trains, not table1, nor chat"),
        (cfg.attn == "flash_attention_2" and not (importlib.util.find_spec("flash_attn") and torch.cuda.is_available()),
         "--attn flash_attention_2 needs a CUDA GPU and the package flash-attn: use --attn auto")):
        if wrong:
            raise UserError(text)
    for flag, used, package in (("web", cfg.web, "gradio"), ("sweep", cfg.sweep, "optuna"),
                                ("load_4bit", cfg.load_4bit, "bitsandbytes"),  # accelerate leaves a tracker out
                                (f"report_to {cfg.report_to}", cfg.report_to != "none", cfg.report_to)):
        if used and not getattr(importlib.util.find_spec(package), "origin", None):  # a folder, as wandb's, has none
            raise UserError(f"--{flag} needs the package {package}: pip install {package}")
    if cfg.model not in EMBEDDED:
        resolve_checkpoint(cfg.model)
    for source in filter(None, (cfg.data, cfg.sft_data)):
        if source != "talk" and (cfg.task != "pretrain" or not Path(source).is_dir()):
            check_source(source, ROW_FILES + TEXT_FILES * (cfg.task == "pretrain"))

def open_model(cfg: Settings, screen: Screen) -> tuple[Any, Any]:
    """Load model and tokenizer as the settings say, and print what came."""
    lora = (cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets) if cfg.trains() and cfg.use_lora else None
    trains_all = cfg.trains() and not lora
    dtype = getattr(torch, cfg.dtype) if cfg.dtype != "auto" else torch.float32 if trains_all else None
    model, tokenizer = load_model(cfg.model, dtype=dtype, lora=lora, load_4bit=cfg.load_4bit, attn=cfg.attn,
                                  seed=cfg.seed, from_scratch=cfg.from_scratch)
    c = model.config
    if cfg.export == "llada" and (c.model_type != "llama" or c.tie_word_embeddings or c.attention_bias or c.mlp_bias):
        raise UserError(f"--export llada needs LLaDA's network, a plain Llama; this model is another, {c.model_type}")
    if trains_all and hasattr(model, "peft_config"):
        model = model.merge_and_unload().requires_grad_(True)
    if cfg.edit_rate and trains_all:
        add_delete_token(model, tokenizer)
    windows = getattr(c, "sliding_window", None) or "sliding" in str(getattr(c, "layer_types", ""))
    if (cfg.cache, cfg.rollout_cache) != ("none", "none") and (windows or not model.can_generate()):
        raise UserError(f"--cache and --rollout_cache: {c.model_type} keeps no keys and values of all tokens")
    if cfg.compile:  # block by block: a small graph that serves all of them, and the output layer stays free
        with refusing("--compile does not work here"):
            torch.compile(torch.sin)(torch.zeros(1))
            lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
            for block in next(m for m in lists if len(m) == c.num_hidden_layers):
                block.compile(dynamic=True)
    if cfg.grad_checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not t) for t in (False, True))
    share = f", {trained:,} trained ({100 * trained / total:.2f} %)" if cfg.trains() else ""
    screen.say(f"model {cfg.model}: {total:,} parameters{share}")
    if lora:
        each = collections.Counter(n.split(".")[-2] for n, _ in model.named_modules() if n.endswith("lora_A"))
        screen.say(f"LoRA r {cfg.lora_r}, alpha {cfg.lora_alpha} on " + ", ".join(f"{n} x{k}" for n, k in each.items()))
    ids = {"mask": tokenizer.mask_token_id, "EOS": tokenizer.eos_token_id, "EOT": turn_end(tokenizer)[0],
           "pad": tokenizer.pad_token_id}
    screen.say("tokens " + ", ".join(f"{k} {i} {tokenizer.convert_ids_to_tokens(i)}" for k, i in ids.items()))
    machine = f"{processes().num_processes} x {model.device}, {torch.get_num_threads()} CPU threads"
    screen.say(f"preset {cfg.preset}, seed {cfg.seed}; {str(model.dtype).split('.')[1]}; {machine}")
    return model, tokenizer

def with_data_ratio(cfg: Settings, parameters: int) -> Settings:
    """The settings with as many SFT steps as --data_ratio asks for, if it does."""
    steps = math.ceil(cfg.data_ratio * parameters / (cfg.bs_sft * cfg.sft_length)) or cfg.steps_sft
    return dataclasses.replace(cfg, steps_sft=steps)

def prepare_folder(cfg: Settings, out: Path, screen: Screen) -> contextlib.AbstractContextManager:
    """Make the run's folder, locked; an earlier run in it is moved aside, unless it is resumed or only evaluated."""
    import filelock
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=0)  # the system frees it when a run dies
    if processes().is_main_process:
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another run works in {out}: wait for it, or give another --output_dir") from None
    if processes().is_main_process and (out / "metrics.jsonl").exists() and not (cfg.resume or cfg.eval_only):
        source = Path(cfg.model).resolve()
        if cfg.model not in EMBEDDED and out.resolve() in [source, *source.parents]:
            raise UserError(f"--model {cfg.model} lies in {out}, where this run would write: give another --output_dir")
        aside = next(p for i in itertools.count(1) if not (p := out.with_name(f"{out.name}.old{i}")).exists())
        out.rename(aside)
        screen.say(f"an earlier run was in {out}; it is now in {aside}")
    out.mkdir(parents=True, exist_ok=True)
    processes().wait_for_everyone()
    return lock

def run_stage(stage: Stage, stages: list[str], cfg: Settings, screen: Screen) -> None:
    """Resume if asked, train, export with what d1_state.json tells: stages passed, settings, versions, commit, argv."""
    import transformers
    if cfg.resume:
        begins = f"resumed after step {stage.step}" if load_trainer(stage, screen) else "from the start"
        screen.say(f"{stage.name}: {begins}")
    stage.run(screen)
    stage.finish(screen)
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)
    state = dict(stages=stages, preset=cfg.preset, origin=origin_of(cfg.model), settings=dataclasses.asdict(cfg),
                 argv=sys.argv[1:], versions=versions, commit=commit or None)
    export_model(stage.model, stage.tokenizer, stage.out, state)
    if cfg.export:
        export_model(stage.model, stage.tokenizer, stage.out / cfg.export, form=cfg.export)
    plot_curves(stage.out)
    processes().wait_for_everyone()

def run_stages(cfg: Settings, screen: Screen, out: Path, before: bool = True) -> list[dict]:
    """Stage 1 if needed, evaluation, stage 2 on a benchmark, evaluation. Returns the entries of eval.json it made."""
    from accelerate.utils import gather_object
    tasks = tasks_of(cfg)
    model, tokenizer = open_model(cfg, screen)
    cfg = with_data_ratio(cfg, sum(p.numel() for p in model.parameters()))
    stages = stages_passed(cfg)
    splits, traces = load_data(cfg, tasks, tokenizer, screen)
    _lock = prepare_folder(cfg, out, screen)  # held as long as this function runs
    def look() -> list[dict]:
        after = [s for s in stages if s != "pretrain"]
        row = "d1" if {"sft", "diffu_grpo"} <= set(after) else ["base", *after][-1]
        return [e for t, split in splits.items()
                for e in evaluate(model, tokenizer, t, split["test"], cfg, row, out, screen)]
    for task, split in splits.items() if cfg.task in RL_TASKS else ():
        say_sizes(task, split, screen)
        if cfg.data and cfg.preset == "tiny" and task.name in TASKS:
            n, keys = len(split["test"]), map(task.key, split["test"])
            seen = sum(split_of(key) == "train" for key in keys if key.startswith(task.name + "/"))
            screen.say(f"{cfg.data}: {n} test problems; {seen} of them (sudoku: their grids) could also come from the "
                       "embedded generator's training split")
    if traces:
        stage = Pretraining if cfg.task == "pretrain" else MaskedSFT
        stages = ["pretrain"] * (stage is MaskedSFT and "pretrain" in stages) + [stage.name]
        run_stage(stage(model, tokenizer, traces, cfg, out), stages, cfg, screen)
    if not cfg.reinforces():
        return look() if cfg.evaluates() else []
    entries, task, split = look() if before and cfg.evaluates() else [], tasks[0], splits[tasks[0]]
    stages = [s for s in stages if s != "diffu_grpo"] + ["diffu_grpo"]
    heldout = split["heldout"][: cfg.limit or 128]
    asked = evaluation_prompts(tokenizer, task, heldout, cfg)[0]
    def check(model) -> float:
        replies = gather_object([r for batch in generate(model, tokenizer, asked, cfg, cfg.gen_length) for r in batch])
        grades = [task.grade(reply["generations"], heldout[i]) for i, reply in replies]
        return sum(getattr(g, task.aim) for g in grades) / len(grades)
    pay = functools.partial(task.batch_rewards, official=cfg.preset == "official")
    run_stage(DiffuGRPO(model, tokenizer, split["train"], task.messages, pay, cfg, out, check), stages, cfg, screen)
    return entries + (look() if cfg.evaluates() else [])

def run_table1(cfg: Settings, screen: Screen, out: Path, given: dict) -> list[dict]:
    """The paper's Table 1 on the model given: base, +SFT, +diffu-GRPO, d1. Finished parts are not redone."""
    sft, entries = out.parent / "sft", []  # where --task sft_only leaves it
    parts = [("table1", out / "base", cfg.model), ("sft_only", sft, cfg.model)]
    for task in TASKS:
        parts += [(task, out / f"{task}_diffu_grpo", cfg.model), (task, out / f"{task}_d1", str(sft))]
    for task, folder, model in parts:
        changes = {"task": task, "model": model, "skip_sft": task in TASKS, "skip_eval": False, "preset": cfg.preset,
                   "from_scratch": cfg.from_scratch and model == cfg.model,
                   "resume": cfg.resume and (folder / "trainer").exists()}
        own = settle(given | {k: (v, "table1") for k, v in changes.items()})[0]
        state = read_json(folder / "d1_state.json").get("settings")
        trained = bool(state) and not changed_settings(state, own)  # the checkpoint of a run with these settings
        screen.say(f"--- table1: {folder}" + ", trained already" * trained)
        if trained or task == "table1":  # the base: nothing to train
            own = dataclasses.replace(own, model=str(folder) if trained else model, eval_only=True,
                                      from_scratch=own.from_scratch and not trained)
        entries += run_stages(own, screen, folder, before=False)
    write_json(out / "eval.json", entries)
    return sorted(entries, key=lambda e: (list(TASKS).index(e["task"]), list(ROW_TITLES).index(e["row"])))

def skeleton(cfg: Settings):
    """The model without memory for its weights, for counting."""
    if cfg.model in EMBEDDED:
        return random_model(*embedded_network(cfg.model, build_tokenizer(cfg.model)))
    base = resolve_checkpoint(cfg.model)[1]
    raw = LLADA_8B if base in ALIASES.values() else read_config(base)  # known without a network
    with refusing(f"cannot load {base}"), torch.device("meta"):
        model = random_model(*network_of(base, raw))
        adapts = cfg.use_lora and cfg.trains()
        return adapt_with_lora(model, cfg.lora_r, cfg.lora_alpha, targets=cfg.lora_targets) if adapts else model

def bytes_per_token(config, r: int, checkpointing: bool) -> float:
    """What backward keeps of one token, in bytes: a Llama in bf16 arithmetic, fp32 norms, fused attention."""
    d, layers, f = config.hidden_size, config.num_hidden_layers, getattr(config, "intermediate_size", 0)
    block = 28 * d + 8 * f + 14 * r if r else 34 * d + 8 * f  # full training has fp32 residuals and norms
    return 2 * d * layers + block if checkpointing else block * layers

def dry_run(cfg: Settings, origin: dict[str, str], screen: Screen) -> None:
    """Print every setting with where it came from, and what the run will need."""
    rows = []
    for f in dataclasses.fields(Settings):
        value, paper = getattr(cfg, f.name), Settings.default(f.name, cfg.task)
        source = f.metadata["source"] if value == paper else f"paper preset: {paper}"
        rows.append((f.name, value, origin[f.name], source))
    screen.table("Settings", ["setting", "value", "from", "source"], rows, text=True)
    model = skeleton(cfg)
    config, tiny, trains = model.config, cfg.preset == "tiny", cfg.trains()
    sft, rl = has_stage1(cfg), trains and cfg.task in (*RL_TASKS, "table1")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * trains
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    total = sum(p.numel() for p in model.parameters()) - adapters
    cfg = with_data_ratio(cfg, total)
    row_rl = (24 if tiny else cfg.max_prompt) + cfg.gen_length  # tokens of a prompt and its completion
    rows_sft, steps = min(cfg.rows_sft, cfg.bs_sft), cfg.diffusion_steps or cfg.gen_length // 2
    rows_rl, scored = cfg.bs_rl // cfg.masks_shared_by(), 1 - 1 / cfg.mu + bool(cfg.beta)  # masks of an update
    updates_sft, updates_rl = cfg.steps_sft * sft, cfg.steps_rl * rl
    if cfg.task == "table1":  # each benchmark twice, for as many steps as it has by default
        updates_sft = updates_sft if "preset" not in origin["steps_sft"] else Settings.default(
            "steps_sft", "sft_only", cfg.preset)
        updates_rl = 2 * sum(Settings.default("steps_rl", task, cfg.preset) if "preset" in origin["steps_rl"] else
                             cfg.steps_rl for task in TASKS)
    back = (4 if cfg.use_lora else 6) + 2 * cfg.grad_checkpoint  # LoRA needs no gradient of the frozen weights
    needs, flops = {"parameters, of which trained": f"{total + adapters:,}, {trained:,}"}, 0.0
    for name, updates, passes, rows, length, cost in (  # passes an update; FLOPs a weight and token
        ("SFT: forward + backward passes", updates_sft, cfg.bs_sft / rows_sft, rows_sft, cfg.sft_length, back),
        ("RL rollouts: forward passes", updates_rl, steps * cfg.grad_accum / cfg.mu, cfg.bs_rl, row_rl, 2),
        ("RL old, ref: forward passes", updates_rl, scored * cfg.grad_accum, rows_rl, row_rl, 2),
        ("RL updates: forward + backward passes", updates_rl, cfg.grad_accum, rows_rl, row_rl, back),
    ):
        attention = 2 * config.hidden_size * config.num_hidden_layers * length
        each = passes * rows * length * cost * (total - model.get_input_embeddings().weight.numel() + attention)
        flops += each * updates
        if updates:
            needs[name] = (f"{passes:.4g} of {rows * length:,} tokens an update, {each:.2e} FLOPs; "
                           f"{passes * updates:,.0f} in the run")
    packed = sum(m.weight.numel() for m in block_linears(model).values()) * cfg.load_4bit  # NF4: .516 bytes each
    width = 4 if tiny or not (cfg.use_lora or cfg.eval_only) else 2  # bytes of the others
    copies = 2 if rl and cfg.beta and not cfg.use_lora else 1  # the frozen reference
    tokens = max(rows_sft * cfg.sft_length * sft, rows_rl * row_rl * rl)
    replies = max(min(rows_sft * cfg.sft_length // 2, cfg.logits_held(config)) * sft, rows_rl * cfg.gen_length * rl)
    kept = bytes_per_token(config, cfg.lora_r * cfg.use_lora, cfg.grad_checkpoint) * tokens
    memory = {  # of the activations a part is bf16 copies of fp32 weights
        "weights" + " and reference" * (copies == 2): copies * (packed * 0.516 + (total - packed) * width),
        "adapters": 4 * adapters, "gradients": 4 * trained, "AdamW": 8 * trained, "activations": kept + 2 * trained,
        "logits": config.vocab_size * 12 * replies}
    needs["FLOPs of training, a process"] = f"{flops:.2e}: {flops / 2e14 / 3600:,.1f} h at 200 TFLOP/s"
    needs |= {f"memory: {name}": f"{size / 2**30:.3f} GiB" for name, size in memory.items() if size}
    needs["memory: peak, about"] = f"{sum(memory.values()) / 2**30:.2f} GiB"
    disk = trained * (16 * (cfg.save_total_limit + 1) * (sft + rl) + 4)  # one more while it is written; weights alone
    needs["disk: checkpoints and weights"] = f"{disk / 2**30:.3f} GiB"
    screen.table("What the run needs", ["quantity", "value"], needs.items())

def smoke(cfg: Settings, screen: Screen) -> None:
    """--smoke: each part of the run once on a few rows, nothing trained or written. Stopped names what failed."""
    name, began = "model", time.perf_counter()
    try:
        for good, seen, following in smoke_checks(cfg, screen):
            if not good:
                raise ValueError(seen)
            screen.say(f"  {name:20}  {seen:60}  {time.perf_counter() - began:6.1f} s")
            name, began = following, time.perf_counter()
    except Exception as e:  # whatever it is, the check has failed
        raise Stopped(f"--smoke: {name} failed: {' '.join(str(e).split())[:300]} ({type(e).__name__})") from e
    screen.say("all checks passed; nothing was trained or written")

def smoke_checks(cfg: Settings, screen: Screen) -> Iterator[tuple[bool, str, str]]:
    """The checks of `smoke`: is it well, what was seen, the next one's name. The first is of the model."""
    cfg = dataclasses.replace(cfg, n_traces=8, steps_rl=min(cfg.steps_rl, cfg.mu), steps_sft=1, rows_sft=1, lr_sft=0.0,
                              bs_sft=2 * processes().num_processes, reward_errors="stop")
    model, tokenizer = open_model(cfg, screen)
    mask, eos, size, problems, rows = tokenizer.mask_token_id, tokenizer.eos_token_id, cfg.block_length, {}, []
    yield True, f"{type(model).__name__}, {str(model.dtype).split('.')[1]}", "tokenizer"
    back = tokenizer.decode(text := tokenizer.encode(SYSTEM, add_special_tokens=False))
    alike = "".join(SYSTEM.lower().split()) == "".join(back.lower().split())  # BERT has no capitals, no newlines
    yield (alike and None not in (mask, eos) and mask != eos,
           f"mask {mask}, EOS {eos}, {len(text)} tokens read back {'alike' if alike else f'as {back!r}'}", "data")
    for name in ("sft_only", *TASKS) if cfg.task == "table1" else [cfg.task]:
        part = dataclasses.replace(cfg, task=name, skip_sft=cfg.skip_sft or cfg.task == "table1")
        splits, traces = load_data(part, tasks_of(part), tokenizer, screen)
        problems, rows = problems | splits, rows + traces  # rows: (ids, prompt_len)
    sizes = collections.Counter(name for split in problems.values() for name, found in split.items() for _ in found)
    yield True, ", ".join(f"{name} {n:,}" for name, n in [*sizes.items(), ("SFT rows", len(rows))]), "forward pass"
    chosen = [(task, e) for task, split in problems.items() for e in split.get("test", [])[:2]]
    asked = [evaluation_prompts(tokenizer, task, [e], cfg)[0][0] for task, e in chosen] or [
        [int(i) for i in ids[: n or size]] for ids, n in rows[:2]]
    if not rows:  # without a stage 1 its loss is tried on this text as a reply
        rows = [(prompt + text + turn_end(tokenizer), len(prompt)) for prompt in asked]
        cfg.sft_length, cfg.sft_extra = max(len(row) for row, _ in rows), 0
    prompt, real = pad_left(asked, tokenizer.pad_token_id, model.device)  # (B, P)
    check_positions(model, prompt.shape[1] + max(cfg.lengths()) * bool(chosen))
    x = F.pad(prompt, (0, size), value=mask)  # (B, P+K)
    with torch.no_grad(), precision(model.device):
        top = float(model.eval()(x, attention_mask=extend_mask(real, x.shape[1])).logits.abs().max())
    yield top < math.inf, f"logits up to {top:.3g}", "decoding" if cfg.eval_only else "masking"
    if not cfg.eval_only:
        stage = MaskedSFT(model, tokenizer, rows, cfg, Path(cfg.output_dir))
        x0, keep = stage.collate(rows[:8], cfg.sft_length)  # (B, L)
        xt, masked = forward_process(x0, torch.full((len(x0),), 0.5), keep, mask, keyed_generator(cfg.seed, "smoke"))
        share, other = masked[~keep].float().mean(), bool(masked[keep].any() or (xt != x0.where(~masked, mask)).any())
        yield (not other and abs(float(share) - 0.5) < 2.5 / math.sqrt((~keep).sum()),  # five standard deviations
               f"at t 0.5 {share:.2f} of the replies{', and more is changed' * other}", "SFT loss, gradient")
        loss, norm = operator.itemgetter("loss", "grad_norm")(stage.update())  # at learning rate 0
        stage.finish(screen)
        yield 0 <= loss < math.inf and 0 <= norm < math.inf, f"loss {loss:.3f}, gradient {norm:.3f}", "decoding"
    with precision(model.device):
        out = diffuse_decode(model.eval(), prompt, attention_mask=real, gen_length=size, steps=min(4, size),
                             cache=cfg.cache, **decoding(tokenizer, cfg))[:, prompt.shape[1] :]  # (B, K)
    left = int((out == mask).sum())
    yield not left, f"{out.numel()} tokens, {left} of them masks", "reward"
    replies, official = zip(chosen, reply_texts(tokenizer, out), strict=False), cfg.preset == "official"
    paid = [sum(task.batch_rewards([text], [e], official)[0].values()) for (task, e), text in replies]
    seen = f"of {len(paid)} replies: {sum(paid):.2f}" if paid else "this run has no benchmark"
    yield all(map(math.isfinite, paid)), seen, ""

def read_space(path: str, given: dict) -> dict[str, tuple[str, dict]]:
    """--sweep_space as {setting: (kind, options) of optuna's suggest}; each value is tried, with the others' first."""
    import yaml
    from optuna.trial import FixedTrial
    space, first, tries = {}, {}, []
    with refusing(f"--sweep_space {path}, where a line is mu: [4, 8], or lr_rl: {{low: 1e-5, high: 1e-3, log: true}}"):
        for name, wanted in yaml.safe_load(Path(path).read_text(encoding="utf-8")).items():
            if name in (*FREE, "task", "eval_only", "export") or not wanted or not isinstance(wanted, list | dict):
                raise ValueError(f"--{name} {wanted} cannot be swept")
            span = map(wanted.pop, ("low", "high")) if isinstance(wanted, dict) else wanted
            values = [parse_words(words_of({name: v}))[name] for v in span]  # read as on the command line
            kind, how = ("categorical", dict(choices=values)) if isinstance(wanted, list) else (
                Settings.__annotations__[name], dict(low=values[0], high=values[1], **wanted))
            getattr(FixedTrial({name: values[0]}), f"suggest_{kind}")(name, **how)  # optuna looks at the range
            space[name], first[name] = (kind, how), (values[0], "sweep")
            tries += [{name: (v, "sweep")} for v in values]
    if not space:
        raise UserError(f"--sweep_space {path} names no setting")
    for one in tries:
        settle(given | first | one)
    return space

def run_sweep(cfg: Settings, screen: Screen, given: dict) -> None:
    """--sweep trials, each a run of its own, or as many as are missing; then the ten best, and the best one's flags."""
    import filelock
    import optuna
    if processes().num_processes > 1:
        raise UserError("--sweep: one process a trial; start the command several times instead")
    space, folder = read_space(cfg.sweep_space, given), Path(cfg.output_dir) / f"{cfg.task}-sweep"
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    with refusing(f"cannot use {folder / 'sweep.db'}"), filelock.FileLock(folder / ".lock"):  # one makes the tables
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'sweep.db'}", {"connect_args": {"timeout": 60}},
                                             heartbeat_interval=20)  # a trial not heard of for 40 s was killed
        study = optuna.create_study(storage=storage, study_name="d1_full", direction="maximize", load_if_exists=True)
        optuna.storages.fail_stale_trials(study)
        if changed := changed_settings(study.user_attrs.get("settings", {}), cfg):
            raise ValueError(f"its trials had {', '.join(changed)}: give the same flags, or another --output_dir")
        study.set_user_attr("settings", dataclasses.asdict(cfg))
    def objective(trial) -> float:
        seed = keyed_generator(cfg.seed, "sweep", trial.number).initial_seed() % 2**32  # no two trials draw alike
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        with refusing(f"{folder} is of another --sweep_space: give another --output_dir"):
            own = {k: (getattr(trial, f"suggest_{kind}")(k, **how), "sweep") for k, (kind, how) in space.items()}
        out = folder / str(trial.number)
        screen.say(f"--- {out}: {shlex.join(words_of(trial.params))}")
        try:
            run_stages(settle(given | own | {"skip_eval": (True, ""), "resume": (False, "")})[0], screen, out)
        except (UserError, NonFiniteLoss) as e:
            screen.say(f"--- {out} failed: {e}")
            raise optuna.TrialPruned from e  # counts, and keeps optuna away from there; one broken off is FAIL
        except Stopped as e:
            raise Stopped(f"{out} is broken off: the same command goes on with the sweep", e.status) from e
        finally:
            screen.stop()
        key = "heldout_accuracy" if cfg.task in RL_TASKS else "heldout_loss"  # no test problem, see [D18]
        found = [r[key] for r in read_log(out / "metrics.jsonl") if key in r] or [math.nan]
        return max(found) if cfg.task in RL_TASKS else -found[-1]
    counted = [getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "PRUNED", "RUNNING")]
    study.optimize(objective, n_trials=max(cfg.sweep - len(study.get_trials(states=counted)), 0), gc_after_trial=True,
                   callbacks=[optuna.study.MaxTrialsCallback(cfg.sweep, states=counted)])
    done, failed, under_way = (study.get_trials(states=[state]) for state in counted)
    best = sorted(done, key=lambda t: -(t.value or 0))[:10]
    rows = [(t.number, f"{t.value:.4f}", *(f"{v:.3g}" if isinstance(v, float) else v for v in t.params.values()))
            for t in best]
    screen.table(f"Best of {len(done)} trials in {folder}, {len(failed)} failed, {len(under_way)} under way elsewhere",
                 ["trial", "held-out accuracy" if cfg.task in RL_TASKS else "minus held-out loss", *space], rows)
    if not done:
        raise Stopped("no trial of the sweep has gone well; their messages are above")
    screen.say(f"best: {shlex.join(words_of(study.best_params))}")

def tag_key(text: str) -> str:
    """eq4 of "Eq. (4), Sec. 3.2", sec3.1 of "Sec. 3.1", alg1 of "Algorithm 1"; small letters throughout."""
    return re.sub(r"(?<!\d)\.|[^a-z\d.]", "", text.partition(",")[0].lower().replace("algorithm", "alg"))

def tag_tables() -> tuple[dict[str, Sequence[str]], dict[str, Sequence[str]]]:
    """The head's tables by tag: equations (place in the paper, function, what it is); deviations (here, official)."""
    equations = re.findall(r"^    d1 (\S.*?)  +(\w+)  +(.*)$", __doc__ or "", re.MULTILINE)
    deviations = re.findall(r"^    (D\d+)  +(.*?) · (.*)$", __doc__ or "", re.MULTILINE)
    return {tag_key(row[0]): row for row in equations}, {tag: row for tag, *row in deviations}

@functools.cache
def definitions(source: str) -> dict[str, Any]:
    """The syntax trees of the functions, classes and methods (Class.method) of this file, by name, in their order."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and isinstance(node, ast.ClassDef)]
            found |= {f"{node.name}.{m.name}": m for m in methods}
    return found

def places_of(tag: str, source: str) -> dict[int, str]:
    """The lines where a deviation's tag stands, each with the function or class around it."""
    nodes = definitions(source).items()
    return {n: [name for name, d in nodes if d.lineno <= n <= d.end_lineno][-1]
            for n, line in enumerate(source.splitlines(), 1) if f"[{tag}]" in line}

def code_of(tag: str, source: str) -> tuple[list[str], list[str]]:
    """The functions that make an equation, and the other tags whose functions they call."""
    nodes, equations = definitions(source), tag_tables()[0]
    name, by_name = equations[tag][1], {row[1]: other for other, row in equations.items()}
    steps = [n for n, d in nodes.items() if n.startswith(f"{name}.") and "Algorithm" in (ast.get_docstring(d) or "")]
    parts = steps or [name]
    calls = [c.func for part in parts for c in ast.walk(nodes[part]) if isinstance(c, ast.Call)]
    called = list(dict.fromkeys(f.id for f in calls if isinstance(f, ast.Name)))
    first, last = (source[: source.index(f"# %% {n}.")].count("\n") for n in (3, 7))  # the mathematics
    own = [c for c in called if c in nodes and first < nodes[c].lineno < last and c not in by_name]
    return parts + own, [by_name[c] for c in called if c in by_name]

def explain(tag: str, screen: Screen) -> None:
    """--explain: a formula of the paper or a deviation, with its code. UserError if the tag is none."""
    from rich.syntax import Syntax
    (equations, deviations), source = tag_tables(), Path(__file__).read_text(encoding="utf-8")
    key = {row[1]: key for key, row in equations.items()}.get(tag, tag_key(tag))
    key, nodes = "sec" * key[:1].isdigit() + key, definitions(source)
    def show(first: int, last: int) -> None:
        code = "\n".join(source.splitlines()[first - 1 : last])
        screen.console.print(Syntax(code, "python", line_numbers=True, start_line=first, theme="ansi_dark"))
    def note(deviation: str) -> None:
        screen.say("[{}] here: {}\n     official code: {}".format(deviation, *deviations[deviation]))
    if key == "tags":
        rows = [[(k, *row) for k, row in table.items()] for table in (equations, deviations)]
        screen.table("Equations", ("tag", "paper", "function", "what"), rows[0], text=True)
        screen.table("Deviations", ("tag", "here", "official code"), rows[1], text=True)
    elif key.upper() in deviations:
        note(key.upper())
        for n, where in places_of(key.upper(), source).items():
            screen.say(f"\n{where}, line {n}:")
            show(n, n if where == "Settings" else min(n + 9, nodes[where].end_lineno))
    elif key in equations:
        place, name, what = equations[key]
        parts, others = code_of(key, source)
        screen.say(f"{place}: {what}; {name}, line {nodes[name].lineno}\n\n{ast.get_docstring(nodes[name])}")
        for part in parts:
            text = nodes[part].body[0]  # the docstring, which is above
            screen.say(f"\n{part}:")
            show(nodes[part].lineno, text.lineno - 1 if part == name else text.end_lineno)
            show(text.end_lineno + 1, nodes[part].end_lineno)
        screen.say("")
        for other in others:
            screen.say(f"calls {equations[other][1]}: --explain {other}")
        for deviation in deviations:
            if any(where.startswith(name) for where in places_of(deviation, source).values()):
                note(deviation)
    else:
        raise UserError(f"--explain {tag}: the tags are {', '.join([*equations, *deviations])}")

def run(argv: Sequence[str] | None) -> None:
    """Do what the command line says and show the results."""
    given = read_flags(argv)
    if "explain" in given:
        return explain(given["explain"][0], Screen())
    cfg, origin = settle(given)
    screen = Screen()
    if cfg.dry_run:
        return dry_run(cfg, origin, screen)
    torch.set_num_threads(cfg.threads or min(torch.get_num_threads(), 8))
    if not cfg.task:
        model, tokenizer = open_model(cfg, screen)
        export_model(model, tokenizer, Path(cfg.output_dir), form=cfg.export)
        return screen.say(f"{cfg.model} is now in {cfg.output_dir}, in the form {cfg.export}")
    if cfg.task == "chat":
        return chat(cfg, screen)
    if cfg.smoke:
        return smoke(cfg, screen)
    if cfg.sweep:
        return run_sweep(cfg, screen, given)
    began, out = time.monotonic(), Path(cfg.output_dir) / {"sft_only": "sft"}.get(cfg.task, cfg.task)
    saved = (out if cfg.task == "table1" else out / "trainer" / "manifest.json").exists()
    cfg.resume = cfg.resume or (cfg.auto_resume and saved)
    if cfg.resume and not saved:
        raise UserError(f"nothing to resume in {out}: run without --resume")
    try:
        entries = run_table1(cfg, screen, out, given) if cfg.task == "table1" else run_stages(cfg, screen, out)
    finally:
        screen.stop()  # a bar left open would eat the error's line
    if entries:
        results_table(screen, entries, cfg)
    screen.say(f"done in {(time.monotonic() - began) / 60:.1f} min; results are in {out}")

def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 stopped, 2 wrong input, 130 Ctrl-C, 143 SIGTERM."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' notes to their own developers
    logging.disable(logging.ERROR)
    debug = "--debug" in (sys.argv if argv is None else argv)  # the settings may be what is wrong
    try:
        run(argv)
    except (UserError, Stopped, OSError, argparse.ArgumentError) as e:
        if debug:
            raise
        print(f"d1_full.py: {'stopped' if isinstance(e, Stopped) else 'error'}: {e}", file=sys.stderr)
        return getattr(e, "status", 2)
    except (RuntimeError, MemoryError) as e:  # torch's OutOfMemoryError is one, a CPU's has no name
        known = isinstance(e, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(e)
        if not known or debug:
            raise
        print(f"d1_full.py: stopped: out of memory ({str(e).partition('.')[0]}); try a smaller --bs_rl, --rows_sft or "
              "--bs_eval, --grad_checkpoint, --use_lora, --load_4bit; --dry_run shows what takes it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("d1_full.py: stopped by Ctrl-C; the same flags and --resume go on if anything was saved", file=sys.stderr)
        return 130
    finally:  # a model whose group is left while it lives can abort the interpreter
        gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0

if __name__ == "__main__":
    sys.exit(main())
