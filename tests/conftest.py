"""What several test files share: toy networks, small models, settings and runs of seconds."""

import copy
import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import signal
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may touch the network
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as d1_full.py sets it, before torch is loaded

import pytest
import torch
import transformers

import d1_full as d1

torch.set_num_threads(1)  # the files are shared out to two processes, see .pytest.ini
ROOT = Path(d1.__file__).parent
DATA = ROOT / "tests" / "data"
LLADA = DATA / "tiny-llada"
MASK = 0  # of the toy networks
WIDTHS = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)  # of the small transformers
GOOD = "<reasoning>\n1+1=2\nso 2\n</reasoning>\n<answer>\n{}\n</answer>"  # a reply in the right form
EXAMPLES = {"gsm8k": {"question": "?", "answer": "1234"}, "math500": {"problem": "?", "answer": "\\frac{1}{2}"},
            "count": {"numbers": [1, 2, 4], "target": 7},
            "sudoku": {"puzzle": "0142243142131320", "solution": "3142243142131324"}}
PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "```", "1", "1234", "3142243142131324",
          "\\boxed{", "}", "{", "=", "+2", "(", ")", "x", ".", "<|eot_id|>", "<|endoftext|>", "\\fbox", "\\boxed ", "$"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- scripted networks: their logits are known
def output(logits):
    """What a model returns."""
    return types.SimpleNamespace(logits=logits)


class ToyModel(torch.nn.Module):
    """p(x_k | canvas) from random numbers: every logit depends on the whole canvas. float64, ids < vocab."""

    def __init__(self, length: int, vocab: int, seed: int = 0):
        super().__init__()
        weight = torch.randn(length * vocab, length * vocab, generator=rng(seed), dtype=torch.float64)
        self.weight, self.vocab = torch.nn.Parameter(weight), vocab

    def forward(self, input_ids, attention_mask=None):
        one_hot = torch.nn.functional.one_hot(input_ids, self.vocab).double().flatten(1)
        return output((one_hot @ self.weight).view(*input_ids.shape, self.vocab))


class Constant(torch.nn.Module):
    """The same logits at every position: those given by token, 0 for the rest. Counts its forward passes."""

    def __init__(self, logits: dict[int, float], vocab: int = 9):
        super().__init__()
        self.row, self.calls = torch.zeros(vocab), 0
        for token, logit in logits.items():
            self.row[token] = logit

    def forward(self, ids, attention_mask=None):
        self.calls += 1
        return output(self.row.expand(*ids.shape, -1).clone())


class Scripted(torch.nn.Module):
    """Logits from a function (ids (B, L) -> tokens to say (B, L)), sure of them; remembers the canvases it saw."""

    def __init__(self, says, vocab=10):
        super().__init__()
        self.says, self.vocab, self.seen = says, vocab, []

    def forward(self, ids, attention_mask=None):
        self.seen.append(ids.clone())
        return output(8.0 * torch.nn.functional.one_hot(self.says(ids), self.vocab).float())


def log_p(model, x0, visible):
    """log p(x0^k | the visible tokens of x0) for every k, in float64."""
    canvas = torch.where(visible, x0, MASK)
    return model(canvas).logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0][0]


def random_case(seed, rows=4, length=5):
    """New, old and reference log-probabilities, advantages, and which tokens are live."""
    g = rng(seed)
    new, old, ref = (torch.randn(rows, length, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    return new, old, ref, torch.randn(rows, generator=g).double(), torch.arange(length).expand(rows, -1) < lengths


REPLY = "Hello Ada. One two."


class Writer(torch.nn.Module):
    """A model that is sure of one reply: the tokens on the left a little more than those on the right."""

    def __init__(self, tokenizer, text=REPLY, length=32, context=512, fail_at=None):
        super().__init__()
        ids = tokenizer.encode(text)
        self.target = torch.tensor(ids + [tokenizer.eos_token_id] * (length - len(ids)))
        self.config = types.SimpleNamespace(max_position_embeddings=context, vocab_size=len(tokenizer))
        self.device, self.calls, self.fail_at, self.longest = torch.device("cpu"), 0, fail_at, 0

    def forward(self, ids, attention_mask=None):
        self.calls, self.longest = self.calls + 1, max(self.longest, ids.shape[1])
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        place = torch.arange(ids.shape[1])[-len(self.target) :]
        logits[:, place, self.target[-len(place) :]] = torch.linspace(8, 2, len(self.target))[-len(place) :]
        return output(logits)


def frame(ids, new=(), edited=(), block=0):
    """A frame of one row by hand."""
    ids = torch.tensor([ids])
    marks = [torch.zeros_like(ids, dtype=torch.bool) for _ in range(2)]
    for mark, places in zip(marks, (new, edited), strict=True):
        mark[0, list(places)] = True
    return d1.EditedFrame(ids, marks[0], torch.zeros(ids.shape), block, 0, edited=marks[1])


# ---- small networks with random weights
def network(kind="llama", layers=2):
    """A small model in memory, of 50 tokens."""
    torch.manual_seed(0)
    shape = dict(WIDTHS, vocab_size=50, num_hidden_layers=layers, initializer_range=0.2)  # .02: attention hardly counts
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**shape)).eval()
    shape |= dict(num_key_value_heads=2, is_causal=False, use_cache=False)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    shape |= dict(tie_word_embeddings=True, shift_logits=kind == "dream")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).eval()
    if kind == "dream":
        model.register_forward_hook(d1.shift_logits)
    return model


