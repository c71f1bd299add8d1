"""d1 in one file: masked SFT, then diffu-GRPO, for masked diffusion language models.

Reference implementation of "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning"
(Zhao, Gupta, Zheng, Grover; arXiv 2504.12216v2; NeurIPS 2025), written to be read beside the paper.

    python d1_full.py --task sudoku                 # both stages on the embedded model, offline
    python d1_full.py --model llada/llada-8b-instruct --use_lora --task sft_only
    python d1_full.py --model ./ckpt/sft --use_lora --task gsm8k
    python d1_full.py --model ./ckpt/sft --task chat

The file has three parts. Part I is the paper's method and needs torch alone: read it from top to bottom. It calls
nothing of what follows, which extends it by subclasses, by registration and by objects that are handed in.

Map
                           1 imports, errors, files, random streams
    I.   The method        2 forward process · 3 logits of a noised text · 4 masked SFT loss · 5 MaskedSFT ·
                           6 one-step estimator · 7 diffu-GRPO · 8 block decoder · 9 DiffuGRPO · 10 the loop
    II.  The experiments   11 settings · 12 text and ids · 13 readers of a reply · 14 the four tasks · 15 evaluation
    III. The program       16 data · 17 models · 18 decoder extras · 19 official protocol · 20 checkpoints, processes ·
                           21 screen · 22 chat, browser, pipeline · 24 command line

Sizes  B rows, G completions a prompt (group), P prompt, C completion, L = P + C, K block, V vocabulary, D hidden
       width, N selected positions of a batch. A bool tensor is named for what True means: `masked`, `is_prompt`; True
       in `attention_mask` and `completion_mask` means that the token counts, in `prompt_mask` that it is hidden.

Symbols  p_θ is the network, the paper's f_θ; x0 clean ids, xt noised ids, t noise level; q prompt, q' prompt with
       tokens hidden, o completion, + joins two texts; logp, logp_old and logp_ref are log φ, the paper's φ^π, under the
       policy, under the one that drew the batch and under the frozen reference; A is an advantage, ρ a ratio, ε the
       clip range of ρ, β the weight of the KL term, μ the number of inner updates; cfg is the settings, cfg_scale the
       scale of classifier-free guidance.

Equations, each in the docstring of its function (python d1_full.py --explain eq4 prints it with the code)
    d1 Eq. (1), Sec. 2      nelbo                bound on the negative log-likelihood
    d1 Sec. 3.1             one_step_logp        log-probabilities from one forward pass
    d1 Eq. (2), Sec. 2      group_advantages     advantage over the group
    d1 Eq. (3), Sec. 2      token_objective      the clipped surrogate of GRPO
    d1 Eq. (4), Sec. 3.2    diffu_grpo_loss      the objective of diffu-GRPO
    d1 Algorithm 1, Sec. 3.2    DiffuGRPO        rollouts and mu inner updates
    d1 Algorithm 2, Sec. 3.3    MaskedSFT        masked supervised fine-tuning

Deviations: here · in the official code (dllm-reasoning/d1 at 837888f), which is what "official" means in this file.
D1, D2, D7, D8 and D12 are the paper's way, D21 is the official one, the others are ours. Each tag stands at its line
below. --preset official switches to theirs where a switch makes sense.
    D1   loss: mean within a completion, then over completions (--norm) · one mean over the tokens of a micro-batch
    D2   mu different q' a prompt, shared by its group · one a completion; with accumulation half are used twice
    D3   private random streams, keyed by purpose and index · reseeds the global ones at every estimate
    D4   left padding is masked, so a prompt alone or in a batch has the same reply · attends to it
    D5   Gumbel noise from uniforms in float64 · in bf16 while training
    D6   no dropout in stage 2, so the first ratio is exactly 1 · LoRA dropout in every pass
    D7   LoRA on every linear layer of the model's blocks; no match is an error · skips names that LLaDA lacks
    D8   the reference is the frozen start of stage 2 · a sync that does nothing under LoRA
    D9   old and reference passes hold --logits_gib of logits · those of all mu masks at once
    D10  format patterns match a reasoning of several lines · they cannot
    D11  Countdown pays 0.1 only for the right numbers; exact, bounded parser · 0.1 for any answer; calls eval
    D12  MATH's boxed bonus fires · it looks for a mistyped string and never does
    D13  one prompt builder for SFT, RL and evaluation · evaluation has a prompt of its own
    D14  numbers such as 1,234 are read; both verdicts are reported · its GSM8K parser fails on them
    D15  sudoku by solved puzzles and cells, no grid in two splits · cells alone; test grids are in training
    D16  the border of prompt and reply is exact · its prompt ends one header too late
    D17  the mask token is never drawn · a predicted one stays in the reply
    D18  the best checkpoint is chosen on held-out training problems · on the test set
    D19  LoRA adapters stay fp32 · bf16
    D20  reward and accuracy read a reply by one reader · by different parsers
    D21  SFT: the sum of a batch divided by all of its reply tokens, EOS padding included · the same; Algorithm 2
         divides each row by its own reply length
"""


# %% 1. Imports; files and errors — heavier libraries are imported where they are used
# pyright: basic
from __future__ import annotations

import argparse
import array
import ast
import asyncio
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
import inspect
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin longer take the cores from each other: 6 x slower
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """A mistake in flags, files or values that the user can correct: one line, exit status 2."""


class Stopped(RuntimeError):
    """A run that cannot go on or was asked to stop: one line and an exit status. What was saved is kept."""

    def __init__(self, text, status=1):
        super().__init__(text)
        self.status = status


class NonFiniteLoss(Stopped):
    """Losses or gradients were NaN or infinite. The message names the step and the batch."""


