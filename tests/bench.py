"""How long d1_full.py takes, beside a plain re-implementation of the official amount of work (dllm-reasoning/d1).

    python tests/bench.py                                   # --shape small, one CPU thread
    python tests/bench.py --rows decode-greedy,update       # rows whose names begin so
    python tests/bench.py --shape llada-8b --device cuda    # LLaDA-8B's shape, random weights, no download
    python tests/bench.py --rows none --growth              # exponents in group, length and vocabulary
    python tests/bench.py --rows none --cache-accuracy ckpt/sft
    python tests/bench.py --markdown ckpt/bench.json        # puts the tables of "small, cpu" into tests/README.md

Official and ours alternate in one process, so that a busy machine slows both alike; rows of one kind share the official
run of a round. Of the rounds that are not timed, the first warms up and counts FLOPs, the second measures memory. What
both compute alike is asserted to be equal. Results are merged into --out, by shape and device.
"""

import argparse
import collections
import copy
import ctypes
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as d1_full.py sets it, before torch is loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch.utils import flop_counter

import d1_full as d1

LR, DECAY, CLIP, TEMPERATURE = 3e-6, 0.1, 0.2, 0.9
ALIKE = 1e-5  # how far official and ours may differ in fp32: in losses and log-probabilities, and so in no id

# ---- what is measured: shapes, models, stand-ins for tokenizer and reward
Shape = collections.namedtuple(
    "Shape", "name vocab prompt completion batch group mu steps lora dtype block", defaults=(0, torch.float32, 32))
SHAPES = {s.name: s for s in (
    Shape("tiny", len(d1.build_tokenizer()), prompt=24, completion=32, batch=64, group=8, mu=8, steps=16),
    Shape("small", 8192, prompt=96, completion=128, batch=6, group=6, mu=12, steps=64),
    Shape("llada-8b", 126464, prompt=200, completion=256, batch=6, group=6, mu=12, steps=128, lora=128,
          dtype=torch.bfloat16))}

class Tokenizer:
    """Texts are ids written out; the last two ids are EOS and mask."""

    def __init__(self, vocab):
        self.vocab, self.mask_token_id, self.eos_token_id, self.pad_token_id = vocab, vocab - 1, vocab - 2, vocab - 2
        self.added_tokens_encoder = {}

    def __len__(self):
        return self.vocab

    def apply_chat_template(self, messages, **options):
        return [int(word) for word in messages[-1]["content"].split()]

    def batch_decode(self, rows, **options):
        return [" ".join(map(str, row)) for row in rows]

def reward(texts):
    """Random but repeatable, so that advantages are not zero."""
    return [{"hash": int(hashlib.sha256(t.encode()).hexdigest()[:8], 16) / 16**8} for t in texts]

class Ids(d1.Task):
    """Prompts that are ids written out."""

    def messages(self, example, system=None):
        return [{"role": "user", "content": example["ids"]}]

    def batch_rewards(self, completions, examples, official=False):
        return reward(completions)

def network(s, tokenizer):
    import transformers
    if s.name == "tiny":
        return d1.random_model(*d1.embedded_network("tiny", tokenizer))
    if s.name == "small":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, vocab_size=s.vocab,
            is_causal=False, use_cache=False, bos_token_id=None, eos_token_id=None))
    kind, config = d1.network_of(s.name, d1.LLADA_8B | {"embedding_size": s.vocab, "eos_token_id": None})
    config.use_cache = False
    transformers.AttentionInterface.register("sdpa", d1.sdpa_after_fp32)  # this and the hook as `load_weights` does
    model = kind(config)
    model.model.rotary_emb.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    return model

def say_eos(model, eos_id, start, length):
    """Make the model say EOS from position `start` of the canvas on, and never before it; None = never at all."""
    row = model.lm_head.weight[eos_id].detach()
    push = 30 * row / row.square().sum()  # (D,) moves the logit of EOS by 30
    ends = None if start is None else (torch.arange(length, device=push.device) >= start)[:, None]  # (L, 1)
    def lean(module, args, hidden):
        assert ends is None or hidden.shape[1] == length, "the final norm sees a part of the canvas only"
        return hidden + (-push if ends is None else torch.where(ends, push, -push))
    model.model.norm.register_forward_hook(lean)

