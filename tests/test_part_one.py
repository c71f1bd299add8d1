"""Part I as a whole: it stands alone, and its functions leave alone what they are given."""

import ast
import sys
import types

import pytest
import torch
from conftest import MASK, ROOT, ToyModel, random_case, rng

import d1_full as d1

SOURCE = (ROOT / "d1_full.py").read_text()
MARK = "# %% Part II."
VOCAB, EOS = 12, 11


class Network(torch.nn.Module):
    """A plain network: one block of torch's own encoder on embedded tokens and positions."""

    def __init__(self, length=40, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = torch.nn.Embedding(VOCAB, width), torch.nn.Embedding(length, width)
        self.block = torch.nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.head = torch.nn.Linear(width, VOCAB)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        padding = None if attention_mask is None else ~attention_mask.bool()
        return types.SimpleNamespace(logits=self.head(self.block(hidden, src_key_padding_mask=padding)))


CFG = types.SimpleNamespace(
    seed=0, save_steps=50, patience=0, max_skips=3, steps_sft=100, bs_sft=16, rows_sft=8, lr_sft=3e-3, wd_sft=0.1,
    clip_sft=1.0, warmup_sft=10, schedule="linear", t_low=1e-3, t_high=1.0, sft_length=12, steps_rl=32, mu=4, group=4,
    bs_rl=16, grad_accum=1, lr_rl=1e-3, wd_rl=0.1, clip_rl=0.2, pmask=0.15, eps=0.5, beta=0.04, norm="sequence",
    gen_length=8, block_length=4, diffusion_steps=0, temperature=0.9, remasking="low_confidence")


@pytest.fixture(scope="module")
def alone():
    """The names of head, section 1 and Part I, executed in an empty namespace where no other library can be had."""
    assert SOURCE.count(MARK) == 1
    text = SOURCE[: SOURCE.index(MARK)]
    later = {name for node in ast.parse(SOURCE).body if node.lineno > text.count("\n")
             for name in [getattr(node, "name", None), *(getattr(t, "id", None) for t in getattr(node, "targets", ()))]}
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        for library in ("accelerate", "datasets", "peft", "rich", "tokenizers", "transformers"):
            patch.setitem(sys.modules, library, None)
        exec(compile(text, "part_one.py", "exec"), names)
        assert "Settings" in later and not (later - {None}) & names.keys()
        yield types.SimpleNamespace(**names)


@pytest.fixture(scope="module")
def trained(alone):
    """The network after both stages, with what the second was given and the figures of both."""
    told, model = [], Network()

    class Ear(alone.Listener):
        def on_step(self, trainer, figures):
            told.append((trainer.stage.name, figures))

        def on_check(self, trainer, figures):
            told.append((trainer.stage.name, figures))

    questions = torch.randint(1, 10, (100, 3), generator=rng()).tolist()
    rows = [([*q, 10, *q, EOS], 4) for q in questions]  # to repeat what was said
    alone.Trainer(alone.MaskedSFT(model, rows, CFG, mask_id=MASK, eos_id=EOS), listener=Ear()).run()

    def reward(completion, problems):
        assert completion.shape == (16, 8) and len(problems) == 16
        return [{"threes": float((row == 3).sum())} for row in completion]

    prompts = [[*q, 10] for q in questions]
    stage = alone.DiffuGRPO(model, prompts, reward, CFG, mask_id=MASK, eos_id=EOS)
    alone.Trainer(stage, listener=Ear()).run()
    return model.eval(), prompts, told


def test_part_one_alone_trains_both_stages(trained):
    _, _, told = trained
    losses = [f["loss"] for stage, f in told if stage == "sft" and "loss" in f]
    assert len(losses) == 100 and sum(losses[-10:]) < 0.7 * sum(losses[:10])
    heldout = [f["heldout_loss"] for stage, f in told if "heldout_loss" in f]
    assert len(heldout) == 2 and max(heldout) < 2  # a guess has ln 12 = 2.5 nats
    rewards = [f["reward"] for stage, f in told if stage == "diffu_grpo" and "reward" in f]
    assert len(rewards) == 32 and rewards[-1] > rewards[0] + 0.5


def test_part_one_alone_decodes(alone, trained):
    model, prompts, _ = trained
    ids = torch.tensor(prompts[:3])
    frames = list(alone.diffuse_steps(model, ids, mask_id=MASK, gen_length=8, block_length=4))
    final = alone.diffuse_decode(model, ids, mask_id=MASK, gen_length=8, block_length=4)
    assert torch.equal(frames[-1].ids, final) and torch.equal(final[:, :4], ids) and (final[:, 4:] != MASK).all()
    assert [int(f.new[0].sum()) for f in frames] == [2, 2, 2, 2]


def test_part_one_alone_estimates(alone, trained):
    model, prompts, _ = trained
    prompt, completion = torch.tensor(prompts[:3]), torch.randint(1, 10, (3, 5), generator=rng(1))
    prompt_mask = torch.rand(3, 4, generator=rng(2)) < 0.3
    got = alone.one_step_logp(model, prompt, completion, prompt_mask, MASK)
    canvas = torch.cat([prompt.masked_fill(prompt_mask, MASK), torch.full((3, 5), MASK)], 1)
    want = model(canvas).logits[:, 4:].log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    assert got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-5)
    advantages = alone.group_advantages(torch.tensor([0.0, 1.0, 2.0]), 3)
    live = alone.live_tokens(completion, EOS)
    loss, metrics = alone.diffu_grpo_loss(got, None, got.detach(), advantages, live)
    assert loss.requires_grad and metrics["kl"] == 0 and metrics["ratio_max"] == 1


def test_part_one_leaves_inputs_and_the_global_stream_alone():
    model, g = ToyModel(6, 7), rng()
    x0 = torch.randint(1, 7, (3, 6), generator=g)
    prompt, completion = x0[:, :4], x0[:, 4:]
    prompt_mask, is_prompt = torch.rand(3, 4, generator=g) < 0.5, torch.zeros(3, 6, dtype=torch.bool)
    case, rewards = random_case(1), torch.tensor([1.0, 2.0, 3.0])
    inputs = [x0, prompt_mask, is_prompt, rewards, *case]
    copies, state = [v.clone() for v in inputs], torch.random.get_rng_state()
    _, masked = d1.forward_process(x0, d1.sample_t(3, g), is_prompt, MASK, g)
    d1.masked_nelbo(model(x0).logits, x0, masked, torch.ones(3), is_prompt)
    d1.one_step_logp(model, prompt, completion, prompt_mask, MASK, cfg_scale=0.5)
    d1.group_advantages(rewards, 3)
    d1.live_tokens(completion, 3)
    d1.diffu_grpo_loss(*case)
    d1.diffuse_decode(model, prompt, mask_id=MASK, gen_length=2, block_length=1, temperature=0.9, generator=g)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