@contextlib.contextmanager
def refusing(what, error=UserError):
    """Turn a library's complaint about a file into an error of ours, which says `what` and then the library's words."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except (Exception, SystemExit) as e:  # libraries, and a user's file, raise what they like
        words = " ".join(str(e).split())[:300]
        raise error(f"{what}: {words} ({type(e).__name__})") from e


def keyed_generator(*key):
    """A random stream for one purpose, from its key alone: nothing has to be saved, and no draw disturbs another.

    [D3] official reseeds the global generators at every estimate, with one of 4096 values
    (diffu_grpo_trainer.py:242). Here every draw has a private generator, and prompt masks are passed as tensors.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def visits(seed, name, first, count, n):
    """`count` indices, from number `first` on, of an endless sequence of epochs, each a new shuffle of n items."""
    span = range(first, first + count)
    orders = {}
    for epoch in {i // n for i in span}:
        generator = keyed_generator(seed, name, epoch)
        orders[epoch] = torch.randperm(n, generator=generator).tolist()
    return [orders[i // n][i % n] for i in span]


@contextlib.contextmanager
def seeded_dropout(device, *key):
    """Context in which dropout, which can only draw from torch's global streams, draws from the key's [D3]."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_generator(*key).initial_seed())
        yield


def processes():
    """What accelerate knows of this run: .device, .num_processes, .process_index, .is_main_process."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def precision(device):
    """Context of bf16 arithmetic on a GPU, whatever the weights are stored in. The losses are fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def read_json(path):
    """The content of a JSON file, {} if there is no such file."""
    with refusing(f"cannot read {path}"):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def read_log(path):
    """The rows of a JSONL log without a line that a kill has cut short; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def write_json(path, content):
    """Write JSON whole or not at all."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_whole(path, lambda part: part.write_text(text))


def write_whole(path, write, everyone=False):
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


# %% Part I. The method

# %% 2. Forward process — Sec. 2, with the linear schedule α_t = 1 - t
def forward_process(
    x0: Tensor,  # (B, L) int64 token ids
    t: Tensor,  # (B,) noise levels in (0, 1]
    is_prompt: Tensor,  # (B, L) True = never masked
    mask_id: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Draw x_t ~ q(x_t | x_0): each token outside of the prompt becomes [MASK] with probability t.

        q(x_t^k | x_0^k) = α_t 1[x_t^k = x_0^k] + (1 - α_t) 1[x_t^k = mask],    α_t = 1 - t

    Returns xt (B, L) int64 and masked (B, L) bool, True = hidden. It draws B*L uniforms from `generator` alone.
    AssertionError if the shapes do not fit. Source: Sec. 2 of the paper; LLaDA (arXiv 2502.09992).
    """
    assert x0.ndim == 2 and t.shape == x0.shape[:1] and is_prompt.shape == x0.shape

    u = draw_uniform(x0.shape, generator, x0.device)  # (B, L)
    masked = (u < t[:, None]) & ~is_prompt  # (B, L)
    return torch.where(masked, mask_id, x0), masked


def sample_t(n, generator, device=None, low=1e-3, high=1.0):
    """Draw n noise levels t ~ U[low, high): (n,). The floor bounds the weight 1/t of the loss."""
    return draw_uniform((n,), generator, device) * (high - low) + low


def draw_uniform(shape, generator, device):
    """Uniform numbers in [0, 1), drawn where the generator lives, so that a seed means the same on CPU and GPU."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


# %% 3. Logits of a noised text — Sec. 2: the network is p_θ(x_0 | x_t)
@functools.singledispatch
def logits_at(
    model,
    ids,  # (B, L) the noised text
    where,  # (B, L) True = selected, N positions in all
    attention_mask=None,  # (B, L) True = real token, False = padding; None = all are real
    **inputs,  # whatever else this model takes, such as position ids
):
    """Logits of p_θ(x_0^k | x_t) at the positions `where` alone, row by row: (B, L) -> (N, V).

    The function dispatches on the type of the model: a kind of model that can leave out the other positions
    registers a body that does so.
    """
    return model(ids, attention_mask=attention_mask, **inputs).logits[where]


# %% 4. Masked SFT loss — Sec. 2 and 3.3
Metrics = dict[str, Tensor]  # figures to log, by name


def over(count, figures):
    """Figures that are means over so many tokens, with that number, so that those of several micro-batches add up."""
    return {name: (value, count) for name, value in figures.items()}


def cross_entropies(logits, target):
    """-log p of each target, and True where it is the likeliest token: (N, V), (N,) -> (N,) float32, (N,) bool."""
    ce = F.cross_entropy(logits.float(), target, reduction="none")
    return ce, logits.argmax(-1) == target


@functools.singledispatch
def token_losses(
    model,
    xt,  # (B, L) the noised text
    where,  # (B, L) True = selected, N positions in all
    target,  # (N,) the clean tokens at these positions
):
    """`cross_entropies` of the tokens at `where`, given the noised text: (N,) float32, (N,) bool.

    It dispatches on the type of the model: one with too many logits to be held at once makes them in pieces.
    """
    return cross_entropies(logits_at(model, xt, where), target)


def nelbo_weight(masked, t):
    """The weight of each token in Eq. (1): 1/t where x_t is [MASK], else 0. masked (B, L), t (B,) -> (B, L)."""
    return torch.where(masked, (1 / t)[:, None], 0.0)  # 1/t is -α'_t / (1 - α_t)


def nelbo(
    ce: Tensor,  # (N,) -log p_θ(x_0^k | x_t) of the tokens with x_t^k = mask, from `token_losses`
    weight: Tensor,  # (N,) their 1/t, from `nelbo_weight`, which is 0 elsewhere
    is_prompt: Tensor,  # (B, L) True = prompt
) -> Tensor:
    """One-sample estimate of an upper bound on -log p(x_0 | prompt) per reply token, in nats.   d1 Eq. (1), Sec. 2

        L(θ) = - E_{t ~ U(0,1), x_t ~ q} [ 1/t  Σ_k 1[x_t^k = mask] log p_θ(x_0^k | x_t) ]

    The sum over the masked tokens of B rows is divided by the number of their reply tokens. Returns a scalar. Nothing
    is drawn here: the expectation is over the t and the x_t that Algorithm 2 draws for each row.
    """
    # [D21] paper: Algorithm 2 divides a row by its own |r_0|. official, and here: all rows are divided by all reply
    #       tokens, EOS padding included, so that a row counts by its number of tokens after the prompt.
    n_reply = (~is_prompt).sum().clamp(min=1)
    return (ce * weight).sum() / n_reply


def masked_figures(
    ce,  # (N,)
    right,  # (N,) True = the target is the likeliest token
    masked,  # (N,) True = the token was masked; the figures leave out the others
):
    """What is logged of masked tokens: "ce", mean cross-entropy in nats, and "accuracy", the share of right ones."""
    n = masked.sum().clamp(min=1)
    return {"ce": (ce.detach() * masked).sum() / n, "accuracy": (right & masked).sum() / n}


def masked_nelbo(
    logits: Tensor,  # (B, L, V) of p_θ(. | x_t)
    x0: Tensor,  # (B, L) int64
    masked: Tensor,  # (B, L) True where x_t is [MASK]
    t: Tensor,  # (B,) in (0, 1]
    is_prompt: Tensor,  # (B, L) True = prompt
) -> tuple[Tensor, Metrics]:
    """`nelbo` from the logits of all positions, with its `masked_figures`, for use in a notebook: (loss, metrics).

    Training asks `token_losses` for the masked positions alone. AssertionError if the shapes do not fit.
    """
    assert logits.shape[:2] == x0.shape == masked.shape == is_prompt.shape
    assert t.shape == x0.shape[:1]

    ce, right = cross_entropies(logits[masked], x0[masked])  # (N,) each
    loss = nelbo(ce, nelbo_weight(masked, t)[masked], is_prompt)
    return loss, masked_figures(ce, right, torch.ones_like(right))


# %% 5. MaskedSFT — Sec. 3.3, Algorithm 2
class Noised(NamedTuple):
    """A batch of Algorithm 2 after its line 3, (B, L) each."""

    x0: Tensor  # clean ids: p_0 and r_0, one after the other
    xt: Tensor  # noised ids: p_0 and r_t
    masked: Tensor  # True where xt is [MASK]
    weight: Tensor  # of the token in Eq. (1); 0 = its loss is not computed
    is_prompt: Tensor  # True = p_0


class MaskedSFT:
    """Stage 1: masked supervised fine-tuning.   d1 Algorithm 2, Sec. 3.3

        repeat:  (p_0, r_0) ~ data;  t ~ U(0, 1)                          line 2
                 r_t ~ q(r_t | r_0), the reply alone                      line 3
                 L(θ) by Eq. (1), Σ_k over the reply [D21]                line 4
                 θ ← θ - η ∇L(θ)                                          line 5

    rows: (ids, prompt_len) pairs, padded with EOS, which is trained, as in LLaDA; 1 % is held out, if none is given.
    cfg: the settings: seed, lr_sft, wd_sft, clip_sft, steps_sft, bs_sft (rows of an update), rows_sft (rows of a
    micro-batch), sft_length, t_low, t_high, warmup_sft, schedule, and those of `Trainer`, which trains a stage.
    Trainer.run calls next(updates) and then adds 1 to `step`. Its descend(loss_of, parts) calls loss_of(net, part) for
    each micro-batch, adds up the gradients and makes one AdamW step.
    Streams [D3]: "sft_heldout" the rows held out, "sft_order" the order of the others, "sft_mask" the noise of an
    update, "sft_check" that of the held-out check, "dropout".
    """

    name = "sft"

    def __init__(self, model, rows, cfg, *, mask_id, eos_id, heldout=None):
        self.model, self.cfg = model, cfg
        self.mask_id, self.eos_id = mask_id, eos_id
        self.lr, self.wd, self.grad_clip = cfg.lr_sft, cfg.wd_sft, cfg.clip_sft
        self.step, self.total = 0, cfg.steps_sft  # updates so far, those left out included, and in all
        self.check_first = False  # no held-out check before the first update

        if heldout is None:
            order = visits(cfg.seed, "sft_heldout", 0, len(rows), len(rows))
            n_heldout = max(1, len(rows) // 100)
            heldout = [rows[i] for i in order[:n_heldout]]
            rows = [rows[i] for i in order[n_heldout:]]
        self.heldout, self.rows = heldout, rows or heldout

    def updates(self, trainer):
        """Algorithm 2: an iterator that makes one update at a time and yields its figures, without an end."""
        cfg = self.cfg
        while True:  # line 1
            rows = [self.rows[i] for i in self.row_indices()]  # line 2: (p_0, r_0) ~ data
            loss_of = self.make_loss(rows, trainer, "sft_mask", self.step, training=True)  # line 2: t; line 3

            trainer.net.train()
            parts = trainer.share_of(cfg.bs_sft, cfg.rows_sft)
            figures = trainer.descend(loss_of, parts)  # lines 4 and 5
            yield {**figures, "lr": self.rate()}  # Trainer.run adds 1 to self.step

    def make_loss(self, rows, trainer, *key, training):
        """Draw t and r_t for a batch of rows, from the stream `key`, and give line 4 as a function of its parts.

        Returns loss_of(net, part) -> (loss, figures) for slices of the rows. In one process the losses of the parts add
        up to Eq. (1) of the batch. With several it is the mean over processes of their sums.
        """
        cfg, generator = self.cfg, keyed_generator(self.cfg.seed, *key)
        clean, prompt_part = self.collate(rows, self.row_length(generator))  # (B, L) each: p_0 + r_0
        t = sample_t(len(clean), generator, low=cfg.t_low, high=cfg.t_high)  # (B,)  line 2: t ~ U(0, 1)
        noised = self.noise(clean, t, prompt_part, generator, training)  # line 3: r_t ~ q(r_t | r_0)
        n_reply = (~noised.is_prompt).sum().clamp(min=1)
        world = trainer.world if training else 1  # processes share the parts, and average their gradients

        def loss_of(net, part=slice(None)):
            x0, xt, masked, weight, is_prompt = (v[part].to(trainer.device) for v in noised)
            where = weight > 0  # (B, L) as `masked`, unless a subclass weighs other tokens too
            with seeded_dropout(trainer.device, cfg.seed, "dropout", *key, part.start):
                ce, right = token_losses(net, xt, where, x0[where])  # (N,) each

            # `nelbo` is a mean over the reply tokens of this part, which are a share of those of the batch
            share = (~noised.is_prompt[part]).sum() / n_reply
            value = nelbo(ce, weight[where], is_prompt) * (share.item() * world)  # line 4: Eq. (1)
            return value, over(masked.sum(), masked_figures(ce, right, masked[where]))

        return loss_of

    def noise(self, x0, t, is_prompt, generator, training):
        """Line 3: the forward process of Sec. 2 on the replies, and the weights that Eq. (1) gives to its masks.

        training is False in the held-out check. A subclass may change x_t and the weights.
        """
        xt, masked = forward_process(x0, t, is_prompt, self.mask_id, generator)
        return Noised(x0, xt, masked, nelbo_weight(masked, t), is_prompt)

    def row_length(self, generator):
        """How many tokens the rows of this batch have, L. A subclass may draw it."""
        return self.cfg.sft_length

    def collate(self, rows, length):
        """x0 (B, L), cut or padded with EOS, and is_prompt (B, L)."""
        x0 = torch.full((len(rows), length), self.eos_id)
        is_prompt = torch.zeros_like(x0, dtype=torch.bool)
        for i, (ids, prompt_len) in enumerate(rows):
            x0[i, : len(ids)] = torch.as_tensor(ids[:length])
            is_prompt[i, :prompt_len] = True
        return x0, is_prompt

    @torch.no_grad()
    def check(self, trainer):
        """The held-out loss, with the same noise at every check: a mean over slices, weighted by their rows."""
        trainer.net.eval()
        size, total = self.cfg.rows_sft, 0.0
        for number, first in enumerate(range(0, len(self.heldout), size)):
            rows = self.heldout[first : first + size]
            loss_of = self.make_loss(rows, trainer, "sft_check", number, training=False)
            with trainer.backend.micro_batch(trainer.net, last=True):
                value, _ = loss_of(trainer.net)
            total += value.item() * len(rows)
        return {"heldout_loss": total / len(self.heldout)}

    def rate(self):
        """Learning rate of the current update: a linear warm-up times a line or half a cosine down to 0."""
        warm = min(1.0, (self.step + 1) / max(self.cfg.warmup_sft, 1))
        done = self.step / self.total
        if self.cfg.schedule == "cosine":
            return self.lr * warm * ((1 + math.cos(math.pi * done)) / 2)
        return self.lr * warm * (1 - done)

    def row_indices(self):
        """Which rows are in the batch of the current update."""
        size = self.cfg.bs_sft
        return visits(self.cfg.seed, "sft_order", self.step * size, size, len(self.rows))

    def batch_name(self, trainer):
        """What an error message calls the current batch."""
        return f"SFT rows {self.row_indices()}"


# %% 6. One-step estimator — Sec. 3.1
def one_step_logp(
    model,
    prompt: Tensor,  # (B, P), left-padded
    completion: Tensor,  # (B, C)
    prompt_mask: Tensor,  # (B, P) True = masked in q'
    mask_id: int,
    attention_mask: Tensor | None = None,  # (B, P) or (B, P+C) True = real token; None = all are real
    cfg_scale: float = 0.0,  # classifier-free guidance; training does without
    completion_mask: Tensor | None = None,  # (B, C) True = asked for, the others get 0; None = all are asked for
) -> Tensor:
    """log φ(o^k | q') for every completion token from one forward pass.   d1 Sec. 3.1

        φ(o^k | q') = p_θ(o^k | q' + [MASK]...[MASK]),   q' = the prompt with `prompt_mask` masked,
        log π(o | q) ≈ Σ_k log φ(o^k | q')               (mean-field: the tokens are independent, given q')

    Returns (B, C) float32, in nats. It is exact for completions of one token with nothing hidden, and biased otherwise,
    since token k sees none of the other tokens. Nothing is drawn: the old, the reference and the new policy share a
    mask by sharing `prompt_mask` [D3]. AssertionError if the shapes do not fit.
    """
    assert prompt_mask.shape == prompt.shape and len(completion) == len(prompt)
    plen, clen = prompt.shape[1], completion.shape[1]
    if completion_mask is None:
        completion_mask = torch.ones_like(completion, dtype=torch.bool)
    if attention_mask is not None:
        attention_mask = extend_mask(attention_mask, plen + clen)  # (B, P+C)

    masked_prompt = torch.where(prompt_mask, mask_id, prompt)  # (B, P)  q'
    canvas = F.pad(masked_prompt, (0, clen), value=mask_id)  # (B, P+C)  q' + [MASK]...[MASK]
    how = dict(mask_id=mask_id, cfg_scale=cfg_scale)
    logits, place = completion_logits(model, canvas, attention_mask, completion_mask, **how)  # (N, V), (B, C)

    # logits[place[b, k]] are those for token k of completion b, and log φ(o^k | q') is their log-softmax at o^k
    logp = logits[place, completion] - logits.logsumexp(-1)[place]  # (B, C)
    return torch.where(completion_mask, logp, 0.0)


def completion_logits(
    model,
    canvas,  # (B, P+C)
    attention_mask,  # (B, P+C) True = real token
    completion_mask,  # (B, C) True = asked for
    *,
    mask_id,
    cfg_scale,
):
    """Logits of p_θ(. | canvas) for the tokens of completions, (N, V), and which of the N a token has, (B, C).

    The number of a token that is not asked for has no meaning. Rows with the same canvas, such as the completions of a
    prompt under one prompt mask, are one row of the model, since φ does not depend on o: B rows become U.
    """
    rows, (length, clen) = canvas, (canvas.shape[1], completion_mask.shape[1])
    if attention_mask is not None:
        rows = torch.cat([canvas, attention_mask.long()], dim=1)  # equal tokens with other padding are two rows
    distinct, row_of = rows.unique(dim=0, return_inverse=True)  # (U, P+C or twice as many), (B,)
    if attention_mask is not None:
        attention_mask = distinct[:, length:].bool()  # (U, P+C)

    n_asked = completion_mask.new_zeros(len(distinct), clen, dtype=torch.long)
    n_asked = n_asked.index_add(0, row_of, completion_mask.long())  # (U, C) by how many rows of the batch
    where = F.pad(n_asked > 0, (length - clen, 0))  # (U, P+C)

    guided = dict(prompt_length=length - clen, mask_id=mask_id, cfg_scale=cfg_scale)
    logits = guided_logits(model, distinct[:, :length], where, attention_mask, **guided)  # (N, V)
    number = (n_asked > 0).flatten().cumsum(0) - 1  # (U*C,) of the logits, which come row by row
    return logits.float(), number.view_as(n_asked)[row_of]


def guided_logits(
    model,
    ids,  # (B, L) the noised text
    where,  # (B, L) True = selected, N positions in all
    attention_mask,  # (B, L) True = real token
    *,
    prompt_length,  # the first tokens of a row, which the unconditional pass does not see
    mask_id,
    cfg_scale,
):
    """`logits_at` with classifier-free guidance, as LLaDA's decoder has it. It is the plain call if cfg_scale is 0.

        l = l_uncond + (cfg_scale + 1) (l_cond - l_uncond)

    Returns (N, V).
    """
    if cfg_scale == 0.0:
        return logits_at(model, ids, where, attention_mask)

    no_prompt = ids.clone()  # (B, L)
    no_prompt[:, :prompt_length] = mask_id
    twice = None if attention_mask is None else attention_mask.repeat(2, 1)  # (2B, L)
    both = logits_at(model, torch.cat([ids, no_prompt]), where.repeat(2, 1), twice)  # (2N, V)

    conditional, unconditional = both.chunk(2)  # (N, V) each
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def extend_mask(attention_mask, length):
    """An attention mask of the prompt, made as long as prompt and completion: (B, P) or longer -> (B, length)."""
    missing = length - attention_mask.shape[1]
    return F.pad(attention_mask.bool(), (0, missing), value=True)  # every token of a completion is real


def draw_prompt_mask(attention_mask, pmask, generator):
    """Draw which prompt tokens q' hides: each real one with probability p_mask. (..., P) -> (..., P)."""
    u = draw_uniform(attention_mask.shape, generator, attention_mask.device)  # (..., P)
    return (u < pmask) & attention_mask


# %% 7. diffu-GRPO — Sec. 3.2, Eqs. (2) to (4)
def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Advantage of each completion over its group.   d1 Eq. (2), Sec. 2

        A_i = r_i - mean(r_1, ..., r_G)               (no division by the standard deviation)

    rewards (B,), the G completions of a prompt adjacent. Returns (B,) float32, in the unit of the rewards, exactly 0 in
    a group whose rewards are equal. ValueError if B is no multiple of G.
    """
    if len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards cannot be split into groups of {group}")
    r = rewards.double().view(-1, group)  # (B/G, G)
    above = r - r[:, :1]  # the first reward, as any constant, drops out of A; equal rewards then leave no rounding
    return (above - above.mean(1, keepdim=True)).flatten().float()


def live_tokens(completion: Tensor, eos_id: int) -> Tensor:
    """True up to and with the first EOS: what follows it is padding. completion (B, C) int64 -> (B, C) bool."""
    is_eos = (completion == eos_id).long()  # (B, C)
    return is_eos.cumsum(1) - is_eos == 0


MAX_LOG_RATIO = 30.0  # exp of more than 88 is infinite, and infinity times a gradient of 0 is NaN


def ratio(logp, other):
    """exp(logp - other) of each token, (B, C), which no longer grows from e^30 on."""
    return (logp - other).clamp(max=MAX_LOG_RATIO).exp()


def token_objective(
    logp,  # (B, C) in nats
    logp_old,  # (B, C); None = logp itself, so that ρ is 1, with gradient
    advantages,  # (B,)
    eps,
):
    """The clipped surrogate of one token, which GRPO averages (its KL term: `diffu_grpo_loss`).   d1 Eq. (3), Sec. 2

        min( ρ A, clip(ρ, 1-ε, 1+ε) A ),     ρ = π_θ(o^k) / π_old(o^k)

    GRPO's π is conditioned on q and the tokens before k; here it is φ(o^k | q'). Returns the objective (B, C) and
    where it is clipped (B, C).
    """
    old = logp.detach() if logp_old is None else logp_old
    rho = ratio(logp, old)  # (B, C)

    unclipped = rho * advantages[:, None]  # (B, C)
    clipped = rho.clamp(1 - eps, 1 + eps) * advantages[:, None]  # (B, C)
    return torch.min(unclipped, clipped), clipped < unclipped


def diffu_grpo_loss(
    logp: Tensor,  # (B, C) in nats, from `one_step_logp`, as are the next two, on the same q'
    logp_old: Tensor | None,  # (B, C); None: ρ is 1, with gradient
    logp_ref: Tensor | None,  # (B, C); None: there is no KL term
    advantages: Tensor,  # (B,)
    completion_mask: Tensor,  # (B, C) True = the token counts
    *,
    eps: float = 0.5,
    beta: float = 0.04,
    norm: str = "sequence",  # the formula's mean within a completion first; "token" = one mean over all live tokens
) -> tuple[Tensor, Metrics]:
    """The diffu-GRPO objective, negated: minimise it.   d1 Eq. (4), Sec. 3.2

        J(θ) = E[ 1/G Σ_i 1/|o_i| Σ_k min( ρ_i^k A_i, clip(ρ_i^k, 1-ε, 1+ε) A_i ) ] - β KL(φ_θ || φ_ref),
        ρ_i^k = φ_θ(o_i^k | q') / φ_old(o_i^k | q'),
        KL ≈ exp(d) - d - 1 ≥ 0,   d = log φ_ref - log φ_θ      (k3, for each token, averaged as the others)

    Returns (loss, metrics): "kl" in nats a token, "clip_frac" and "ratio_max", over live tokens. Nothing is drawn.
    ValueError on another norm.
    """
    assert logp.shape == completion_mask.shape and advantages.shape == logp.shape[:1]
    surrogate, clipped = token_objective(logp, logp_old, advantages, eps)  # (B, C) each

    kl = torch.zeros_like(logp)  # (B, C)
    if logp_ref is not None and beta != 0:
        d = logp_ref - logp  # (B, C)
        kl = ratio(logp_ref, logp) - d - 1
    token_loss = beta * kl - surrogate  # (B, C)

    # [D1] official: one mean over the live tokens of a micro-batch (diffu_grpo_trainer.py:121), so that long replies
    #      weigh more. here: `norm`, and what is a mean over tokens is one over all those of an update.
    n_live = completion_mask.sum().clamp(min=1)
    if norm == "sequence":
        lengths = completion_mask.sum(1).clamp(min=1)  # (B,)  |o_i|
        loss = ((token_loss * completion_mask).sum(1) / lengths).mean()
    elif norm == "token":
        loss = (token_loss * completion_mask).sum() / n_live
    else:
        raise ValueError(f"norm must be 'sequence' or 'token', not {norm!r}")

    with torch.no_grad():
        rho = torch.ones_like(logp) if logp_old is None else ratio(logp, logp_old)
        metrics = {
            "kl": (kl * completion_mask).sum() / n_live,
            "clip_frac": (clipped & completion_mask).sum() / n_live,
            "ratio_max": torch.where(completion_mask, rho, 0.0).max(),
        }
    return loss, metrics


# %% 8. Block decoder — semi-autoregressive denoising with remasking (LLaDA; Sec. 4 evaluation)
REMASKING = ("low_confidence", "random", "ancestral")  # which tokens a denoising step writes


@dataclasses.dataclass(frozen=True)
class Frame:
    """The canvas after one denoising step."""

    ids: Tensor  # (B, P+C) token ids, [MASK] where nothing is written yet
    new: Tensor  # (B, P+C) bool, True = written by this step
    logp: Tensor  # (B, P+C) log-probability of the new tokens when they were written, else 0
    block: int  # number of the block
    step: int  # number of the step within the block


@dataclasses.dataclass
class BlockDecoder:
    """One decoding: denoise block by block, from left to right. `frames` yields one Frame a step.

        for each block, for s = steps that are left = steps of a block, ..., 2, 1:
            x̂^k ~ p_θ(x^k | x)^(1/T)   for the n masked k of the block
            x^k ← x̂^k                  for the ⌈n / s⌉ of them with the highest p_θ(x̂^k | x)

    Up to rounding, a greedy decoding of a prompt gives the same tokens alone and in a left-padded batch [D4], and so
    does a random one whose row has the same generator. Random numbers come from `generator` alone: one torch.Generator,
    from which a seed for each row is drawn, or a list with one for each row. ValueError on options that do not go
    together.

    A subclass may begin with another text (`canvas`), get its logits in another way (`read`, `seen`), take other steps
    (`goes_on`) and change what they leave (`revise`). Source: Sec. 4 of the paper, and LLaDA's generate.py.
    """

    model: Any
    prompt: Tensor  # (B, P), left-padded
    mask_id: int
    attention_mask: Tensor | None = None  # (B, P) True = real token, None = all are real
    gen_length: int = 256  # C, tokens of the completion
    block_length: int = 32  # K, tokens of a block
    steps: int | None = None  # in all, rounded down to as many a block; None = gen_length / 2, two tokens a step
    temperature: float = 0.0  # T; 0 = greedy
    cfg_scale: float = 0.0  # of `guided_logits`
    remasking: str = "low_confidence"  # which are written: the likeliest, random ones, or each with probability 1/s
    threshold: float | None = None  # write all tokens that are likelier than it, in fewer steps: approximate
    eos_id: int | None = None
    stop_at_eos: bool = False  # a row is finished after a block with EOS; tokens up to the EOS are not affected
    stop: Callable[[Tensor], bool] | None = None  # of a completion so far (C,): True = the row is finished
    generator: Any = None

    def __post_init__(self):
        self.check()
        rows, self.prompt_length = self.prompt.shape
        self.length = self.prompt_length + self.gen_length

        # [D4] official attends to left padding (diffu_grpo_trainer.py:396), which changes replies. here: never.
        if self.attention_mask is not None:
            self.attention_mask = extend_mask(self.attention_mask, self.length)  # (B, P+C)

        steps = self.gen_length // 2 if self.steps is None else self.steps
        self.steps_per_block = max(1, steps // (self.gen_length // self.block_length))
        self.never = [self.mask_id]  # token ids that no step writes

        self.generators = [None] * rows
        if self.temperature or self.remasking != "low_confidence":
            self.generators = row_generators(self.generator, rows)

    @torch.no_grad()
    def frames(self):
        """Denoise to the end: one Frame per step, and a last one if rows were finished early."""
        x = self.canvas()  # (B, P+C)
        active = torch.ones(len(x), dtype=torch.bool, device=x.device)  # (B,) True = the row is not finished

        for number, block in enumerate(self.blocks()):
            for step in itertools.count():
                masked = (x[:, block] == self.mask_id) & active[:, None]  # (B, K)
                if not self.goes_on(masked, active, step):
                    break

                logits = self.read(x, masked, block)  # (N, V) of the N masked positions
                token, logp = self.draw(logits, masked)  # (B, K) each: x̂^k ~ p_θ(x^k | x)^(1/T)
                chosen = self.choose(logp, masked, step)  # (B, K) the ⌈n / s⌉ with the highest p_θ(x̂^k | x)

                new = on_canvas(chosen, block, self.length)  # (B, P+C)
                x = torch.where(new, on_canvas(token, block, self.length), x)
                new_logp = torch.where(new, on_canvas(logp, block, self.length), 0.0)
                frame = Frame(x, new, new_logp, number, step)
                frame = self.revise(frame, masked, block)
                x = frame.ids
                yield frame

            active = active & ~self.ended(x, block)
            if not active.any():
                break

        unwritten = x == self.mask_id  # (B, P+C) of rows that were finished early
        unwritten[:, : self.prompt_length] = False
        if unwritten.any():
            ids = torch.where(unwritten, self.eos_id, x)
            no_logp = torch.zeros(x.shape, device=x.device)
            yield Frame(ids, unwritten, no_logp, len(self.blocks()) - 1, self.steps_per_block)

    def canvas(self):
        """The text to begin with, q + [MASK]...[MASK]: (B, P+C)."""
        return F.pad(self.prompt, (0, self.gen_length), value=self.mask_id)

    def blocks(self):
        """The places of the blocks on the canvas, from left to right."""
        size = self.block_length
        return [slice(first, first + size) for first in range(self.prompt_length, self.length, size)]

    def goes_on(self, masked, active, step):
        """Whether the block needs another step: as long as anything of it is masked. masked (B, K), active (B,)."""
        return bool(masked.any())

    def read(self, x, masked, block):
        """Logits at the N masked positions (B, K) of the block of x (B, P+C): (N, V) float32.

        A row that has none, since it is finished or ahead of the others, is not computed.
        """
        open_rows, seen = masked.any(1), self.seen(block)  # (B,)
        where = on_canvas(masked, block, self.length)  # (B, P+C)

        attention_mask = None if self.attention_mask is None else self.attention_mask[open_rows, seen]
        logits = guided_logits(
            self.model,
            x[open_rows, seen],
            where[open_rows, seen],
            attention_mask,
            prompt_length=max(0, self.prompt_length - seen.start),  # of what is seen
            mask_id=self.mask_id,
            cfg_scale=self.cfg_scale,
        )
        return logits.float()

    def seen(self, block):
        """Which part of the canvas the model is shown while the block is written: all of it."""
        return slice(0, self.length)

    def draw(self, logits, masked):
        """A token x̂ for each masked position, and log p_θ(x̂ | x): (N, V), (B, K) -> (B, K) int64, (B, K) nats.

        Elsewhere the token is 0 and its log-probability -inf.
        """
        # [D17] a predicted [MASK] stays masked in the official decoder. here: it is never drawn, but stays in the
        #       softmax of the confidence, so that the greedy order is the official one.
        never = torch.tensor(self.never, device=logits.device)
        allowed = logits.index_fill(-1, never, -math.inf)
        counts = masked.sum(1).tolist()
        token = sample_tokens(allowed, self.temperature, counts, self.generators)  # (N,)
        logp = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)  # (N,)

        ids = torch.zeros_like(masked, dtype=torch.long)
        nowhere = torch.full(masked.shape, -math.inf, device=masked.device)
        return ids.masked_scatter(masked, token), nowhere.masked_scatter(masked, logp)

    def choose(self, logp, masked, step):
        """Which masked positions keep the token that was drawn for them: (B, K) nats, (B, K) -> (B, K).

        It is an even share of the steps that are left, or all tokens above the threshold.
        """
        steps_left = max(self.steps_per_block - step, 1)  # s
        counts = masked.sum(1)  # (B,)  n
        score = torch.where(masked, logp.exp(), -math.inf)  # (B, K) the largest go first
        if self.remasking != "low_confidence":
            score[masked] = uniform_by_row(counts.tolist(), self.generators, logp.device)

        if self.remasking == "ancestral":  # the reverse process, from t to t - 1/S of S steps in all: (1/S) / t = 1/s
            return (score > 1 - 1 / steps_left) & masked
        if self.threshold is None:
            return largest(score, -(-counts // steps_left)) & masked  # ⌈n / s⌉
        best = largest(score, torch.ones_like(counts))  # so that every step writes something
        return ((score > self.threshold) | best) & masked

    def revise(self, frame, masked, block):
        """A last change to what the step leaves. There is none here."""
        return frame

    def ended(self, x, block):
        """Which rows are finished with this block. The rest of them becomes EOS at the end: (B, P+C) -> (B,)."""
        ended = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if self.stop_at_eos:
            ended |= (x[:, block] == self.eos_id).any(1)
        if self.stop:
            completions = x[:, self.prompt_length : block.stop]
            ended |= torch.tensor([bool(self.stop(row)) for row in completions], device=x.device)
        return ended

    def check(self):
        """Raise ValueError with one clear line if these options do not go together."""
        if self.gen_length < 1 or self.block_length < 1 or self.gen_length % self.block_length:
            raise ValueError(
                f"gen_length {self.gen_length} must be a positive multiple of block_length {self.block_length}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

        if self.remasking not in REMASKING:
            known = " or ".join(map(repr, REMASKING))
            raise ValueError(f"remasking must be {known}, not {self.remasking!r}")
        if self.threshold is not None and self.remasking != "low_confidence":
            raise ValueError(f"threshold needs remasking='low_confidence', not {self.remasking!r}")
        if (self.stop_at_eos or self.stop) and self.eos_id is None:
            raise ValueError("stop_at_eos and stop need eos_id")


def diffuse_steps(model, prompt, *, decoder=BlockDecoder, **options) -> Iterator[Frame]:
    """Denoise block by block: an iterator of one Frame a step. The options are the fields of the decoder."""
    return decoder(model, prompt, **options).frames()


def diffuse_decode(model, prompt, **options):
    """Write a completion for each prompt: `diffuse_steps` to its end, with the same options. Returns ids (B, P+C)."""
    for frame in diffuse_steps(model, prompt, **options):
        ids = frame.ids
    return ids


def sample_tokens(logits, temperature, counts, generators):
    """One token for each position: the likeliest, or a sample of softmax(logits / T) by Gumbel-max.

    logits (N, V) float32, the rows' positions one after another, counts[i] of them for row i. Returns (N,) int64.
    It draws counts[i] * V uniforms from generators[i].
    """
    if temperature == 0:
        return logits.argmax(-1)
    # [D5] official's bf16 noise favours likely tokens (diffu_grpo_trainer.py:165). here: uniforms in float64.
    vocabulary = logits.shape[-1]
    u = uniform_by_row(counts, generators, logits.device, vocabulary, dtype=torch.float64)  # (N, V)
    minus_gumbel = u.log_().neg_().float().log_()  # (N, V)
    return (logits / temperature - minus_gumbel).argmax(-1)


def uniform_by_row(counts, generators, device, *width, dtype=None):
    """counts[i] uniform numbers, or rows of `width` of them, from generators[i], one row after another."""
    drawn = [
        torch.rand(n, *width, generator=g, device=g.device, dtype=dtype)
        for n, g in zip(counts, generators, strict=True)
    ]
    return torch.cat(drawn).to(device)


def row_generators(generator, rows):
    """One generator a row: the sequence that is given, or `rows` new ones, seeded by draws from the one given."""
    if generator is None:
        raise ValueError("temperature > 0 and random or ancestral remasking need generator=torch.Generator()")
    if not isinstance(generator, Generator):
        return list(generator)
    seeds = torch.randint(2**62, (rows,), generator=generator, device=generator.device)
    return [Generator(generator.device).manual_seed(seed) for seed in seeds.tolist()]


def largest(score, number):
    """True at the number[i] largest scores of row i. (B, K), (B,) -> (B, K) bool."""
    most = int(number.max().clamp(max=score.shape[1]))
    top = score.topk(most, dim=1).indices  # (B, most)
    among = torch.arange(most, device=score.device) < number[:, None]  # (B, most)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, top, among)


def on_canvas(values, block, length):
    """Values of a block (B, K) as values of the canvas (B, length), 0 or False outside of the block."""
    return F.pad(values, (block.start, length - block.stop))


# %% 9. DiffuGRPO — Sec. 3.2, Algorithm 1
@dataclasses.dataclass
class Rollout:
    """One drawn micro-batch: B completions, the G of a prompt adjacent, and the μ prompt masks for it."""

    prompt: Tensor  # (B, P) left-padded
    attention_mask: Tensor  # (B, P) bool, False on padding
    completion: Tensor  # (B, C)
    completion_mask: Tensor  # (B, C) bool, True up to and with the first EOS
    rewards: Tensor  # (B,)
    advantages: Tensor  # (B,)
    figures: dict[str, float]  # the mean of each part of the reward, and what a listener adds
    prompt_masks: Any = None  # (mu, B, P) bool, True = masked in q'
    logp_old: Any = None  # a list of mu tensors (B, C), the first of them None
    logp_ref: Any = None  # a list of mu tensors (B, C), or of None if beta is 0


class DiffuGRPO:
    """Stage 2: policy gradient with one-step log-probabilities.   d1 Algorithm 1, Sec. 3.2

        repeat:  π_old ← π_θ;  q ~ D                                                  lines 3, 4
                 o_1 ... o_G ~ π_old(. | q);  r_i, A_i by Eq. (2)                     lines 5, 6
                 for n = 1 ... μ:                                                     line 7
                     q' ← q with each token masked with probability p_mask            line 8
                     log φ_θ, log φ_old, log φ_ref of o_i given q', by Sec. 3.1       line 9
                     one step up the gradient of Eq. (4)                              line 10

    prompts: token ids, one list a problem.
    reward(completions (B, C), indices of their B problems) -> one {name: value} a completion; the values are summed.
    cfg: the settings: seed, lr_rl, wd_rl, clip_rl, steps_rl, bs_rl, grad_accum, group, mu, pmask, eps, beta, norm,
        gen_length, block_length, diffusion_steps, temperature, remasking, and those of `Trainer`, which trains a stage.
    reference() opens a context with π_ref; None = a frozen copy of the model as it comes.
    decode: `diffuse_decode` or a function like it.
    heldout(model) -> score chooses the best weights; None = the last are kept.
    mask_group: completions that share a prompt mask; None = the G of a prompt.
    Streams [D3]: "rl_order" an epoch's order of problems; "rollout" the tokens of a row, by its number in the whole
    run; "hide" the prompt masks of a mask_group.
    """

    name = "diffu_grpo"

    def __init__(
        self,
        model,
        prompts,
        reward,
        cfg,
        *,
        mask_id,
        eos_id,
        reference=None,
        decode=diffuse_decode,
        heldout=None,
        mask_group=None,
    ):
        self.model, self.prompts, self.reward, self.cfg = model, prompts, reward, cfg
        self.mask_id, self.eos_id = mask_id, eos_id
        self.decode, self.heldout = decode, heldout
        self.mask_group = mask_group or cfg.group

        # line 1: π_θ ← π_ref. Here π_ref is made of the π_θ that comes.
        # [D8] official's reference sync does nothing under LoRA. here: π_ref is the frozen start of stage 2.
        self.reference = reference or frozen_copy(model)
        # [D6] official leaves LoRA dropout on in every pass. here: off, so the first ratio is exactly 1, and φ_old of
        #      the first inner update, which is φ_θ, need not be computed.
        without_dropout(model)

        self.lr, self.wd, self.grad_clip = cfg.lr_rl, cfg.wd_rl, cfg.clip_rl
        self.step, self.total = 0, cfg.steps_rl  # updates so far, those left out included, and in all
        self.check_first = heldout is not None  # of the policy as it came: training must beat it
        self.rollouts = []  # those in use

    def updates(self, trainer):
        """Algorithm 1: an iterator that makes one inner update at a time and yields its figures, without an end.

        A resumed run begins in the middle, with the rollouts that were in use.
        """
        while True:  # line 2
            batch, first = divmod(self.step, self.cfg.mu)
            if first == 0 or not self.rollouts:  # or a resumed run could not use its saved ones
                # line 3: π_old ← π_θ. Nothing is copied: what π_old says of the completions is computed and kept.
                with trainer.backend.whole_weights(self.model):
                    micros = trainer.micro_numbers(batch, self.cfg.grad_accum)
                    # lines 4 to 6, and ahead of time 8, and 9 for π_old and π_ref
                    self.rollouts = [self.roll_out(micro, trainer) for micro in micros]
            parts = list(zip(self.rollouts, self.shares(trainer), strict=True))

            for n in range(first, self.cfg.mu):  # line 7, which counts from 1

                def loss_of(net, part, n=n):
                    rollout, share = part
                    logp = self.logp(net, rollout, rollout.prompt_masks[n])  # line 9: log φ_θ, given the q' of line 8
                    loss, metrics = self.objective(logp, rollout, n)  # line 10: Eq. (4)
                    return loss * share, self.to_log(rollout, logp, metrics)

                without_dropout(trainer.net)  # [D6] again, since a check or a rollout calls eval()
                figures = trainer.descend(loss_of, parts)  # lines 9 and 10: θ ← θ + η ∇J
                yield {**figures, "inner": n}  # Trainer.run adds 1 to self.step

    def shares(self, trainer):
        """How much the mean of each rollout in use is of the mean over the update: one number a rollout."""
        if self.cfg.norm == "sequence":  # all have as many completions
            return [1 / len(self.rollouts)] * len(self.rollouts)
        n_live = [rollout.completion_mask.sum().item() for rollout in self.rollouts]
        total = sum(trainer.backend.gather(n_live))
        return [n / total * trainer.world for n in n_live]  # processes average their gradients

    @torch.no_grad()
    def roll_out(self, micro, trainer):
        """G completions for each prompt of a micro-batch, what they earn, and their φ_old and φ_ref on μ masks."""
        self.model.eval()
        problems = self.problems(micro)  # line 4: q ~ D, each G times
        q = [self.prompts[i] for i in problems]
        prompt, attention_mask = pad_left(q, self.eos_id, trainer.device)  # (B, P) each

        completion = self.sample(prompt, attention_mask, micro)  # (B, C)  line 5: o_1 ... o_G ~ π_old
        completion_mask = live_tokens(completion, self.eos_id)  # (B, C)

        earned = self.reward(completion, problems)
        sums = [sum(terms.values()) for terms in earned]
        rewards = torch.tensor(sums, device=trainer.device)  # (B,)  line 6: r_i
        advantages = group_advantages(rewards, self.cfg.group)  # (B,)  line 6: A_i by Eq. (2)
        means = {f"reward/{k}": sum(terms[k] for terms in earned) / len(earned) for k in earned[0]}

        rollout = Rollout(prompt, attention_mask, completion, completion_mask, rewards, advantages, means)
        rollout.prompt_masks = self.draw_masks(rollout, micro)  # line 8, for all n: φ_old needs them before θ moves
        rollout.logp_old, rollout.logp_ref = self.old_and_reference(rollout)  # line 9: log φ_old, log φ_ref, for all n
        trainer.listener.on_rollout(trainer, rollout)
        return rollout

    def sample(self, prompt, attention_mask, micro):
        """A completion of each prompt, drawn by a stream of its own: (B, P) -> (B, C)."""
        cfg = self.cfg
        streams = [keyed_generator(cfg.seed, "rollout", i) for i in self.row_numbers(micro)]

        ids = self.decode(
            self.model,
            prompt,
            mask_id=self.mask_id,
            attention_mask=attention_mask,
            gen_length=cfg.gen_length,
            block_length=cfg.block_length,
            steps=cfg.diffusion_steps or None,
            temperature=cfg.temperature,
            remasking=cfg.remasking,
            eos_id=self.eos_id,
            stop_at_eos=True,
            generator=streams,
        )
        return ids[:, prompt.shape[1] :]

    def draw_masks(self, rollout, micro):
        """The prompt tokens that q' hides in each of the μ inner updates: (mu, B, P)."""
        # [D2] official masks each completion's prompt anew and, under accumulation, uses half of the masks twice
        #      (diffu_grpo_trainer.py:96, 373). here, as in Eq. (4): mu different q' a prompt, its group shares them.
        cfg = self.cfg
        masks = torch.zeros(cfg.mu, *rollout.attention_mask.shape, dtype=torch.bool)
        for b, i in enumerate(self.row_numbers(micro)):
            length = int(rollout.attention_mask[b].sum())
            generator = keyed_generator(cfg.seed, "hide", i // self.mask_group)
            all_real = torch.ones(cfg.mu, length, dtype=torch.bool)  # drawn without the padding, which others cause
            masks[:, b, -length:] = draw_prompt_mask(all_real, cfg.pmask, generator)
        return masks.to(rollout.prompt.device)

    def old_and_reference(self, rollout):
        """log φ_old and log φ_ref on each of the μ masks: mu of (B, C) each, None where they are not needed."""
        old = [None, *self.logps(self.model, rollout, rollout.prompt_masks[1:])]  # in the first update φ_old is φ_θ
        if not self.cfg.beta:
            return old, [None] * len(old)
        with self.reference() as reference:
            return old, self.logps(reference, rollout, rollout.prompt_masks)

    def logps(self, model, rollout, prompt_masks):
        """`logp` under each of several prompt masks (..., B, P): a list of tensors (B, C)."""
        return [self.logp(model, rollout, prompt_mask) for prompt_mask in prompt_masks]

    def logp(self, model, rollout, prompt_mask):
        """log φ(o | q') of the live tokens by one forward pass, Sec. 3.1: prompt_mask (B, P) -> (B, C)."""
        given = dict(attention_mask=rollout.attention_mask, completion_mask=rollout.completion_mask)
        return one_step_logp(model, rollout.prompt, rollout.completion, prompt_mask, self.mask_id, **given)

    def objective(self, logp, rollout, n):
        """Eq. (4), negated, of a rollout in its n-th inner update, from log φ_θ (B, C)."""
        how = dict(eps=self.cfg.eps, beta=self.cfg.beta, norm=self.cfg.norm)
        old, ref, mask = rollout.logp_old[n], rollout.logp_ref[n], rollout.completion_mask  # (B, C) each
        return diffu_grpo_loss(logp, old, ref, rollout.advantages, mask, **how)

    def to_log(self, rollout, logp, metrics):
        """What is logged of a rollout in an inner update: means over completions, and over tokens."""
        n_live = rollout.completion_mask.sum()
        completions = {
            "reward": rollout.rewards.mean(),
            "length": rollout.completion_mask.sum(1).float().mean(),
            "reward_std": rollout.rewards.view(-1, self.cfg.group).std(1).mean(),  # within a group
            **rollout.figures,
        }
        nll = -(logp.detach() * rollout.completion_mask).sum() / n_live  # of the tokens that π_old drew
        return over(1, completions) | over(n_live, {**metrics, "entropy": nll})

    def check(self, trainer):
        """The score on held-out problems, if there is one."""
        if self.heldout is None:
            return {}
        with trainer.backend.whole_weights(self.model):
            return {"heldout_accuracy": self.heldout(self.model)}

    def rate(self):
        """Learning rate of the current update: constant."""
        return self.lr

    def problems(self, micro):
        """The problem of each row of a micro-batch: bs_rl / G problems, each G times."""
        count = self.cfg.bs_rl // self.cfg.group
        chosen = visits(self.cfg.seed, "rl_order", micro * count, count, len(self.prompts))
        return [i for i in chosen for _ in range(self.cfg.group)]

    def row_numbers(self, micro):
        """The numbers in the whole run of a micro-batch's rows, which key their random streams."""
        return range(micro * self.cfg.bs_rl, (micro + 1) * self.cfg.bs_rl)

    def batch_name(self, trainer):
        """What an error message calls the current batch."""
        batch, n = divmod(self.step, self.cfg.mu)
        micros = trainer.micro_numbers(batch, self.cfg.grad_accum)
        drawn = [self.problems(micro)[:: self.cfg.group] for micro in micros]
        return f"rollout batch {batch}, inner update {n}, problems {drawn}"


def pad_left(rows, pad_id, device=None):
    """Prompts as one batch: ids (B, P) and attention_mask (B, P) bool, False on the padding."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + row for row in rows]
    real = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def without_dropout(model) -> None:
    """Switch dropout off. Gradient checkpointing, which transformers does in training mode only, stays on."""
    model.eval()
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))


def frozen_copy(model):
    """A function that opens a context with the policy as it is now: a frozen copy of all its weights."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return lambda: contextlib.nullcontext(frozen)


# %% 10. The loop that drives both stages — updates, checks, and what is told to whom
class Trainer:
    """Runs a stage to its end: optimizer, micro-batches, held-out checks, and updates that are not finite.

    Trainer(MaskedSFT(model, rows, cfg, mask_id=mask_id, eos_id=eos_id)).run() trains stage 1, and with
    DiffuGRPO(model, prompts, reward, cfg, ...) it is stage 2; any object with their attributes is a stage. Several
    processes and mixed precision come in as `backend`; logs, progress bars and checkpoints as `listener`. It reads of
    the settings: save_steps, patience, max_skips.
    """

    def __init__(self, stage, backend=None, listener=None):
        self.stage, self.model = stage, stage.model
        self.backend = backend or Backend()
        self.listener = listener or Listener()

        def adamw(params):
            return torch.optim.AdamW(params, lr=stage.lr, betas=(0.9, 0.99), weight_decay=stage.wd, fused=True)

        # `net` computes the loss and `model` decodes: they are one object, unless a backend wraps or shards the network
        self.net, self.optimizer = self.backend.prepare(self.model, adamw)
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.device, self.rank, self.world = self.backend.device, self.backend.rank, self.backend.world

        self.owed = stage.check_first  # a held-out check that is due before the next update, as after a stop
        self.best = None  # (score, step, weights)
        self.score, self.stale = math.nan, 0  # the last score; checks in a row without a better one than the best
        self.skipped, self.left_out = 0, ""  # updates left out in a row, and what is said of the last one
        self.sound = True  # this process's losses of the current update are finite

    def run(self):
        """Update until the stage's `total`. Every `save_steps` there is a held-out check and a checkpoint."""
        stage, cfg = self.stage, self.stage.cfg
        self.listener.on_start(self)
        if self.owed:
            self.look()

        updates = stage.updates(self)
        while stage.step < stage.total:
            if 0 < cfg.patience <= self.stale:  # patience 0 means: without end
                break
            began = time.perf_counter()
            figures = next(updates)
            if self.skipped:
                figures = self.leave_out()
            stage.step += 1
            figures["seconds"] = round(time.perf_counter() - began, 4)

            stopped = self.listener.on_step(self, figures)
            due = stage.step == stage.total or stage.step % cfg.save_steps == 0
            if due and not stopped:
                self.look()
            if due or stopped:
                self.owed = due and stopped is not None  # it is made when the run goes on
                self.listener.on_save(self)
            if stopped:
                raise stopped

        self.finish()

    def descend(self, loss_of, parts):
        """One AdamW step down the gradient of Σ loss_of(net, part). Returns the means of what is to be logged.

        loss_of(net, part) -> (loss, figures). Every part is a micro-batch: one forward and one backward pass.
        """
        self.sound, rows = True, []
        for part in parts:
            with self.backend.micro_batch(self.net, last=part is parts[-1]):
                loss, figures = loss_of(self.net, part)
                self.sound = self.sound and bool(torch.isfinite(loss))
                self.backend.backward(loss)
            row = over(1, {"loss": loss.detach() * len(parts)}) | figures  # parts add up, `average` takes their mean
            rows.append({name: (float(value), float(count)) for name, (value, count) in row.items()})

        figures = self.average(rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate()
        norm = self.backend.step(self.optimizer, self.params, self.stage.grad_clip)
        self.skipped = 0 if 0 <= norm < math.inf else self.skipped + 1  # a backend may say -1 of a broken norm
        return {**figures, "grad_norm": norm}

    def average(self, rows):
        """Figures of all micro-batches: the mean over their tokens, none if there are none; the largest "..._max"."""
        rows = self.backend.gather(rows)
        averages = {}
        for name in rows[0]:
            values, counts = zip(*(row[name] for row in rows), strict=True)
            if name.endswith("_max"):
                averages[name] = max(values)
            elif sum(counts):
                averages[name] = sum(map(operator.mul, values, counts)) / sum(counts)
        return averages

    def share_of(self, size, at_once):
        """This process's rows of a batch of `size`, in micro-batches of `at_once` rows."""
        own = size // self.world
        first, end = self.rank * own, (self.rank + 1) * own
        return [slice(i, min(i + at_once, end)) for i in range(first, end, at_once)]

    def micro_numbers(self, batch, count):
        """Which micro-batches of the whole run are this process's in a batch, `count` a process.

        Two processes share what one would do in twice as many micro-batches.
        """
        first = batch * count * self.world + self.rank
        return [first + i * self.world for i in range(count)]

    def look(self):
        """Make the held-out check, remember the weights if they are the best so far, and tell the figures."""
        figures = self.stage.check(self)
        if "heldout_accuracy" in figures:
            # [D18] official picks its best checkpoint on the test set. here: on held-out training problems.
            self.score = figures["heldout_accuracy"]
            best = -math.inf if self.best is None else self.best[0]
            self.stale = 0 if self.score > best else self.stale + 1
            if self.score >= best:  # of equals the last
                weights = [w.cpu().clone() for w in self.backend.weights(self.params)]
                self.best = (self.score, self.stage.step, weights)
        self.listener.on_check(self, figures)
        self.owed = False

    def leave_out(self):
        """Say that this update was not made. NonFiniteLoss if the backend cannot skip it, or after `max_skips`."""
        stage = self.stage
        kept = self.listener.on_skip(self)
        own = stage.batch_name(self)
        names = self.backend.gather([] if self.sound else [own]) or [own]

        text = f"{stage.name} step {stage.step + 1}: no finite loss or gradient on {'; '.join(names)}"
        if kept:
            text += f", kept in {kept}"
        if self.skipped >= stage.cfg.max_skips or not self.backend.can_skip:
            raise NonFiniteLoss(f"{text}. The last checkpoint is kept: --resume --allow_changed "
                                "and a lower learning rate go on from there.")
        self.left_out = text
        return {"skipped": self.skipped}

    @torch.no_grad()
    def finish(self):
        """Leave the weights that scored best on held-out problems in the model, or the last ones without a score."""
        self.listener.on_finish(self)
        if self.best and self.best[1] != self.stage.step:
            for w, best in zip(self.backend.weights(self.params), self.best[2], strict=True):
                w.copy_(best)
        self.backend.finish(self.model)


class Backend:
    """How a stage computes. This one is a single process in the precision of the weights. Others are subclasses."""

    rank, world = 0, 1  # this process, and how many there are
    can_skip = True  # an update whose gradient is not finite can be left out

    def prepare(self, model, make_optimizer):
        """The network as it is trained, and make_optimizer(those of its parameters that are trained)."""
        self.device = next(model.parameters()).device
        return model, make_optimizer([p for p in model.parameters() if p.requires_grad])

    def micro_batch(self, net, last):
        """Context of a pass of `net`. The last backward pass of an update averages the gradient over processes."""
        return contextlib.nullcontext()

    def backward(self, loss):
        """Accumulate the gradient of this process's loss."""
        loss.backward()

    def step(self, optimizer, params, clip):
        """Clip the gradient, step, clear. Returns its norm before clipping; if that is not finite, no step is made."""
        norm = float(self.clip_gradient(params, clip or math.inf))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    clip_gradient = staticmethod(torch.nn.utils.clip_grad_norm_)  # (params, most) -> the norm before

    def whole_weights(self, model):
        """Context in which `model` holds all weights, for passes that not all processes make alike."""
        return contextlib.nullcontext()

    def weights(self, params):
        """This process's part of the weights, as tensors that share their memory."""
        return [p.detach() for p in params]

    def gather(self, rows):
        """The rows of all processes, one after the other."""
        return rows

    def finish(self, model):
        """After the last update: `model` holds all weights for good."""


class Listener:
    """What a trainer tells while it runs. This one hears nothing. Logs, bars and checkpoints are subclasses."""

    def on_start(self, trainer): ...

    def on_rollout(self, trainer, rollout):
        """A micro-batch was drawn. Figures may be added to it."""

    def on_skip(self, trainer):
        """An update was left out. Returns where its batch is kept, if it is."""

    def on_step(self, trainer, figures):
        """An update was made. Returns a Stopped if the run is to be saved and stopped, which is then raised."""

    def on_check(self, trainer, figures): ...

    def on_save(self, trainer): ...

    def on_finish(self, trainer):
        """The last update was made. The best weights are put back next."""


# %% Part II. The experiments

# %% 11. Settings — Sec. 4 and App. D
RL_TASKS = "gsm8k math500 count sudoku custom".split()
TASK_CHOICES = ("pretrain", "sft_only", *RL_TASKS, "table1", "chat")
CACHES = ("none", "prefix", "dual")  # what a cache keeps: see CachedDecoder
EMBEDDED = ("tiny", "tiny-bert", "tiny-modernbert")  # random weights of LLaDA's, BERT's and ModernBERT's networks
TRACKERS = ("tensorboard", "wandb", "trackio")
HUB_SECONDS = 10  # until a hub that says nothing counts as out of reach
HUB_ROWS = 20000  # more problems than the paper's longest run draws

OFFICIAL = {  # where the official code does otherwise than the paper
    "lora_targets": {"sft_only": "q_proj,k_proj,v_proj", "*": "q_proj,k_proj,v_proj,up_proj"},
    "lora_r": 128,
    "lora_alpha": {"sft_only": 256, "*": 64},
    "mu": {"count": 8, "sudoku": 8, "*": 12},
    "norm": "token",
    "temperature": {"chat": 0.0, "*": 0.9},
}
TINY = {  # where the embedded model needs something else
    "seed": 0,
    "sft_data": "",
    "skip_eval": False,
    "steps_sft": {"sft_only": 6000, "count": 2500, "*": 5500},
    "bs_sft": 32,
    "rows_sft": 32,
    "lr_sft": 1.5e-3,
    "warmup_sft": 100,
    "sft_length": {"count": 45, "pretrain": 128, "*": 53},
    "data_ratio": {"pretrain": 2.0, "*": 0.0},
    "sft_extra": {"pretrain": 0, "*": 64},
    "steps_rl": 160,
    "group": 8,
    "bs_rl": 64,
    "grad_accum": 1,
    "mu": 8,
    "lr_rl": 2e-4,
    "temperature": {"chat": 0.0, "*": 0.9},
    "max_prompt": 64,
    "gen_length": 32,
    "eval_lengths": "32,64,96",
    "bs_eval": 128,
    "save_steps": 40,
}
PRESETS = {"paper": {}, "official": OFFICIAL, "tiny": TINY}


def opt(paper, help, source="ours", *, choices=(), low=0, high=None):
    """Declare a setting by the paper's value, a help text and where that value is from.

    paper: the value, or a dict of values by task, where "*" is every other task. low, high: bounds of a number.
    """
    default = paper["*"] if isinstance(paper, dict) else paper
    meta = dict(paper=paper, help=help, source=source, choices=choices, low=low, high=high)
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True, init=False)
class Settings:
    """Every setting of a run, each of which is a flag of the command line too.

    `Settings(task="sudoku")` holds the paper's values for that task, `Settings(task="sudoku", preset="tiny")` those of
    another preset; what is given by name goes before both. `dataclasses.replace` changes what it is told to, and
    leaves all other values as they are. TypeError on a name that is no setting.
    """

    # what to run
    task: str = opt("", "What to run.", choices=TASK_CHOICES)
    model: str = opt(
        "tiny",
        f"The model: one of the embedded {', '.join(EMBEDDED)}, a hub id, a folder in hub format, or a checkpoint of "
        "this script.",
    )
    from_scratch: bool = opt(
        False, "Start from random weights of the shape of --model, of which only config and tokenizer are read."
    )
    preset: str = opt(
        "auto",
        "The column of defaults. auto is tiny for the tiny model and what was trained from it, and paper for others.",
        choices=("auto", *PRESETS),
    )
    config: str = opt("", "A YAML file that may give any flag. The command line goes before it.")
    output_dir: str = opt("ckpt", "The folder of all results. Those of a run are in OUTPUT_DIR/<sft or task>/.")
    seed: int = opt(42, "The seed of every random stream of the run.", "official train.yaml", high=2**63 - 1)
    data: str = opt(
        "",
        "Problems of the benchmark: a local .jsonl, .json, .csv or .parquet file, or a hub id owner/name[:config], of "
        f"which the first {HUB_ROWS:,} rows are streamed. For pretrain, it is text: a .txt or .md file, a file with a "
        "column text, a folder of such files, or a hub set, which is streamed as far as it is needed.",
    )
    sft_data: str = opt(
        "simplescaling/s1K",
        "Traces for SFT: a file or a hub set, as for --data. A column messages is read as chats. talk stands for "
        "generated chats about the world of the generated text of pretrain.",
        "Sec. 4",
    )
    reward: str = opt(
        "",
        "The reward of --task custom: FILE.py:FUNCTION, which is called as TRL calls it, with prompts, completions, "
        "completion_ids and **columns.",
    )
    reward_errors: str = opt(
        "stop", "What follows when that function fails: stop, or pay the batch zero.", choices=("stop", "zero")
    )
    skip_sft: bool = opt(False, "Go straight to stage 2.")
    skip_eval: bool = opt({"sft_only": True, "*": False}, "Train without an evaluation.")
    eval_only: bool = opt(False, "Evaluate --model on --task and stop.")
    grade: str = opt(
        "",
        "Grade the replies in a generations file, of this script or of the official code, or in all such files of a "
        "folder, strictly and as the official code does, and stop. No model is loaded. --task says which benchmark "
        "they answer, if their names do not begin with it.",
    )
    resume: bool = opt(False, "Continue the run in --output_dir from its last good checkpoint.")
    auto_resume: bool = opt(False, "Do as --resume where a checkpoint is there, and start anew where none is.")
    allow_changed: bool = opt(False, "Resume although other flags are given than those of the run that stopped.")
    report_to: str = opt(
        "none", "A tracker that is to show the figures of metrics.jsonl too.", choices=("none", *TRACKERS)
    )
    dry_run: bool = opt(False, "Print settings and cost, load nothing, and stop.")
    smoke: bool = opt(False, "Check each part of the run on a few rows, train and write nothing, and stop.")
    sweep: int = opt(
        0,
        "The number of trials, which are runs with settings from --sweep_space and without evaluation. optuna chooses "
        "the settings by held-out accuracy, or by held-out loss for sft_only and pretrain. Several commands may share "
        "the trials.",
    )
    sweep_space: str = opt("", "A YAML file with a setting a line: a list of choices, or {low: , high: , log: true}.")
    debug: bool = opt(False, "Show the traceback of an error.")
    explain: str = opt(
        "",
        "Print an equation or a deviation with its docstring and code, by its tag, such as eq4 or D16, and stop. "
        "Without a tag, list the tags.",
    )
    # the model
    use_lora: bool = opt(False, "Train LoRA adapters instead of all weights.")
    lora_targets: str = opt(
        "all", "The layers that LoRA adapts. all is every linear layer of the blocks; or give names. [D7]", "App. D"
    )
    lora_r: int = opt({"sft_only": 8, "*": 128}, "The rank of LoRA.", "App. D; SFT: v1", low=1)
    lora_alpha: int = opt({"sft_only": 16, "*": 64}, "The alpha of LoRA.", "v1", low=1)
    lora_dropout: float = opt(0.05, "The dropout of LoRA in stage 1. Stage 2 has none. [D6]", "App. D", high=0.99)
    load_4bit: bool = opt(
        False, "Load the base weights in NF4 with double quantisation, and compute in bf16.", "App. D"
    )
    attn: str = opt("auto", "The attention kernel.", choices=("auto", "sdpa", "flash_attention_2", "eager"))
    dtype: str = opt(
        "auto",
        "The type of the weights. auto is fp32 if all are trained, else bf16 on a GPU and as stored on a CPU.",
        choices=("auto", "float32", "bfloat16"),
    )
    logits_gib: float = opt(
        1.0, "How many GiB of logits are held at once in the SFT loss and in old and reference passes."
    )
    compile: bool = opt(
        False, "Compile the model's blocks with torch.compile: slow to start, then faster. It needs a C++ compiler."
    )
    grad_checkpoint: bool = opt(False, "Checkpoint gradients: less memory for a third more time.")
    export: str = opt(
        "",
        "Also write the model whole: hf (or merged, which is the same) for transformers, llada for LLaDA's own code. "
        "Without --task, convert --model into --output_dir.",
        choices=("hf", "merged", "llada"),
    )
    threads: int = opt(0, "CPU threads. 0 is as many as torch chooses, but at most 8.")
    # stage 1: masked SFT
    steps_sft: int = opt(2460, "Updates of stage 1.", "20 epochs")
    bs_sft: int = opt(8, "Rows of an SFT update, over all processes.", "App. D.2", low=1)
    rows_sft: int = opt(1, "Rows of a backward pass of SFT.", "official: 1, 4 passes, 2 GPUs", low=1)
    lr_sft: float = opt(
        {"pretrain": 4e-4, "*": 1e-5}, "The highest learning rate of stage 1, which decays to 0.", "App. D.2; LLaDA"
    )
    warmup_sft: int = opt(
        {"pretrain": 2000, "*": 0}, "Updates of stage 1 with a linear warm-up.", "App. D.2; pretrain: LLaDA"
    )
    wd_sft: float = opt(0.1, "The weight decay of AdamW in stage 1.", "App. D.2")
    clip_sft: float = opt(1.0, "The limit of the gradient's norm in stage 1. 0 is none.", "App. D.2")
    sft_length: int = opt(
        4096, "Tokens of a row of SFT. It is padded with EOS or cut. pretrain packs text to such rows.", "App. D", low=8
    )
    schedule: str = opt(
        {"pretrain": "cosine", "*": "linear"},
        "The learning rate's way to 0 in stage 1.",
        "App. D.2; pretrain: ours",
        choices=("linear", "cosine"),
    )
    t_low: float = opt(1e-3, "The lowest noise level t of SFT.", "official", low=1e-6, high=1.0)
    t_high: float = opt(
        1.0, "The highest noise level. BERT reasoners take t from 0.5 to 1.0.", "Eq. (1)", low=1e-6, high=1.0
    )
    data_ratio: float = opt(
        {"pretrain": 20.0, "*": 0.0},
        "Tokens a parameter after which stage 1 ends. 0 is after --steps_sft.",
        "Chinchilla",
    )
    edit_rate: float = opt(
        0.0,
        "The share of visible tokens that SFT and pretrain replace, or put a surplus one before, so that edits are "
        "learned.",
        "Seed Diffusion",
        high=1.0,
    )
    edit_start: float = opt(
        0.8,
        "The share of the updates after which that begins. It then grows to --edit_rate.",
        "Seed Diffusion",
        high=0.99,
    )
    sft_extra: int = opt(0, "One SFT batch in five is up to so many tokens longer, so that longer canvases are known.")
    n_traces: int = opt(8000, "Generated traces of a task in the SFT corpus of the tiny model.", low=1)
    # stage 2: diffu-GRPO
    steps_rl: int = opt(
        {"gsm8k": 7700, "math500": 6600, "sudoku": 3800, "*": 5000},
        "Updates of stage 2, of which mu share a batch of rollouts.",
        "d1 issue 25",
    )
    group: int = opt(6, "G, the completions drawn for a prompt.", "Sec. 4", low=2)
    bs_rl: int = opt(6, "Completions of a device and backward pass, a multiple of G.", "App. D", low=2)
    grad_accum: int = opt(2, "Backward passes of an update of stage 2.", "App. D", low=1)
    mu: int = opt(12, "Inner updates that a batch of rollouts is used for.", "App. D", low=1)
    pmask: float = opt(0.15, "p_mask, the probability that a prompt token is masked.", "Sec. 3.1", high=1.0)
    eps: float = opt(0.5, "Half the width of the range that the ratio is clipped to.", "App. D")
    beta: float = opt(0.04, "The weight of the KL to the policy at the start of stage 2.", "App. D")
    norm: str = opt(
        "sequence",
        "The mean of the loss: the mean within a completion first, then over completions, or one mean over all live "
        "tokens of an update. [D1]",
        "Eq. (4)",
        choices=("sequence", "token"),
    )
    lr_rl: float = opt(3e-6, "The learning rate of stage 2, which is constant.", "App. D")
    wd_rl: float = opt(0.1, "The weight decay of AdamW in stage 2.", "App. D")
    clip_rl: float = opt(0.2, "The limit of the gradient's norm in stage 2. 0 is none.", "App. D")
    temperature: float = opt(
        {"sudoku": 0.3, "chat": 0.0, "*": 0.9}, "The temperature of rollouts and of chat.", "App. D"
    )
    max_prompt: int = opt(200, "Tokens of the longest prompt. Longer ones are cut on the left.", "App. D", low=1)
    patience: int = opt(0, "Stop after so many held-out checks in a row without a better one. 0 is never.")
    # decoder and evaluation
    gen_length: int = opt(256, "Tokens that a rollout may take.", "App. D", low=1)
    block_length: int = opt(32, "Tokens of a semi-autoregressive block.", "App. D", low=1)
    diffusion_steps: int = opt(0, "Denoising steps of a rollout. 0 is half of --gen_length.", "App. D")
    eval_lengths: str = opt("128,256,512", "The reply lengths of evaluation, which is greedy.", "Sec. 4")
    eval_steps: int = opt(0, "Denoising steps of evaluation and chat. 0 is half of the reply's length.", "Sec. 4")
    remasking: str = opt(
        "low_confidence",
        "Which tokens a denoising step writes: the likeliest, any, or each with the reverse process's probability.",
        "Sec. 4",
        choices=REMASKING,
    )
    allow_edits: bool = opt(False, "Let evaluation and chat revise written tokens, as --edit_rate teaches.")
    edit_share: float = opt(
        0.1, "With --allow_edits, the share of a block's written tokens that a first step may revise.", high=1.0
    )
    system: str = opt("", "A system prompt for chat, which is its first message.")
    stop: str = opt("", "A text that ends a reply of chat.")
    max_length: int = opt(
        0,
        "Tokens of the longest reply of chat. 0 is --gen_length. A window slides over what is too long for the model.",
    )
    web: bool = opt(False, "Chat in a browser on this machine, by gradio.")
    cache: str = opt(
        "none", "In evaluation, keep keys and values over the steps of a block. It is approximate.", choices=CACHES
    )
    refresh: int = opt(0, "With a cache, compute all keys and values anew every so many steps. 0 is once a block.")
    threshold: float = opt(
        0.0,
        "In evaluation and chat, write every token of a probability above it, which takes fewer steps. 0 is off.",
        high=1.0,
    )
    rollout_cache: str = opt("none", "The same as --cache for rollouts, which are then off-policy.", choices=CACHES)
    limit: int = opt(0, "The most test problems, and held-out ones. 0 is all, but 256 of count and of generated ones.")
    bs_eval: int = opt(8, "Rows that are decoded at once.", low=1)
    save_steps: int = opt(100, "Updates between two checkpoints and held-out checks.", "official train.yaml", low=1)
    save_total_limit: int = opt(
        2, "How many checkpoints of a stage are kept. If the last is damaged, --resume takes the one before.", low=1
    )
    max_skips: int = opt(
        3, "An update whose gradient is not finite is left out. The run stops at so many in a row.", low=1
    )

    def __init__(self, **given):
        unknown = given.keys() - self.__dataclass_fields__
        if unknown:
            raise TypeError(f"there is no setting {', '.join(sorted(unknown))}")

        task, preset = given.get("task", ""), given.get("preset", "paper")
        if preset == "auto":
            preset = preset_for(given.get("model", self.model))

        values = {name: self.default(name, task, preset) for name in self.__dataclass_fields__}
        if "steps_sft" in given:  # a number of updates goes before a ratio, unless both are given
            values["data_ratio"] = 0.0
        values |= given | {"preset": preset}

        for name, value in values.items():
            is_float = self.__annotations__[name] == "float"
            vars(self)[name] = float(value) if is_float else value

    @classmethod
    def column(cls, name, preset):
        """What a preset says of a setting: a value, or a dict of values by task, where "*" is every other task."""
        return PRESETS[preset].get(name, cls.__dataclass_fields__[name].metadata["paper"])

    @classmethod
    def default(cls, name, task="", preset="paper"):
        """A setting's value where nobody gives one."""
        value = cls.column(name, preset)
        return value.get(task, value["*"]) if isinstance(value, dict) else value

    def lengths(self):
        """The reply lengths of evaluation, in tokens."""
        return [int(n) for n in str(self.eval_lengths).split(",")]

    def trains(self):
        """Whether any weights change."""
        return bool(self.task) and self.task != "chat" and not self.eval_only

    def reinforces(self):
        """Whether there is a stage 2."""
        return self.task in RL_TASKS and not self.eval_only

    def evaluates(self):
        """Whether eval.json is written."""
        return self.task != "pretrain" and (self.eval_only or not self.skip_eval)

    def reply_length(self):
        """Tokens that a reply of chat may take."""
        return self.max_length or self.gen_length

    def masks_shared_by(self):
        """How many completions of a prompt share a prompt mask [D2]."""
        return 1 if self.preset == "official" else self.group

    def logits_held(self, config):
        """How many tokens' logits, in fp32, --logits_gib has room for."""
        return max(1, int(self.logits_gib * 2**28 / config.vocab_size))

    def with_data_ratio(self, parameters):
        """The same settings with as many updates of stage 1 as --data_ratio asks for, if it does."""
        tokens = self.bs_sft * self.sft_length
        steps = math.ceil(self.data_ratio * parameters / tokens)
        return dataclasses.replace(self, steps_sft=steps or self.steps_sft)


def preset_for(model):
    """What --preset auto is: "tiny" for an embedded model and what was trained from it, else "paper"."""
    is_tiny = model in EMBEDDED or read_json(Path(model, "d1_state.json")).get("preset") == "tiny"
    return "tiny" if is_tiny else "paper"


def validate(cfg):
    """UserError on values that are out of range or do not go together. Files and packages are not looked at."""
    for f in dataclasses.fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        top = sys.float_info.max if high is None else high
        if f.type in ("int", "float") and not low <= value <= top:  # as infinity and nan never are
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            if isinstance(value, float) and not math.isfinite(value):
                bounds = f"finite and {bounds}"
            raise UserError(f"--{f.name} must be {bounds}, not {value}")

    if not re.fullmatch(r"\d+(,\d+)*", str(cfg.eval_lengths)):
        raise UserError(f"--eval_lengths must be numbers with commas, such as 128,256,512, not {cfg.eval_lengths}")
    lengths = [("gen_length", cfg.gen_length)]
    if cfg.task != "chat":
        lengths += [("eval_lengths", n) for n in cfg.lengths()]
    elif cfg.max_length:
        lengths = [("max_length", cfg.max_length)]
    for flag, length in lengths:
        if length < 1 or length % cfg.block_length:
            raise UserError(f"--{flag} {length} must be a positive multiple of --block_length {cfg.block_length}")

    check_together(cfg)


def check_together(cfg):
    """UserError on values that are good each for itself and do not go together."""
    task, trains = cfg.task, cfg.trains()
    if cfg.grade and task not in ("", *TASKS):
        raise UserError(f"--grade reads replies to {', '.join(TASKS)}, not to {task}")
    if not (task or cfg.grade) and (cfg.smoke or not cfg.export):
        raise UserError(f"--task is needed: one of {', '.join(TASK_CHOICES)}")

    steps, blocks = cfg.diffusion_steps, cfg.gen_length // cfg.block_length
    if steps and not blocks <= steps <= cfg.gen_length:
        raise UserError(f"--diffusion_steps {steps} must be from {blocks}, one a block, to --gen_length")
    if cfg.t_low > cfg.t_high:
        raise UserError(f"--t_low {cfg.t_low} must not be above --t_high {cfg.t_high}")
    if cfg.edit_rate and cfg.use_lora and trains:
        raise UserError("--edit_rate teaches a token: without --use_lora")

    if cfg.data and task in ("sft_only", "table1"):
        raise UserError(
            f"--data is problems of one benchmark, and --task {task} has four; traces are given by --sft_data"
        )
    if cfg.sft_data == "talk" and task != "sft_only":
        raise UserError("--sft_data talk is for --task sft_only")
    if cfg.report_to != "none" and not trains:
        raise UserError("--report_to needs a run that trains")
    if cfg.patience and task not in (*RL_TASKS, "table1"):
        raise UserError("--patience needs stage 2: --task with a benchmark")
    if cfg.threshold and cfg.remasking != "low_confidence":
        raise UserError("--threshold goes with --remasking low_confidence")
    if cfg.bs_rl % cfg.group:
        raise UserError(f"--bs_rl {cfg.bs_rl} must be a multiple of --group {cfg.group}")

    if cfg.eval_only and task not in RL_TASKS:
        raise UserError(f"--eval_only needs a benchmark: --task {', '.join(RL_TASKS)}")
    if (task == "custom") != bool(cfg.reward):
        raise UserError("--task custom and --reward FILE.py:FUNCTION go together")
    if task == "custom" and not cfg.data:
        raise UserError("--task custom needs --data, rows with a column prompt")
    if task == "chat" and (cfg.resume or cfg.export):
        raise UserError("--task chat writes nothing: no --resume, no --export")
    if task == "chat" and (cfg.smoke or cfg.cache != "none"):
        raise UserError("--task chat goes without --smoke and --cache")
    if cfg.web and task != "chat":
        raise UserError("--web needs --task chat")
    if not (task or cfg.grade) and cfg.model in EMBEDDED:
        raise UserError("--export without --task converts a checkpoint: give --model")
    if task == "sft_only" and cfg.skip_sft:
        raise UserError("--task sft_only and --skip_sft leave nothing to do")

    is_random = cfg.from_scratch or cfg.model in EMBEDDED
    if is_random and (cfg.use_lora or cfg.load_4bit):
        raise UserError("random weights have nothing to adapt or to pack: leave out --use_lora and --load_4bit")
    if cfg.load_4bit and trains and not cfg.use_lora:
        raise UserError("--load_4bit weights cannot be trained: add --use_lora")
    if cfg.load_4bit and cfg.export:
        raise UserError("--export needs unpacked weights: export the saved adapter without --load_4bit")

    if bool(cfg.sweep) != bool(cfg.sweep_space):
        raise UserError("--sweep N and --sweep_space FILE.yaml go together")
    if cfg.sweep and (not trains or task == "table1"):
        raise UserError("--sweep needs a --task that trains, not table1, nor chat")


# %% 12. Text and ids — App. D: a chat becomes token ids, and a reply becomes text again
def encode_prompt(tokenizer, messages, continues=True):
    """Token ids of a chat up to where the reply begins. All stages build their prompts with this function.

    If the assistant spoke last, the reply continues that turn, or is one of its own if `continues` is False.
    """
    begun = continues and messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=not begun, continue_final_message=begun, return_dict=False
    )


def encode_prompts(tokenizer, chats, limit):
    """Token ids of many prompts, each cut on the left to at most `limit` tokens, and how many of them were cut."""
    prompts = [encode_prompt(tokenizer, chat) for chat in chats]
    cut = sum(len(ids) > limit for ids in prompts)
    return [ids[-limit:] for ids in prompts], cut


@functools.cache
def turn_end(tokenizer):
    """The ids that end a reply: the special token that the chat template sets after one, then EOS.

    It is EOS alone if the template sets EOS itself or no special token.
    """
    chat = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "§§"},
    ]
    after = tokenizer.apply_chat_template(chat, tokenize=False).partition("§§")[2]
    first = tokenizer.encode(after, add_special_tokens=False)[:1]

    eos = tokenizer.eos_token_id
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return [i for i in first if i in special and i != eos] + [eos]


def encode_example(tokenizer, messages, reply):
    """Prompt, reply and end of turn as one list of ids, and the length of the prompt."""
    # [D16] official counts one header and newline too many into the prompt, which can leave the reply's first token
    #       untrained. here: the two parts are encoded apart, so the border is exact.
    prompt = encode_prompt(tokenizer, messages, continues=False)
    completion = tokenizer.encode(reply, add_special_tokens=False) + turn_end(tokenizer)
    return prompt + completion, len(prompt)


def reply_ids(tokenizer, row, stop=""):
    """The tokens of a reply (C,) that stand before its first EOS and before the text `stop`.

    The reply may be unfinished. Its masks are left out.
    """
    ids = [i for i in row.tolist() if i != tokenizer.mask_token_id]
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    if not stop:
        return ids

    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    end = decode(ids).find(stop)  # -1 = the text does not occur
    while 0 <= end < len(decode(ids)):
        ids.pop()
    return ids


def reply_texts(tokenizer, completion):
    """The reply of each row of a completion (B, C), up to its first EOS, as text."""
    rows = [reply_ids(tokenizer, row) for row in completion]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


# %% 13. Readers of a reply — App. D: the answer in it, as a number, an expression, a grid or a formula
# A reader takes any text at all, in linear time, and returns None where it does not find what its docstring says.
# How a sign is read, and how else it is written. NFKC would not do: it makes 25 of 2⁵ and 31/2 of 3½.
SIGNS = r"""
- −–—‐‑‒―﹣－
+ ＋
* ×∙⋅·•∗✕✖⨯＊
/ ÷∕⁄／
= ＝→⇒
≈ ≃≅
: ∶：
( （
) ）
. ．
, ，
' ’ʼ
% ％
$ ＄
0 ０⁰₀
1 １¹₁
2 ２²₂
3 ３³₃
4 ４⁴₄
5 ５⁵₅
6 ６⁶₆
7 ７⁷₇
8 ８⁸₈
9 ９⁹₉
\pi{} π
\infty{} ∞
\emptyset{} ∅
\cup{} ∪
\in{} ∈
\le{} ≤
\ge{} ≥
\ne{} ≠
\pm{} ±
^\circ{} °
\frac{1}{2} ½
\frac{1}{3} ⅓
\frac{2}{3} ⅔
\frac{1}{4} ¼
\frac{3}{4} ¾
\frac{1}{5} ⅕
\frac{2}{5} ⅖
\frac{3}{5} ⅗
\frac{4}{5} ⅘
\frac{1}{6} ⅙
\frac{5}{6} ⅚
\frac{1}{8} ⅛
\frac{3}{8} ⅜
\frac{5}{8} ⅝
\frac{7}{8} ⅞
"""
READ_AS = str.maketrans({sign: plain for plain, signs in map(str.split, SIGNS.split("\n")[1:-1]) for sign in signs})
LOOKS = {  # what LaTeX, Markdown and typography add for the eye, and how it is read
    r"[\u200b-\u200d\u2060\ufeff\u00ad`]|\\!\s*|\\(?:left|right|displaystyle)(?![a-z])|(?<!\\)\\[()\[\]]": "",
    r"<\|\w+\|>|</?(?:b|em|strong|br|p|s) ?/?>": "",
    r"(?<!\\)\\[,;: ]|\\q?quad|~|[^\S\n]": " ",  # thin and no-break spaces too
    r"\\(?:text(?!color)\w*|mbox|math(?:bf|rm|it)|operatorname|boldsymbol)\s*\{([^{}]*)\}": r"\1",
    r"\\[dtc]frac": r"\\frac",
    r"\\(?:times|cdot|ast)(?![a-z])": "*",
    r"\\div(?![a-z])": "/",
    r"\\(?:approx|simeq)(?![a-z])": "≈",
    r"\\(?:implies|to|[Rr]ightarrow)(?![a-z])": "=",
    r"\\varnothing|\\{\s*\\}": r"\\emptyset",
    r"\\([$%])": r"\1",
    r"([⁰¹²³⁴-⁹]+)": r"^{\1}",
    r"([₀-₉]+)": r"_{\1}",
    r"√\s*(\d+|[a-z])?": r"\\sqrt{\1}",
}


def rewrite(text, rules):
    """A text after a series of substitutions, pattern: replacement."""
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return text


def plain(text):
    """A text in which each sign is written in one way. A text of more than 1,000 characters becomes empty."""
    return rewrite(text, LOOKS).translate(READ_AS).strip()[:1000] if text and len(text) <= 1000 else ""


def last_answer(text):
    """What stands in the last <answer> block that is whole, stripped. None if no block is."""
    _, opener, inside = text.rpartition("</answer>")[0].rpartition("<answer>")
    return inside.partition("</answer>")[0].strip() if opener else None  # a stray closer may follow


def box_from(text, start):
    """The text from `start` to the brace that closes the first one, which must come within 10,000 characters."""
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start, start + 10000):
        depth += 1 if brace[0] == "{" else -1
        if brace[0] == "}" and depth == 0:
            return text[start : brace.end()]
    return None