def padded(rows=3, length=7):
    """Prompts for `network`, the second of which is padded on the left, and their attention mask."""
    ids, real = torch.randint(1, 50, (rows, length), generator=rng()), torch.ones(rows, length, dtype=torch.bool)
    real[1, :3] = False
    return ids, real


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer():
    """Byte-level, as Qwen's: an EOS that ends a turn, no mask token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", chat_template=CHATML)


def wordpiece_tokenizer():
    """BERT's manner: [CLS], [SEP], [MASK], no EOS, no chat template, lower case."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = [chr(c) for c in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    core = Tokenizer(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]")


def saved_network(kind, folder):
    """A random small model of another family, saved as its owners would: the folder."""
    torch.manual_seed(0)
    tok = wordpiece_tokenizer() if "bert" in kind else chatml_tokenizer()
    shape = dict(WIDTHS, num_hidden_layers=2, vocab_size=len(tok), pad_token_id=0 if "bert" in kind else None,
                 bos_token_id=None)
    if kind == "bert":
        config = transformers.BertConfig(**shape, max_position_embeddings=512)
        model = transformers.BertForMaskedLM(config)
    elif kind == "modernbert":
        shape |= dict(eos_token_id=3, cls_token_id=2, sep_token_id=3, bos_token_id=2)
        model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**shape))
    else:
        config = transformers.Qwen2Config(
            **shape, num_key_value_heads=2, eos_token_id=tok.eos_token_id, tie_word_embeddings=True)
        model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: the folder of a small model of it}."""
    root = tmp_path_factory.mktemp("models")
    return {"llada": str(LLADA)} | {kind: saved_network(kind, root / kind) for kind in ("bert", "modernbert", "qwen")}


def trained_adapter(base, folder, lora, model=None):
    """A LoRA checkpoint as a stage leaves it, with weights that do something."""
    torch.manual_seed(1)
    model, tok = d1.load_model(model or base, device="cpu", lora=lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".default." in name and "lora_B" in name:
                p.normal_(std=0.05)
    folder.mkdir()
    d1.export_model(model, tok, folder, {"stages": ["sft"]})
    return model, tok


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the embedded model, untrained."""
    return d1.load_model("tiny", device="cpu")


@pytest.fixture(scope="session")
def loud(tiny):
    """The tiny model with larger weights: at its first ones, attention hardly matters."""
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    return model, tiny[1]


@pytest.fixture(scope="module")
def untrained(tiny, tmp_path_factory):
    """The folder of the embedded model, untrained, as this script saves it."""
    folder = tmp_path_factory.mktemp("tiny")
    d1.export_model(*tiny, folder, {"preset": "tiny", "stages": []})
    return folder


# ---- stages of seconds
@pytest.fixture
def screen():
    return d1.Screen()


def settled(**flags):
    """The settings of these flags."""
    return d1.settle({name: (value, "test") for name, value in flags.items()})[0]


@pytest.fixture
def quick(tmp_path):
    """quick(task, **settings) -> Settings for a run of seconds in a folder of its own."""

    def make(task="sudoku", **changes):
        small = dict(steps_sft=6, bs_sft=4, n_traces=40, steps_rl=4, mu=2, group=2, bs_rl=4, limit=4, bs_eval=64,
                     eval_lengths="32", save_steps=2, threads=1, warmup_sft=2, output_dir=str(tmp_path))
        return settled(**{"task": task, **small, **changes})

    return make


def paid(reward, name="sudoku"):
    """A copy of a task that pays reward(texts, examples) -> [{name: value}]."""
    task = copy.copy(d1.TASKS[name])
    task.batch_rewards = lambda texts, examples, official=False: reward(texts, examples)
    return task


def length_reward(texts, examples):
    return [{"length": float(len(text))} for text in texts]


def trainer_of(stage, tokenizer, cfg, out, screen=None):
    """The trainer of a stage in a folder, with all that listens in a run."""
    out.mkdir(parents=True, exist_ok=True)
    more = [stage.prompts] if isinstance(stage, d1.DiffuGRPO) else []
    return d1.trainer_for(stage, tokenizer, cfg, out, screen or d1.Screen(), *more)


def sft(cfg, tiny, out, lora=None, screen=None, **changes):
    """The trainer of stage 1, of a copy of the tiny model on sudoku's traces."""
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    model = d1.adapt_with_lora(model, *lora) if lora else model
    cfg = dataclasses.replace(cfg, **changes)
    rows = d1.sft_rows(cfg, tok, [d1.TASKS["sudoku"]], d1.Screen())
    return trainer_of(d1.sft_stage(model, tok, rows, cfg), tok, cfg, out, screen)