class Work:
    """A shape on a device: models, data and the two stages, all from fixed seeds."""

    def __init__(self, shape, device):
        self.s, self.device, self.tokenizer = shape, torch.device(device), Tokenizer(shape.vocab)
        self.length, self.mask_id = shape.prompt + shape.completion, shape.vocab - 1

    def ids(self, *size):
        return torch.randint(self.s.vocab - 2, size, generator=torch.Generator().manual_seed(1)).to(self.device)

    def prompts(self):
        return self.ids(self.s.batch // self.s.group, self.s.prompt).repeat_interleave(self.s.group, 0)  # (B, P)

    def prompt_masks(self, rows):
        real = torch.ones(self.s.mu, rows, self.s.prompt, dtype=torch.bool)
        return d1.draw_prompt_mask(real, 0.15, torch.Generator().manual_seed(2)).to(self.device)  # (mu, rows, P)

    def model(self, train=False, **eos):
        """The network with random weights; eos: where `say_eos` is to end its replies."""
        torch.manual_seed(0)
        torch.set_default_dtype(self.s.dtype)
        with self.device:
            model = network(self.s, self.tokenizer).eval()
        torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            model.lm_head.weight[self.mask_id] = 0  # as in a trained model, the mask token is never the likeliest
        if eos:
            say_eos(model, self.tokenizer.eos_token_id, length=self.length, **eos)
        return d1.adapt_with_lora(model, self.s.lora, self.s.lora // 2) if train and self.s.lora else model

    def settings(self):
        s = self.s
        flags = dict(
            task="sudoku", group=s.group, bs_rl=s.batch, grad_accum=1, mu=s.mu, lr_rl=LR, wd_rl=DECAY, clip_rl=CLIP,
            norm="token", temperature=TEMPERATURE, max_prompt=s.prompt, gen_length=s.completion, block_length=s.block,
            diffusion_steps=s.steps, eval_lengths=str(s.completion), bs_sft=s.batch, rows_sft=s.batch, lr_sft=LR,
            wd_sft=DECAY, clip_sft=CLIP, warmup_sft=0, steps_sft=10**9, sft_length=self.length, sft_extra=0)
        return d1.settle({name: (value, "bench") for name, value in flags.items()})[0]

    def grpo(self, model):
        examples = [{"ids": " ".join(map(str, row))} for row in self.ids(64, self.s.prompt).tolist()]
        return self.trainer(d1.rl_stage(model, self.tokenizer, Ids(), examples, self.settings()))

    def sft(self, model):
        rows = [(row, self.s.prompt) for row in self.ids(64, self.length).tolist()]
        return self.trainer(d1.sft_stage(model, self.tokenizer, rows, self.settings()))

    def trainer(self, stage):
        """A trainer on this device that logs and saves nothing."""
        backend = d1.make_backend(stage.cfg, Path(tempfile.gettempdir()))
        return d1.Trainer(stage, backend, getattr(stage, "prompts", None))

# ---- the official amount of work
def official_decode(model, prompt, s, mask_id, temperature):
    """All positions and the whole vocabulary at each step, noise and confidence too; autograd on, no early stop."""
    x = F.pad(prompt, (0, s.completion), value=mask_id)  # (B, L)
    place = torch.arange(x.shape[1], device=x.device)
    steps = s.steps // (s.completion // s.block)  # a block
    for lo, step in itertools.product(range(s.prompt, x.shape[1], s.block), range(steps)):
        logits = model(x).logits  # (B, L, V)
        noisy = logits.exp() / (-torch.rand_like(logits).log()) ** temperature if temperature else logits  # (B, L, V)
        open_ = x == mask_id  # (B, L)
        tokens = torch.where(open_, noisy.argmax(-1), x)  # (B, L)
        score = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (B, L)
        score = score.masked_fill(~open_ | (place < lo) | (place >= lo + s.block), -math.inf)
        for row in range(len(x)):
            top = score[row].topk(s.block // steps + (step < s.block % steps)).indices
            x[row, top] = tokens[row, top]
    return x

class Official:
    """The official trainers' work on a model of their own."""

    def __init__(self, work, model):
        self.work, self.model, self.reference = work, model, d1.reference_of(model)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(self.params, lr=LR, betas=(0.9, 0.99), weight_decay=DECAY, fused=False)

    def logps(self, model, prompt, completion, prompt_masks):
        """All masks in one forward pass, logits at all positions. prompt_masks (n, B, P) -> (n, B, C)"""
        q = torch.where(prompt_masks, self.work.mask_id, prompt)  # (n, B, P)
        canvas = F.pad(q, (0, completion.shape[1]), value=self.work.mask_id).flatten(0, 1)  # (nB, L)
        with d1.precision(self.work.device):
            logits = model(canvas).logits[:, prompt.shape[1] :]  # (nB, C, V)
            target = completion.repeat(len(prompt_masks), 1).flatten()  # (nB*C,)
            ce = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
        return -ce.view(len(prompt_masks), *completion.shape)

    @torch.no_grad()
    def score(self, prompt, completion, prompt_masks):
        """The old and the reference pass."""
        old = self.logps(self.model, prompt, completion, prompt_masks)  # (mu, B, C)
        with self.reference() as ref:
            return old, self.logps(ref, prompt, completion, prompt_masks)

    def update(self, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return loss.item()

    def inner(self, k, batch, old, ref):
        mask = batch.prompt_masks[k : k + 1]
        logp = self.logps(self.model, batch.prompt, batch.completion, mask)[0]  # (B, C)
        return self.update(
            d1.diffu_grpo_loss(logp, old[k], ref[k], batch.advantages, batch.completion_mask, norm="token")[0])

    def iteration(self):
        """Draw, pay and score a batch, then mu inner updates."""
        work, prompt = self.work, self.work.prompts()
        with d1.precision(work.device):
            ids = official_decode(self.model, prompt, work.s, work.mask_id, TEMPERATURE)
        completion = ids[:, work.s.prompt :]  # (B, C)
        paid = torch.tensor([r["hash"] for r in reward(d1.reply_texts(work.tokenizer, completion))])
        batch = types.SimpleNamespace(
            prompt=prompt, completion=completion, prompt_masks=work.prompt_masks(len(prompt)),
            completion_mask=d1.live_tokens(completion, work.tokenizer.eos_token_id),
            advantages=d1.group_advantages(paid.to(work.device), work.s.group))
        old, ref = self.score(prompt, completion, batch.prompt_masks)
        for k in range(work.s.mu):
            self.inner(k, batch, old, ref)

    def sft(self, x0, xt, masked, t, is_prompt):
        with d1.precision(self.work.device):
            logits = self.model(xt).logits  # (B, L, V)
            ce = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)  # (B, L)
        return self.update((ce * masked / t[:, None]).sum() / (~is_prompt).sum())

# ---- the rows; those of one kind share the official run: how to make it, ours by name, and which compute the same
Kind = collections.namedtuple("Kind", "official ours same", defaults=((),))

def adapted(work, model, prompt, name):
    """The model for a row of `decoding`: in bf16, or so sure of itself that the median of its first guesses is .9."""
    model = copy.deepcopy(model) if name.endswith(("bf16", "threshold")) else model
    if name.endswith("bf16"):
        for p in model.parameters():
            p.data = p.data.bfloat16()
    if "threshold" in name:
        with torch.no_grad():
            logits = model(F.pad(prompt, (0, work.s.completion), value=work.mask_id)).logits.float()  # (B, L, V)
            sure = [(1.1**k * logits[:, work.s.prompt :]).softmax(-1).amax(-1).median() < 0.9 for k in range(80)]
            model.lm_head.weight *= 1.1 ** sum(sure)
    return model

def decoding(work, names, temperature=0.0):
    s, model, prompt = work.s, work.model(), work.ids(work.s.batch, work.s.prompt)
    def ours(name):
        caches = name.startswith(("prefix", "dual"))
        options = dict(decoder=d1.CachedDecoder, cache=name.split("-")[0]) if caches else {}
        return functools.partial(
            d1.diffuse_decode, adapted(work, model, prompt, name), prompt, mask_id=work.mask_id, steps=s.steps,
            gen_length=s.completion, block_length=s.block, temperature=temperature, **options,
            threshold=0.9 if "threshold" in name else None, generator=torch.Generator().manual_seed(0))
    return Kind(lambda: official_decode(model, prompt, s, work.mask_id, temperature),
                {n: ours(n.removeprefix("decode-")) for n in names}, {"decode-greedy"} & {*names})

def scoring(work, names):
    s, prompt, completion = work.s, work.prompts(), work.ids(work.s.batch, work.s.completion)
    masks = work.prompt_masks(s.batch // s.group).repeat_interleave(s.group, 1)  # (mu, B, P) the same in a group
    official = Official(work, work.model())
    stage = work.grpo(official.model).stage
    everywhere = torch.ones_like(completion, dtype=torch.bool)
    rollout = d1.Rollout(prompt, torch.ones_like(prompt, dtype=torch.bool), completion, everywhere, None, None, {})
    @torch.no_grad()
    def ours():  # old needs no pass for the first mask: the first inner update's own pass gives it
        with d1.precision(work.device):
            return [torch.stack(stage.logps(official.model, rollout, m)) for m in (masks[1:], masks)]
    return Kind(lambda: official.score(prompt, completion, masks), {"logp": ours}, names)

def updating(work, names):
    model = work.model(train=True, start=None)
    official, trainer = Official(work, copy.deepcopy(model)), work.grpo(model)
    made = trainer.stage.updates(trainer)
    next(made)  # draws, and does the inner update 0
    batch = trainer.stage.rollouts[0]
    passes = official.score(batch.prompt, batch.completion, batch.prompt_masks)
    official.inner(0, batch, *passes)
    theirs, ours = itertools.tee(itertools.cycle(range(1, work.s.mu)))
    def update():
        trainer.stage.step = next(ours)
        return next(trainer.stage.updates(trainer))["loss"]
    return Kind(lambda: official.inner(next(theirs), batch, *passes), {"update": update}, names)

def fine_tuning(work, names):
    model = work.model(train=True)
    official, trainer = Official(work, copy.deepcopy(model)), work.sft(model)
    stage = trainer.stage
    made = stage.updates(trainer)
    def theirs():  # before ours, so at the same stage.step: the same rows and the same noise
        noise = d1.keyed_generator(stage.cfg.seed, "sft_mask", stage.step)
        x0, is_prompt = stage.collate([stage.rows[i] for i in stage.row_indices()], work.length)  # (B, L) each
        d1.draw_uniform((2,), noise, "cpu")  # those of the length
        t = d1.sample_t(len(x0), noise)  # (B,)
        xt, masked = d1.forward_process(x0, t, is_prompt, work.mask_id, noise)
        return official.sft(*(v.to(work.device) for v in (x0, xt, masked, t, is_prompt)))
    def ours():
        loss = next(made)["loss"]
        stage.step += 1
        return loss
    return Kind(theirs, {"sft": ours}, names)

def one_iteration(trainer):
    made = trainer.stage.updates(trainer)
    for _ in range(trainer.stage.cfg.mu):
        next(made)
        trainer.stage.step += 1

def iterating(work, names):
    official = Official(work, work.model(train=True, start=None))
    starts = {"iteration": None, "iteration-ends-early": work.s.prompt + work.s.completion // 3}
    return Kind(official.iteration, {
        n: functools.partial(one_iteration, work.grpo(work.model(train=True, start=starts[n]))) for n in names})

KINDS = (
    (decoding, ["decode-greedy", "decode-bf16", "decode-prefix", "decode-dual", "decode-threshold",
                "decode-dual-threshold"]),
    (functools.partial(decoding, temperature=TEMPERATURE), ["decode-T.9", "decode-T.9-bf16"]),
    (scoring, ["logp"]), (updating, ["update"]), (fine_tuning, ["sft"]),
    (iterating, ["iteration", "iteration-ends-early"]))
ROWS = [name for _, names in KINDS for name in names]

# ---- measuring
def count(run):
    """(result, FLOPs of all matrix products, forward passes) of one run."""
    passes, aten = [], torch.ops.aten
    more = {aten._scaled_dot_product_flash_attention_for_cpu:  # torch knows those of CUDA alone
            lambda q, k, v, *args, out_shape=None, **options: flop_counter.sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda g, q, k, v, *args, out_shape=None, **options: flop_counter.sdpa_backward_flop_count(g, q, k, v)}
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=more)
    counter.mod_tracker = types.SimpleNamespace(  # its own holds the autograd graphs of all passes: 20 GiB in a decode
        parents={"Global"}, __enter__=lambda: None, __exit__=lambda *error: None)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: passes.append(1) if isinstance(module, torch.nn.Embedding) else None)
    with counter:
        result = run()
    hook.remove()
    return result, counter.get_total_flops(), len(passes)

def peak(run, device):
    """(result, MiB at the run's peak over those before it); None where neither CUDA nor Linux tells."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), (torch.cuda.max_memory_allocated() - before) / 2**20
    def status(field):
        return int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) / 1024
    try:
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = status("VmRSS:")
    except OSError:
        return run(), None
    return run(), status("VmHWM:") - before

def clock(run, device):
    """(result, seconds) of one run."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    gc.collect()
    wait()
    began = time.perf_counter()
    result = run()
    wait()
    return result, time.perf_counter() - began

@functools.cache
def ceiling(device, dtype):
    """FLOP/s of the best of several square matrix products: what the device can do."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / min(clock(lambda: a @ b, device)[1] for _ in range(8))

def difference(a, b):
    """The largest one of losses, or of lists of log-probabilities from the last mask back; of ids, the share."""
    if isinstance(a, (list, tuple)):
        return max(difference(x[-len(y) :], y) for x, y in zip(a, b, strict=True))
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return ((a - b).abs().max() if a.is_floating_point() else (a != b).float().mean()).item()

def compare(work, kind, names, repeats):
    """Measure the rows of one kind, official and ours in turn: {name: figures}."""
    made = kind(work, names)
    runs, official = {"official": made.official, **made.ours}, None
    sides, gaps = {n: {"all": []} for n in runs}, dict.fromkeys(made.same, 0.0)
    for turn, (name, run) in itertools.product(range(repeats + 2), runs.items()):
        f = sides[name]
        if turn == 0:
            result, f["flops"], f["passes"] = count(run)
        elif turn == 1:
            result, f["mib"] = peak(run, work.device)
        else:
            result, seconds = clock(run, work.device)
            f["all"].append(seconds)
        official = result if name == "official" else official
        if name in gaps:
            gaps[name] = max(gaps[name], difference(official, result))
            # elsewhere rounding depends on the shapes of matrices, and is reported only
            exact = work.device.type == "cpu" and work.s.dtype == torch.float32
            assert not exact or gaps[name] <= ALIKE, f"{name}: official and ours differ by {gaps[name]}"
    return {n: figures(work, n, sides["official"], sides[n], gaps.get(n)) for n in made.ours}

def figures(work, name, official, ours, gap):
    """One row of the report, from its times, FLOPs and memory."""
    ratios = [a / b for a, b in zip(official["all"], ours["all"], strict=True)]
    decodes, sides = name.startswith("decode"), {"official": dict(official), "ours": dict(ours)}
    for side, f in sides.items():
        autocast = work.device.type == "cuda" and not decodes  # `precision`
        dtype = torch.bfloat16 if autocast or (side == "ours" and name.endswith("bf16")) else work.s.dtype
        f["seconds"] = statistics.median(f["all"])
        f["flops_per_second"] = f["flops"] / f["seconds"]
        f["mfu"] = f["flops_per_second"] / ceiling(work.device, dtype)
        f["tokens_per_second"] = work.s.batch * work.s.completion / f["seconds"] if decodes else None
    return {**sides, "ratio": sides["official"]["seconds"] / sides["ours"]["seconds"],
            "spread": [min(ratios), max(ratios)], "max_difference": gap}

def kernels(work):
    """torch.profiler's table of the ten kernels that take the most time of one iteration of ours, on a GPU."""
    run = functools.partial(one_iteration, work.grpo(work.model(train=True, start=None)))
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    return profile.key_averages().table(sort_by="self_device_time_total", row_limit=10, max_name_column_width=60)

def growth(shape, device):
    """Seconds of one iteration of ours as one size grows, and the exponent of a fit in logarithms."""
    found = {}
    axes = dict(group=(2, 4, 8, 16), completion=(32, 64, 128, 256), vocab=(2048, 8192, 32768, 131072))
    for axis, sizes in axes.items():
        seconds = []
        for size in sizes:
            s = shape._replace(mu=4, **{axis: size})
            work = Work(s._replace(batch=s.group, steps=s.completion // 8), device)
            run = functools.partial(one_iteration, work.grpo(work.model(train=True, start=None)))
            if not found and not seconds:
                run()  # warms up
            seconds.append(clock(run, work.device)[1])
        slope = statistics.linear_regression(*(list(map(math.log, v)) for v in (sizes, seconds))).slope
        found[axis] = dict(sizes=sizes, seconds=seconds, exponent=slope)
    return found

CACHED = {kind: dict(decoder=d1.CachedDecoder, cache=kind) for kind in ("prefix", "dual")}
WAYS = {"exact": {}, **CACHED, "threshold .9": dict(threshold=0.9),
        "dual, threshold .9": CACHED["dual"] | dict(threshold=0.9)}

def cache_accuracy(checkpoint, device, puzzles, length=512, rows=128):
    """What caches and the threshold cost in solved sudokus. An eighth also without the stop at EOS: slow, and alike."""
    model, tok = d1.load_model(checkpoint, device=device)
    d1.without_dropout(model)
    task, found, exact = d1.TASKS["sudoku"], {}, None
    examples = task.examples("test", puzzles)
    prompts = [d1.encode_prompt(tok, task.messages(e)) for e in examples]
    def replies(n, options):
        texts = []
        for first in range(0, n, rows):
            ids, real = d1.pad_left(prompts[:n][first : first + rows], tok.pad_token_id, device)
            out = d1.diffuse_decode(model, ids, mask_id=tok.mask_token_id, attention_mask=real, gen_length=length,
                                    steps=length // 2, eos_id=tok.eos_token_id, **options)
            texts += d1.reply_texts(tok, out[:, ids.shape[1] :])
        return texts
    for stop, way in itertools.product((True, False), WAYS):
        n, options = puzzles if stop else puzzles // 8, WAYS[way] | {"stop_at_eos": stop}
        texts, seconds = clock(functools.partial(replies, n, options), torch.device(device))
        exact = (texts, seconds) if way == "exact" else exact
        found[way + ", stop at EOS" * stop] = dict(
            puzzles=n, seconds=seconds, ratio=exact[1] / seconds, tokens_per_second=n * length / seconds,
            solved=sum(task.grade(t, e).correct for t, e in zip(texts, examples[:n], strict=True)) / n,
            same=sum(map(str.__eq__, texts, exact[0])) / n)
    return found

# ---- the report
COLUMNS = ("official → ours", "seconds", "times faster", "MiB", "passes", "TFLOP", "MFU %", "tokens/s", "differ by")

def row_cells(name, f):
    def both(key, form, scale=1.0):
        pair = [f[side][key] for side in ("official", "ours")]
        return "" if None in pair else " → ".join(format(v * scale, form) for v in pair)
    gap = f["max_difference"]
    return (name, both("seconds", ".3g"), f"{f['ratio']:.2f} ({f['spread'][0]:.2f}-{f['spread'][1]:.2f})",
            both("mib", ",.0f"), both("passes", ".0f"), both("flops", ".3g", 1e-12), both("mfu", ".0f", 100),
            both("tokens_per_second", ",.0f"), "" if gap is None else f"{gap:.0e}" if gap else "0")

def tables(report):
    """(title, header, rows) of every table of a report."""
    for name, r in report.items():
        title = f"{name}; {r['machine']}"
        yield title, COLUMNS, [row_cells(n, r["rows"][n]) for n in ROWS if n in r.get("rows", {})]
        yield title, ("one iteration of ours", "sizes", "seconds", "exponent"), [
            (axis, ", ".join(map(str, g["sizes"])), ", ".join(f"{v:.3g}" for v in g["seconds"]), f"{g['exponent']:.2f}")
            for axis, g in r.get("growth", {}).items()]
        yield title, ("decoding", "puzzles", "seconds", "times faster", "tokens/s", "solved %", "same reply %"), [
            (way, str(f["puzzles"]), f"{f['seconds']:.1f}", f"{f['ratio']:.2f}", f"{f['tokens_per_second']:,.0f}",
             f"{100 * f['solved']:.1f}", f"{100 * f['same']:.1f}") for way, f in r.get("accuracy", {}).items()]

def show(report):
    from rich import box, console, table
    for title, header, rows in (t for t in tables(report) if t[2]):
        t = table.Table(*header, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for cells in rows:
            t.add_row(*cells)
        console.Console(width=150).print(t)

def write_tables(report, path):
    """Put the tables of the shape `small` on a CPU between their marks in a file; one that was not measured stays."""
    text, kind = path.read_text(encoding="utf-8"), "small, cpu"
    made = tables({kind: report[kind]})
    for mark, (_, header, rows) in zip(("rows", "growth", "accuracy"), made, strict=True):
        if rows:
            lines = [header, ["---"] * len(header), *rows]
            table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
            before, rest = text.split(f"<!-- bench: {mark} -->\n")
            text = f"{before}<!-- bench: {mark} -->\n{table}<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    path.write_text(text, encoding="utf-8")

def machine(device):
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = cpu.partition("model name\t: ")[2].partition("\n")[0] or "CPU"
    threads = f"{name}, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    return f"{torch.cuda.get_device_name() if device == 'cuda' else threads}, torch {torch.__version__}"

def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--shape", default="small", choices=SHAPES)
    a.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    a.add_argument("--rows", default="all", help=f"how rows begin, with commas; all, none, or of: {', '.join(ROWS)}")
    a.add_argument("--repeats", type=int, default=5)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--out", type=Path, default=Path("ckpt/bench.json"))
    a.add_argument("--growth", action="store_true", help="time one iteration of ours over growing sizes")
    a.add_argument("--cache-accuracy", metavar="CKPT", help="solve sudoku with this checkpoint of the embedded model")
    a.add_argument("--puzzles", type=int, default=256, help="of --cache-accuracy")
    a.add_argument("--markdown", type=Path, metavar="FILE", help="put its tables into tests/README.md and stop")
    return a.parse_args()

def main():
    args = arguments()
    if args.markdown:
        return write_tables(json.loads(args.markdown.read_text()), Path(__file__).with_name("README.md"))
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stages take a GPU where there is one
    torch.set_num_threads(args.threads)
    starts, report = tuple(args.rows.replace("all", "").split(",")), d1.read_json(args.out)
    rows = [n for n in ROWS if n.startswith(starts)]
    assert args.rows == "none" or all(any(n.startswith(s) for n in ROWS) for s in starts), f"rows are {', '.join(ROWS)}"
    here = report.setdefault(f"{args.shape}, {args.device}", {}) | {"machine": machine(args.device)}
    report[f"{args.shape}, {args.device}"] = here
    work = Work(SHAPES[args.shape], args.device)
    for kind, names in KINDS:
        if names := [n for n in names if n in rows]:
            here["rows"] = here.get("rows", {}) | compare(work, kind, names, args.repeats)
            d1.write_json(args.out, report)
    if args.shape == "llada-8b" and args.device == "cuda" and rows:
        print(kernels(work))
    if args.growth:
        here["growth"] = growth(SHAPES[args.shape], args.device)
    if args.cache_accuracy:
        here["accuracy"] = cache_accuracy(args.cache_accuracy, args.device, args.puzzles)
    d1.write_json(args.out, report)
    show(report)

if __name__ == "__main__":
    main()