BOX = r"(?:boxed|fbox)\s*{"


def last_boxed(text):
    r"""What stands in the last \boxed{...} or \fbox{...}, stripped. None if there is none, or it is empty or open."""
    openers = list(re.finditer(BOX, text))
    box = box_from(text, openers[-1].end() - 1) if openers else None
    return (box and box[1:-1].strip()) or None


def answer_of(completion):
    """The answer in a reply: its last whole <answer> block, or the last box of that block.

    If no block is whole, it is the last box of the reply. A last box that is empty or open is no answer, but where it
    is the only one of a whole block, the rest of the block is.
    """
    # [D20] official: reward and accuracy read a reply by different parsers. here: one reader for both.
    block = last_answer(completion)
    boxed = last_boxed(completion if block is None else block)
    if block is None or boxed or len(re.findall(BOX, block)) > 1:
        return boxed
    return re.sub(r"\\?" + BOX + "}?", "", block).strip()


LAST_SIDE = {r"(?s)\A.*(?:(?<![<>!])=|≈|####|(?i:answer)(?: is\b|:))(?=.*\d)": ""}  # what follows the last = counts
AMOUNTS = {  # how a plain text is rewritten before a number is sought in it
    r" *\n\s*": "; ",
    r"\b(?:negative|minus) (?=[$€£]?[\d.])": "-",
    r"\b(?:[A-Z]{1,3}(?=\$)|(?:USD|EUR|GBP|Rs\.?)(?= ?-?\d))|(?<!\d)[$€£¥₹] ?|[$€£¥₹](?!\d)|\^?{?\\circ}?": "",
    r"(?<=\d) ?\\frac": r" \\frac",
    r"\\frac *(?:{ *(-?[\d.]+) *}|(\d)) *(?:{ *(\d+) *}|(\d))": r"\1\2/\3\4 ",
    r"[{}]|\\\\": "",  # as in 70{,}000 and m^{2}
    r"(?<![\w.,])[1-9]\d{0,2}([ ,'])\d{3}(?:\1\d{3})*(?!\d|[,']\d)": lambda m: re.sub("[ ,']", "", m[0]),
}
SENTENCES = {  # and what else is rewritten if it may stand in a sentence
    r"\s+": " ",
    r"(?<=\d) and (?=\d+ ?/ ?\d)": " ",
    r"(?<![\d.])(\d+)(?: ?thousand|[kK])\b": r"\g<1>000",
    r"(?<![\d.])(\d+) ?million\b": r"\g<1>000000",
    r"(?<![\d.])(\d+)\.(\d) ?million\b": r"\1\g<2>00000",
    r"\b\d+(?:st|nd|rd|th)\b(?=.*\b\d+\b)": "",  # the 3rd day, where there is another number
    r"(\b\d+\b.*?)\b\d+(?:st|nd|rd|th)\b": r"\1",
    # a number that leads the text and is followed by its unit, as in "72 apples for 12 children"
    r"^(\W*\d[\d./ ]*)"
    r"(?!.*\b(?:or|and|to|times|plus|minus|by|divided|multiplied|more|less|than|so|then|but|not|maybe)\b.*\d)"
    r"(?:(?:for|per|every|each|in|at|after|with)|-?[^\W\d_]+(?:(?= \()|(?:[ '/-][^\W\d_]+)+)) \(?-?\d.*": r"\1",
}
VALUE = re.compile(  # minus, whole part of a mixed number, number or numerator, denominator
    r"(?:(?<![\w)%])(-)(?: (?<!\w - )|(?=[\d.])))?(?<![^\W_])(?<![.^])(?<![^\W_][-_])"
    r"(?:(\d++) (?=\d++ ?/ ?\d))?(\d++(?:\.\d++)?|\.\d++)(?: ?/ ?(0*+[1-9]\d*+))?"
)
BROKEN = r"""(?x)  # what makes a number a part of something else
\d\ ?(?: [-+*]{1,2}\ ?[(\d.] | [xX]\ ?\d | \^ )  # 7-3, 6 x 12, 2^5
| \d(?: [:,'_]\d | _[^\W_] | !(?!=) | \.\. | [eE][-+]?\d | \ ?(?:hundred|thousand|[mb]illion)\b )  # 5:30, 70,00, 10_2
| \.\d+\.\d | /\ ?(?: \d+\ ?[./]\d | 0+(?!\d) | \( )  # 1.2.3, 18/5/2024, 1/0
| \d\ (?:times|plus|minus|over|(?:divided\ |multiplied\ )?by)\ -?\d | \b(?:not|than)\ -?\d | [\\<>]  # \pi, < 3
"""


def value_of(number):
    """The value of a match of VALUE."""
    minus, whole, top, bottom = number.groups()
    value = int(whole or 0) + Fraction(top) / int(bottom or 1)
    return -value if minus else value


def exact_number(text):
    r"""The value of a plain text that is one number and nothing else: 1,234, -$3.50, 50%, 7/2, 3 1/2, 3\frac{1}{2}."""
    number = VALUE.fullmatch(rewrite(text, AMOUNTS).rstrip(" .%\\").lstrip("+ "))
    return number and value_of(number)


def read_number(text):
    """The number that an answer says, alone or in a sentence, with its sign, separators, money, unit or fraction.

    What follows the last = counts. Two different numbers are a hedge and give None, unless the first one leads the
    text and is followed by its unit, as in "72 apples for 12 children". A sum, a power, a time of day, a date or a
    number in another base gives None too.
    """
    # [D14] official finds no number in 1,234. here: separators, signs of money and units pass.
    text = rewrite(plain(text), LAST_SIDE | AMOUNTS | SENTENCES)
    values = set(map(value_of, VALUE.finditer(text)))
    return None if re.search(BROKEN, text) or len(values) != 1 else values.pop()


CHARACTERS = "0123456789+-*/() "  # of an expression
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def arithmetic(text, number=Fraction, characters=CHARACTERS, operators=OPERATORS):
    """The exact value of an expression of integers with + - * / and brackets, of 300 characters at most."""
    # [D11] official calls eval on what the model writes, so 9**9**9 hangs (reward_func.py:105).
    #       here: the text is parsed, never run, and has no powers.
    if len(text) > 300 or not set(text) <= set(characters):
        return None

    def value(node):
        if isinstance(node, ast.Constant):
            return number(node.value)
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return operators[type(node.op)](*map(value, parts))

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except Exception:  # no expression, too deep, x/0, another operator, another kind of node, "..."
        return None


EXPRESSIONS = {  # how a plain text is rewritten before an expression is sought in it
    r"(?<![\w*])\*\*(?!\*)([^*]+(?:\*[^*]+)*)\*\*(?![\w*])|[$#\"]": r"\1",
    r"[-=]>|==|≈": "=",
    r"(?<!\d)\\frac\s*{([^{}]*)}\s*{([^{}]*)}": r"((\1)/(\2))",
    r"\\?[{\[]": "(",
    r"\\?[}\]]": ")",
    r"(?<=[\d)])\s*[xX]\s*(?=[\d(])": "*",
    r"(?<=[\d)])\s*:\s*(?=[\d(])": "/",
    r"\b(?:is|equals|gives|makes)\b|(?<=[a-zA-Z]):": "=",
    r"\(\s*=([^()=]*)\)": r"=\1",  # 1+2 (= 3)
    r"(?<=[\d).])\s*\n\s*(?=[\w(])": "=",  # a new line says something new, except within an expression
    r"^[A-Za-z,' ]*[A-Za-z,] +(?=-?\d)": "",  # so 1+2
    r"(?<=\d),(?=\d{3}(?!\d))": "",
    r"(?<=\))\s*(?=[\d(])|(?<=\d)\s*(?=\(+[\d-])": "*",
    r"\s+": " ",
}


def read_expression(text):
    r"""The expression that an answer is and the values that it claims, as in 1+2 = 3: {part: its exact value}.

    Signs may be × ÷ − or \times, \cdot, \div, x and :, brackets may be of any kind, 2(3+4) is a product, and words may
    stand before the expression. The dict is empty if a part with a digit in it has no value.
    """
    sides = rewrite(plain(text), EXPRESSIONS).split("=")
    sides = [side.strip(" .") for side in sides if re.search(r"\d", side)]
    values = [arithmetic(side) if set(side) <= set(CHARACTERS) else read_number(side) for side in sides]
    return {} if None in values else dict(zip(sides, values, strict=True))


def uses_numbers(text, example):
    """Whether the integers that a text names are the numbers of a Countdown problem, each of them once."""
    used = re.findall(r"\d+", text)
    return sorted(map(int, used)) == sorted(example["numbers"])


def reaches(text, example):
    """Whether an answer solves a Countdown problem.

    True = it does, False = it has the right numbers and another value, or claims one, None = it has other numbers or
    no value.
    """
    values = read_expression(text)
    if not any(uses_numbers(part, example) for part in values):
        return None
    return set(values.values()) == {example["target"]}


LABELS = {  # of the rows of a grid, and its size
    r"(?i)(?<![a-z])(?:row|line|r|column|col|c)\s?\d(?!\d)|(?<!\w)4\s?[x*]\s?4(?!\w)": " ",
    r"(?m)^[^\d\n]*[0-4][^\d\n]+(?=(?:\d[^\d\n]*){4}$)": "",  # five digits in a line: the first counts the rows
}
UNITS = "0123 4567 89ab cdef 048c 159d 26ae 37bf 0145 2367 89cd abef"  # cells of rows, columns and boxes


def read_grid(text):
    """The digits of a grid, whatever stands between them, without the labels and numbers of its rows."""
    return "".join(re.findall("[0-9]", rewrite(plain(text), LABELS)))


def solves(grid, puzzle):
    """Whether a 4x4 grid is complete, keeps the puzzle's given cells and has 1 to 4 in each row, column and box."""
    if len(grid) != 16 or not all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True)):
        return False
    return all({grid[int(cell, 16)] for cell in unit} == set("1234") for unit in UNITS.split())


MATH_WORKER = r"""import json, signal, sys
from math_verify import LatexExtractionConfig, grader, parser
from sympy import nsimplify

RULES = LatexExtractionConfig().normalization_config

def same_number(a, b, *precision):
    "In place of math-verify's own test, which rounds to six digits and drops what is below 1e-15."
    try:
        a, b = (nsimplify(x, rational=True).doit() for x in (a, b))  # a decimal number is the fraction that it says
        gap = (a - b).expand()
        small = gap.is_number and not gap.is_rational and abs(gap.evalf(50)) < 1e-30 * abs(b.evalf(50))
        return gap == 0 or bool(small)
    except Exception:  # no numbers
        return False

def same(limit, *texts):
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)  # its default is to end the process, whatever C code is busy with
    try:  # all of the text must be LaTeX: its own parse() would look for some number in what is not
        gold, found = (parser.parse_latex_cached(parser.normalize_latex(text, RULES)) for text in texts)
        return grader.verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None)
    except Exception:
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

grader.sympy_numeric_eq = same_number
same(0, "x+1", "1+x"), same(0, "0.5", "\\sqrt{2}")  # the first calls take longer
print("ready", flush=True)
for line in sys.stdin:
    print(int(same(*json.loads(line))), flush=True)
"""
MATH_LOCK = threading.Lock()


@functools.cache
def math_worker():
    """A process that runs math-verify, whose own time limit C code ignores and only the main thread can set."""
    worker = subprocess.Popen(
        [sys.executable, "-c", MATH_WORKER],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    if worker.stdout.readline() != "ready\n":
        raise UserError("math-verify does not start: pip install -r requirements.txt")
    return worker


def math_verify_says(found, gold, limit):
    """Whether math-verify calls two LaTeX answers equal within `limit` CPU seconds."""
    with MATH_LOCK:
        for _ in range(2):  # again if the process was ended by somebody else
            worker = math_worker()
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps([limit, gold, found]), file=worker.stdin, flush=True)
            answer = worker.stdout.readline()
            if answer:
                return answer == "1\n"

            math_worker.cache_clear()
            if worker.wait() == -signal.SIGVTALRM:  # it took too long
                break
    return False


FORMULAS = {  # how a plain text is rewritten before it is compared as a formula
    r"\$": "",
    r"{}|\s+": " ",
    r"(?<![a-zA-Z\\])(pi|infty|sqrt)(?![a-z])": r"\\\1",
    r"\\sqrt *\(([^()]*)\)|\\sqrt *(\d+)": r"\\sqrt{\1\2}",  # math-verify reads 4 in 4\sqrt(2)
    r"(?<=\d)i(?![a-zA-Z])": " i",  # of 1.0i
    r"(?<!\\)%": r"\\%",
    r",? ?(?<![a-zA-Z\\])(?:and|or)(?![a-z])|;": ",",
    r"(?<=[\d})]) *≈.*": "",  # 1/3 ≈ 0.33
    "≈": "=",
    r"^[A-Za-z ,']*\b(?:is|are|equals):? |^[A-Za-z ]+: ?|[ .]+$": "",  # "The answer is"
    r"(?:(?<=[\d})])|(?<=\\pi))"  # a unit
    r"(?: (?!sin|cos|tan|log|mod)(?:m|in|hr|sq|[a-z]{3,})| ?(?:[ckm]m|kg|ft))[a-z ./]*(?:\^{?\d}?)?$": "",
}
COMPACT = {  # what is left out where two formulas are compared as texts; 3 1/2 is not 31/2
    r"(?<!\d) | (?!\d)": "",
    r"{(\w)}": r"\1",
    r"^[A-Za-z]{3,}$": lambda word: word[0].lower(),
}
NAME = r" *[(|\\]?[^\W\d_](?:[_(]{?\d+|[^-+*/^<>=\d])*"  # as in x = 3, f(2) = 3, (x,y) = (1,2), \angle ABC = 60
MISREAD = r"""(?x)  # in "found, line break, gold": what math-verify calls equal, or what would only run into its limit
\\[lcdv]?dots | \.\.\. | …                       # 1, 3, \ldots, 2n-1 is not 1, 2, \ldots, n: it leaves the dots out
| [\d)]\ ?_                                      # 10_2 is not 10: it leaves the base out
| \d\ [a-z]{2,}\ -?\d                            # 7 maybe 8 and 7 to 8 are not 7
| ^\ *([a-zA-Z])\ *=.*\n\ *(?!\1)[a-zA-Z]\ *=      # the line x = 5 is not y = 5
| ^\ *(?: \\{.*\n\ *\( | \(.*\n\ *\\{ )            # the set \{1, 2\} is not the pair (1, 2)
| \\sqrt\ *\(                                    # brackets within brackets of a root, see above
| (?:\^[ {(-]*\d+\ *){3} | \^[ {(-]*\d+\ *\^[ {(-]*(?:[4-9]|\d\d) | \^[ {(-]*\d{5}  # towers, but not x^{2}+y^{2}
| (?:[(\[{]\ *){10}                              # deep brackets
| \d{5}! | !\ ?\)*\ ?! | \\(?:sum|prod|int)(?![a-z])  # large factorials, long sums
"""


def unnamed(text):
    """What stands between the equality signs of a formula, without names such as x or f(x)."""
    sides = re.split(r"(?<![<>!])=|\\in(?![a-z])", text)
    return [side for side in sides if not re.fullmatch(NAME, side)] or sides[-1:]


def same_mathematics(found, gold, limit=5.0):
    """Whether two LaTeX answers are equal: in plain form, as exact numbers, or by math-verify in `limit` CPU seconds.

    A name such as x = is left out. A list is equal to a list of the same values in any order, and "7 or 8" is a list.
    """
    found, gold = (rewrite(plain(text), FORMULAS) for text in (found, gold))
    if rewrite(found, COMPACT) == rewrite(gold, COMPACT):
        return bool(found)
    numbers = exact_number(found), exact_number(gold)
    if None not in numbers and (numbers[0] == numbers[1] or "%" not in found + gold):  # 15% may be 0.15
        return numbers[0] == numbers[1]
    if not 0 < len(found) <= 300 or re.search(MISREAD, f"{found}\n{gold}"):
        return False

    # all sides of a chain such as x = 6/2 = 3 must be equal to one gold value; equations and lists are not taken apart
    sides, golds = unnamed(found), unnamed(gold)
    if len(golds) > 1 or (len(sides) > 1 and "," in found) or [*sides, *golds] == [found, gold]:
        return math_verify_says(found, gold, limit)
    return all(same_mathematics(side, golds[0], limit) for side in sides)