def grpo(cfg, tiny, out, reward=length_reward, lora=None, screen=None):
    """The trainer of stage 2, of a copy of the tiny model on sudoku, which pays a point a letter or as told."""
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    if lora:
        torch.manual_seed(0)  # peft draws its first weights from the global stream
        model = d1.adapt_with_lora(model, *lora)
        with torch.no_grad():  # an adapter that stage 1 has trained
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    task = paid(reward)
    return trainer_of(d1.rl_stage(model, tok, task, task.examples("train", 8), cfg), tok, cfg, out, screen)


def stage_of(kind, quick, tiny, out, save_steps=100, screen=None, **changes):
    """The trainer of a stage by its kind: sft, sft_lora, grpo or grpo_lora."""
    lora = (4, 8, 0.1) if "lora" in kind else None
    if "sft" in kind:
        return sft(quick(steps_sft=6, save_steps=save_steps, **changes), tiny, out, lora, screen)
    cfg = quick(steps_rl=8, mu=4, save_steps=save_steps, **changes)
    return grpo(cfg, tiny, out, lora=lora and lora[:2], screen=screen)


def updates(trainer):
    """Make the updates of a stage one at a time, as the loop makes them: their figures."""
    for figures in trainer.stage.updates(trainer):
        yield figures
        trainer.stage.step += 1


def loss_of(trainer, rows, *key, part=slice(None), training=True):
    """(loss, figures) of rows by the function that training calls, with the noise of a key."""
    return trainer.stage.make_loss(rows, trainer, *key, training=training)(trainer.net, part)


def stop_at(trainer, step, number=signal.SIGTERM):
    """Let a signal come during this step of a stage."""
    descend = trainer.descend

    def and_a_signal(*args):
        if trainer.stage.step + 1 == step:
            os.kill(os.getpid(), number)
        return descend(*args)

    trainer.descend = and_a_signal


def weights(trainer):
    """All weights that are trained, as one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.params])


def logged(folder):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    """The rows of metrics.jsonl less their seconds, which no two runs share."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in logged(folder)]


# ---- runs of seconds
SMALL = dict(steps_sft=4, bs_sft=4, n_traces=40, steps_rl=4, mu=2, group=2, bs_rl=4, limit=4, eval_lengths="32,64",
             save_steps=2, threads=1)


def words(settings):
    """Settings as the words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run(*flags, out):
    """The exit status of a command that takes seconds; the flags given here win."""
    return d1.main([*words(SMALL), "--output_dir", str(out), *map(str, flags)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of one small `--task sudoku` from nothing."""
    out = tmp_path_factory.mktemp("runs")
    assert run("--task", "sudoku", out=out) == 0
    return out


@pytest.fixture(scope="session")
def unevaluated(tmp_path_factory):
    """The folder of one small `--task sudoku --skip_eval` from nothing."""
    out = tmp_path_factory.mktemp("runs")
    assert run("--task", "sudoku", "--skip_eval", out=out) == 0
    return out


@pytest.fixture
def finished(unevaluated, tmp_path):
    """A copy of that folder, to go on with."""
    shutil.copytree(unevaluated / "sudoku", tmp_path / "sudoku")
    return tmp_path


SHORT = words(dict(  # for models with letters as tokens
    steps_sft=2, bs_sft=4, rows_sft=2, sft_length=420, steps_rl=2, mu=2, group=2, bs_rl=2, grad_accum=1, gen_length=32,
    eval_lengths=32, limit=2, max_prompt=64, threads=1))


def command(*flags):
    """A command that has to end well."""
    assert d1.main([str(f) for f in flags]) == 0


@pytest.fixture
def traces(tmp_path):
    """An SFT file with s1K's columns, one malformed row and one too long for 96 tokens."""
    rows = [{"question": f"{i}+{i}?", "thinking_trajectories": [f"{i}+{i}={2 * i}"], "attempt": str(2 * i)}
            for i in range(2, 12)]
    rows[3]["attempt"] = None
    rows[5]["thinking_trajectories"] = ["on " * 400]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def problems(tmp_path):
    """A file of GSM8K problems."""
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in range(80)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def quick_collections():
    """`main` and optuna collect garbage after each run: let them pass over what is there already."""
    gc.freeze()
    yield
    gc.unfreeze()


def stop_once(monkeypatch, step, how):
    """Stage 2 is stopped as it begins this step, the first time it gets there."""
    descend, came = d1.Trainer.descend, []

    def stopping(trainer, *args):
        if trainer.stage.name == "diffu_grpo" and trainer.stage.step + 1 == step and not came:
            came.append(step)
            how()
        return descend(trainer, *args)

    monkeypatch.setattr(d1.Trainer, "descend", stopping)


def without(monkeypatch, package):
    """As if a package were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))


def flip(path):
    """Damage a file by one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