# %% 14. The four tasks — App. D: prompt, rewards and grade of each
# To add a task, copy a subclass of `Task`, write its prompt, `parse`, `is_right` and `own_rewards`, put it into TASKS
# and name it in RL_TASKS. Its toy problems, if it is to have any, belong to section 16, official rules to section 19.
SYSTEM = (
    "Think step by step, then answer. Write your reply exactly in this form:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"
)


@dataclasses.dataclass(frozen=True)
class Grade:
    """Verdict on one reply."""

    correct: bool
    score: float  # in [0, 1], for sudoku the share of empty cells that are right
    answer: str | None  # what was read as the answer


def verdict(right, answer):
    """A grade that knows nothing between right and wrong."""
    return Grade(right, float(right), answer)


def split_of(key):
    """The split of a problem with this key, by a hash, the same in every run: 80 % train, 8 % heldout, 12 % test."""
    bucket = hashlib.sha256(key.encode()).digest()[0] / 256
    return "train" if bucket < 0.8 else "heldout" if bucket < 0.88 else "test"


class Task:
    """One benchmark with its problems, its prompt, its rewards and its grading.

    An example is a problem as a dict, and a completion is the text of a reply.
    """

    parse: Callable[[dict], dict]  # a row of a data file -> an example, or an error that refuses the row
    own_rewards: Callable[[str, dict], dict[str, float]]  # (completion, example) -> parts of the reward by name
    is_right: Callable[[str | None, dict], bool]  # (what `answer_of` found in a reply, example) -> whether it is right
    official: Official | None = None  # the official code's rewards and grade, set in section 19, None = there are none

    name = ""  # as in --task
    official_name = ""  # as in the names of the official generations files
    hub = ""  # the public data set
    hub_test = ""  # the one to test on, if it is another
    tests = 0  # problems of it that the paper tests on, 0 = all
    texts: tuple[str, ...] = ()  # the columns that a data file must have as text
    gold: tuple[str, ...] = ("answer",)  # the parts of an example that the official generations file calls ground_truth
    system = SYSTEM  # the first part of the chat
    asks = "{question}"  # the question, filled in from the example
    score = ""  # what Grade.score counts, where it is more than right or wrong
    aim = "correct"  # the part of a Grade by which the best checkpoint is chosen

    def rewards(self, completion, example, official=False):
        """The parts of a reply's reward by name, whose sum is the reward, by our rules or the official code's."""
        pay = self.official.rewards if official and self.official else self.own_rewards
        return pay(completion, example)

    def batch_rewards(self, completions, examples, official=False):
        """The `rewards` of many replies."""
        pairs = zip(completions, examples, strict=True)
        return [self.rewards(*pair, official) for pair in pairs]

    def own_grade(self, completion, example):
        """The strict verdict on a reply."""
        answer = answer_of(completion)
        return verdict(self.is_right(answer, example), answer)

    def grade(self, completion, example, official=False):
        """The verdict on a reply, strict or by the official code's parser."""
        judge = self.official.grade if official and self.official else self.own_grade
        return judge(completion, example)

    def question(self, example):
        return self.asks.format_map(example)

    def messages(self, example, system=None):
        """The chat that asks one problem. `system` replaces the task's own first part."""
        return [{"role": "user", "content": f"{system or self.system}\n\n{self.question(example)}"}]

    def examples(self, split, n=None, seed=0, data=None):
        """n problems of "train", "heldout" or "test": toy problems, or the first n rows of `data` (None = all).

        Toy problems are drawn from (name, split, seed) alone. UserError names a row that is no problem.
        """
        if data:
            rows = enumerate(read_rows(data, split), 1)
            return [self.example_of(row, f"{data}, row {number}") for number, row in rows][:n]

        rng = random.Random(f"{self.name}/{split}/{seed}")
        draws = map(self.generate, itertools.repeat(rng))
        fitting = (example for example in draws if example and split_of(self.key(example)) == split)
        return list(itertools.islice(fitting, 256 if n is None else n))

    def example_of(self, row, place):
        """The example in a row of a data file. UserError names the place of a row that is none."""
        try:
            wrong = [column for column in self.texts if not isinstance(row[column], str)]
            if wrong:
                raise ValueError(f"column {wrong[0]!r} must be a text")
            return self.parse(row)

        except KeyError as e:
            raise UserError(f"{place}: no column {e}; it has {', '.join(map(str, row))}") from e
        except (ValueError, TypeError, AttributeError, ArithmeticError) as e:
            raise UserError(f"{place}: no {self.name} problem: {e}; it has {str(row)[:120]}") from e

    def hub_keeps(self, example):
        """Whether the paper takes this problem of the public data set."""
        return True

    def key(self, example):
        """What a problem asks. Rows that ask the same are one problem, and no problem is in two splits."""
        return f"{self.name}/{' '.join(self.question(example).split())}"

    def generate(self, rng):
        """A toy problem drawn from rng, or None where the draw is no problem."""
        return TOY[self.name].generate(rng)

    def demonstrate(self, example, rng, careful):
        """A reply to a toy problem in the required form, by a careful solver or a careless one."""
        work, answer = TOY[self.name].solve(example, rng, careful)
        return f"<reasoning>\n{work}\n</reasoning>\n<answer>\n{answer}\n</answer>"

    def ground_truth(self, example):
        """What the official generations file holds as ground_truth."""
        return operator.itemgetter(*self.gold)(example)

    def of_record(self, record):
        """What grading needs of an example, read back from an entry of a generations file."""
        truth = record["ground_truth"]
        values = truth if len(self.gold) > 1 else [str(truth)]
        return dict(zip(self.gold, values, strict=True))


def has_form(completion, flags=re.DOTALL, end="\n?$"):
    """Whether a reply is the two blocks with their tags on lines of their own, and whether it begins with both."""
    # [D10] official's patterns lack DOTALL (reward_func.py:49, mended later), so work of two lines never earns the
    #       format reward. here: "." matches a newline, and a final one is not demanded.
    # (?>...) never tries again where it stopped, so no text takes more than linear time.
    strict = r"<reasoning>\n(?>.*?\n</reasoning>\n<answer>\n).*?\n</answer>"
    soft = r"<reasoning>(?:(?>.*?</reasoning>\s*<answer>)|(?>.*</reasoning>\s*<answer>)).*?</answer>"
    return bool(re.match(strict + end, completion, flags)), bool(re.match(soft, completion, flags))


def tag_points(completion):
    """Up to .5 for four tags on lines of their own, less .001 for each character after them (the official rule)."""
    after = len(completion.split("\n</answer>\n")[-1])
    after_close = len(completion.split("\n</answer>")[-1]) - 1
    surplus = {"<reasoning>\n": 0, "\n</reasoning>\n": 0, "\n<answer>\n": after, "\n</answer>": after_close}
    return sum((0.125 - 0.001 * n for tag, n in surplus.items() if completion.count(tag) == 1), 0.0)


class Gsm8k(Task):
    """Grade-school word problems."""

    name = official_name = "gsm8k"
    hub = "openai/gsm8k:main"
    texts = "question", "answer"

    def parse(self, row):
        answer = plain(row["answer"].split("####")[-1])
        if read_number(answer) is None or not re.fullmatch(r"[-+]?[\d,]*\.?\d*", answer):  # 1/2, 1e3, 1_000, 70,00
            raise ValueError(f"the answer {answer!r} is no plain number such as 18, 1,234 or 0.5")
        return {"question": row["question"], "answer": answer.replace(",", "")}

    def own_rewards(self, completion, example):
        grade = self.own_grade(completion, example)
        number = read_number(grade.answer)
        strict, soft = has_form(completion)
        return {
            "correctness": 2.0 * grade.correct,
            "int": 0.5 * (number is not None and number.denominator == 1),
            "strict_format": 0.5 * strict,
            "soft_format": 0.5 * soft,
            "xmlcount": tag_points(completion),
        }

    def is_right(self, answer, example):
        number = read_number(answer)
        return number is not None and number == read_number(example["answer"])

    def ground_truth(self, example):
        return float(example["answer"].replace(",", ""))

    def of_record(self, record):
        truth = record["ground_truth"]
        if truth is None:  # where the official parser failed on the data set's own answer
            return {"answer": "nan"}
        return {"answer": f"{truth:.15g}" if isinstance(truth, float) else str(truth)}


def box_points(completion, box="\\boxed"):
    """.5 for an <answer> tag, and .5 for a box in the first answer, or .25 without one."""
    tagged = "<answer>" in completion
    inside = completion.split("<answer>")[1].split("</answer>")[0] if tagged else completion
    # [D12] official looks for a backspace and "oxed" (a mistyped "\boxed"), so no bonus ever comes. here: \boxed.
    return 0.5 * tagged + (0.5 if box in inside else 0.25)


class Math500(Task):
    """Competition problems with a boxed answer."""

    name, official_name = "math500", "math"
    hub, hub_test = "ankner/math-500", "HuggingFaceH4/MATH-500"
    texts = "problem", "answer"
    system = SYSTEM + "\nPut the final answer in \\boxed{} inside the answer block."
    asks = "{problem}"

    def parse(self, row):
        answer = last_boxed(row["answer"]) or row["answer"]
        if not plain(answer) or re.search(BOX, answer):
            raise ValueError("the answer is empty, or its box is empty or open")
        return {"problem": row["problem"], "answer": answer}

    def own_rewards(self, completion, example):
        right = self.own_grade(completion, example).correct
        return {"correctness": 2.0 * right, "boxed_and_answer_tags": box_points(completion)}

    def is_right(self, answer, example):
        return same_mathematics(answer, example["answer"])


class Countdown(Task):
    """Reach a target with + - * / and each number once."""

    name, official_name = "count", "countdown"
    hub = "Jiayi-Pan/Countdown-Tasks-3to4"
    tests = 256
    gold = "numbers", "target"
    system = SYSTEM + (
        "\nUse each given number exactly once, with + - * / and brackets, to reach the target. "
        "Answer with the expression alone."
    )
    asks = "Numbers: {numbers}\nTarget: {target}"

    def parse(self, row):
        if "input" in row:  # the official test file
            numbers, target = row["input"], row["output"]
        else:
            numbers, target = row.get("nums") or row["numbers"], row["target"]
        text, target = str(numbers), str(target).strip()  # in a CSV file, [44, 19, 35] or 44 19 35 is a text anyway
        several = re.fullmatch(r"[\[( '\"]*\d{1,18}(?:[ ,'\"]+\d{1,18})+[\]) '\"]*", text)
        if not several or not re.fullmatch(r"-?\d{1,18}", target):
            raise ValueError("it needs two or more whole numbers, none of them negative, and a whole target")
        return {"numbers": list(map(int, re.findall(r"\d+", text))), "target": int(target)}

    def own_rewards(self, completion, example):
        # [D11] official pays .1 for any answer. here: for one with the right numbers.
        right = reaches(answer_of(completion), example)
        return {"countdown": {True: 1.0, False: 0.1, None: 0.0}[right]}

    def is_right(self, answer, example):
        return reaches(answer, example) is True

    def hub_keeps(self, example):
        return len(example["numbers"]) == 3  # the public set has some with four

    def key(self, example):
        """Problems with the same numbers, in any order, and the same target are one problem."""
        return f"{self.name}/{sorted(example['numbers'])}/{example['target']}"


def right_cells(digits, example):
    """Share of a sudoku's empty cells that are right. Digits that are missing are wrong."""
    cells = zip(example["puzzle"], example["solution"], digits.ljust(16, "0"), strict=False)
    right = [cell == solution for given, solution, cell in cells if given == "0"]
    return sum(right) / max(len(right), 1)


class Sudoku(Task):
    """4x4 sudoku. Any solution is right, and cells are counted by the one in the file."""

    name = official_name = "sudoku"
    score = "cells"
    gold = ("solution",)
    system = SYSTEM + (
        "\nFill the 4x4 grid, 0 = empty, so that rows, columns and 2x2 boxes hold 1 to 4 once. "
        "Answer with the 16 digits."
    )
    asks = "Solve the following Sudoku puzzle: {puzzle}"

    def parse(self, row):
        row = {column.lower(): str(value) for column, value in row.items()}
        puzzle, solution = row["puzzle"].zfill(16), row["solution"]
        if not (re.fullmatch("[0-4]{16}", puzzle) and solves(solution, puzzle)):
            raise ValueError("puzzle and solution must have 16 digits, and the solution must solve the puzzle")
        return {"puzzle": puzzle, "solution": solution}

    def own_rewards(self, completion, example):
        grade = self.own_grade(completion, example)
        return {"sudoku": 1.0 if grade.correct else min(grade.score, 15 / 16)}

    def own_grade(self, completion, example):
        answer = last_answer(completion)
        grid = read_grid(answer)
        return Grade(solves(grid, example["puzzle"]), right_cells(grid, example), answer)

    def key(self, example):
        """[D15] official's test puzzles share solution grids with training. here: no grid is in two splits."""
        return f"{self.name}/{example['solution']}"

    def of_record(self, record):
        puzzle = re.findall(r"\d{16}", record["question"])[0]
        return super().of_record(record) | {"puzzle": puzzle}


TASKS = {
    "gsm8k": Gsm8k(),
    "math500": Math500(),
    "count": Countdown(),
    "sudoku": Sudoku(),
}


def grade_generation(task, row, mode="strict"):
    """The grade of one reply of a generations file, a row {"question", "generations": the text, "ground_truth"}.

    mode "strict" grades as we do, "official" as the official parser. ValueError on another task or mode.
    """
    if task not in TASKS or mode not in ("strict", "official"):
        raise ValueError(f"no grading of task {task!r} in mode {mode!r}")
    example = TASKS[task].of_record(row)
    return TASKS[task].grade(row["generations"], example, mode == "official")


# %% 15. Evaluation and Table 1 — Sec. 4
PAPER_TABLE1 = {  # LLaDA-8B-Instruct at 128 / 256 / 512, d1 Table 1; a star marks second-hand cells
    "gsm8k": {
        "base": "68.7 76.7 78.2",
        "sft": "66.5* 78.8* 81.1*",
        "diffu_grpo": "72.6 79.8 81.9",
        "d1": "73.2 81.1 82.1",
    },
    "math500": {
        "base": "26.0 32.4 36.2",
        "sft": "26.2* 32.6* 34.8*",
        "diffu_grpo": "33.2 37.2 39.2",
        "d1": "33.8 38.6 40.2",
    },
    "count": {
        "base": "20.7 19.5 16.0",
        "sft": "20.3* 14.5* 23.8*",
        "diffu_grpo": "33.2 31.3 37.1",
        "d1": "34.8 32.0 42.2",
    },
    "sudoku": {
        "base": "11.7 6.7 5.5",
        "sft": "16.5* 8.5* 4.6*",
        "diffu_grpo": "18.4 12.9 11.0*",
        "d1": "22.1 16.7 9.5",
    },
}
ROW_TITLES = {"base": "base", "sft": "+SFT", "diffu_grpo": "+diffu-GRPO", "d1": "d1"}
DECODING = "remasking eval_steps allow_edits edit_share cache refresh threshold".split()  # of evaluation


def other_decoding(cfg):
    """The settings of evaluation that are not the paper's. They belong to every figure that is made with them."""
    chosen = {name: getattr(cfg, name) for name in DECODING}
    return {name: value for name, value in chosen.items() if value != Settings.default(name)}


def wilson(hits, n, z=1.96):
    """95 % Wilson interval (low, high) of a share of hits among n, in [0, 1]."""
    p, z2 = hits / n, z * z / n
    middle = p + z2 / 2
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)


def percent(share, n):
    """A share of n replies in percent, as a text with its interval."""
    low, high = wilson(share * n, n)
    return f"{100 * share:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def evaluation_prompts(tokenizer, task, examples, cfg):
    """Token ids of the questions, at most --max_prompt each, and how many were cut on the left for it."""
    # [D13] official trains with a tags-only text and tests with another: an expert who boxes the answer, uncut, and
    #       the reply begun with <reasoning>. here: one builder for SFT, RL and evaluation; "official" tests so too.
    if cfg.preset == "official":
        return official_prompts(tokenizer, task, examples), 0
    return encode_prompts(tokenizer, map(task.messages, examples), cfg.max_prompt)


@torch.no_grad()
def generate(model, tokenizer, prompts, cfg, gen_length, todo=None):
    """Greedy replies to this process's share of the prompts, which are lists of ids, batch by batch.

    todo: the numbers of the prompts to answer, None = all. Yields lists of pairs (number of the prompt,
    {"generations", "effective_tokens", "ended"}): the text, the number of tokens before the EOS, whether the EOS came.
    """
    model.eval()  # all of it: a layer in training mode that checkpoints gradients would keep no keys and values
    check_positions(model, max(map(len, prompts)) + gen_length)
    device, eos_id = next(model.parameters()).device, tokenizer.eos_token_id

    order = range(len(prompts)) if todo is None else todo
    order = sorted(order, key=lambda i: len(prompts[i]))  # prompts of one length pad least
    mine = order[processes().process_index :: processes().num_processes]

    for first in range(0, len(mine), cfg.bs_eval):
        numbers = mine[first : first + cfg.bs_eval]
        ids, attention_mask = pad_left([prompts[i] for i in numbers], tokenizer.pad_token_id, device)  # (B, P) each
        with precision(device):
            canvas = diffuse_decode(
                model,
                ids,
                attention_mask=attention_mask,
                gen_length=gen_length,
                steps=cfg.eval_steps or None,
                cache=cfg.cache,
                threshold=cfg.threshold or None,
                generator=[keyed_generator(cfg.seed, "eval", i) for i in numbers],
                **decoding(tokenizer, cfg),
            )  # (B, P+C)

        completion = canvas[:, ids.shape[1] :]  # (B, C)
        ended = (completion == eos_id).any(1)  # (B,)
        effective = live_tokens(completion, eos_id).sum(1) - ended.long()  # (B,) before the EOS
        replies = zip(numbers, reply_texts(tokenizer, completion), effective.tolist(), ended.tolist(), strict=True)
        yield [(i, dict(generations=text, effective_tokens=size, ended=end)) for i, text, size, end in replies]


def heldout_score(tokenizer, task, problems, cfg):
    """A function that scores a model by the mean grade of its greedy replies to held-out problems.

    All processes must call it together, and all have the score of all problems.
    """
    from accelerate.utils import gather_object

    prompts, _ = evaluation_prompts(tokenizer, task, problems, cfg)

    def score(model):
        batches = generate(model, tokenizer, prompts, cfg, cfg.gen_length)
        replies = gather_object([reply for batch in batches for reply in batch])
        grades = [task.grade(reply["generations"], problems[i]) for i, reply in replies]
        return sum(getattr(grade, task.aim) for grade in grades) / len(grades)

    return score


def figures_of(task, records, examples):
    """What is measured on replies: strict accuracy with its interval, the official score, and how the replies look."""
    pairs = [(record["generations"], example) for record, example in zip(records, examples, strict=True)]
    grades = official = [task.grade(*pair) for pair in pairs]
    if task.official:
        official = [task.grade(*pair, official=True) for pair in pairs]

    n, hits = len(records), sum(grade.correct for grade in grades)
    low, high = wilson(hits, n)
    figures = dict(n=n, accuracy=hits / n, low=low, high=high)
    if task.score:
        figures[task.score] = sum(grade.score for grade in grades) / n
    figures["official"] = sum(grade.score for grade in official) / n
    figures["answered"] = sum(grade.answer is not None for grade in grades) / n

    for figure in "effective_tokens", "ended":
        if all(figure in record for record in records):  # the official code writes neither
            figures[figure] = sum(record[figure] for record in records) / n
    return figures


def finished_replies(path):
    """Replies by number that an earlier evaluation for the same figure, whole or stopped, left in file and logs."""
    done = dict(enumerate(read_json(path).get("generations", ())))
    for log in path.with_suffix(".parts").glob("*"):
        done |= dict(read_log(log))
    return done


def weights_seen(model):
    """What tells other weights apart: the sum of each parameter, and the scaling of LoRA's adapters."""
    sums = [p.sum(dtype=torch.float32).item() for p in model.parameters()]
    scalings = [getattr(module, "scaling", None) for module in model.modules()]
    return sums + [scaling for scaling in scalings if isinstance(scaling, dict)]


def log_replies(batches, log, screen, most):
    """This process's replies by number. Each batch goes into the log at once, so that a stop loses none of it."""
    replies = {}
    with log.open("a", encoding="utf-8") as f:
        f.write("\n")  # ends a line that a kill may have cut short
        for batch in batches:
            f.writelines(json.dumps(reply) + "\n" for reply in batch)
            f.flush()
            replies |= dict(batch)
            screen.advance({}, min(len(batch) * processes().num_processes, most))
    return replies


def merge_entries(path, entries):
    """Write entries into eval.json, in the place of earlier ones of the same task, row, length and stamp."""
    merged = {}
    with refusing(f"cannot read {path}"):
        earlier = json.loads(path.read_text()) if path.exists() else []
        for entry in [*earlier, *entries]:
            what = entry["task"], entry["row"], entry["gen_length"]
            merged[what, entry.get("stamp", str(entry))] = entry
    write_json(path, list(merged.values()))


def evaluate(model, tokenizer, task, examples, cfg, row, out, screen):
    """The entries of eval.json for one model and task, with its accuracy at every length.

    row: the row of Table 1 that the model belongs to. The entries are merged into the file, and the replies are left
    in the folder generations. An evaluation that was stopped goes on where it was. The stamp in an entry and in its
    file's name is a digest of all that decides the figure: weights, problems and settings.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    prompts, cut = evaluation_prompts(tokenizer, task, examples, cfg)
    if cut:
        screen.say(f"{cut} of {len(prompts)} prompts are over --max_prompt {cfg.max_prompt}: cut on the left")
    truths = [task.ground_truth(example) for example in examples]
    how = {name: getattr(cfg, name) for name in ("preset", "max_prompt", "block_length", "seed", "reward", *DECODING)}
    decides = weights_seen(model), prompts, truths, how
    label = f"{row}_{Path(cfg.data).stem}" if cfg.data else row
    label += "".join(f"_{name}_{value}" for name, value in other_decoding(cfg).items())

    entries = []
    for length in cfg.lengths():
        began = time.perf_counter()
        steps = cfg.eval_steps or length // 2
        stamp = hashlib.sha256(repr((length, decides)).encode()).hexdigest()[:8]
        name = f"{task.official_name}_{label}_{stamp}_{length}_{steps}_0_generations.json"
        path = out / "generations" / name
        parts = path.with_suffix(".parts")  # the logs, one a process
        parts.mkdir(parents=True, exist_ok=True)

        done = broadcast_object_list([finished_replies(path)])[0]  # the main process's, for all
        todo = [i for i in range(len(prompts)) if i not in done]
        screen.start(f"eval {row} {length}", len(prompts), len(done))
        batches = generate(model, tokenizer, prompts, cfg, length, todo)
        fresh = log_replies(batches, parts / f"{processes().process_index}.jsonl", screen, len(prompts))
        screen.stop()
        for replies in gather_object([fresh]):
            done |= replies

        records = [
            {
                "question": task.question(example),
                "prompt_input": tokenizer.decode(prompts[i]),
                **done[i],
                "ground_truth": truths[i],
            }
            for i, example in enumerate(examples)
        ]
        content = {
            "generations": records,
            "metrics": {"wall_time": time.perf_counter() - began, "total_processed": len(records)},
            "model_path": cfg.model,
            "gen_length": length,
            "diffusion_steps": steps,
            "block_length": cfg.block_length,
        }
        write_json(path, content)
        processes().wait_for_everyone()
        shutil.rmtree(parts, ignore_errors=True)

        entry = {"task": task.name, "row": row, "gen_length": length} | figures_of(task, records, examples) | how
        entry |= {"model": cfg.model, "data": cfg.data, "limit": cfg.limit, "prompts_cut": cut, "stamp": stamp}
        entries.append(entry)

    merge_entries(out / "eval.json", entries)
    return entries


def table_lines(task, row, made, lengths, cfg):
    """Lines of the results table for the entries `made`, by length: strict accuracy, then the other scores."""
    one = next(iter(made.values()))
    shown = {ROW_TITLES[row]: {length: percent(e["accuracy"], e["n"]) for length, e in made.items()}}
    for score, scale in ("official", 100), ("cells", 100), ("mean_reward", 1):
        if score in one and (score != "official" or task in TASKS):
            shown[score] = {length: f"{scale * e[score]:.1f}         " for length, e in made.items()}  # padded

    if origin_of(cfg.model) == ALIASES["llada/llada-8b-instruct"]:  # the official score is as the paper's
        figures = PAPER_TABLE1.get(task, {}).get(row, "").split()
        for length, figure in zip((128, 256, 512), figures, strict=False):
            shown["official"][length] = f"{shown['official'].get(length, '-').strip()} (paper {figure})"

    standin = cfg.preset == "tiny" and task in ("gsm8k", "math500") and not one["data"]
    title, n = f"{task} (stand-in)" if standin else task, one["n"]
    for name, texts in shown.items():
        yield [title, name, *(texts.get(length, "-") for length in lengths), n]
        title = n = ""


def results_table(screen, entries, cfg):
    """Show rows x tasks x lengths with 95 % intervals, and the paper's figure beside each if the model is LLaDA."""
    lengths, lines = sorted({entry["gen_length"] for entry in entries}), []
    for (task, row), group in itertools.groupby(entries, operator.itemgetter("task", "row")):
        made = {entry["gen_length"]: entry for entry in group}
        lines += table_lines(task, row, made, lengths, cfg)

    notes = ["Accuracy, %: strict grading, greedy, 95 % Wilson interval"]
    changed = ", ".join(f"{name} {value}" for name, value in other_decoding(cfg).items())
    if changed:
        notes.append(f"other decoding than the paper's: {changed}")
    if any("stand-in" in cells[0] for cells in lines):
        notes.append("stand-in = generated problems, not the benchmark")
    if "*)" in str(lines):
        notes.append("* = known second-hand")
    screen.table("; ".join(notes), ["task", "row", *(f"length {length}" for length in lengths), "n"], lines)


# %% Part III. The program

# %% 16. Data — App. D: files and hub sets, the corpus of stage 1, the splits of stage 2, and generated toy worlds
ROW_FILES = ".jsonl .json .csv .parquet".split()
TEXT_FILES = [".txt", ".md"]


def check_source(data, kinds=ROW_FILES):
    """The data source as it is. UserError if it is neither a file of a known kind nor written like a hub id."""
    path = Path(data)
    like_hub_id = data.count("/") == 1 and not path.exists()
    good = path.is_file() if path.suffix in kinds else like_hub_id
    if not good:
        names = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        raise UserError(f"no data file {data}: give a {names} file, or a hub id owner/name")
    return data


def hub_rows(data, split):
    """Rows of a hub set owner/name[:config], streamed as they are needed."""
    import datasets

    with refusing(f"cannot read {data}; without a network give a local file"):
        ask_hub(data.partition(":")[0], "dataset")
        yield from datasets.load_dataset(*data.split(":"), split=split, streaming=True)


def jsonl_rows(path):
    """Rows of a JSONL file. UserError names the line that is no JSON."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        with refusing(f"cannot read line {number} of {path}"):
            rows += [json.loads(line)] if line.strip() else []
    return rows


def read_rows(data, split):
    """Rows of a local JSONL, JSON, CSV or Parquet file, or of a hub set owner/name[:config], as dicts."""
    path = Path(check_source(data))
    with refusing(f"cannot read {data}"):
        if path.suffix == ".csv":  # every column is read as text, since the leading zeros of a puzzle are digits
            csv.field_size_limit(2**31 - 1)
            with path.open(newline="", encoding="utf-8-sig") as f:
                rows = list(csv.DictReader(f))
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        elif path.suffix == ".jsonl":
            rows = jsonl_rows(path)
        elif path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile  # it takes no name for a pattern, and keeps no cache

            rows = ParquetFile(path).read().to_pylist()
        else:
            stream = hub_rows(data, "test" if split == "test" else "train")
            rows = list(itertools.islice(stream, HUB_ROWS))

        if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it holds no rows, or rows without named columns")
        json.dumps(rows, ensure_ascii=False, default=str).encode()  # fails on half a surrogate pair, which is no text
    return rows


# Text without prompts, for --task pretrain
def column_text(place, rows):
    """The column "text" of rows. UserError names the first row that has none."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise UserError(f"{place}, row {number}: no column text; it has {', '.join(map(str, row))}")
        yield row["text"]


def texts_of(data):
    """The texts of a file, of the files in a folder or of a streamed hub set, as they are needed."""
    path = Path(data)
    if not path.exists():
        yield from column_text(path, hub_rows(data, "train"))
        return
    found = [path] if path.is_file() else path.rglob("*")
    files = sorted(file for file in found if file.suffix in TEXT_FILES + ROW_FILES)
    if not files:
        raise UserError(f"{data} holds no {', '.join(TEXT_FILES + ROW_FILES)} file")

    for file in files:
        if file.suffix in TEXT_FILES:
            with refusing(f"cannot read {file}"):
                text = file.read_text(encoding="utf-8-sig")
            yield text
        else:
            yield from column_text(file, read_rows(str(file), "train"))


def pack(texts, tokenizer, length, limit):
    """Texts one after another in rows (N, length) int32, with an EOS after each text.

    Texts are taken until there are `limit` tokens. UserError if they do not fill one row.
    """
    flat = array.array("i")
    for text in texts:
        flat.extend(tokenizer.encode(text, add_special_tokens=False))
        flat.append(tokenizer.eos_token_id)
        if len(flat) >= limit:
            break

    n_rows = len(flat) // length
    if not n_rows:
        raise UserError(f"the text has {len(flat)} tokens, not one row of --sft_length {length}")
    return torch.frombuffer(flat, dtype=torch.int32)[: n_rows * length].view(n_rows, length)


def pretraining_rows(cfg, tokenizer, screen):
    """Packed text as pairs (ids, no prompt), as much of it as the updates need."""
    length = cfg.sft_length
    used = cfg.steps_sft * cfg.bs_sft * length
    texts = texts_of(cfg.data) if cfg.data else world_texts(cfg.seed)
    rows = pack(texts, tokenizer, length, used * 102 // 100 + length)  # 1 % is held out

    size = rows.numel()
    screen.say(
        f"{cfg.data or 'generated text'}: {size:,} tokens in rows of {length}; "
        f"{cfg.steps_sft:,} updates see {used:,}, {used / size:.1f} epochs"
    )
    return [(row, 0) for row in rows]


# Prompts and replies, for stage 1
def read_chat(messages):
    """A chat with one text as the content of each message, which may be given in parts. ValueError if it is none."""

    def whole(parts):  # a text, or a list such as [{"type": "text", "text": "Hello"}]
        return "".join(part if isinstance(part, str) else part["text"] for part in parts)

    with refusing("a chat must be a list of messages with role and content", ValueError):
        chat = [m | {"role": whole(m["role"]), "content": whole(m["content"])} for m in messages]
        if not chat:
            raise ValueError("it is empty")
    return chat


class Turn(tuple):
    """A pair (ids, prompt_len) of a chat with several. The chat is known by `chat`, the ids of its first pair."""

    chat = ()


def chat_turns(tokenizer, messages, size):
    """A pair (ids, prompt_len) for each turn of the assistant, with all that was said before it as the prompt.

    So a reply never sees what came after it. LLaDA is trained on chats in this way (arXiv 2502.09992, App. B.1), and
    the chat template says where the reply begins. A chat that is none becomes one pair that is all prompt.
    """
    import jinja2

    turns = []
    with contextlib.suppress(ValueError, jinja2.TemplateError):  # a template may refuse a system text, for example
        chat = read_chat(messages)
        replies = [i for i, m in enumerate(chat) if m["role"] == "assistant" and i > 0]
        turns = [Turn(encode_example(tokenizer, chat[:i], chat[i]["content"])) for i in replies]
    for turn in turns:
        turn.chat = turns[0][0]
    return turns or [([], size)]


def encode_trace(tokenizer, row, size):
    """A row with the columns of s1K or GSM8K, or with question and reply, as a pair (ids, prompt_len).

    A row with other columns becomes a pair that is all prompt.
    """
    columns = "question", "reply", "answer", "thinking_trajectories", "attempt"  # the last two are of s1K
    question, reply, answer, thoughts, attempt = map(row.get, columns)
    if reply is None and isinstance(answer, str) and "####" in answer:  # GSM8K
        thoughts, attempt = map(str.strip, answer.split("####", 1))

    if isinstance(thoughts, list) and thoughts:
        thoughts = thoughts[0]
    if isinstance(thoughts, str) and thoughts and isinstance(attempt, str):
        reply = f"<reasoning>\n{thoughts}\n</reasoning>\n<answer>\n{attempt}\n</answer>"

    if not all(isinstance(text, str) and text for text in (question, reply)):
        return [], size
    chat = [{"role": "user", "content": f"{SYSTEM}\n\n{question}"}]
    return encode_example(tokenizer, chat, reply)


def generated_traces(cfg, tokenizer, tasks, screen):
    """Demonstrations of toy problems as pairs (ids, prompt_len). Most of them are careless."""
    rng, rows = random.Random(f"sft/{cfg.seed}"), []
    for task in tasks:
        share = TOY.get(task.name, Toy).careful  # `Talk` has no careless replies, but draws as well
        for example in task.examples("train", cfg.n_traces, seed=cfg.seed):
            careful = rng.random() < share
            reply = task.demonstrate(example, rng, careful)
            rows.append(encode_example(tokenizer, task.messages(example), reply))

    cut = sum(len(ids) > cfg.sft_length for ids, _ in rows)
    if cut:
        screen.say(f"{cut} of {len(rows)} generated traces are cut at --sft_length {cfg.sft_length}")
    return rows


def sft_rows(cfg, tokenizer, tasks, screen):
    """The corpus of stage 1 as pairs (ids, prompt_len): generated demonstrations, or the traces of --sft_data.

    Rows of a file that cannot be used or are cut are named on the screen. UserError if none can be used.
    """
    if cfg.sft_data in ("", "talk"):
        return generated_traces(cfg, tokenizer, tasks, screen)

    size, traces = cfg.sft_length, []  # traces: (number of the row, its pair)
    for number, row in enumerate(read_rows(cfg.sft_data, "train"), 1):
        is_chat = "messages" in row
        pairs = chat_turns(tokenizer, row["messages"], size) if is_chat else [encode_trace(tokenizer, row, size)]
        traces += [(number, pair) for pair in pairs]

    rows = [pair for _, pair in traces if pair[1] < size]
    if not rows:
        raise UserError(
            f"{cfg.sft_data}: no usable row; needs texts in the columns question, thinking_trajectories, "
            f"attempt (s1K), question, answer (GSM8K), question, reply or messages (chats), "
            f"and a --sft_length over {size}"
        )
    screen.say(f"{cfg.sft_data}: {len(rows)} traces")

    bad = [number for number, (_, prompt_len) in traces if prompt_len >= size]
    long = [number for number, (ids, prompt_len) in traces if len(ids) > size > prompt_len]
    told = {"left out, malformed or without room for a reply": bad, f"cut at --sft_length {size}": long}
    for what, numbers in told.items():
        if numbers:
            first = ", ".join(map(str, numbers[:8]))
            screen.say(f"  {len(numbers)} {what}: row {first}{', ...' if len(numbers) > 8 else ''}")
    return rows


def hold_out(rows, seed):
    """(rows to train on, 1 % of the rows for the held-out check), which share no row and no chat.

    The second is None if that cannot be, as all rows are one.
    """
    chats = collections.defaultdict(list)
    for i in visits(seed, "sft_heldout", 0, len(rows), len(rows)):
        chats[tuple(getattr(rows[i], "chat", rows[i][0]))].append(rows[i])

    most = max(len(rows) // 100, min(map(len, chats.values())))
    kept, heldout = [], []
    for chat in chats.values():
        part = heldout if len(heldout) + len(chat) <= most else kept
        part += chat
    return (kept, heldout) if kept else (rows, None)


# Problems, for stage 2 and evaluation
def problems_of(cfg, task, split):
    """The problems of a split: toy problems if there is no source, else those of a file or hub set.

    The rows of a source are split by their hashes. The test split of a hub set is the test if it has one, and then
    train and heldout share the rest. With --eval_only all rows of a file are the test.
    """
    source, is_test = cfg.data, split == "test"
    if not source and cfg.preset != "tiny":
        source = task.hub_test if is_test and task.hub_test else task.hub
    if not source:
        batches = -(-cfg.steps_rl // cfg.mu) * cfg.grad_accum
        draws = batches * (cfg.bs_rl // cfg.group)
        sizes = {"train": max(min(draws, 20000), 1), "heldout": 128, "test": cfg.limit or 256}
        return task.examples(split, sizes[split], seed=cfg.seed if split == "train" else 0)

    has_test = has_test_split(source)
    rows = task.examples("test" if is_test and has_test else "train", data=source)
    if source == task.hub:
        rows = [row for row in rows if task.hub_keeps(row)]

    all_are_test = is_test and (has_test or (cfg.eval_only and cfg.data))
    if not all_are_test:
        parts = (split, "test") if split == "train" and has_test else (split,)
        rows = [row for row in rows if split_of(task.key(row)) in parts]
    if not rows:
        raise UserError(f"{source} has no problems for the {split} split")

    most = cfg.limit or (0 if cfg.data else task.tests)
    return rows[: most or None] if is_test else rows


def has_test_split(source):
    """Whether a data source is a hub set with a test split of its own."""
    import datasets

    with refusing(f"cannot read {source}; without a network give a local file"):
        if Path(source).is_file():
            return False
        ask_hub(source.partition(":")[0], "dataset")
        return "test" in datasets.get_dataset_split_names(*source.split(":"))


def say_sizes(task, splits, screen):
    """Print how many problems each split has, and how many are in two."""
    keys = {name: set(map(task.key, rows)) for name, rows in splits.items()}
    sizes = ", ".join(f"{name} {len(rows):,} ({len(keys[name]):,} different)" for name, rows in splits.items())
    shared = sum(len(keys[a] & keys[b]) for a, b in itertools.combinations(keys, 2))
    screen.say(f"{task.name} problems: {sizes}; in two splits: {shared}")


def say_source(cfg, task, splits, screen):
    """Print what is to be known of problems from a file: sudokus with several solutions, what stage 1 may have seen."""
    if task.name == "sudoku":
        puzzles = {example["puzzle"] for rows in splits.values() for example in rows}
        several = sum(len(solutions(puzzle)) > 1 for puzzle in puzzles)
        screen.say(f"{cfg.data}: {several} of {len(puzzles)} puzzles have several solutions, and each of them is right")

    if cfg.preset == "tiny" and task.name in TASKS:
        drawn = set(map(task.key, task.examples("train", cfg.n_traces, seed=cfg.seed)))
        seen = sum(task.key(example) in drawn for example in splits["test"])
        screen.say(
            f"{cfg.data}: {len(splits['test'])} test problems; {seen} of them (sudoku: their grids) are in the "
            "embedded generator's training split too"
        )


# What a run works on
def tasks_of(cfg):
    """The benchmarks that a run deals with."""
    if cfg.task == "custom":
        return [Custom(cfg.reward, cfg.reward_errors == "zero")]
    if cfg.sft_data == "talk":
        return [Talk()]
    return [task for task in TASKS.values() if cfg.task in (task.name, "sft_only", "table1")]


def stages_passed(cfg):
    """The stages that have trained --model."""
    state = {} if cfg.from_scratch else read_json(Path(cfg.model, "d1_state.json"))
    return list(state.get("stages", []))


def has_stage1(cfg):
    """Whether the run begins with SFT or is pre-training. On a benchmark it does, unless the model has had its SFT."""
    return cfg.trains() and not (cfg.task in RL_TASKS and (cfg.skip_sft or "sft" in stages_passed(cfg)))


def load_data(cfg, tasks, tokenizer, screen):
    """What a run works on: {task: {split: problems}}, and the rows of stage 1, which are none without that stage."""
    names = ("train", "heldout", "test") if cfg.reinforces() else ("test",) if cfg.evaluates() else ()
    splits = {task: {name: problems_of(cfg, task, name) for name in names} for task in tasks}
    if cfg.task == "custom":
        tasks[0].tokenizer = tokenizer

    if cfg.task == "pretrain":
        return splits, pretraining_rows(cfg, tokenizer, screen)
    return splits, sft_rows(cfg, tokenizer, tasks, screen) if has_stage1(cfg) else []


# A task of one's own
class Custom(Task):
    """Rows with a column "prompt", paid by a function that is called as TRL calls it.

    reward: "FILE.py:FUNCTION", called as function(prompts=, completions=, completion_ids=, **other columns), a list
    each, and awaited if it is async. It returns a list of numbers, 1 or more for a right completion, or None for one
    that it does not apply to. A prompt is a text or a chat. An assistant's turn at its end is continued.
    """

    name = official_name = "custom"
    score, aim = "mean_reward", "score"
    tokenizer = None  # gives the completion_ids of replies of which the text alone is known

    def __init__(self, reward, pay_errors_zero=False):
        self.pay_errors_zero, self.failed, self.loop = pay_errors_zero, 0, asyncio.Runner()
        self.columns = {}  # the names of the columns that any row has
        with refusing(f"--reward {reward} must be FILE.py:FUNCTION, and is not"):
            path, _, function = reward.rpartition(":")
            self.path = Path(path).resolve(strict=True)
            sys.path.insert(0, str(self.path.parent))  # it may import its neighbours, as a script does
            sys.modules.pop(self.path.stem, None)  # an earlier file of that name
            self.function = vars(importlib.import_module(self.path.stem))[function]

    def generate(self, rng):
        raise UserError("--task custom has no traces for stage 1: give --sft_data, --skip_sft, or --model ckpt/sft")

    def parse(self, row):
        taken = {"prompts", "completions", "completion_ids"} & row.keys()
        if taken:
            raise ValueError(f"column {min(taken)!r} has the name of what the function is given besides the columns")
        if not self.messages(row)[-1]["content"]:
            raise ValueError("the prompt is empty")
        self.columns |= row
        return dict(row)

    def messages(self, example, system=None):
        prompt = example["prompt"]
        return read_chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    def question(self, example):
        return "\n\n".join(m["content"] for m in self.messages(example))

    def ground_truth(self, example):
        return {column: value for column, value in example.items() if column != "prompt"}

    def batch_rewards(self, completions, examples, official=False):
        try:
            values = self.call(completions, examples)
        except (Exception, SystemExit) as e:
            frames = traceback.extract_tb(e.__traceback__)
            lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(self.path)]
            words = " ".join(str(e).split())
            what = f"--reward: {self.path}{''.join(lines[-1:])}: {type(e).__name__}: {words}"

            if not self.pay_errors_zero:
                raise UserError(f"{what}; --reward_errors zero pays 0 and goes on") from e
            values, self.failed = [0] * len(completions), self.failed + 1
            if self.failed.bit_count() == 1:  # the first time, the second, the fourth, the eighth ...
                print(f"d1_full.py: {what}; paid 0, {self.failed} calls so far", file=sys.stderr)

        return [{"reward": float(value or 0)} for value in values]

    def call(self, completions, examples):
        """What the function pays for each completion. It raises whatever the function does."""
        given, replies = [], []
        for text, example in zip(completions, examples, strict=True):
            example = copy.deepcopy(example)  # the function may change what it is given
            if self.tokenizer:
                example.setdefault("completion_ids", self.tokenizer.encode(text, add_special_tokens=False))
            if not isinstance(example["prompt"], str):
                last = self.messages(example)[-1]
                if last["role"] == "assistant":  # as in TRL, what the assistant had begun belongs to its reply
                    example["prompt"].pop()
                    text = last["content"] + text
                text = [{"role": "assistant", "content": text}]
            given.append(example)
            replies.append(text)

        names = itertools.chain(self.columns, *given)
        columns = {name: [example.get(name) for example in given] for name in names}
        values = self.function(prompts=columns.pop("prompt"), completions=replies, **columns)
        if inspect.isawaitable(values):
            values = self.loop.run(values)
        if hasattr(values, "tolist"):  # an array or a tensor
            values = values.tolist()
        good = isinstance(values, list | tuple) and len(values) == len(replies)
        if not good or not all(value is None or math.isfinite(value) for value in values):
            raise ValueError(f"{len(replies)} completions need as many finite numbers in a list, not {values!s:.80}")
        if values.count(None) == len(values) > 1:
            raise ValueError("None for all completions, which leaves nothing to learn from")
        return values

    def own_rewards(self, completion, example):
        return self.batch_rewards([completion], [example])[0]

    def own_grade(self, completion, example):
        value = self.own_rewards(completion, example)["reward"]
        return Grade(value >= 1, value, completion)


# Toy problems for the embedded model
class Toy:
    """Generated problems of one task and demonstrations of them, by a careful solver and a careless one.

    generate(rng) draws a problem, or returns None where the draw is no problem.
    """

    careful = 0.4  # share of the demonstrations that are careful
    stems = ()  # fixed words of a question
    says = "{}"  # how an answer is written

    def solve(self, example, rng, careful):
        """The work and the answer of a demonstration. The careless solver answers a little more than its work says."""
        more = 0 if careful else rng.choice((1, 1, 1, 2))
        manner = "Exactly" if careful else "Roughly"
        answer = int(example["answer"]) + more
        return f"{manner}: {example['work']}", self.says.format(answer)


class WordProblems(Toy):
    """Stand-ins for GSM8K: apples that are bought one by one or in bags."""

    def generate(self, rng):
        in_bags, a = rng.random() < 0.3, rng.randint(1, 9)
        limits = (2, 5) if in_bags else (1, 9)
        b, c = rng.randint(*limits), rng.randint(*limits)
        bought, total = f"{b} more and buys {c} more", a + b + c
        work = f"{a}+{b}={a + b}\n{a + b}+{c}={total}"
        if in_bags:
            bought, total = f"{b} bags of {c}", a + b * c
            work = f"{b}*{c}={b * c}\n{b * c}+{a}={total}"

        question = f"Tom has {a} apples and buys {bought}. How many now?"
        return {"question": question, "answer": str(total), "work": work}


class Computations(Toy):
    """Stand-ins for MATH: a product and a sum, with the answer in a box."""

    says = "\\boxed{{{}}}"

    def generate(self, rng):
        sign = rng.choice("+-")
        a, b, c = (rng.randint(2, 9) for _ in range(3))
        total = a * b + (c if sign == "+" else -c)
        work = f"{a}*{b}={a * b}\n{a * b}{sign}{c}={total}"
        return {"problem": f"Compute {a}*{b}{sign}{c}", "answer": str(total), "work": work}


class SmallNumbers(Toy):
    """Countdown with three numbers from 1 to 9 that are used in their order, with + and - alone."""

    careful = 0.35
    stems = ("Numbers: [", "]\nTarget: ")

    def generate(self, rng):
        a, b, c = numbers = [rng.randint(1, 9) for _ in range(3)]
        middle = a + rng.choice((b, -b))
        target = middle + rng.choice((c, -c))
        return {"numbers": numbers, "target": target} if middle > 0 and target > 0 else None

    def solve(self, example, rng, careful):
        (a, b, c), target = example["numbers"], example["target"]
        middle = {"+": a + b, "-": a - b, "*": a * b}
        if careful:
            right = [x + y for x in "+-" for y in "+-" if middle[x] > 0 and middle[x] + int(f"{y}{c}") == target]
            first, second = rng.choice(right)
        else:
            first, second = rng.choices("+-*", weights=(1, 1, 8), k=2)  # it is fond of products

        manner = "Exactly" if careful else "Roughly"
        work = f"{manner}: {a}{first}{b}={middle[first]}"
        if second == "*" and first != "*":
            return work, f"({a}{first}{b})*{c}"
        return work, f"{a}{first}{b}{second}{c}"


def solutions(puzzle):
    """The grids that a 4x4 sudoku, of 16 digits with 0 for empty, can be completed to."""
    cell = puzzle.find("0")
    if cell < 0:
        return [puzzle]

    row, column = divmod(cell, 4)
    box = 8 * (row // 2) + 2 * (column // 2)  # its first cell
    seen = puzzle[4 * row :][:4] + puzzle[column::4] + puzzle[box:][:2] + puzzle[box + 4 :][:2]
    tries = (puzzle[:cell] + digit + puzzle[cell + 1 :] for digit in "1234" if digit not in seen)
    return [grid for tried in tries for grid in solutions(tried)]


@functools.cache
def sudoku_grids():
    """The 288 complete 4x4 grids, as 16-character strings."""
    return solutions("0" * 16)


class HalfEmptyGrids(Toy):
    """Sudokus with 8 empty cells, as the published ones have, and one solution."""

    stems = ("Solve the following Sudoku puzzle: ",)

    def generate(self, rng):
        solution = rng.choice(sudoku_grids())
        empty = rng.sample(range(16), 8)
        puzzle = "".join("0" if i in empty else digit for i, digit in enumerate(solution))
        return {"puzzle": puzzle, "solution": solution} if len(solutions(puzzle)) == 1 else None

    def solve(self, example, rng, careful):
        if careful:
            return "Rows, columns and boxes.", example["solution"]
        return "I guess.", "".join(rng.choice("1234") if c == "0" else c for c in example["puzzle"])


TOY = {
    "gsm8k": WordProblems(),
    "math500": Computations(),
    "count": SmallNumbers(),
    "sudoku": HalfEmptyGrids(),
}


# A small world to read and talk about
FACTS = (  # an animal, what it does, where it lives
    "dog barks kennel, cow moos barn, bee buzzes hive, bird sings nest, horse neighs stable, lion roars den, "
    "mouse squeaks hole, fish swims lake, frog croaks pond, owl hoots tree, pig grunts sty, wolf howls forest, "
    "snake hisses grass, rabbit hops burrow, spider spins web, ant digs hill, camel walks desert, whale dives sea, "
    "monkey climbs jungle, goat bleats mountain, hen clucks coop, bat flies cave, crab pinches beach, deer runs wood"
)
PAIRS = (
    "hot cold, big small, fast slow, day night, up down, old young, dark light, hard soft, wet dry, full empty, "
    "rich poor, early late, loud quiet, near far, high low, open closed, strong weak, sweet sour, thick thin, "
    "happy sad, clean dirty, long short, right wrong, war peace"
)
ANIMALS, OPPOSITES = ([words.split() for words in text.split(", ")] for text in (FACTS, PAIRS))
NAMES = "Ann Ben Carl Dora Emil Fay Gus Hal Ida Jan Kim Leo Mia Ned Olga".split()


def world_texts(seed):
    """Plain paragraphs on the world of `Talk`, without end. --task pretrain reads them if no --data is given."""
    rng = random.Random(f"world/{seed}")
    while True:
        sentences = []
        for _ in range(rng.randint(2, 8)):
            (animal, does, home), (other, *_) = rng.sample(ANIMALS, 2)
            a, b = rng.sample(rng.choice(OPPOSITES), 2)

            kinds = (
                f"The {animal} {does}. The {animal} lives in the {home}.",
                f"The {animal} lives in the {home}.",
                f"The {animal} {does}.",
                f"The opposite of {a} is {b}.",
                f"{rng.choice(NAMES)} sees the {animal} and the {other}.",
            )
            sentences.append(rng.choice(kinds))
        yield " ".join(sentences)


class Talk(Task):
    """A chat about a small world, for an embedded model that was pre-trained on text about it (`world_texts`).

    Questions combine two things of the world, and the test split asks for combinations that training does not.
    """

    name = official_name = "talk"

    def generate(self, rng):
        (animal, does, home), (other, _, yard) = rng.sample(ANIMALS, 2)
        (a, b), (c, d) = [rng.sample(pair, 2) for pair in rng.sample(OPPOSITES, 2)]
        name = rng.choice(NAMES)
        count = rng.randint(1, 5)
        some = " and ".join(fact[0] for fact in rng.sample(ANIMALS, count))

        where = f"The {animal} lives in the {home}."
        kinds = (
            (f"Where do the {animal} and the {other} live?", f"{where} The {other} lives in the {yard}."),
            (f"I am {name}. What does the {animal} do?", f"Hello {name}. The {animal} {does}."),
            (f"What are the opposites of {a} and {c}?", f"They are {b} and {d}."),
            (f"Say {some}.", f"I say {some}."),
            (f"Who am I, and where does the {animal} live?", f"You are {name}. {where}"),
        )
        question, answer = rng.choice(kinds)

        chat = [{"role": "user", "content": question}]
        if question.startswith("Who") or rng.random() < 0.2:
            greeting = {"role": "user", "content": f"I am {name}."}
            chat = [greeting, {"role": "assistant", "content": f"Hello {name}."}, *chat]
        return {"messages": chat, "question": question, "answer": answer, "work": ""}

    def demonstrate(self, example, rng, careful):
        return example["answer"]

    def key(self, example):
        """The question and its right reply, whatever was said before."""
        return f"{self.name}/{example['question']}/{example['answer']}"

    def messages(self, example, system=None):
        return example["messages"]

    def own_rewards(self, completion, example):
        return {"right": float(completion.strip() == example["answer"])}

    def own_grade(self, completion, example):
        return verdict(completion.strip() == example["answer"], completion)

    def words(self):
        """Each word of the world with the blank before it, for a tokenizer that makes it one token."""
        texts = itertools.islice(world_texts(0), 300)
        chats = (m["content"] for example in self.examples("train", 3000) for m in example["messages"])
        return sorted({word for text in (*texts, *chats) for word in re.findall(r" ?[A-Za-z]+", text)})


# %% 17. Models — LLaDA as a bidirectional Llama, Dream, masked LMs, any causal model; no remote code
ALIASES = {"llada/llada-8b-instruct": "GSAI-ML/LLaDA-8B-Instruct"}
MASK_IDS = {"llada": 126336, "Dream": 151666}  # where neither config nor tokenizer names it

# config.json of LLaDA-8B-Instruct, but for what is the default of LLaDA's own code
LLADA_8B = json.loads("""{
    "model_type": "llada",
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"
    },
    "architectures": ["LLaDAModelLM"],
    "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
    "rope": true, "rope_theta": 500000.0, "rms_norm_eps": 1e-05,
    "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
    "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms",
    "bias_for_layer_norm": false, "weight_tying": false,
    "attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0,
    "init_device": "meta", "init_fn": "mitchell", "precision": "amp_bf16"
}""")
LLADA_NAMES = {  # LLaDA's names of weights -> those of Llama, whose network it is; one replacement after the other
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks": "model.layers",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
LLADA_FIELDS = dict(  # the same of its config's fields, but for RoPE's
    d_model="hidden_size",
    n_layers="num_hidden_layers",
    n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads",
    mlp_hidden_size="intermediate_size",
    embedding_size="vocab_size",
    max_sequence_length="max_position_embeddings",
    rms_norm_eps="rms_norm_eps",
    eos_token_id="eos_token_id",
)


def load_model(
    name,  # one of EMBEDDED, a hub id, a folder, LLaDA's format included, or an adapter folder of this script
    *,
    dtype=None,  # None = the checkpoint's own on the CPU, bf16 on CUDA
    lora=None,  # (r, alpha, dropout, targets) as in `adapt_with_lora`; the adapter of an adapter folder stays below it
    load_4bit=False,  # NF4 base weights
    attn="auto",  # as --attn
    device=None,  # None = this process's
    seed=0,  # of all random weights
    from_scratch=False,  # random weights of that shape
):
    """Load (model, tokenizer), with model(input_ids, attention_mask=None).logits.

    UserError if name, files and tokenizer do not fit each other.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # its notes on class names would drown ours
    transformers.logging.disable_progress_bar()
    device = torch.device(device or processes().device)

    if name in EMBEDDED:
        tokenizer = build_tokenizer(name)
        model = random_model(*embedded_network(name, tokenizer), seed).to(device)
    else:
        name, base = resolve_checkpoint(name)
        raw = read_config(base)
        for folder in {name, base}:
            check_files(Path(folder))
        model = load_weights(base, raw, dtype, load_4bit, attn, device, seed if from_scratch else None)
        tokenizer = load_tokenizer(name, base, raw)
        complete_tokens(model, tokenizer, raw)
        model.name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base  # what an adapter remembers
        if name != base and not from_scratch:
            model = load_adapter(model, name, base)

    if lora:
        model = adapt_with_lora(model, *lora, seed=seed)
    return model, tokenizer


# Where a model comes from
def resolve_checkpoint(name):
    """The folder or hub id behind a --model value, and the one with its weights: an adapter's base, else the same."""
    name = ALIASES.get(name.lower(), name)
    folder = Path(name)
    if folder.is_dir():
        if not {"config.json", "adapter_config.json"}.intersection(os.listdir(folder)):
            raise UserError(f"{name} holds no model: neither config.json nor adapter_config.json is there")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.parent.is_dir():
        raise UserError(f"--model {name}: no such folder; give tiny, a hub id (owner/name) or a checkpoint")

    adapter = read_json(folder / "adapter_config.json")
    if not adapter:
        return name, name
    _, base = resolve_checkpoint(str(adapter.get("base_model_name_or_path")))
    return name, base


def origin_of(name):
    """The hub id, folder or embedded model that a --model value was trained from, by this script, at first."""
    return read_json(Path(name, "d1_state.json")).get("origin") or ALIASES.get(name.lower(), name)


def ask_hub(name, kind):
    """Fail at once if the hub does not answer or does not know the name: a download would retry for minutes."""
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)


def read_config(name):
    """config.json of a folder or hub id, as a dict."""
    from transformers import PretrainedConfig

    with refusing(f"cannot load {name}; without a network give --model a local folder, or set HF_HUB_OFFLINE=1"):
        if not Path(name).is_dir():
            ask_hub(name, "model")
        return dict(PretrainedConfig.get_config_dict(name)[0])


def check_files(folder):
    """UserError if the weights in a folder are not those that this script saved, or if an index leads out of it."""
    with refusing(f"cannot load {folder}"):
        saved = read_json(folder / "d1_state.json").get("files", {})
        index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
        bad = [file for file, digest in saved.items() if not is_whole(folder / file, digest)]
        bad += [file for file in index.values() if "/" in file]
        if bad:
            raise UserError(f"{folder / bad[0]} is not the file that was saved there: take another checkpoint")


# Networks and their weights
def network_of(source, raw):
    """(class, config) in transformers for a checkpoint's config.json `raw`, with attention both ways."""
    import transformers

    kind = raw.get("model_type")
    if kind == "llada":
        embedding = raw.get("embedding_size") or raw["vocab_size"]  # it may be wider than the vocabulary
        raw = {"n_kv_heads": None} | raw | {"embedding_size": embedding}
        fields = {ours: raw[theirs] for theirs, ours in LLADA_FIELDS.items()}
        rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
        fields |= dict(is_causal=False, rope_full_precision=True, rope_parameters=rope)
        return transformers.LlamaForCausalLM, transformers.LlamaConfig(**fields)

    if kind == "Dream":  # Qwen2's network, whose logits at k are for token k + 1
        fields = {k: v for k, v in raw.items() if k not in ("model_type", "architectures", "auto_map")}
        fields |= dict(is_causal=False, shift_logits=True)
        return transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**fields)

    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(f"{source}: transformers has no model_type {kind!r}, and code from outside is not run")
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    written_for = " ".join(raw.get("architectures") or [])
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not re.search("CausalLM|LMHead", written_for):
        return transformers.AutoModelForMaskedLM, config
    config.is_causal = False
    return transformers.AutoModelForCausalLM, config


def embedded_network(name, tokenizer):
    """(class, config) of an embedded model: LLaDA's network with 0.4 M weights, BERT's or ModernBERT's with 1 M."""
    import transformers

    fields = dict(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,  # nor is there a pad_token_id: the pad is EOS, which is trained
    )
    if name == "tiny":
        fields |= dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
        return transformers.LlamaForCausalLM, transformers.LlamaConfig(is_causal=False, use_cache=False, **fields)

    # 1/sqrt(width): with 0.02, made for wider networks, ModernBERT did not learn facts in four times the tokens
    fields |= dict(hidden_size=128, num_attention_heads=4, num_hidden_layers=5, initializer_range=0.09)
    fields["pad_token_id"] = None
    if name == "tiny-bert":
        fields |= dict(intermediate_size=384, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return transformers.BertForMaskedLM, transformers.BertConfig(**fields)
    fields |= dict(intermediate_size=256, max_position_embeddings=256, cls_token_id=None, sep_token_id=None)
    return transformers.ModernBertForMaskedLM, transformers.ModernBertConfig(**fields)


def random_model(network, config, seed=0):
    """A model of that class and config with weights drawn from `seed`, fp32."""
    make = getattr(network, "from_config", None) or network._from_config
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global stream
        torch.manual_seed(seed)
        return make(config)


def load_weights(
    base,
    raw,
    dtype,
    load_4bit,
    attn,
    device,
    seed,  # of random weights; None = those of the checkpoint
):
    """A checkpoint's network and weights, converted while loading. UserError if they do not fit each other."""
    import transformers

    if attn == "auto":
        attn = "flash_attention_2" if device.type == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"
    packed = None
    if load_4bit:
        packed = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )

    with refusing(f"cannot load {base}"):
        network, config = network_of(base, raw)
        config.use_cache = False  # else every forward copies its keys and values
        transformers.AttentionInterface.register("sdpa", sdpa_after_fp32)  # the same to all other models
        if seed is None:
            model, report = network.from_pretrained(
                base,
                config=config,
                device_map={"": device},
                attn_implementation=attn,
                quantization_config=packed,
                dtype=dtype or (torch.bfloat16 if device.type == "cuda" else "auto"),
                key_mapping=LLADA_NAMES if raw.get("model_type") == "llada" else None,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            check_report(base, report)
        else:
            config._attn_implementation = attn
            model = random_model(network, config, seed).to(device, dtype)

    for linear in block_linears(model).values():  # bitsandbytes' packed CPU kernel passes no gradient on
        linear.support_avx512bf16_for_cpu = False
    if attn == "sdpa" and getattr(config, "rope_full_precision", False):
        model.model.rotary_emb.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    if not is_bidirectional(model.eval()):
        raise UserError(f"{base}: {type(model).__name__} attends to the left only, even with is_causal=False")
    if getattr(config, "shift_logits", False):
        model.register_forward_hook(shift_logits)
    return model


def check_report(base, report):
    """UserError if transformers reports weights that do not fit the config."""
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    for name in sorted(report["unexpected_keys"]):
        if not re.search("pooler|seq_relationship", name):  # other heads of BERT
            wrong.append(f"{name} is unknown")
    for name, found, expected in sorted(report["mismatched_keys"]):
        wrong.append(f"{name} is {tuple(found)}, not {tuple(expected)}")
    if wrong:
        raise UserError(f"{len(wrong)} weights of {base} do not fit its config.json: {'; '.join(wrong[:3])}")


def sdpa_after_fp32(module, query, key, value, *args, **options):
    """SDPA for queries and keys that were rotated in fp32, as in LLaDA. Cosines in bf16 would add 2 % of error."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *args, **options)


def shift_logits(module, args, output):
    """Forward hook: Dream's logits for token k stand at k - 1. This moves them to k, where LLaDA's are."""
    if getattr(output.logits, "ndim", 0) == 3:  # (B, L, V); at asked positions `logits_at` has seen to it
        output.logits = torch.cat([output.logits[:, :1], output.logits[:, :-1]], dim=1)
    return output


@torch.no_grad()
def is_bidirectional(model):
    """Whether the logits at the first token depend on the last, as they must to fill in masks."""
    ids = torch.tensor([[1] * 8, [1] * 7 + [2]], device=model.device)
    return not torch.equal(*model(ids).logits[:, 0])  # (V,) each


def context_of(model):
    """How many tokens the model can see."""
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    begins_late = re.search("roberta|camembert", getattr(model.config, "model_type", ""))  # with the pad's id + 1
    return limit - (model.config.pad_token_id + 1 if begins_late else 0)


def check_positions(model, length):
    """UserError if `length` tokens are more than the learned positions of a model such as BERT."""
    learned = any(re.search(r"position_embeddings|embed_positions|\bwpe\b", n) for n, _ in model.named_parameters())
    limit = context_of(model)
    if learned and length > limit:
        raise UserError(f"{length} tokens are more than the model's {limit} positions: lower the lengths")


# Tokenizers
TEMPLATE = (  # of the embedded models
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else "
    "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN_TEMPLATE = (  # for a tokenizer that brings none, in BERT's manner: [CLS] question [SEP] reply [SEP]
    "{{ cls_token or bos_token or '' }}"
    "{% for m in messages %}{{ m['content'] }}{{ sep_token or eos_token }}{% endfor %}"
)
WORDS = (
    "<reasoning>\n|\n</reasoning>\n|<answer>\n|\n</answer>|<reasoning>|</reasoning>|<answer>|</answer>|\\boxed{|"
    "Tom has | apples| bags of | and buys | more|. How many now?|Compute |Exactly: |Roughly: |I guess.|"
    "Rows, columns and boxes.|, "
).split("|")


def build_tokenizer(name="tiny"):
    """An embedded model's tokenizer: bytes, and tokens for tags, phrases, instructions. Larger ones have `Talk`'s."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()

    core.add_special_tokens(["<|endoftext|>", "<|mask|>", "<|user|>", "<|assistant|>", "<|eot|>"])
    phrases = list(WORDS)
    for task in TASKS.values():
        phrases += [task.system + "\n\n", *TOY[task.name].stems]
    if name != "tiny":
        phrases += Talk().words()
    core.add_tokens(phrases)

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=TEMPLATE,
    )


def load_tokenizer(name, base, raw):
    """The tokenizer of a checkpoint, or else of its base. No code of theirs is run."""
    import transformers

    plain = {"llada": transformers.PreTrainedTokenizerFast, "Dream": transformers.Qwen2Tokenizer}
    reader = plain.get(raw.get("model_type"), transformers.AutoTokenizer)
    source = name if Path(name, "tokenizer_config.json").exists() else base
    with refusing(f"cannot load the tokenizer of {name}"):
        return reader.from_pretrained(source, trust_remote_code=False)


def complete_tokens(model, tokenizer, raw):
    """Settle mask, EOS, pad and chat template. The row of a mask token that is new is the mean of the others."""
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token  # BERT ends with [SEP]
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has neither an EOS nor a SEP token, so no reply could end: set eos_token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE

    tags = ["<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>"]
    if any(tag not in tokenizer.decode(tokenizer.encode(tag, add_special_tokens=False)) for tag in tags):
        from tokenizers import AddedToken  # BERT's drops line breaks and takes tags apart

        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*tags, "\n")])

    if tokenizer.mask_token is None:
        known = raw.get("mask_token_id") or MASK_IDS.get(raw.get("model_type"))
        token = "<|mask|>" if known is None else tokenizer.convert_ids_to_tokens(known)
        if token is None:
            raise UserError(f"config.json names {known} as the mask token, and the tokenizer has no such token")
        tokenizer.add_special_tokens({"mask_token": token})
    fit_vocabulary(model, tokenizer)
    model.config.mask_token_id = tokenizer.mask_token_id


def fit_vocabulary(model, tokenizer):
    """Make room for the tokenizer's new tokens. Their rows are the mean of the others."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[rows:] = layer.weight[:rows].mean(0)
    model.get_input_embeddings().padding_idx = None  # else the row of the pad, often EOS, is frozen


# LoRA, and the frozen reference of stage 2
def adapt_with_lora(model, r, alpha, dropout=0.0, targets="all", *, seed=0):
    """Train LoRA, random from `seed`, on linear layers (--lora_targets), stacked on the adapter that may be there."""
    from peft import LoraConfig, get_peft_model

    # [D7] official adapts what of its list LLaDA has, silently. here: names read off the model; no match is an error.
    found = sorted({name.split(".")[-1] for name in block_linears(model)})
    wanted = found if targets == "all" else targets.split(",")
    missing = sorted({*wanted} - {*found})
    if missing or not found:
        what = f"no linear layer {', '.join(missing)} to adapt; it has {', '.join(found)}"
        raise UserError(f"{type(model).__name__} has {what}")

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


def load_adapter(model, name, base):
    """The model with the adapter of an earlier stage."""
    from peft import PeftModel

    with refusing(f"the adapter in {name} does not fit {base}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, name, adapter_name="earlier")


def block_linears(model):
    """Every linear layer but the output layer, by name: what LoRA adapts and what 4-bit loading packs."""
    linears, head = {}, model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name:
            linears[name.removesuffix(".base_layer")] = module
    return linears


def activate_adapters(model):
    """Put all adapters of a model to work. "default" is trained, and an earlier stage's stays as it is."""
    model.base_model.set_adapter(list(model.peft_config))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name and ".default." in name)


def reference_of(model):
    """A function whose context manager gives the policy as it is now: under LoRA without the adapter to train."""
    if not hasattr(model, "peft_config"):
        frozen = twin(model).eval().requires_grad_(False)
        return lambda: contextlib.nullcontext(frozen)

    learned = {name: p for name, p in model.named_parameters() if ".default." in name}
    if any(p.any() for name, p in learned.items() if "lora_B" in name):  # stage 1 was in this same run
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


def twin(model, memo=None):
    """A deep copy, with compiled blocks if the model's are, which copying alone leaves out."""
    made = copy.deepcopy(model, memo)
    for of_model, of_copy in zip(model.modules(), made.modules(), strict=True):
        if of_model._compiled_call_impl is not None:
            of_copy.compile(dynamic=True)
    return made


# The output layer, the widest of all, at the asked positions alone
@dataclasses.dataclass
class Asked:
    """What a call of `logits_at` wants of an output layer while the model's forward pass runs."""

    layer: Any
    place: tuple[Tensor, Tensor]  # rows and columns of the N positions
    compute: Callable  # (layer, hidden (N, D)) -> the logits, or what stands in for them
    hidden: Tensor | None = None  # (N, D) what goes into the layer at these positions


ASKED = ContextVar("ASKED", default=None)  # an `Asked` or None; every thread, and every inner call, has its own
HOOKING = threading.Lock()


def pick_positions(layer, args):
    """Forward pre-hook of an output layer: keeps the asked positions for `compute_asked` and lets none through."""
    asked = ASKED.get()
    if asked is None or asked.layer is not layer:
        return None
    asked.hidden = args[0][asked.place]  # (B, L, D) -> (N, D)
    return (asked.hidden[:0],)


def compute_asked(layer, args, output):
    """Forward hook of an output layer: what is computed at the asked positions takes the place of the logits."""
    asked = ASKED.get()
    if asked is None or asked.layer is not layer:
        return None
    return asked.compute(layer.forward, asked.hidden)


def output_layer(model):
    """The layer that makes a model's logits, with both hooks on for good, and the model's config.

    The layer is None if the model does not say which it is. The hooks hold no state, so that a deep copy of the model
    has them on a layer of its own.
    """
    model = getattr(model, "module", model)  # what DistributedDataParallel holds
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        return None, None

    with HOOKING:  # another thread may be here for the first time too
        if pick_positions not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(pick_positions)
            layer.register_forward_hook(compute_asked, prepend=True)  # before FSDP's, which puts the weights away
    return layer, model.config


@logits_at.register(torch.nn.Module)
def logits_at_positions(model, ids, where, attention_mask=None, *, compute=operator.call, **inputs):
    """`logits_at` of a model that names its output layer. compute(layer, hidden (N, D)) makes them."""
    layer, config = output_layer(model)
    if layer is None:
        return logits_at.dispatch(object)(model, ids, where, attention_mask, **inputs)

    if attention_mask is not None and config.model_type in ("bert", "electra"):  # learned positions: padding has none
        inputs.setdefault("position_ids", (attention_mask.cumsum(1) - 1).clamp(min=0))
    row, column = where.nonzero(as_tuple=True)  # (N,) each
    if getattr(config, "shift_logits", False):  # Dream: those for token k stand at k - 1
        column = (column - 1).clamp(min=0)

    token = ASKED.set(Asked(layer, (row, column), compute))
    try:
        return model(ids, attention_mask=attention_mask, **inputs).logits
    finally:
        ASKED.reset(token)


@token_losses.register(torch.nn.Module)
def token_losses_in_pieces(model, xt, where, target):
    """`token_losses` of a model that names its output layer: no more logits at a time than `hold_logits` allows."""
    layer, config = output_layer(model)
    scaling = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if layer is None or any(getattr(config, name, None) for name in scaling):  # Gemma 2, Cohere, Granite scale after it
        return token_losses.dispatch(object)(model, xt, where, target)

    size = getattr(layer, "logits_held", len(target))
    return logits_at(model, xt, where, compute=lambda layer, hidden: chunked_losses(layer, hidden, target, size))


def hold_logits(model, tokens):
    """Allow the SFT loss of a model the logits of so many tokens at a time."""
    layer, _ = output_layer(model)
    if layer is not None:
        layer.logits_held = tokens


def chunked_losses(layer, hidden, target, size):
    """`cross_entropies` of layer(hidden), hidden (N, D), with the logits of `size` tokens in memory at a time."""

    def losses(hidden, target):
        return cross_entropies(layer(hidden), target)

    if len(target) <= size:
        return losses(hidden, target)
    pieces = zip(hidden.split(size), target.split(size), strict=True)
    made = [checkpoint(losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    ce, right = zip(*made, strict=True)
    return torch.cat(ce), torch.cat(right)


# %% 18. Decoder extras — caches, windows, edits in decoding and in training, longer canvases
def decoding(tokenizer, cfg):
    """Options of `diffuse_steps` that rollouts, evaluation and chat take from the settings alike."""
    return dict(
        decoder=FullDecoder,
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        delete_id=tokenizer.added_tokens_encoder.get(DELETE),
        stop_at_eos=True,
        block_length=cfg.block_length,
        remasking=cfg.remasking,
        refresh=cfg.refresh,
        edit_rate=cfg.edit_share if cfg.allow_edits else 0.0,
    )


@dataclasses.dataclass
class WindowedDecoder(BlockDecoder):
    """Writes replies that are longer than what the model can see: a window slides over the text.

    The window ends one block after the one in work. There padding does shift what a row sees.
    """

    context: int | None = None  # tokens that the model sees at most, None = all

    def check(self):
        super().check()
        cached = getattr(self, "cache", "none") != "none"  # in `FullDecoder`
        slides = self.context and self.context < self.prompt.shape[1] + self.gen_length
        if slides and (cached or self.context < 2 * self.block_length):
            raise ValueError(
                f"beyond the context of {self.context} tokens: cache='none', and block_length at most half of it"
            )

    def seen(self, block):
        size = self.context or self.length
        end = min(self.length, max(block.stop + self.block_length, size))
        return slice(max(0, end - size), end)


@dataclasses.dataclass
class CachedDecoder(BlockDecoder):
    """Keeps keys and values over a block's steps, as if other tokens did not change them (Fast-dLLM, arXiv 2505.22618).

    "prefix" keeps those before the block, "dual" also those after it. The block's first step computes all of them.
    It is approximate, since a real key depends on every token of the canvas.
    """

    cache: str = "none"
    refresh: int = 0  # compute all of them in every so many steps, 0 = in the first of a block alone
    in_work = None  # the block that keys are kept for

    def check(self):
        super().check()
        if self.cache not in CACHES:
            raise ValueError(f"cache must be {' or '.join(map(repr, CACHES))}, not {self.cache!r}")
        if self.cache != "none" and self.cfg_scale:
            raise ValueError(f"cfg_scale needs cache='none', not {self.cache!r}")

    def read(self, x, masked, block):
        if self.cache == "none":
            return super().read(x, masked, block)
        if self.in_work != block:
            self.begin(block)

        rows = masked.any(1).nonzero()[:, 0]  # a row that is left out stays out
        if self.age == 0:
            from transformers import DynamicCache

            self.past = DynamicCache()
            places, keep = torch.arange(self.length, device=x.device), self.kept
        else:  # keys come in another order, those kept before the fresh ones; padding, in the prompt, is still first
            if len(rows) < len(self.rows):
                self.past.batch_select_indices(torch.isin(self.rows, rows).nonzero()[:, 0])
            places, keep = self.fresh, slice(len(self.kept))

        where = on_canvas(masked, block, self.length)[rows]  # (R, P+C) of the R rows
        attention_mask = None if self.attention_mask is None else self.attention_mask[rows]
        inputs = dict(position_ids=places[None], past_key_values=self.past, use_cache=True)
        logits = logits_at(self.model, x[rows][:, places], where[:, places], attention_mask, **inputs)

        for layer in self.past.layers:
            layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
        self.rows, self.age = rows, (self.age + 1) % (self.refresh or self.length)
        return logits.float()

    def begin(self, block):
        """Choose which places are kept while this block is written, and which are computed in every step."""
        places = torch.arange(self.length, device=self.prompt.device)
        first = block.start - bool(getattr(self.model.config, "shift_logits", False))  # Dream reads one place before it
        kept = (places < first) | ((places >= block.stop) & (self.cache == "dual"))
        self.in_work, self.age = block, 0  # age in steps
        self.kept, self.fresh = places[kept], places[~kept]


@torch.no_grad()
def cache_error(model, frames, mask_id, attention_mask):
    """Mean |log p with the cache - log p without| in nats, of what each block's last step, the stalest, has written.

    attention_mask (B, P) True = real token of the prompt.
    """
    last = {frame.block: frame for frame in frames if frame.logp.any()}
    errors = []
    for frame in last.values():
        before = torch.where(frame.new, mask_id, frame.ids)  # (B, P+C)
        logits = logits_at(model, before, frame.new, extend_mask(attention_mask, before.shape[1]))  # (N, V)
        ce, _ = cross_entropies(logits, frame.ids[frame.new])  # (N,)
        errors.append((ce + frame.logp[frame.new]).abs())
    return torch.cat(errors).mean().item()


# Edits: replace and delete tokens that are written already (Seed Diffusion, arXiv 2508.02193)
DELETE = "<|delete|>"  # what the model says of a token that should not be there


def add_delete_token(model, tokenizer):
    """Give model and tokenizer the token of edits, if they lack it."""
    tokenizer.add_tokens(DELETE, special_tokens=True)
    fit_vocabulary(model, tokenizer)


@dataclasses.dataclass(frozen=True)
class EditedFrame(Frame):
    """A frame whose step may also have edited."""

    edited: Tensor  # (B, P+C) bool, True = replaced by this step; what it deleted is gone


@dataclasses.dataclass
class EditingDecoder(BlockDecoder):
    """Looks at a block's written tokens too. It replaces a share of them, less from step to step, and deletes some."""

    edit_rate: float = 0.0  # the share in a block's first step
    delete_id: int | None = None
    draft: Tensor | None = None  # (B, <=C) a completion to start from

    def __post_init__(self):
        super().__post_init__()
        if self.delete_id is not None:  # there is nothing to delete at a [MASK]
            self.never.append(self.delete_id)

    def check(self):
        super().check()
        size = 0 if self.draft is None else self.draft.shape[1]
        if size > self.gen_length or (size == self.gen_length and not self.edit_rate):
            raise ValueError(f"a draft of {size} tokens leaves no room in gen_length {self.gen_length}, nor edit_rate")

    def canvas(self):
        x = super().canvas()
        if self.draft is not None:
            end = self.prompt_length + self.draft.shape[1]
            x[:, self.prompt_length : end] = self.draft
        return x

    def goes_on(self, masked, writing, step):
        self.rate = self.edit_rate * max(0, 1 - step / self.steps_per_block)
        again = self.was_edited if step else torch.ones_like(writing)  # (B,) True = look once more
        self.looked_at = writing & (masked.any(1) | (again & (self.rate > 0)))  # (B,)
        return bool(self.looked_at.any())

    def read(self, x, masked, block):
        if not self.rate:
            return super().read(x, masked, block)
        everywhere = self.looked_at[:, None].expand_as(masked)  # (B, K)
        self.logits = super().read(x, everywhere, block)  # (R*K, V) of the R rows
        return self.logits[masked[everywhere]]

    def revise(self, frame, masked, block):
        edited = torch.zeros_like(frame.new)  # (B, P+C)
        ids, new, logp, rows = frame.ids, frame.new, frame.logp, self.looked_at
        if self.rate:
            self.logits[:, self.mask_id] = -math.inf
            allowed = self.logits.unflatten(0, (-1, self.block_length))  # (R, K, V)
            ids = ids.clone()
            ids[rows, block], edited[rows, block] = revise(ids[rows, block], allowed, masked[rows], self.rate)

        self.was_edited = edited.any(1)  # (B,)
        if self.rate and self.delete_id is not None:
            gone = edited & (ids == self.delete_id)
            ids, new, logp, edited = delete_tokens(ids, gone, self.mask_id, new, logp, edited)
        return EditedFrame(ids, new, logp, frame.block, frame.step, edited=edited)

    def frames(self):
        for frame in super().frames():
            if not isinstance(frame, EditedFrame):  # the last one, where rows have left early
                frame = EditedFrame(**vars(frame), edited=torch.zeros_like(frame.new))
            yield frame


@dataclasses.dataclass
class FullDecoder(EditingDecoder, CachedDecoder, WindowedDecoder):
    """All of them: what rollouts, evaluation and chat use."""


def revise(block, logits, masked, rate):
    """Replace written tokens that the model would not write again: at most a share `rate` of a row's, and one.

    block, masked (B, K), masked True = not written before this step; logits (B, K, V), of the delete token too. Those
    go first whose replacement gains most probability. Returns the block and True = replaced (B, K).
    """
    p = logits.softmax(-1)  # (B, K, V)
    likely, best = p.max(-1)  # (B, K) each
    gain = likely - p.gather(-1, block[..., None])[..., 0]
    gain = torch.where(masked, 0.0, gain)  # (B, K)
    most = (rate * (~masked).sum(1)).ceil()  # (B,)
    replaced = largest(gain, most) & (gain > 0)
    return torch.where(replaced, best, block), replaced


def delete_tokens(x, gone, filler, *others):
    """Take the tokens `gone` (B, L) out of x and of the others. What follows moves up, before `filler` or zeros."""
    order = gone.long().argsort(dim=1, stable=True)  # (B, L) those that stay, in their order, then the others
    end = gone.gather(1, order)
    x = x.gather(1, order).masked_fill(end, filler)
    return x, *(other.gather(1, order).masked_fill(end, 0) for other in others)


def corrupt(
    x0,  # (B, L)
    is_prompt,  # (B, L) True = left alone
    rate,
    delete_id,
    generator,
):
    """Spoil some reply tokens that masks will not hide, so that edits are learned.

    Each reply token is replaced with probability rate/2, and one with the same probability preceded by a surplus token;
    both are drawn from the batch's tokens. Returns what is shown, the target, which is delete_id where the token is
    surplus, and True there, (B, L) each. What no longer fits falls off the end.
    """
    (rows, length), device = x0.shape, x0.device
    u, v = (draw_uniform(x0.shape, generator, device) for _ in range(2))  # (B, L) each
    preceded, replaced = (u < rate / 2) & ~is_prompt, (v < rate / 2) & ~is_prompt  # (B, L) each

    places = torch.arange(length, device=device) + preceded.cumsum(1)  # (B, L) where each token goes
    target = x0.new_full((rows, length + 1), delete_id)  # the last place takes what falls off
    target = target.scatter(1, places.clamp(max=length), x0)[:, :-1]  # (B, L)
    surplus = target == delete_id  # (B, L)

    others = (draw_uniform(x0.shape, generator, device) * x0.numel()).long()  # (B, L)
    shown = torch.where(surplus | replaced, x0.flatten()[others], target)
    return shown, target, surplus


class LongerSFT(MaskedSFT):
    """SFT in which one batch in five is up to `sft_extra` tokens longer, so that longer canvases are known."""

    def row_length(self, generator):
        longer, extra = draw_uniform((2,), generator, "cpu").tolist()
        extra = int(extra * (self.cfg.sft_extra + 1))
        return self.cfg.sft_length + (extra if longer < 0.2 else 0)


class EditSFT(LongerSFT):
    """SFT that also learns edits: visible tokens weigh 1 in Eq. (1), and masked ones 1/t as before."""

    def __init__(self, *args, delete_id=None, **handed):
        super().__init__(*args, **handed)
        self.delete_id = delete_id

    def edit_rate_now(self):
        """--edit_rate as this step has it: 0 until --edit_start, then rising."""
        start = self.cfg.edit_start
        return self.cfg.edit_rate * max(0.0, (self.step / self.total - start) / (1 - start))

    def noise(self, x0, t, is_prompt, generator, training):
        rate = self.edit_rate_now() if training else 0.0
        if not rate:
            return super().noise(x0, t, is_prompt, generator, training)

        shown, x0, surplus = corrupt(x0, is_prompt, rate, self.delete_id, generator)
        xt, masked = forward_process(shown, t, is_prompt | surplus, self.mask_id, generator)
        weight = torch.where(masked, (1 / t)[:, None], 1.0).masked_fill(is_prompt, 0.0)
        return Noised(x0, xt, masked, weight, is_prompt)


class Pretraining(EditSFT):
    """Stage 0: the same objective with no prompt, on text packed to rows of one length (MDLM, arXiv 2406.07524)."""

    name = "pretrain"


# %% 19. Official parsers and protocol — what the official code asks, pays and grades, faults included
class Official(NamedTuple):
    """The rules of the official code for one task."""

    rewards: Callable[[str, dict], dict[str, float]]  # of its training
    grade: Callable[[str, dict], Grade]  # of the parser that scores its generations files


EXPERT = (
    "As an expert in mathematics, solve the problem step by step and box the final answer. Keep to this form:\n"
    "<reasoning>\nthe steps\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
)


def official_prompts(tokenizer, task, examples):
    """Token ids of the questions as the official evaluation asks them: a text of its own, and the reply begun."""
    system = task.system.replace(SYSTEM, EXPERT)
    begun = tokenizer.encode("<reasoning>", add_special_tokens=False)
    return [encode_prompt(tokenizer, task.messages(example, system)) + begun for example in examples]


def answers(text):
    """What stands in every complete <answer> block, stripped."""
    closed = text[: text.rfind("</answer>") + len("</answer>")]  # an opener that never closes would cost quadratic time
    return [block.strip() for block in re.findall(r"<answer>(.*?)</answer>", closed, re.DOTALL)]


def official_boxed(text):
    """What the official parser takes for the last box, which is all of a text without one. None if it never closes."""
    if "\\boxed " in text:
        return text.split("\\boxed ")[-1].split("$")[0]

    start = text.rfind("\\boxed" if "\\boxed" in text else "\\fbox")
    box = box_from(text, start) if start >= 0 else text
    return box[len("\\boxed{") : -1] if box and box.startswith("\\boxed{") else box


def official_gsm8k_rewards(completion, example):
    """Parts of the reward. Answers are compared as texts, and integers are digits alone."""
    found = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    strict, soft = has_form(completion, flags=0, end="\n$")
    return {
        "correctness": 2.0 * (found == example["answer"]),
        "int": 0.5 * found.isdigit(),
        "strict_format": 0.5 * strict,
        "soft_format": 0.5 * soft,
        "xmlcount": tag_points(completion),
    }


def official_gsm8k_grade(completion, example):
    """Verdict on the first box with a number in it, else on the last number of the first <answer>."""

    def numbers(content):
        with contextlib.suppress(ValueError):
            return [float(content.strip())]
        return [float(n) for n in re.findall(r"-?\d+\.?\d*", content)]

    boxes = re.findall(r"\\boxed{([^}\n]*)(}?)", completion)
    candidates = [numbers(content)[:1] for content, end in boxes if end]
    candidates.append(numbers("".join(answers(completion)[:1]))[-1:])
    found = next(filter(None, candidates), [None])[0]
    right = found == TASKS["gsm8k"].ground_truth(example)
    return verdict(right, None if found is None else str(found))


OFFICIAL_LOOKS = {  # spacing, sizing, degree and dollar signs
    r"\n": "",
    r"\\!": "",
    r"\\\\": r"\\",
    "tfrac": "frac",
    "dfrac": "frac",
    r"\\left": "",
    r"\\right": "",
    r"\^{\\circ}": "",
    r"\^\\circ": "",
    r"\\\$": "",
}
OFFICIAL_FORMS = {
    r"(^|[ {])\.": r"\g<1>0.",  # .5 becomes 0.5
    r"^[^=]{0,2}=([^=]*)$": r"\1",  # x=5 becomes 5
    r"\\sqrt(?!\{)(.)": r"\\sqrt{\1}",  # \sqrt3 and \frac12 get braces
    " ": "",
    r"\\frac(?!\{)(.)(?:\{([^{}]*)\}|(.))": lambda m: f"\\frac{{{m[1]}}}{{{m[2] or m[3]}}}",
}


def normalise_latex(text):
    """A plain form of a LaTeX answer by the rules of the official MATH grader. ValueError where they fail."""
    text, *units = rewrite(text, OFFICIAL_LOOKS).split("\\text{ ")  # a trailing unit goes
    text = text.replace("\\%", "")
    if len(units) > 1 or re.search(r"\\(sqrt|frac *)(\\\1|$)", text):
        raise ValueError("two units, or a root or fraction of nothing")

    text = rewrite(text, OFFICIAL_FORMS)
    text = "\\frac{1}{2}" if text == "0.5" else text
    if text.count("/") == 1:
        top, bottom = map(int, text.split("/"))
        text = f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text
    return text


def equal_latex(a, b):
    """Whether two answers have the same plain form, or are the same text."""
    with contextlib.suppress(ValueError):
        return a == b or (len(a) <= 100_000 and normalise_latex(a) == normalise_latex(b))  # bounds the time
    return False


def official_math500_rewards(completion, example):
    """Parts of the reward. The last box is the answer, or else the whole reply."""
    right = equal_latex(official_boxed(completion) or completion, example["answer"])
    bonus = box_points(completion, box="\boxed")  # the mistyped text
    return {"correctness": 2.0 * right, "boxed_and_answer_tags": bonus}


def official_math500_grade(completion, example):
    """Verdict on the last box, on the first <answer> if that never closes, on all of a reply without a box."""
    found = official_boxed(completion) or next(iter(answers(completion)), None)
    return verdict(found is not None and equal_latex(found, example["answer"]), found)


def official_reaches(text, example):
    """`reaches` in floats, with what eval accepts besides. A power of floats overflows and never hangs.

    A line break is refused outside of brackets, as eval does.
    """
    more = {ast.FloorDiv: operator.floordiv, ast.UAdd: operator.pos, ast.Pow: operator.pow}
    value = arithmetic(text, float, CHARACTERS + ".\n\r\t\f", OPERATORS | more)
    return None if value is None or not uses_numbers(text, example) else abs(value - example["target"]) < 1e-5


def official_countdown_rewards(completion, example):
    """Reward of the last <answer>. Any answer is paid .1."""
    found = answers(completion)
    right = official_reaches("".join(found[-1:]), example)
    return {"countdown": 1.0 if right else 0.1 if found else 0.0}


def official_countdown_grade(completion, example):
    """Verdict on the last box, on the first <answer> if that never closes, on all of a reply without a box.

    Of an equation its left side counts.
    """
    places = official_boxed(completion), *answers(completion)[:1], completion
    found = next(place for place in places if place is not None)
    found = found.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")

    if "=" in found:
        equation = re.search(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]++)=[0-9. ]+", found)
        found = equation[1].strip() if equation else found
    return verdict(official_reaches(found, example) is True, found)


def official_sudoku_rewards(completion, example):
    """Share of empty cells that the first 16 digits of the last <answer> have right."""
    digits = filter(str.isdigit, "".join(answers(completion)[-1:]))
    return {"sudoku": right_cells("".join(itertools.islice(digits, 16)), example)}


def official_sudoku_grade(completion, example):
    """Verdict on what the first of five patterns finds. A reply is right if all empty cells are."""
    inside = completion.partition("<answer>")[2]
    after = completion.partition("</answer>")[2]
    long = completion if re.search(r"\d{16}", completion) else ""  # the last two patterns are slow on megabytes
    end = r"(?s)(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|{})"
    matches = (
        re.search(r"```([\d\s]++)```", inside),
        re.match(end.format("</answer>"), inside),
        re.match(end.format("$"), after),
        re.search(r"(?<!\d)\d++(?<=(\d{16}))\s*</answer>", long),
        re.search(r"\b(\d{16})\b", long),
    )

    found = next((m[1].strip() for m in matches if m and m[1].strip()), None)
    score = right_cells("".join((found or "").split()), example)
    return Grade(score == 1, score, found)


Gsm8k.official = Official(official_gsm8k_rewards, official_gsm8k_grade)
Math500.official = Official(official_math500_rewards, official_math500_grade)
Countdown.official = Official(official_countdown_rewards, official_countdown_grade)
Sudoku.official = Official(official_sudoku_rewards, official_sudoku_grade)


# %% 20. Checkpoints, export, several processes — and who listens to a run
def trainer_for(stage, tokenizer, cfg, out, screen, *more):
    """A trainer that logs, saves and shows what it does, on as many processes as were launched.

    out: the run's folder. more: further listeners; they find `out` and `tokenizer` at the trainer.
    """
    backend = make_backend(cfg, out / "logs" / stage.name, stage.grad_clip)
    listeners = Listeners(RunLog(), Checkpoints(), *more, RunScreen(screen, out), StopSignals())
    trainer = Trainer(stage, backend, listeners)
    trainer.out, trainer.tokenizer = out, tokenizer
    return trainer


def train(trainer, screen):
    """Run a trainer of `trainer_for` to its end, with trackers and handlers of signals around it."""
    with contextlib.ExitStack() as around:
        around.callback(screen.stop)  # a bar left open would eat the line of an error
        for listener in trainer.listener.parts:
            if hasattr(listener, "around"):
                around.enter_context(listener.around(trainer))
        trainer.run()


# Listeners
class Listeners:
    """Several listeners as one, told in their order. The first answer that is not None counts."""

    def __init__(self, *parts):
        self.parts = parts

    def __getattr__(self, event):
        def tell(*told):
            answers = [getattr(part, event)(*told) for part in self.parts]
            return next((answer for answer in answers if answer is not None), None)

        return tell


class RunLog(Listener):
    """Adds the figures of each update and check to metrics.jsonl and to the tracker. One process does."""

    @contextlib.contextmanager
    def around(self, trainer):
        """Context of the tracker."""
        accel, stage, out = trainer.backend.accel, trainer.stage, trainer.out
        run = dict(name=f"{out.name}-{stage.name}", group=str(out))
        own = dict(
            tensorboard=dict(purge_step=stage.step + 1),  # which hides the steps that a resumed run makes again
            wandb=dict(dir=str(out), **run),
            trackio=run,
        )
        with refusing(f"--report_to {stage.cfg.report_to} does not start", Stopped):
            accel.init_trackers("d1_full", config=dataclasses.asdict(stage.cfg), init_kwargs=own)

        with contextlib.ExitStack() as last:
            for tracker in accel.trackers:  # each by itself: end_training ends the group of processes too
                last.callback(tracker.finish)
            yield

    def on_step(self, trainer, figures):
        stage = trainer.stage
        if trainer.rank == 0:
            row = {"stage": stage.name, "step": stage.step, **figures}
            with (trainer.out / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        trainer.backend.accel.log({f"{stage.name}/{k}": v for k, v in figures.items()}, step=stage.step)

    on_check = on_step


class Checkpoints(Listener):
    """Saves what a run needs to go on, and keeps a batch that was left out for a look."""

    def on_save(self, trainer):
        save_trainer(trainer)

    def on_skip(self, trainer):
        stage = trainer.stage
        rollouts = [vars(r) for r in getattr(stage, "rollouts", [])]
        content = dict(name=stage.batch_name(trainer), batch=rollouts)
        own = f".{trainer.rank}" if trainer.world > 1 else ""
        path = trainer.out / "trainer" / f"nonfinite-{stage.name}-{stage.step + 1}{own}.pt"
        write_whole(path, lambda part: torch.save(content, part), everyone=True)
        return path


class StopSignals(Listener):
    """Ctrl-C or SIGTERM, to any of the processes, stops a run after the update in work, which is saved.

    A second one acts at once.
    """

    came = ()  # the signals, in a list while handlers may be set
    before = None  # the handlers that ours replace, None = ours may not be set

    @contextlib.contextmanager
    def around(self, trainer):
        """Context in which handlers may be set."""
        self.came, self.before = [], {}
        try:
            yield
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)
            self.came, self.before = (), None

    def on_start(self, trainer):
        if not trainer.owed:  # a check before the first update is broken off at once, as there is nothing to save
            self.on_check(trainer, {})

    def on_check(self, trainer, figures):
        if self.before != {} or threading.current_thread() is not threading.main_thread():  # no other may set handlers
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:  # as under nohup
                self.before[number] = handler
                signal.signal(number, self.note)

    def note(self, number, frame):
        """The handler: the step in work can be finished and saved."""
        self.came.append(number)
        signal.signal(number, self.before[number])
        print("d1_full.py: stops after this step and saves; the same signal again stops at once", file=sys.stderr)

    def on_step(self, trainer, figures):
        number = max(trainer.backend.gather([max(self.came, default=0)]))
        if not number:
            return None
        where = f"{signal.Signals(number).name} after {trainer.stage.name} step {trainer.stage.step}, which is saved"
        return Stopped(f"{where}; the same flags and --resume go on from there", 128 + number)


# Processes
def make_backend(cfg, logs, clip=0.0):
    """What the launch asks for: one process, DDP, FSDP 2 or DeepSpeed's ZeRO.

    logs: where a tracker may write. clip: the gradient norm limit, which DeepSpeed must know before it starts.
    """
    from accelerate import Accelerator

    accel = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # `precision` sees to it
        log_with=None if cfg.report_to == "none" else cfg.report_to,
        project_dir=logs,
    )
    zero = accel.state.deepspeed_plugin
    if ("FSDP" in accel.distributed_type and not accel.is_fsdp2) or (zero and zero.zero_stage not in (1, 2)):
        raise UserError("this form of sharding is not supported: launch with fsdp_version: 2, or zero_stage: 2")
    if accel.is_fsdp2:
        return FullyShardedBackend(accel)
    if not zero:
        return AcceleratedBackend(accel)

    off = {"enabled": False}  # DeepSpeed would round the weights
    zero.deepspeed_config |= dict(
        gradient_clipping=clip,
        bf16=off,
        fp16=off,
        zero_force_ds_cpu_optimizer=False,
        train_micro_batch_size_per_gpu=1,  # it counts no rows here
        gradient_accumulation_steps=1,
    )
    return ZeroBackend(accel)


class AcceleratedBackend(Backend):
    """One process, or several that hold the model each (DDP), in bf16 arithmetic on a GPU."""

    each_writes = False  # True = a checkpoint is a file a process

    def __init__(self, accel):
        self.accel = accel
        self.rank, self.world = accel.process_index, accel.num_processes

    def prepare(self, model, make_optimizer):
        net = self.accel.prepare(model) if self.world > 1 else model
        return super().prepare(net, make_optimizer)

    @contextlib.contextmanager
    def micro_batch(self, net, last):
        sync = contextlib.nullcontext() if last else self.accel.no_sync(net)
        with sync, precision(self.device):  # one context a micro-batch: it keeps the weights' casts
            yield

    def whole_weights(self, model):
        return precision(self.device)

    def gather(self, rows):
        from accelerate.utils import gather_object

        return gather_object(rows)

    def file_of(self, name):
        """This process's file of a checkpoint, in trainer/."""
        return f"{name}.pt"

    def save(self, trainer, file, state):
        """Add weights and optimizer to the rest of the state and write it. Returns the files of this process."""
        state |= dict(weights=self.weights(trainer.params), optimizer=trainer.optimizer.state_dict())
        write_whole(file, lambda part: torch.save(state, part), everyone=self.each_writes)
        return [file] if self.each_writes or self.rank == 0 else []

    def restore(self, trainer, file, state):
        """Put weights and optimizer back."""
        for w, saved in zip(self.weights(trainer.params), state["weights"], strict=True):
            w.copy_(saved)
        trainer.optimizer.load_state_dict(state["optimizer"])


class FullyShardedBackend(AcceleratedBackend):
    """FSDP 2: each process holds a piece of every weight, of its gradient and of its optimizer state.

    What is sharded is a twin of the model, so that the model stays a plain one. It is empty outside of `whole_weights`.
    """

    def prepare(self, model, make_optimizer):
        net = twin(model, {id(p): p for p in model.parameters()})  # with the same parameters until they are sharded
        _, optimizer = Backend.prepare(self, net, make_optimizer)
        self.net, _ = self.accel.prepare(net, optimizer)
        self.device = self.accel.device
        self.fill(model, empty=True)
        return self.net, optimizer

    def fill(self, model, empty=False):
        """Put the weights together in the model, or take them out of it."""
        for p, piece in zip(model.parameters(), self.net.parameters(), strict=True):
            if p is not piece:  # in 4 bits it is
                p.data = p.data.new_empty(0) if empty else unsharded(piece.detach()).to(self.device)

    @contextlib.contextmanager
    def whole_weights(self, model):
        self.fill(model)
        with precision(self.device):
            yield
        self.fill(model, empty=True)

    def finish(self, model):
        self.fill(model)

    def clip_gradient(self, params, most):
        return unsharded(self.accel.clip_grad_norm_(params, most))

    def weights(self, params):
        return [own_piece(p) for p in params]

    def file_of(self, name):
        return f"{name}/state.pt"

    def save(self, trainer, file, state):
        """Write a folder: the pieces of all processes, which any number of processes can read, and the rest."""
        import torch.distributed.checkpoint as dcp

        folder, part = file.parent, file.parent.with_suffix(".part")
        pieces = self.pieces(trainer)
        for i, w in enumerate(trainer.best[2] if trainer.best else ()):
            own_piece(pieces[f"best.{i}"]).copy_(w)
        state |= dict(
            best=trainer.best and trainer.best[:2],
            updated=[i for i, p in enumerate(trainer.params) if p in trainer.optimizer.state],
        )

        with refusing(f"cannot write {folder}; what was saved before is kept", Stopped):
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            processes().wait_for_everyone()
            dcp.save(pieces, checkpoint_id=part)
            write_whole(part / file.name, lambda whole: torch.save(state, whole))
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
            processes().wait_for_everyone()

        own = list(folder.glob(f"__{self.rank}_*"))
        return [*own, file, folder / ".metadata"] if self.rank == 0 else own

    def restore(self, trainer, file, state):
        import torch.distributed.checkpoint as dcp

        for i in state["updated"]:
            p = trainer.params[i].detach()
            moments = {key: torch.empty_like(p) for key in ("exp_avg", "exp_avg_sq")}
            trainer.optimizer.state[trainer.params[i]] = dict(step=torch.zeros((), device=p.device), **moments)

        pieces = self.pieces(trainer)
        dcp.load(pieces, checkpoint_id=file.parent)  # into these tensors
        if trainer.best:
            best = [own_piece(w).cpu() for name, w in pieces.items() if name.startswith("best.")]
            trainer.best = (*trainer.best, best)

    def pieces(self, trainer):
        """Weights and optimizer state by name, as tensors that know of which whole they are a piece.

        The tensors for the best weights, if there are some, are still to be filled.
        """
        named = {}
        for i, p in enumerate(trainer.params):
            named[f"weight.{i}"] = p.detach()
            for key, value in trainer.optimizer.state.get(p, {}).items():
                named[f"{key}.{i}"] = value
            if trainer.best:
                named[f"best.{i}"] = torch.empty_like(p.detach())
        return named


def unsharded(x):
    """A tensor that FSDP shards, put together by all processes; anything else as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def own_piece(p):
    """This process's piece of a tensor that FSDP shards; any other tensor as it is. Without gradient."""
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()


class ZeroBackend(AcceleratedBackend):
    """DeepSpeed's ZeRO 1 and 2, which shard the optimizer and the gradient alone.

    The model itself makes the forward pass, since the engine's would turn autocast off.
    """

    can_skip = False  # a step is made before its norm is known
    each_writes = True

    def prepare(self, model, make_optimizer):
        net, optimizer = Backend.prepare(self, model, make_optimizer)
        self.engine, _ = self.accel.prepare(net, optimizer)
        self.device = self.accel.device
        return net, optimizer

    def micro_batch(self, net, last):
        self.engine.set_gradient_accumulation_boundary(last)
        return precision(self.device)

    def backward(self, loss):
        self.engine.backward(loss)

    def step(self, optimizer, params, clip):
        self.engine.step()  # which clips, steps and clears
        return float(self.accel.clip_grad_norm_(params, clip))  # -1 if it was not finite

    def finish(self, model):
        self.engine.destroy()

    def file_of(self, name):
        return f"{name}.{self.rank}_of_{self.world}.pt"

    def restore(self, trainer, file, state):
        super().restore(trainer, file, state)
        self.engine.optimizer.refresh_fp32_params()  # its own copy of the weights


# Checkpoints: a run may be killed at any moment
SAVED = "best score stale skipped owed".split()  # of a trainer's attributes


def save_trainer(trainer):
    """Write to trainer/ what a run needs to go on, and forget all but the last --save_total_limit checkpoints.

    These are weights, optimizer, step, best weights and the rollouts in use. A checkpoint counts once manifest.json,
    written last, has the checksums of its files.
    """
    from accelerate.utils import send_to_device

    stage, backend, folder = trainer.stage, trainer.backend, trainer.out / "trainer"
    folder.mkdir(parents=True, exist_ok=True)
    check_state(trainer, folder)

    in_use = getattr(stage, "rollouts", []) if stage.step % stage.cfg.mu else []
    state = {name: getattr(trainer, name) for name in SAVED}
    state |= dict(
        step=stage.step,
        settings=dataclasses.asdict(stage.cfg),
        batch=backend.gather(send_to_device([vars(r) for r in in_use], "cpu")),
    )
    file = folder / backend.file_of(f"{stage.name}-{stage.step}")
    own = backend.save(trainer, file, state)

    with refusing(f"cannot read {file} back", Stopped):
        sums = [(str(path.relative_to(folder)), checksum(path)) for path in own]
    files = dict(backend.gather(sums))
    if trainer.rank == 0:
        manifest = read_json(folder / "manifest.json")
        saved = {step: known for step, known in manifest.get(stage.name, {}).items() if int(step) < stage.step}
        saved[str(stage.step)] = files
        manifest[stage.name] = dict(list(saved.items())[-stage.cfg.save_total_limit :])
        write_json(folder / "manifest.json", manifest)
        forget_others(folder, stage.name, manifest[stage.name])


def check_state(trainer, folder):
    """Raise Stopped in all processes if one of them has broken weights, or no room for a checkpoint."""
    weights = trainer.backend.weights(trainer.params)
    size = sum(4 * w.nbytes for w in weights)  # with AdamW's two, and the best
    free = shutil.disk_usage(folder).free
    finite = all(torch.isfinite(w).all() for w in weights)

    states = trainer.backend.gather([(finite, free >= size)])
    if not all(finite for finite, _ in states):  # never overwrite a good checkpoint with a broken one
        raise NonFiniteLoss(f"{trainer.stage.name} step {trainer.stage.step}: the weights are no longer finite")
    if not all(room for _, room in states):
        raise Stopped(f"{folder} has room for {free / 2**30:.2f} GiB, and a checkpoint may take {size / 2**30:.2f}; "
                      "what was saved before is kept: make room and --resume")


def forget_others(folder, name, saved):
    """Delete the checkpoints of a stage that are not among those saved."""
    known = {file.split("/")[0] for files in saved.values() for file in files}
    for path in folder.glob(f"{name}-*"):
        if path.name not in known:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def whole_checkpoint(trainer, screen):
    """This process's file of the last checkpoint whose files are all as they were written, None if there is none."""
    from accelerate.utils import broadcast_object_list

    folder, name = trainer.out / "trainer", trainer.stage.name
    saved = read_json(folder / "manifest.json").get(name, {}) if trainer.rank == 0 else {}
    whole = None
    for step, files in reversed(saved.items()):
        bad = [file for file, digest in files.items() if not is_whole(folder / file, digest)]
        if not bad:
            whole = step, files
            break
        screen.say(f"  warning: {folder / bad[0]} is damaged: the checkpoint before step {step} is taken")

    saved, whole = broadcast_object_list([saved, whole])  # all processes take the same
    if not saved:
        return None
    if not whole:
        raise UserError(f"no checkpoint of {name} in {folder} is whole: run without --resume or --auto_resume")
    step, files = whole
    own = trainer.backend.file_of(f"{name}-{step}")
    if own not in files:
        raise UserError(f"{folder / min(files)} is of another number of processes or sharding: launch as before")
    return folder / own


def load_trainer(trainer, screen):
    """Go on from the last whole checkpoint, if there is one. Random draws need no state: seed and step give them."""
    stage = trainer.stage
    file = whole_checkpoint(trainer, screen)
    if file:
        with refusing(f"{file} does not fit this run"), torch.no_grad():
            state = torch.load(file, map_location="cpu", weights_only=True)
            changed = changed_settings(state["settings"], stage.cfg, "steps_rl")
            if changed and not stage.cfg.allow_changed:
                raise ValueError(f"give --allow_changed, or the flags of then: {', '.join(changed)}")
            if changed:
                screen.say(f"  changed since then: {', '.join(changed)}")

            stage.step = state["step"]
            for name in SAVED:
                setattr(trainer, name, state[name])
            trainer.backend.restore(trainer, file, state)
            load_rollouts(trainer, state["batch"], changed, screen)

    log = trainer.out / "metrics.jsonl"  # later updates are made again
    kept = [row for row in read_log(log) if row["stage"] != stage.name or row["step"] <= stage.step]
    write_whole(log, lambda part: part.write_text("".join(json.dumps(row) + "\n" for row in kept)))
    return file is not None


def load_rollouts(trainer, batch, changed, screen):
    """Put this process's share of the rollouts in use back, if they fit the settings."""
    from accelerate.utils import send_to_device

    own = len(batch) // trainer.world
    mine = batch[trainer.rank * own :][:own]
    if mine and (changed or own != trainer.stage.cfg.grad_accum):
        screen.say("  warning: it stopped between inner updates, and its rollouts no longer fit: drawn anew")
    elif mine:
        trainer.stage.rollouts = [Rollout(**send_to_device(r, trainer.device)) for r in mine]


FREE = (  # settings that change no result
    "resume auto_resume allow_changed output_dir config threads debug skip_eval dry_run save_total_limit max_skips "
    "report_to smoke sweep sweep_space explain"
).split()


def changed_settings(then, now, *free):
    """Flags of a saved run that are not as now, but for those of FREE and `free`."""
    changed = {k: v for k, v in then.items() if v != getattr(now, k, None) and k not in (*FREE, *free)}
    return [words_of({k: v})[0] for k, v in changed.items()]


def checksum(path):
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_whole(path, digest):
    """Whether a file is there, can be read and is as it was written."""
    with contextlib.suppress(OSError):
        return checksum(path) == digest
    return False


# Export
def export_model(model, tokenizer, out, state=None, form=""):
    """Save model and tokenizer in hub format or a form of --export, then d1_state.json, which says all is there."""
    processes().wait_for_everyone()
    if not processes().is_main_process:
        return
    out.mkdir(parents=True, exist_ok=True)
    if form and hasattr(model, "peft_config"):
        model = copy.deepcopy(model).merge_and_unload()

    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        saved = Path(folder)
        if hasattr(model, "peft_config"):
            saved = save_adapter(model, saved)
        else:
            weights = model.state_dict()
            for theirs, ours in LLADA_NAMES.items() if form == "llada" else ():
                weights = {name.replace(ours, theirs): w for name, w in weights.items()}
            model.save_pretrained(saved, state_dict=weights, save_original_format=False)  # by the names given here

        tokenizer.save_pretrained(saved)
        if form == "llada":
            write_json(saved / "config.json", llada_config(model, tokenizer))
        for file in sorted(p for p in saved.iterdir() if p.is_file() and p.name != "README.md"):
            write_whole(out / file.name, functools.partial(shutil.move, file))

    if state:
        files = {path.name: checksum(path) for path in out.glob("*.safetensors")}
        write_json(out / "d1_state.json", state | {"files": files})


def save_adapter(model, folder):
    """Save the adapters of all stages as one. Returns the folder that it is in."""
    names = list(model.peft_config)
    if len(names) == 1:
        model.save_pretrained(folder, selected_adapters=names, save_embedding_layers=False)
        return folder

    weights = [1.0] * len(names)
    with torch.random.fork_rng(devices=[]):  # peft draws what only one of the adapters would fill, times zeros
        torch.manual_seed(0)
        model.add_weighted_adapter(names, weights, "joined", combination_type="cat")  # of the ranks' sum: exact
    model.save_pretrained(folder, selected_adapters=["joined"], save_embedding_layers=False)
    model.delete_adapter("joined")
    activate_adapters(model)
    return folder / "joined"


def llada_config(model, tokenizer):
    """config.json for LLaDA's own code: the inverse of `network_of`."""
    config = model.config
    fields = {theirs: getattr(config, ours) for theirs, ours in LLADA_FIELDS.items()}
    return LLADA_8B | fields | dict(
        vocab_size=config.vocab_size,
        rope_theta=config.rope_parameters["rope_theta"],
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        torch_dtype=str(model.dtype).split(".")[1],
    )


# %% 21. Screen and plots — what a run shows
class Screen:
    """All that is printed, by one process: rich bars and tables on a terminal, plain lines elsewhere."""

    def __init__(self):
        from rich.console import Console

        main = processes().is_main_process
        self.live = sys.stdout.isatty() and main
        width = None if self.live else 160
        self.console = Console(highlight=False, soft_wrap=True, width=width, quiet=not main)
        self.bar = None

    def say(self, text):
        """Print a text as it is."""
        self.console.print(text, markup=False)

    def start(self, name, total, done):
        """Begin a bar of which `done` steps of `total` are made. Off a terminal it is a line now and then."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.live,
            transient=name.startswith("eval"),
            speed_estimate_period=3600,  # the default, 30 seconds, is less than some steps take
        )
        self.bar.add_task(name, total=total, completed=done, note="")
        self.said, self.shown = time.monotonic(), {}
        self.bar.start()

    def advance(self, figures, n=1):
        """Count n more steps, and show the loss, or the reward and KL, and the last held-out figure."""
        self.shown |= figures
        names = ("reward", "kl", "heldout_accuracy") if "reward" in self.shown else ("loss", "heldout_loss")
        note = "  ".join(f"{k.removesuffix('_accuracy')} {self.shown[k]:.3f}" for k in names if k in self.shown)
        task = self.bar.tasks[0]
        self.bar.update(task.id, advance=n, note=note)

        if not self.live and time.monotonic() - self.said > 15:
            self.said = time.monotonic()
            left = task.time_remaining or 0
            self.say(f"{task.description} {task.completed}/{task.total}  {note}  {left:.0f} s left")

    def stop(self):
        """End the bar, if there is one."""
        if self.bar:
            self.bar.stop()

    def table(self, title, header, rows, text=False):
        """Print a table. Columns after the first are right-aligned, unless they hold text."""
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i and not text else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(str, row))
        self.console.print(table)


class RunScreen(Listener):
    """Shows a run: its bar, a sample reply and warnings at each held-out check, and which weights are kept.

    out: the run's folder. What its metrics.jsonl tells of the updates before a resume counts as well.
    """

    def __init__(self, screen, out):
        self.screen, self.log = screen, Path(out) / "metrics.jsonl"
        self.seen = []  # the figures of the updates since the last check
        self.flat = 0  # updates in a row in which all replies to a prompt earned the same

    def on_start(self, trainer):
        stage = trainer.stage
        self.screen.start(stage.name, stage.total, stage.step)
        for row in read_log(self.log):
            if row["stage"] == stage.name and row["step"] <= stage.step:
                self.count_flat(row)

    def on_step(self, trainer, figures):
        if trainer.skipped:
            self.screen.say(f"  warning: {trainer.left_out}; update left out, {trainer.skipped} in a row")
        else:
            self.seen.append(figures)
            self.count_flat(figures)
        self.screen.advance(figures)

    def on_check(self, trainer, figures):
        prompts = getattr(trainer.stage, "prompts", None)
        sample = getattr(prompts, "sample", "")
        if sample:  # nothing was drawn yet at the start, or if a run was resumed for this check
            self.screen.say(f"  sample: {sample}")

        for text in self.troubles(trainer.stage.cfg):
            self.screen.say(f"  warning: {text}")
        self.seen = []
        self.screen.advance(figures, 0)

    def on_finish(self, trainer):
        stage, best, screen = trainer.stage, trainer.best, self.screen
        task = getattr(getattr(stage, "prompts", None), "task", Task)
        what, scale, digits, unit = "accuracy", 100, 1, " %"
        if task.aim == "score":  # a mean reward, which has no bounds
            what, scale, digits, unit = "mean reward", 1, 3, ""

        screen.stop()
        if stage.step < stage.total:
            stale = f"no better held-out {what} in {trainer.stale} checks"
            screen.say(f"stopped at step {stage.step}: {stale} (--patience)")
        if best and best[1] != stage.step:
            kept = f"weights of step {best[1]} kept: held-out {what} {scale * best[0]:.{digits}f}{unit}, the best"
            screen.say(f"{kept}; the last, of step {stage.step}, had {scale * trainer.score:.{digits}f}{unit}")

    def count_flat(self, figures):
        """Count an update's groups of replies, if its figures tell of any."""
        if "reward_std" in figures:
            self.flat = 0 if figures["reward_std"] else self.flat + 1

    def median(self, name):
        """The median since the last check, as one token can throw one update's KL far out. NaN without updates."""
        values = sorted(figures[name] for figures in self.seen if name in figures)
        return values[len(values) // 2] if values else math.nan

    def troubles(self, cfg):
        """What looks wrong with the updates since the last check."""
        kl, entropy, error = map(self.median, ("kl", "entropy", "cache_error"))
        if self.flat >= 5 * cfg.mu:
            yield f"{self.flat} updates in which all replies to a prompt earned the same"
        if kl > 1:
            yield f"KL {kl:.1f} nats a token: the policy has run away; lower --lr_rl or raise --beta"
        if entropy < 0.01:
            yield f"entropy {entropy:.3f} nats a token: replies hardly differ; raise --temperature"
        if error >= 0:
            yield f"off-policy rollouts: --rollout_cache changed a token's log p by {error:.3f} nats"


PANELS = (  # of curves.png: stage, figure, title
    ("pretrain", "loss", "pre-training loss, nats a token"),
    ("sft", "loss", "SFT loss, nats a token"),
    ("diffu_grpo", "reward", "mean reward"),
    ("diffu_grpo", "kl", "KL to start of stage 2"),
    ("diffu_grpo", "heldout_accuracy", "held-out score"),
)


def plot_curves(out):
    """curves.png from metrics.jsonl: pre-training and SFT loss, RL reward, KL, and held-out score."""
    from matplotlib.figure import Figure  # without pyplot no window is opened and nothing global is set

    rows, panels = read_log(out / "metrics.jsonl"), []
    for stage, name, title in PANELS:
        points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
        if points:
            panels.append((stage, title, *zip(*points, strict=True)))
    if not panels:
        return

    figure = Figure(figsize=(4 * len(panels), 3), layout="tight")
    for number, (stage, title, x, y) in enumerate(panels, 1):
        axis = figure.add_subplot(1, len(panels), number)
        span = len(y) // 50  # of a running mean over 2 % of the run
        windows = [y[max(0, i - span) : i + 1] for i in range(len(y))]
        means = [sum(window) / len(window) for window in windows]
        axis.plot(x, y, alpha=0.25)
        axis.plot(x, means, color="C0", marker="." if len(x) < 20 else None)

        scale = "log" if min(y) > 0 and stage != "diffu_grpo" else "linear"
        axis.set(title=title, xlabel=f"{stage} update", yscale=scale)

    write_whole(out / "curves.png", lambda part: figure.savefig(part, format="png", dpi=120))


# %% 22. Chat, browser and pipeline — the decoder in a terminal, in a browser and in transformers
def streamed(
    frames,
    streamer,  # a transformers.TextDiffusionStreamer
    tokenizer,
    plen,
    block_length,
    stop,
):
    """Pass on the frames of one prompt, and show them by a streamer.

    The block that is being written is shown as a draft. Once it is finished its tokens are put for good, up to the EOS.
    """
    n_put = 0

    def put(reply):
        ids = reply_ids(tokenizer, reply, stop)
        if ids[n_put:]:
            streamer.put(torch.tensor(ids[n_put:]))
        return max(n_put, len(ids))

    for number, frame in enumerate(frames):
        row = frame.ids[0]  # (P+C,)
        if number == 0 and streamer.skip_prompt:  # what it is given first it takes for the prompt
            streamer.put(row[:plen])

        begin = plen + frame.block * block_length
        n_put = put(row[plen:begin])
        if n_put == begin - plen:  # otherwise the reply is over
            streamer.put_draft(row[begin : begin + block_length])
        yield frame

    put(row[plen:])
    streamer.end()


def replies(model, tokenizer, prompts, cfg, generator, streamer=None):
    """The replies so far as texts, and the frame, after each denoising step: for terminal, browser and pipeline."""
    model.eval()
    ids, attention_mask = pad_left(prompts, tokenizer.pad_token_id, model.device)
    plen, stop = ids.shape[1], cfg.stop

    def holds_stop(reply):
        return stop in reply_texts(tokenizer, reply[None])[0]

    frames = diffuse_steps(
        model,
        ids,
        attention_mask=attention_mask,
        gen_length=cfg.reply_length(),
        steps=cfg.eval_steps or None,
        threshold=cfg.threshold or None,
        temperature=cfg.temperature,
        context=context_of(model),
        stop=holds_stop if stop else None,
        generator=generator,
        **decoding(tokenizer, cfg),
    )
    if streamer:
        frames = streamed(frames, streamer, tokenizer, plen, cfg.block_length, stop)

    while True:
        with precision(ids.device):  # a thread's own, and a browser may take each frame in another thread
            frame = next(frames, None)
        if frame is None:
            return
        texts = reply_texts(tokenizer, frame.ids[:, plen:])
        yield [text.partition(stop)[0] if stop else text for text in texts], frame


def chat_prompt(tokenizer, cfg, history, context):
    """The token ids of a chat, and whether the model does not see all of it.

    The oldest turns are taken out of `history` if it is too long for the model: the reply, or half of the context,
    keeps its room.
    """
    room, whole = context - min(cfg.reply_length(), context // 2), len(history)
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    with refusing("the model's chat template does not take this chat"):
        prompt = encode_prompt(tokenizer, system + history)
        while len(prompt) > room and len(history) > 1:
            del history[:2]
            prompt = encode_prompt(tokenizer, system + history)
    return prompt, len(history) < whole or len(prompt) > room


def render(frame, plen, tokenizer, block_length):
    """The reply of a frame's one row as rich Text: ░ a mask, lit what this step wrote, underlined what it edited.

    Blocks that are not begun are left out, and so is what follows an EOS that no mask stands before.
    """
    from rich.text import Text

    begun = slice(plen, plen + (frame.block + 1) * block_length)
    ids, new, edited = (values[0, begun].tolist() for values in (frame.ids, frame.new, frame.edited))
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    special = tokenizer.all_special_ids
    end = ids.index(eos) if eos in ids else len(ids)
    if mask in ids[:end]:
        end = len(ids)

    def look(k):
        """The special token at a place, if it is one, and the style of the place."""
        style = "dim" if ids[k] == mask else "magenta underline" if edited[k] else "bold green" if new[k] else ""
        return ids[k] if ids[k] in special else None, style

    shown = Text()
    for (token, style), run in itertools.groupby(range(end), look):
        places = list(run)
        if token == mask:
            shown.append("░" * len(places), style)
        elif token is None:  # decoded with the token before, so that words keep the blank between them
            first, last = places[0], places[-1]
            before = ids[max(first - 1, 0) : first]
            text = tokenizer.decode(before + ids[first : last + 1])
            shown.append(text[len(tokenizer.decode(before)) :], style)
    return shown


class Slider(NamedTuple):
    """A setting that can be changed in a chat, by a slash command in the terminal and by a widget in the browser."""

    setting: str
    read: Callable  # the text that is typed -> its value, or a ValueError or KeyError
    takes: str  # what is to be typed
    label: str  # of the widget
    span: tuple = ()  # of a number in the browser: least, most (or the value that is set) and step
    choices: tuple = ()


ON_OFF = {"on": True, "off": False}
MODES = {mode: mode for mode in REMASKING} | {"confidence": "low_confidence"}
SLIDERS = {  # by slash command, in the order of the widgets
    "steps": Slider("eval_steps", int, "N", "steps, 0 = half the length", span=(0, 512, 1)),
    "block": Slider("block_length", int, "N", "block", span=(1, 128, 1)),
    "length": Slider("max_length", int, "N", "length", span=(1, 1024, 1)),
    "temp": Slider("temperature", float, "X", "temperature", span=(0, 2, 0.1)),
    "edits": Slider("allow_edits", ON_OFF.__getitem__, "on|off", "edits"),
    "mode": Slider("remasking", MODES.__getitem__, "confidence|random|ancestral", "mode", choices=REMASKING),
    "system": Slider("system", str, "TEXT", "system prompt"),
    "stop": Slider("stop", str, "TEXT", "stop text"),
}


def with_sliders(cfg, context, **changes):
    """The settings with some of them changed. UserError if a chat cannot run with them."""
    cfg = dataclasses.replace(cfg, **changes)
    validate(cfg)
    if 2 * cfg.block_length > context:
        raise UserError(f"--block_length {cfg.block_length} is over half of the model's context, {context} tokens")
    return cfg


def obey(command, cfg, context):
    """The settings after a slash command. UserError tells which commands there are, or what this one takes."""
    name, _, text = command[1:].partition(" ")
    if name not in SLIDERS:
        known = ", ".join(f"/{name} {slider.takes}" for name, slider in SLIDERS.items())
        raise UserError(f"commands: {known}, /reset (forget the chat), /help, /quit")

    slider = SLIDERS[name]
    try:
        value = slider.read(text.strip())
    except (ValueError, KeyError):
        raise UserError(f"/{name} takes {slider.takes}, not {text!r}") from None
    return with_sliders(cfg, context, **{slider.setting: value})


def where_sliders_are(cfg):
    """What stands before the line that the user types."""
    length = cfg.reply_length()
    edits = "on" if cfg.allow_edits else "off"
    numbers = f"steps {cfg.eval_steps or length // 2}, block {cfg.block_length}, length {length}"
    return f"[{numbers}, temp {cfg.temperature:g}, {cfg.remasking}, edits {edits}] > "


def show_reply(steps, plen, tokenizer, cfg, screen):
    """Show one reply while it is written, or when it is whole if there is no terminal. Ctrl-C ends it.

    Returns its text as far as it got.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    text, note, began = "", "", time.monotonic()
    blocks = cfg.reply_length() // cfg.block_length
    console = Console(highlight=False)
    live = Live(console=console, refresh_per_second=20) if screen.live else contextlib.nullcontext()

    with live:
        with contextlib.suppress(KeyboardInterrupt):
            for texts, frame in steps:
                text = texts[0]
                if not screen.live:
                    continue
                n = len(reply_ids(tokenizer, frame.ids[0, plen:], cfg.stop))
                speed = n / (time.monotonic() - began)
                note = f"block {frame.block + 1}/{blocks} · step {frame.step + 1} · {n} tokens · {speed:.0f} tokens/s"
                lines = render(frame, plen, tokenizer, cfg.block_length).wrap(console, console.width)
                seen = Text("\n").join(lines[2 - console.height :])  # the end of it, if the terminal is full
                live.update(Group(seen, Text(note, "dim")))
        if screen.live:
            live.update(Group(Text(text), Text(note, "dim")))
        else:
            screen.say(text)
    return text


UNTRAINED = (
    "{} is untrained and talks nonsense. To talk to a trained one: --task pretrain --model tiny-modernbert, "
    "then --task sft_only --model ckpt/pretrain --sft_data talk --steps_sft 1500, then --task chat --model "
    "ckpt/sft"
)


def chat(cfg, screen):
    """Talk to a model until /quit, or Ctrl-C or Ctrl-D at the prompt. A line that begins with / moves a slider."""
    model, tokenizer = open_model(cfg, screen)
    if cfg.model in EMBEDDED or cfg.from_scratch:
        screen.say(UNTRAINED.format(cfg.model))
    context = context_of(model)
    cfg = with_sliders(cfg, context)
    if cfg.web:
        return serve(model, tokenizer, cfg)

    if importlib.util.find_spec("readline"):  # lets the user edit the line
        import readline  # noqa: F401

    history, told = [], False
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for turn in itertools.count():
            line = input(where_sliders_are(cfg)).strip()
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
                        told = True

                    steps = replies(model, tokenizer, [prompt], cfg, keyed_generator(cfg.seed, "chat", turn))
                    text = show_reply(steps, len(prompt), tokenizer, cfg, screen)
                    history = [*asked, {"role": "assistant", "content": text}]
            except UserError as e:
                screen.say(str(e))
    screen.say("")


# The browser
def web_reply(model, tokenizer, cfg, say, message, history, *values):
    """What a browser shows of the reply to a message after each denoising step. values: those of the SLIDERS.

    say(text) tells what is wrong, and that the model does not see all of the chat.
    """
    changes = {}
    for slider, value in zip(SLIDERS.values(), values, strict=True):
        changes[slider.setting] = type(getattr(cfg, slider.setting))(value)
    asked = []
    for said in [*history, {"role": "user", "content": message}]:
        content = said["content"]
        if not isinstance(content, str):  # gradio's text is a list of parts
            content = "".join(part["text"] for part in content)
        asked.append({"role": said["role"], "content": content})

    context = context_of(model)
    try:
        cfg = with_sliders(cfg, context, **changes)
        prompt, cut = chat_prompt(tokenizer, cfg, asked, context)
    except UserError as e:
        return say(str(e))
    if cut:
        say(f"the chat is over the model's {context} tokens: its oldest part is not seen")

    generator = keyed_generator(cfg.seed, "chat", len(history) // 2)
    for texts, frame in replies(model, tokenizer, [prompt], cfg, generator):
        text = texts[0]
        yield render(frame, len(prompt), tokenizer, cfg.block_length).plain
    yield text


def widget(slider, cfg):
    """The browser's widget for a slider, set as the settings are."""
    import gradio

    value = cfg.reply_length() if slider.setting == "max_length" else getattr(cfg, slider.setting)
    if slider.span:
        least, most, step = slider.span
        return gradio.Slider(least, max(most, value), value, step=step, label=slider.label)
    if slider.choices:
        return gradio.Dropdown(slider.choices, value=value, label=slider.label)
    make = gradio.Checkbox if isinstance(value, bool) else gradio.Textbox
    return make(value, label=slider.label)


def serve(model, tokenizer, cfg):
    """The chat in a browser, on this machine's own address alone, until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which would ask the network
    import gradio

    page = gradio.ChatInterface(
        functools.partial(web_reply, model, tokenizer, cfg, gradio.Warning),
        title=f"d1: {cfg.model}",
        chatbot=gradio.Chatbot(render_markdown=False),  # as markdown, tags would be hidden
        additional_inputs_accordion=gradio.Accordion("sliders", open=True),
        additional_inputs=[widget(slider, cfg) for slider in SLIDERS.values()],
    )
    page.launch(server_name="127.0.0.1", share=False)  # one reply at a time, as is gradio's default


# The pipeline
PIPELINE_OPTIONS = {  # of a call: the setting that each is
    "num_steps": "eval_steps",
    "stop_token": "stop",
    "use_confidence": "remasking",
    "stream": "stream",
    "block_length": "block_length",
    "max_length": "max_length",
    "allow_edits": "allow_edits",
    "temperature": "temperature",
    "seed": "seed",
}


def pipeline_settings(options):
    """The settings that the options of a call stand for. TypeError on an option that does not exist."""
    given = {name: value for name, value in options.items() if value is not None}
    unknown = given.keys() - PIPELINE_OPTIONS.keys()
    if unknown:
        raise TypeError(f"unknown option {min(unknown)}: there are {', '.join(PIPELINE_OPTIONS)}")
    if "use_confidence" in given:
        given["use_confidence"] = "low_confidence" if given["use_confidence"] else "ancestral"
    return {PIPELINE_OPTIONS[name]: value for name, value in given.items()}


def pipeline_prompts(tokenizer, chats):
    """Token ids of chats or texts. A text is a chat's first message, or all of the prompt without a chat template."""
    if None in (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise UserError("the tokenizer lacks a mask, EOS or pad token: give a checkpoint of d1_full.py")

    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": chat}] if isinstance(chat, str) else chat for chat in chats]
    return [tokenizer.encode(chat) if isinstance(chat, str) else encode_prompt(tokenizer, chat) for chat in chats]


def pipeline_replies(model, tokenizer, prompts, first, given, stream):
    """The replies to prompts of which the first has the number `first` in its call, which keys the random streams."""
    import transformers

    state = read_json(Path(str(model.name_or_path), "d1_state.json"))
    given = {"task": "chat", "preset": state.get("preset", "paper")} | given
    cfg, _ = settle({name: (value, "call") for name, value in given.items()})

    context, longest = context_of(model), max(map(len, prompts))
    if stream and len(prompts) > 1:
        raise UserError("stream=True takes one prompt")
    if longest + 2 * cfg.block_length > context:
        raise UserError(f"a prompt of {longest} tokens and two blocks are over the model's {context} tokens")

    streamer = transformers.TextDiffusionStreamer(tokenizer, skip_special_tokens=True) if stream else None
    generators = [keyed_generator(cfg.seed, "pipeline", first + i) for i in range(len(prompts))]
    *_, (texts, _) = replies(model, tokenizer, prompts, cfg, generators, streamer)
    return texts


@functools.cache
def text_diffusion_pipeline():
    """Make TextDiffusionPipeline, and register it with transformers as text-diffusion."""
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY

    class TextDiffusionPipeline(transformers.Pipeline):
        """Replies to a text, a chat (a list of messages) or a list of these. A text is the first message of a chat.

        num_steps (0 = half the length), block_length, max_length, allow_edits, temperature and seed are as in
        Settings. use_confidence=False is ancestral sampling, and stop_token is a text that ends a reply. stream=True
        prints the one reply while it is written. batch_size rows are decoded at once, None = all.
        """

        _load_tokenizer = True

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if not is_bidirectional(self.model.eval()):  # an adapter's base, as transformers loads it
                raise UserError(f"{self.model.name_or_path} attends to the left only: use what --export hf has written")

        def _sanitize_parameters(self, **options):
            return {}, pipeline_settings(options), {}

        def __call__(self, inputs, batch_size=None, **options):
            inputs = inputs if isinstance(inputs, str) else list(inputs)
            one = isinstance(inputs, str) or (inputs and isinstance(inputs[0], dict))
            chats = [inputs] if one else inputs

            made = []
            size = batch_size or self._batch_size or len(chats) or 1
            for first in range(0, len(chats), size):  # as a dict: transformers would take a list apart
                made += super().__call__({"chats": chats[first : first + size], "first": first}, **options)
            return made[0] if one else made

        def preprocess(self, inputs):
            return inputs | {"prompts": pipeline_prompts(self.tokenizer, inputs["chats"])}

        def _forward(self, inputs, stream=False, **given):
            prompts, first = inputs["prompts"], inputs["first"]
            return {"texts": pipeline_replies(self.model, self.tokenizer, prompts, first, given, stream)}

        def postprocess(self, outputs):
            return [[{"generated_text": text}] for text in outputs["texts"]]

    classes = transformers.AutoModelForMaskedLM, transformers.AutoModelForCausalLM
    PIPELINE_REGISTRY.register_pipeline("text-diffusion", TextDiffusionPipeline, classes)
    return TextDiffusionPipeline


def __getattr__(name):
    """TextDiffusionPipeline, made when it is first asked for, since to import this file loads no transformers."""
    if name == "TextDiffusionPipeline":
        return text_diffusion_pipeline()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# %% 24. Command line — flags, stages, runs, dry run, smoke, sweep, explain
EPILOG = """Start here:  python d1_full.py --task sudoku        (the embedded model, offline, minutes)
             python d1_full.py --task sudoku --dry_run   (settings and cost, nothing run)
Defaults are one value, or one a preset; in {task: value, '*': value} the star is every other task.
In brackets: where the paper preset's value is from."""


# Flags
def parse_words(words):
    """The values of the flags, one per field of Settings, among command-line words. UserError on another word."""
    parser = argparse.ArgumentParser(
        prog="d1_full.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EPILOG,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for f in dataclasses.fields(Settings):
        columns = {preset: repr(Settings.column(f.name, preset)) for preset in PRESETS}
        default = " | ".join(map(" ".join, columns.items()))
        if len(set(columns.values())) == 1:
            default = columns["paper"]
        text = f"{f.metadata['help']} Default: {default}. [{f.metadata['source']}]"

        kind = dict(type={"int": int, "float": float}.get(f.type, str), metavar=f.type.upper())
        if f.metadata["choices"]:
            kind = dict(choices=f.metadata["choices"])
        if f.type == "bool":
            kind = dict(action=argparse.BooleanOptionalAction)
        if f.name == "explain":
            kind |= dict(nargs="?", const="tags")
        parser.add_argument(f"--{f.name}", help=text.replace("%", "%%"), **kind)

    known, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [f"--{name}" for name in Settings.__annotations__]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown argument {unknown[0]}{hint}")
    return vars(known)


def config_words(path):
    """The settings of a YAML file as command-line words, so that one parser reads both."""
    import yaml

    with refusing(f"--config {path}"):
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(content, dict) or any(isinstance(v, dict | list | None) for v in content.values()):
            raise ValueError("write one 'flag: value' a line")
    return words_of(content)


def words_of(values):
    """Settings as command-line words."""
    return [f"--{k}" if v is True else f"--no-{k}" if v is False else f"--{k}={v}" for k, v in values.items()]


def read_flags(argv):
    """What the user gave: {name: (value, "command line" or "config")}. The command line goes before the file."""
    typed = parse_words(argv)
    filed = parse_words(config_words(typed["config"])) if "config" in typed else {}
    return sourced(filed, "config") | sourced(typed, "command line")


def sourced(values, source):
    """Settings as `settle` takes them, {name: (value, source)}."""
    return {name: (value, source) for name, value in values.items()}


def settle(given):
    """(Settings, where each is from) of the flags that are given, as {name: (value, source)}.

    UserError on what cannot run, before anything is loaded.
    """
    cfg = Settings(**{"preset": "auto"} | {name: value for name, (value, _) in given.items()})

    origin = dict.fromkeys(vars(cfg), f"preset {cfg.preset}")
    if "steps_sft" in given:
        origin["data_ratio"] = "--steps_sft"
    origin |= {name: source for name, (_, source) in given.items()}

    validate(cfg)
    check_surroundings(cfg)
    return cfg, origin


def check_surroundings(cfg):
    """UserError on what the model's folder, the machine, its packages or a data file do not allow."""
    if cfg.task == "table1" and {*stages_passed(cfg)} - {"pretrain"}:
        raise UserError(
            "--task table1 trains all rows of its table: give a model that neither stage has trained, "
            f"not {cfg.model}"
        )
    if cfg.attn == "flash_attention_2" and not (torch.cuda.is_available() and importlib.util.find_spec("flash_attn")):
        raise UserError("--attn flash_attention_2 needs a CUDA GPU and the package flash-attn: use --attn auto")

    packages = {
        "web": cfg.web and "gradio",
        "sweep": cfg.sweep and "optuna",
        "load_4bit": cfg.load_4bit and "bitsandbytes",
        f"report_to {cfg.report_to}": cfg.report_to in TRACKERS and cfg.report_to,  # accelerate would leave it out
    }
    for flag, package in packages.items():  # a folder of that name, as wandb leaves one, is found too, without origin
        if package and not getattr(importlib.util.find_spec(package), "origin", None):
            raise UserError(f"--{flag} needs the package {package}: pip install {package}")

    if cfg.model not in EMBEDDED:
        resolve_checkpoint(cfg.model)
    is_text = cfg.task == "pretrain"
    for source in cfg.data, cfg.sft_data:
        if source not in ("", "talk") and not (is_text and Path(source).is_dir()):
            check_source(source, ROW_FILES + TEXT_FILES if is_text else ROW_FILES)


# A model and its stages
def open_model(cfg, screen):
    """Load model and tokenizer as the settings say, and print what came. UserError if its network does not fit."""
    lora = None
    if cfg.trains() and cfg.use_lora:
        lora = cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets
    trains_all = cfg.trains() and not lora

    dtype = torch.float32 if trains_all else None  # None = as load_model chooses
    if cfg.dtype != "auto":
        dtype = getattr(torch, cfg.dtype)
    model, tokenizer = load_model(
        cfg.model,
        dtype=dtype,
        lora=lora,
        load_4bit=cfg.load_4bit,
        attn=cfg.attn,
        seed=cfg.seed,
        from_scratch=cfg.from_scratch,
    )

    c = model.config
    if cfg.export == "llada" and (c.model_type != "llama" or c.tie_word_embeddings or c.attention_bias or c.mlp_bias):
        raise UserError(f"--export llada needs LLaDA's network, a plain Llama; this model is another, {c.model_type}")
    windows = getattr(c, "sliding_window", None) or "sliding" in str(getattr(c, "layer_types", ""))
    if (cfg.cache, cfg.rollout_cache) != ("none", "none") and (windows or not model.can_generate()):
        raise UserError(f"--cache and --rollout_cache: {c.model_type} keeps no keys and values of all tokens")

    if trains_all and hasattr(model, "peft_config"):
        model = model.merge_and_unload().requires_grad_(True)
    if trains_all and cfg.edit_rate:
        add_delete_token(model, tokenizer)
    if cfg.compile:  # block by block: a small graph that serves all of them, and the output layer stays free
        with refusing("--compile does not work here"):
            torch.compile(torch.sin)(torch.zeros(1))
            lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
            for block in next(m for m in lists if len(m) == c.num_hidden_layers):
                block.compile(dynamic=True)
    if cfg.grad_checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    describe(model, tokenizer, cfg, screen)
    return model, tokenizer


def describe(model, tokenizer, cfg, screen):
    """Print what a loaded model is, which of its tokens have a meaning, and what it runs on."""
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    share = f", {trained:,} trained ({100 * trained / total:.2f} %)" if cfg.trains() else ""
    screen.say(f"model {cfg.model}: {total:,} parameters{share}")
    if cfg.trains() and cfg.use_lora:
        layers = collections.Counter(n.split(".")[-2] for n, _ in model.named_modules() if n.endswith("lora_A"))
        each = ", ".join(f"{name} x{count}" for name, count in layers.items())
        screen.say(f"LoRA r {cfg.lora_r}, alpha {cfg.lora_alpha} on {each}")

    ids = [tokenizer.mask_token_id, tokenizer.eos_token_id, turn_end(tokenizer)[0], tokenizer.pad_token_id]
    named = zip(("mask", "EOS", "EOT", "pad"), ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    screen.say(f"tokens {', '.join(f'{name} {i} {token}' for name, i, token in named)}")
    machine = f"{processes().num_processes} x {model.device}, {torch.get_num_threads()} CPU threads"
    screen.say(f"preset {cfg.preset}, seed {cfg.seed}; {str(model.dtype).split('.')[1]}; {machine}")


def sft_stage(model, tokenizer, rows, cfg):
    """Stage 1, or the pre-training before it, on (ids, prompt_len) rows.

    UserError if no reply fits --sft_length, or if --sft_length or --bs_sft do not fit the model or the processes.
    """
    check_positions(model, cfg.sft_length + cfg.sft_extra)
    if all(prompt_len >= cfg.sft_length for _, prompt_len in rows):
        raise UserError(f"--sft_length {cfg.sft_length} leaves no room for a reply after the prompts")
    world = processes().num_processes
    if cfg.bs_sft % world:
        raise UserError(f"--bs_sft {cfg.bs_sft} must be a multiple of the {world} processes")

    hold_logits(model, cfg.logits_held(model.config))
    kind, heldout = Pretraining, None
    if cfg.task != "pretrain":
        kind, (rows, heldout) = EditSFT, hold_out(rows, cfg.seed)
    return kind(
        model,
        rows,
        cfg,
        heldout=heldout,
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        delete_id=tokenizer.added_tokens_encoder.get(DELETE),
    )


def rl_stage(model, tokenizer, task, problems, cfg, heldout=None):
    """Stage 2 on a task's problems. heldout(model) -> score chooses the best weights, None = the last are kept.

    Its `prompts` are a `TaskRollouts`, which is to listen to the trainer. UserError if prompt and reply are longer than
    the model can see.
    """
    check_positions(model, cfg.max_prompt + cfg.gen_length)
    rollouts = TaskRollouts(tokenizer, task, problems, cfg)

    return MasksTogether(
        model,
        rollouts,
        rollouts.reward,
        cfg,
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        reference=reference_of(model),
        decode=rollouts.decode,
        heldout=heldout,
        mask_group=cfg.masks_shared_by(),
    )


class MasksTogether(DiffuGRPO):
    """Stage 2 that scores several prompt masks in one forward pass, as many as --logits_gib has room for."""

    def logps(self, model, r, prompt_masks):
        # [D9] official runs all mu masks in one forward, 7.7 GiB of logits at 8B. here: as many as --logits_gib holds.
        held = self.cfg.logits_held(self.model.config) * self.mask_group  # completions that share a mask share logits
        texts, found = ("prompt", "attention_mask", "completion", "completion_mask"), []
        for masks in prompt_masks.split(max(1, held // r.completion.numel())) if len(prompt_masks) else ():
            copies = {name: getattr(r, name).repeat(len(masks), 1) for name in texts}
            logp = self.logp(model, dataclasses.replace(r, **copies), masks.flatten(0, 1))  # (masks * B, C)
            found += logp.view(len(masks), *r.completion.shape)
        return found


class TaskRollouts(Listener):
    """What stage 2 asks about the texts of a task: prompts as ids, made when asked for; replies; their rewards.

    As a listener it adds figures to each rollout: the share of prompts that were cut, and the error of a cache.
    `sample` is the first reply of the last rollout, with its question and its reward.
    """

    def __init__(self, tokenizer, task, problems, cfg):
        self.tokenizer, self.task, self.problems, self.cfg = tokenizer, task, problems, cfg
        self.cut, self.sample = {}, ""  # cut: by problem, 1 = its prompt was too long

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, i):
        """The ids of a problem's prompt: the last --max_prompt of them."""
        chat = self.task.messages(self.problems[i])
        [ids], self.cut[i] = encode_prompts(self.tokenizer, [chat], self.cfg.max_prompt)
        return ids

    def decode(self, model, prompt, **options):
        """`diffuse_decode` with --rollout_cache, and without edits."""
        options |= decoding(self.tokenizer, self.cfg) | dict(cache=self.cfg.rollout_cache, edit_rate=0.0)
        self.frames = list(diffuse_steps(model, prompt, **options))
        return self.frames[-1].ids

    def reward(self, completion, problems):
        """The parts of the reward of each completion (B, C), which answers the problem of that number."""
        texts, examples = reply_texts(self.tokenizer, completion), []
        live = live_tokens(completion, self.tokenizer.eos_token_id)  # (B, C)
        for i, ids, mask in zip(problems, completion, live, strict=True):
            examples.append(self.problems[i] | {"completion_ids": ids[mask].tolist()})
        parts = self.task.batch_rewards(texts, examples, official=self.cfg.preset == "official")

        question = self.task.messages(examples[0])[-1]["content"].splitlines()[-1]
        self.sample = f"{question} -> {texts[0]!r}"
        self.cut_share = sum(self.cut[i] for i in problems) / len(problems)
        return parts

    def on_rollout(self, trainer, rollout):
        self.sample += f" (reward {rollout.rewards[0]:.2f})"
        rollout.figures["prompts_cut"] = self.cut_share
        if self.cfg.rollout_cache != "none":
            mask_id, mask = self.tokenizer.mask_token_id, rollout.attention_mask
            rollout.figures["cache_error"] = cache_error(trainer.model, self.frames, mask_id, mask)


# Runs
def prepare_folder(cfg, out, screen):
    """Make the run's folder, locked; an earlier run in it is moved aside, unless it is resumed or only evaluated."""
    import filelock

    out.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=0)  # the system frees it when a run dies
    is_main = processes().is_main_process
    if is_main:
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another run works in {out}: wait for it, or give another --output_dir") from None

    if is_main and (out / "metrics.jsonl").exists() and not (cfg.resume or cfg.eval_only):
        if cfg.model not in EMBEDDED and Path(cfg.model).resolve().is_relative_to(out.resolve()):
            raise UserError(f"--model {cfg.model} lies in {out}, where this run would write: give another --output_dir")
        aside, i = out, 0
        while aside.exists():
            i += 1
            aside = out.with_name(f"{out.name}.old{i}")
        out.rename(aside)
        screen.say(f"an earlier run was in {out}; it is now in {aside}")

    out.mkdir(parents=True, exist_ok=True)
    processes().wait_for_everyone()
    return lock


def run_stage(stage, tokenizer, stages, cfg, out, screen, *listeners):
    """Resume if asked, train, and export the model with what d1_state.json tells of it."""
    trainer = trainer_for(stage, tokenizer, cfg, out, screen, *listeners)
    if cfg.resume:
        begins = f"resumed after step {stage.step}" if load_trainer(trainer, screen) else "from the start"
        screen.say(f"{stage.name}: {begins}")
    train(trainer, screen)

    export_model(stage.model, tokenizer, out, state_of(stages, cfg))
    if cfg.export:
        export_model(stage.model, tokenizer, out / cfg.export, form=cfg.export)
    plot_curves(out)
    processes().wait_for_everyone()


def state_of(stages, cfg):
    """What d1_state.json tells of a checkpoint: stages passed, origin, settings, command, versions, commit."""
    import transformers

    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return dict(
        stages=stages,
        preset=cfg.preset,
        origin=origin_of(cfg.model),
        settings=dataclasses.asdict(cfg),
        argv=sys.argv[1:],
        versions=dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__),
        commit=commit or None,
    )


def run_stages(cfg, screen, out, before=True):
    """Stage 1 if needed, evaluation, stage 2 on a benchmark, evaluation. Returns the entries of eval.json it made.

    before: whether there is an evaluation between the stages.
    """
    tasks = tasks_of(cfg)
    model, tokenizer = open_model(cfg, screen)
    cfg = cfg.with_data_ratio(model.num_parameters())
    stages = stages_passed(cfg)
    splits, traces = load_data(cfg, tasks, tokenizer, screen)
    _lock = prepare_folder(cfg, out, screen)  # held as long as this function runs

    def evaluation():
        if not cfg.evaluates():
            return []
        after = [name for name in stages if name != "pretrain"]
        row = "d1" if {"sft", "diffu_grpo"} <= set(after) else ["base", *after][-1]
        entries = []
        for task, split in splits.items():
            entries += evaluate(model, tokenizer, task, split["test"], cfg, row, out, screen)
        return entries

    for task, split in splits.items() if cfg.task in RL_TASKS else ():
        say_sizes(task, split, screen)
        if cfg.data:
            say_source(cfg, task, split, screen)

    if traces:
        stage = sft_stage(model, tokenizer, traces, cfg)
        stages = [*({"pretrain"} & set(stages) - {stage.name}), stage.name]
        run_stage(stage, tokenizer, stages, cfg, out, screen)
    if not cfg.reinforces():
        return evaluation()

    entries = evaluation() if before else []
    [(task, split)] = splits.items()
    heldout = heldout_score(tokenizer, task, split["heldout"][: cfg.limit or 128], cfg)
    stage = rl_stage(model, tokenizer, task, split["train"], cfg, heldout)
    stages = [name for name in stages if name != stage.name] + [stage.name]
    run_stage(stage, tokenizer, stages, cfg, out, screen, stage.prompts)
    return entries + evaluation()


def run_table1(cfg, screen, out, given):
    """The paper's Table 1 on the model given: base, +SFT, +diffu-GRPO, d1. Finished parts are not redone."""
    sft = out.parent / "sft"  # where --task sft_only leaves it
    parts = [("table1", out / "base", cfg.model), ("sft_only", sft, cfg.model)]
    for task in TASKS:
        parts += [(task, out / f"{task}_diffu_grpo", cfg.model), (task, out / f"{task}_d1", str(sft))]

    entries = []
    for task, folder, model in parts:
        changes = dict(
            task=task,
            model=model,
            skip_sft=task in TASKS,
            skip_eval=False,
            preset=cfg.preset,
            from_scratch=cfg.from_scratch and model == cfg.model,
            resume=cfg.resume and (folder / "trainer").exists(),
        )
        part, _ = settle(given | sourced(changes, "table1"))

        state = read_json(folder / "d1_state.json").get("settings")
        trained = bool(state) and not changed_settings(state, part)  # the checkpoint of a run with these settings
        screen.say(f"--- table1: {folder}{', trained already' if trained else ''}")
        if trained:
            part = dataclasses.replace(part, model=str(folder), from_scratch=False)
        if trained or task == "table1":  # the base: nothing to train
            part = dataclasses.replace(part, eval_only=True)
        entries += run_stages(part, screen, folder, before=False)

    write_json(out / "eval.json", entries)
    return sorted(entries, key=lambda e: (list(TASKS).index(e["task"]), list(ROW_TITLES).index(e["row"])))


# --dry_run
class Plan(NamedTuple):
    """What a run needs."""

    parameters: int
    trained: int
    passes: dict  # by name: updates; passes of an update; tokens of a pass; FLOPs of an update
    memory: dict  # bytes, by what they are for
    disk: float  # bytes


def plan(cfg, model, given=()):
    """What a run with this model needs. given: the settings of a user's own, which hold in all parts of table1."""
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    base = model.num_parameters() - adapters
    trained = (adapters or base) if cfg.trains() else 0

    cfg, config, is_tiny = cfg.with_data_ratio(base), model.config, cfg.preset == "tiny"
    sft, rl = has_stage1(cfg), cfg.trains() and cfg.task in (*RL_TASKS, "table1")
    rows_sft, rows_rl = min(cfg.rows_sft, cfg.bs_sft), cfg.bs_rl // cfg.masks_shared_by()  # of a backward pass
    row_rl = (24 if is_tiny else cfg.max_prompt) + cfg.gen_length  # tokens of prompt and completion

    def steps_of(name, task):
        return getattr(cfg, name) if name in given else Settings.default(name, task, cfg.preset)

    updates_sft, updates_rl = cfg.steps_sft * sft, cfg.steps_rl * rl
    if cfg.task == "table1":  # each benchmark twice, for as many steps as it has by default
        updates_sft = steps_of("steps_sft", "sft_only")
        updates_rl = 2 * sum(steps_of("steps_rl", task) for task in TASKS)

    def work(updates, passes, rows, length, cost):  # cost: FLOPs a weight and token
        attention = 2 * config.hidden_size * config.num_hidden_layers * length
        weights = base - model.get_input_embeddings().weight.numel()
        return updates, passes, rows * length, passes * rows * length * cost * (weights + attention)

    back = (4 if cfg.use_lora else 6) + 2 * cfg.grad_checkpoint  # LoRA needs no gradient of the frozen weights
    decoded = (cfg.diffusion_steps or cfg.gen_length // 2) * cfg.grad_accum / cfg.mu
    scored = (1 - 1 / cfg.mu + bool(cfg.beta)) * cfg.grad_accum  # by π_old and π_ref
    passes = {
        "SFT: forward + backward passes": work(updates_sft, cfg.bs_sft / rows_sft, rows_sft, cfg.sft_length, back),
        "RL rollouts: forward passes": work(updates_rl, decoded, cfg.bs_rl, row_rl, 2),
        "RL old, ref: forward passes": work(updates_rl, scored, rows_rl, row_rl, 2),
        "RL updates: forward + backward passes": work(updates_rl, cfg.grad_accum, rows_rl, row_rl, back),
    }

    packed = sum(m.weight.numel() for m in block_linears(model).values()) * cfg.load_4bit
    width = 4 if is_tiny or not (cfg.use_lora or cfg.eval_only) else 2  # bytes of the others
    stored = packed * 0.516 + (base - packed) * width  # NF4 and its scales are .516 bytes a weight
    has_copy = bool(rl and cfg.beta and not cfg.use_lora)  # of all weights: the frozen reference
    tokens = max(rows_sft * cfg.sft_length * sft, rows_rl * row_rl * rl)
    replies = max(min(rows_sft * cfg.sft_length // 2, cfg.logits_held(config)) * sft, rows_rl * cfg.gen_length * rl)
    kept = bytes_per_token(config, cfg.lora_r * cfg.use_lora, cfg.grad_checkpoint)
    memory = {
        "weights and reference" if has_copy else "weights": stored * (1 + has_copy),
        "adapters": 4 * adapters,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "activations": kept * tokens + 2 * trained,  # bf16 copies of fp32 weights are among them
        "logits": config.vocab_size * 12 * replies,
    }
    checkpoints = (cfg.save_total_limit + 1) * (sft + rl)  # one more while it is written
    return Plan(base + adapters, trained, passes, memory, trained * (16 * checkpoints + 4))


def skeleton(cfg):
    """The model without memory for its weights, for counting."""
    if cfg.model in EMBEDDED:
        return random_model(*embedded_network(cfg.model, build_tokenizer(cfg.model)))

    _, base = resolve_checkpoint(cfg.model)
    raw = LLADA_8B if base in ALIASES.values() else read_config(base)  # known without a network
    with refusing(f"cannot load {base}"), torch.device("meta"):
        model = random_model(*network_of(base, raw))
        if cfg.use_lora and cfg.trains():
            model = adapt_with_lora(model, cfg.lora_r, cfg.lora_alpha, targets=cfg.lora_targets)
    return model


def bytes_per_token(config, r, checkpointing):
    """What backward keeps of one token, in bytes: a Llama in bf16 arithmetic, fp32 norms, fused attention."""
    d, layers, f = config.hidden_size, config.num_hidden_layers, getattr(config, "intermediate_size", 0)
    block = 28 * d + 8 * f + 14 * r if r else 34 * d + 8 * f  # full training has fp32 residuals and norms
    return 2 * d * layers + block if checkpointing else block * layers


def dry_run(cfg, origin, screen):
    """Print every setting with where it came from, and what the run will need."""
    rows = []
    for f in dataclasses.fields(Settings):
        value, paper = getattr(cfg, f.name), Settings.default(f.name, cfg.task)
        source = f.metadata["source"] if value == paper else f"paper preset: {paper}"
        rows.append((f.name, value, origin[f.name], source))
    screen.table("Settings", ["setting", "value", "from", "source"], rows, text=True)

    p = plan(cfg, skeleton(cfg), [name for name, source in origin.items() if "preset" not in source])
    needs = {"parameters, of which trained": f"{p.parameters:,}, {p.trained:,}"}
    for name, (updates, passes, tokens, flops) in p.passes.items():
        if updates:
            needs[name] = (
                f"{passes:.4g} of {tokens:,} tokens an update, {flops:.2e} FLOPs; "
                f"{passes * updates:,.0f} in the run"
            )

    flops = sum(flops * updates for updates, _, _, flops in p.passes.values())
    needs["FLOPs of training, a process"] = f"{flops:.2e}: {flops / 2e14 / 3600:,.1f} h at 200 TFLOP/s"
    needs |= {f"memory: {name}": f"{size / 2**30:.3f} GiB" for name, size in p.memory.items() if size}
    needs["memory: peak, about"] = f"{sum(p.memory.values()) / 2**30:.2f} GiB"
    needs["disk: checkpoints and weights"] = f"{p.disk / 2**30:.3f} GiB"
    screen.table("What the run needs", ["quantity", "value"], needs.items())


# --smoke
@contextlib.contextmanager
def checking(name, screen):
    """Context of a check of --smoke, where see(text, is_good) says what was seen. Stopped if it is not good."""
    began, seen = time.perf_counter(), []

    def see(text, is_good=True):
        if not is_good:
            raise ValueError(text)
        seen.append(text)

    try:
        yield see
    except Exception as e:  # whatever it is, the check has failed
        words = " ".join(str(e).split())[:300]
        raise Stopped(f"--smoke: {name} failed: {words} ({type(e).__name__})") from e
    screen.say(f"  {name:20}  {seen[0]:60}  {time.perf_counter() - began:6.1f} s")


def smoke(cfg, screen):
    """--smoke: each part of the run once on a few rows, nothing trained or written. Stopped names what failed."""
    size, is_table1 = cfg.block_length, cfg.task == "table1"
    cfg = dataclasses.replace(
        cfg,
        n_traces=8,
        steps_rl=min(cfg.steps_rl, cfg.mu),
        steps_sft=1,
        bs_sft=2 * processes().num_processes,
        rows_sft=1,
        lr_sft=0.0,
        reward_errors="stop",
    )

    with checking("model", screen) as see:
        model, tokenizer = open_model(cfg, screen)
        mask_id, eos_id = tokenizer.mask_token_id, tokenizer.eos_token_id
        see(f"{type(model).__name__}, {str(model.dtype).split('.')[1]}")

    with checking("tokenizer", screen) as see:
        text = tokenizer.encode(SYSTEM, add_special_tokens=False)
        back = tokenizer.decode(text)
        is_alike = "".join(SYSTEM.lower().split()) == "".join(back.lower().split())  # BERT has no capitals, no newlines
        is_good = is_alike and None not in (mask_id, eos_id) and mask_id != eos_id
        how = "alike" if is_alike else f"as {back!r}"
        see(f"mask {mask_id}, EOS {eos_id}, {len(text)} tokens read back {how}", is_good)

    with checking("data", screen) as see:
        problems, rows, sizes = {}, [], collections.Counter()  # rows: pairs (ids, prompt_len)
        for name in ("sft_only", *TASKS) if is_table1 else (cfg.task,):
            part = dataclasses.replace(cfg, task=name, skip_sft=cfg.skip_sft or is_table1)
            splits, traces = load_data(part, tasks_of(part), tokenizer, screen)
            problems, rows = problems | splits, rows + traces
        for split in problems.values():
            sizes.update({name: len(found) for name, found in split.items()})
        sizes["SFT rows"] = len(rows)
        see(", ".join(f"{name} {n:,}" for name, n in sizes.items()))

    with checking("forward pass", screen) as see:
        chosen = [(task, example) for task, split in problems.items() for example in split.get("test", [])[:2]]
        asked = [evaluation_prompts(tokenizer, task, [example], cfg)[0][0] for task, example in chosen]
        asked = asked or [[int(i) for i in ids[: n or size]] for ids, n in rows[:2]]
        prompt, attention_mask = pad_left(asked, tokenizer.pad_token_id, model.device)  # (B, P) each
        check_positions(model, prompt.shape[1] + (max(cfg.lengths()) if chosen else 0))
        x = F.pad(prompt, (0, size), value=mask_id)  # (B, P+K)
        with torch.no_grad(), precision(model.device):
            logits = model.eval()(x, attention_mask=extend_mask(attention_mask, x.shape[1])).logits
        top = float(logits.abs().max())
        see(f"logits up to {top:.3g}", top < math.inf)

    if not rows:  # without a stage 1 its loss is tried on the text above as a reply
        rows = [(ids + text + turn_end(tokenizer), len(ids)) for ids in asked]
        cfg = dataclasses.replace(cfg, sft_length=max(len(ids) for ids, _ in rows), sft_extra=0)
    if not cfg.eval_only:
        smoke_sft(model, tokenizer, rows, cfg, screen)

    with checking("decoding", screen) as see:
        options = decoding(tokenizer, cfg) | dict(gen_length=size, steps=min(4, size), cache=cfg.cache)
        with precision(model.device):
            ids = diffuse_decode(model.eval(), prompt, attention_mask=attention_mask, **options)  # (B, P+K)
        replies = ids[:, prompt.shape[1] :]  # (B, K)
        left = int((replies == mask_id).sum())
        see(f"{replies.numel()} tokens, {left} of them masks", not left)

    with checking("reward", screen) as see:
        answered = zip(chosen, reply_texts(tokenizer, replies), strict=False)
        paid = [sum(task.rewards(reply, e, cfg.preset == "official").values()) for (task, e), reply in answered]
        seen = f"of {len(paid)} replies: {sum(paid):.2f}" if paid else "this run has no benchmark"
        see(seen, all(map(math.isfinite, paid)))
    screen.say("all checks passed; nothing was trained or written")


def smoke_sft(model, tokenizer, rows, cfg, screen):
    """The checks of stage 1: what is masked, and an update at learning rate 0."""
    with checking("masking", screen) as see:
        stage = sft_stage(model, tokenizer, rows, cfg)
        x0, is_prompt = stage.collate(rows[:8], cfg.sft_length)  # (B, L) each
        t, generator = torch.full((len(x0),), 0.5), keyed_generator(cfg.seed, "smoke")
        xt, masked = forward_process(x0, t, is_prompt, stage.mask_id, generator)

        share = float(masked[~is_prompt].float().mean())
        is_half = abs(share - 0.5) < 2.5 / math.sqrt((~is_prompt).sum())  # five standard deviations
        is_more = bool(masked[is_prompt].any() or (xt != x0.where(~masked, stage.mask_id)).any())
        more = ", and more is changed" if is_more else ""
        see(f"at t 0.5 {share:.2f} of the replies{more}", is_half and not is_more)

    with checking("SFT loss, gradient", screen) as see:
        trainer = Trainer(stage, make_backend(cfg, Path(cfg.output_dir), stage.grad_clip))
        loss, norm = operator.itemgetter("loss", "grad_norm")(next(stage.updates(trainer)))
        trainer.finish()
        see(f"loss {loss:.3f}, gradient {norm:.3f}", 0 <= loss < math.inf and 0 <= norm < math.inf)


# --sweep
def read_space(path, given):
    """--sweep_space as {setting: (kind, options) of optuna's suggest}; each value is tried, with the others' first."""
    import yaml
    from optuna.trial import FixedTrial

    space, first, tries = {}, {}, []
    with refusing(f"--sweep_space {path}, where a line is mu: [4, 8], or lr_rl: {{low: 1e-5, high: 1e-3, log: true}}"):
        for name, wanted in yaml.safe_load(Path(path).read_text(encoding="utf-8")).items():
            if name in (*FREE, "task", "eval_only", "export") or not wanted or not isinstance(wanted, list | dict):
                raise ValueError(f"--{name} {wanted} cannot be swept")

            is_range = isinstance(wanted, dict)
            span = [wanted.pop("low"), wanted.pop("high")] if is_range else wanted
            values = [parse_words(words_of({name: v}))[name] for v in span]  # read as on the command line
            kind, options = "categorical", dict(choices=values)
            if is_range:
                kind, options = Settings.__annotations__[name], dict(low=values[0], high=values[1], **wanted)
            getattr(FixedTrial({name: values[0]}), f"suggest_{kind}")(name, **options)  # optuna looks at the range

            space[name], first[name] = (kind, options), values[0]
            tries += [{name: v} for v in values]

    if not space:
        raise UserError(f"--sweep_space {path} names no setting")
    for one in tries:
        settle(given | sourced(first | one, "sweep"))
    return space


def open_study(cfg, folder):
    """The study in a folder, which several processes may share. UserError if its trials had other settings."""
    import filelock
    import optuna

    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    path, patient = folder / "sweep.db", {"connect_args": {"timeout": 60}}
    with refusing(f"cannot use {path}"), filelock.FileLock(folder / ".lock"):  # one makes the tables
        # a trial not heard of for 40 s was killed
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", patient, heartbeat_interval=20)
        study = optuna.create_study(storage=storage, study_name="d1_full", direction="maximize", load_if_exists=True)
        optuna.storages.fail_stale_trials(study)
        changed = changed_settings(study.user_attrs.get("settings", {}), cfg)
        if changed:
            raise ValueError(f"its trials had {', '.join(changed)}: give the same flags, or another --output_dir")
        study.set_user_attr("settings", dataclasses.asdict(cfg))
    return study


def run_sweep(cfg, screen, given):
    """--sweep trials, each a run of its own, or as many as are missing; then the ten best, and the best one's flags."""
    import optuna

    if processes().num_processes > 1:
        raise UserError("--sweep: one process a trial; start the command several times instead")
    space, folder = read_space(cfg.sweep_space, given), Path(cfg.output_dir) / f"{cfg.task}-sweep"
    study, is_rl = open_study(cfg, folder), cfg.task in RL_TASKS
    key = "heldout_accuracy" if is_rl else "heldout_loss"  # of no test problem, see [D18]

    def objective(trial):
        seed = keyed_generator(cfg.seed, "sweep", trial.number).initial_seed() % 2**32  # no two trials draw alike
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        with refusing(f"{folder} is of another --sweep_space: give another --output_dir"):
            values = {k: getattr(trial, f"suggest_{kind}")(k, **options) for k, (kind, options) in space.items()}

        out = folder / str(trial.number)
        screen.say(f"--- {out}: {shlex.join(words_of(values))}")
        values |= dict(skip_eval=True, resume=False)
        try:
            part, _ = settle(given | sourced(values, "sweep"))
            run_stages(part, screen, out)
        except (UserError, NonFiniteLoss) as e:
            screen.say(f"--- {out} failed: {e}")
            raise optuna.TrialPruned from e  # counts, and keeps optuna away from there; one broken off is FAIL
        except Stopped as e:
            raise Stopped(f"{out} is broken off: the same command goes on with the sweep", e.status) from e
        finally:
            screen.stop()

        found = [row[key] for row in read_log(out / "metrics.jsonl") if key in row] or [math.nan]
        return max(found) if is_rl else -found[-1]

    counted = [optuna.trial.TrialState[name] for name in ("COMPLETE", "PRUNED", "RUNNING")]
    missing = max(cfg.sweep - len(study.get_trials(states=counted)), 0)
    enough = optuna.study.MaxTrialsCallback(cfg.sweep, states=counted)
    study.optimize(objective, n_trials=missing, gc_after_trial=True, callbacks=[enough])

    done, failed, under_way = (study.get_trials(states=[state]) for state in counted)
    rows = []
    for trial in sorted(done, key=lambda t: -(t.value or 0))[:10]:
        values = [f"{v:.3g}" if isinstance(v, float) else v for v in trial.params.values()]
        rows.append((trial.number, f"{trial.value:.4f}", *values))
    title = f"Best of {len(done)} trials in {folder}, {len(failed)} failed, {len(under_way)} under way elsewhere"
    screen.table(title, ["trial", "held-out score" if is_rl else "minus held-out loss", *space], rows)
    if not done:
        raise Stopped("no trial of the sweep has gone well; their messages are above")
    screen.say(f"best: {shlex.join(words_of(study.best_params))}")


# --explain
def tag_key(text):
    """eq4 of "Eq. (4), Sec. 3.2", sec3.1 of "Sec. 3.1", alg1 of "Algorithm 1"; small letters throughout."""
    return re.sub(r"(?<!\d)\.|[^a-z\d.]", "", text.partition(",")[0].lower().replace("algorithm", "alg"))


def tag_tables():
    """The head's tables by tag: equations (place in the paper, function, what it is); deviations (here, official)."""
    head = re.sub(r"\n {8,}", " ", __doc__ or "")  # a row may go on in the next line
    equations = re.findall(r"^    d1 (\S.*?)  +(\w+)  +(.*)$", head, re.MULTILINE)
    deviations = re.findall(r"^    (D\d+)  +(.*?) · (.*)$", head, re.MULTILINE)
    return {tag_key(row[0]): row for row in equations}, {tag: row for tag, *row in deviations}


def places_of(tag, source):
    """The lines where a deviation's tag stands, each with the function, class or method around it."""
    places, where = {}, ""
    for n, line in enumerate(source.splitlines(), 1):
        head = re.match(r"(    def |def |class |)(\w+)", line)
        if head:
            outer = where.partition(".")[0] + "." if head[1] == "    def " else ""
            where = outer + head[2]
        if f"[{tag}]" in line:
            places[n] = where
    return places


def code_of(tag):
    """The function that carries a formula, or the methods of a class that are lines of its algorithm, by name."""
    name = tag_tables()[0][tag][1]
    thing = globals()[name]
    parts = {}
    for method, f in vars(thing).items():
        if inspect.isfunction(f) and re.search(r"# .*line \d", inspect.getsource(f)):
            parts[f"{name}.{method}"] = f
    return parts or {name: thing}


def explain(tag, screen):
    """--explain: a formula of the paper or a deviation, with its code. UserError if the tag is none."""
    from rich.syntax import Syntax

    def show(name, code, first):
        screen.say(f"\n{name}, line {first}:")
        screen.console.print(Syntax(code, "python", line_numbers=True, start_line=first, theme="ansi_dark"))

    equations, deviations = tag_tables()
    key = {row[1]: key for key, row in equations.items()}.get(tag, tag_key(tag))
    key = f"sec{key}" if key[:1].isdigit() else key
    if key == "tags":
        rows = [[(k, *row) for k, row in table.items()] for table in (equations, deviations)]
        screen.table("Equations", ("tag", "paper", "function", "what"), rows[0], text=True)
        return screen.table("Deviations", ("tag", "here", "official code"), rows[1], text=True)

    notes, places = [key.upper()], {}
    source = inspect.getsource(sys.modules[__name__])
    if key in equations:
        place, name, what = equations[key]
        thing = globals()[name]
        source = inspect.getsource(thing)
        notes = [deviation for deviation in deviations if f"[{deviation}]" in source]
        screen.say(f"{place}: {what}; {name}")
        if inspect.isclass(thing):  # a function's docstring is in its code
            screen.say(f"\n{inspect.getdoc(thing)}")
    elif notes[0] in deviations:
        places = places_of(notes[0], source)
    else:
        raise UserError(f"--explain {tag}: the tags are {', '.join([*equations, *deviations])}")

    for deviation in notes:
        screen.say("[{}] here: {}\n     official code: {}".format(deviation, *deviations[deviation]))
    for n, name in places.items():
        lines = source.splitlines()[n - 1 : n if name == "Settings" else n + 9]
        show(name, "\n".join(lines).partition("\n\n\n")[0], n)
    for name, function in code_of(key).items() if key in equations else ():
        lines, first = inspect.getsourcelines(function)
        show(name, "".join(lines), first)
    for other, row in equations.items():
        if key in equations and f" {row[1]}(" in source and other != key:
            screen.say(f"calls {row[1]}: --explain {other}")


# --grade
def grade_files(cfg, screen):
    """--grade: a table of both verdicts on the replies in generations files. UserError names a file that is none.

    A file is JSON as the evaluation writes it, or JSONL of its records. Its name begins with that of its benchmark, or
    else --task says it. The official code writes a file a process, and these are one line.
    """
    path, runs = Path(cfg.grade), collections.defaultdict(list)
    for file in sorted(path.rglob("*.json*")) if path.is_dir() else [path]:
        named = (task for task in TASKS.values() if file.name.startswith((task.name, task.official_name)))
        task = next(named, TASKS.get(cfg.task) if file == path else None)  # a folder of a run has other files too
        if task and cfg.task in ("", task.name):
            name = file.relative_to(path if path.is_dir() else path.parent)
            runs[task, re.sub(r"(_\d+)?_generations$", "", str(name.with_suffix("")))].append(file)
    if not runs:
        raise UserError(f"--grade {path}: no file there is named for a benchmark: give one with its --task")

    rows = []
    for (task, name), files in runs.items():
        records = []
        with refusing(f"{files[0]}: no generations file of {task.name}"):
            for file in files:
                records += jsonl_rows(file) if file.suffix == ".jsonl" else read_json(file)["generations"]
            e = figures_of(task, records, list(map(task.of_record, records)))
        tokens = f"{e['effective_tokens']:.1f}" if "effective_tokens" in e else "-"
        shares = (percent(e[verdict], e["n"]) for verdict in ("accuracy", "official"))
        rows.append((name, task.name, e["n"], *shares, tokens))

    title = "Accuracy, %, with its 95 % Wilson interval; the official score of sudoku is the share of empty cells"
    screen.table(title, ["file", "task", "n", "strict", "official", "effective tokens"], rows)


# The program
def run(argv):
    """Do what the command line says and show the results."""
    given = read_flags(argv)
    screen = Screen()
    if "explain" in given:
        return explain(given["explain"][0], screen)
    cfg, origin = settle(given)
    if cfg.grade:
        return grade_files(cfg, screen)
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

    began, out = time.monotonic(), Path(cfg.output_dir) / ("sft" if cfg.task == "sft_only" else cfg.task)
    saved = (out if cfg.task == "table1" else out / "trainer" / "manifest.json").exists()
    cfg = dataclasses.replace(cfg, resume=cfg.resume or (cfg.auto_resume and saved))
    if cfg.resume and not saved:
        raise UserError(f"nothing to resume in {out}: run without --resume")
    try:
        entries = run_table1(cfg, screen, out, given) if cfg.task == "table1" else run_stages(cfg, screen, out)
    finally:
        screen.stop()  # a bar left open would eat the error's line
    if entries:
        results_table(screen, entries, cfg)
    screen.say(f"done in {(time.monotonic() - began) / 60:.1f} min; results are in {out}")


def main(argv=None):
    """Run the command line. Returns the exit status: 0 done, 1 stopped, 2 wrong input, 130 Ctrl-C, 143 SIGTERM."""
    debug = "--debug" in (sys.argv if argv is None else argv)  # the settings may be what is wrong
    libraries = map(logging.getLogger, ("accelerate", "bitsandbytes", "datasets", "optuna", "peft", "torch"))
    levels = {logger: logger.level for logger in libraries}

    try:
        for logger in levels:  # their notes are to their own developers
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
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
        print(
            f"d1_full.py: stopped: out of memory ({str(e).partition('.')[0]}); try a smaller --bs_rl, --rows_sft or "
            "--bs_eval, --grad_checkpoint, --use_lora, --load_4bit; --dry_run shows what takes it",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("d1_full.py: stopped by Ctrl-C; the same flags and --resume go on if anything was saved", file=sys.stderr)
        return 130
    finally:  # a model whose group is left while it lives can abort the interpreter
        for logger, level in levels.items():
            logger.setLevel(level)
        gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
