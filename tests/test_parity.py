"""Figures of the official code (dllm-reasoning/d1 at 837888f), on a random LLaDA in its own format."""

import json

import pytest
import torch
from conftest import DATA, loss_of
from safetensors.torch import load_file

import d1_full as d1

OFFICIAL = load_file(DATA / "official.safetensors")
FIGURES = json.loads((DATA / "official.json").read_text())
MASK, EOS, P = 500, 481, 20


@pytest.fixture(scope="module")
def llada():
    model, tokenizer = d1.load_model(str(DATA / "tiny-llada"), device="cpu")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (MASK, EOS)
    return model.eval()


def official_mask(seed):
    """The prompt mask that the official code draws from a global seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.rand(3, 36)[:, :P] < 0.15


def test_logits_with_and_without_padding(llada):
    with torch.no_grad():
        got = llada(OFFICIAL["logits.ids"]).logits[:, 7::8]
        real = OFFICIAL["logits.pad_mask"].bool()
        padded = llada(OFFICIAL["logits.pad_ids"], attention_mask=real).logits[:, 7::8]
    assert torch.allclose(got, OFFICIAL["logits.logits"], atol=1e-5)
    real = real[:, 7::8]
    assert torch.allclose(padded[real], OFFICIAL["logits.pad_logits_dllm"][real], atol=1e-5)


@pytest.mark.parametrize("case", FIGURES["generate"])
def test_greedy_ids(llada, case):
    how = FIGURES["generate"][case]
    got = d1.diffuse_decode(
        llada, OFFICIAL[f"generate.{case}.prompt"], mask_id=MASK, gen_length=how["gen"],
        block_length=how["block"], steps=how["steps"], cfg_scale=how.get("cfg", 0.0))
    assert torch.equal(got, OFFICIAL[f"generate.{case}.out"])


def recorded_noise(case):
    """Clean ids, noise levels and prompts of a recorded batch, and its noise drawn anew."""
    x0 = OFFICIAL[f"sft.{case}.clean_ids"]
    prompt = OFFICIAL["sft.prompt.prompt_lengths"] if case == "prompt" else torch.zeros(4, 1)
    is_prompt, generator = torch.arange(48) < prompt, torch.Generator().manual_seed(FIGURES["sft"][case]["seed"])
    t = d1.sample_t(4, generator)
    xt, masked = d1.forward_process(x0, t, is_prompt, MASK, generator)
    return x0, t, is_prompt, xt, masked


def by_all_logits(model, x0, t, is_prompt, xt, masked):
    return d1.masked_nelbo(model(xt).logits, x0, masked, t, is_prompt)[0]


def by_token_losses(model, x0, t, is_prompt, xt, masked):
    ce, _ = d1.token_losses(model, xt, masked, x0[masked])
    return d1.nelbo(ce, d1.nelbo_weight(masked, t)[masked], is_prompt)


def by_training(model, x0, t, is_prompt, xt, masked, parts=(slice(None),)):
    """The loss that `MaskedSFT` descends, in one part or in several that add up."""

    class Recorded(d1.MaskedSFT):
        def noise(self, *drawn):
            return d1.Noised(x0, xt, masked, d1.nelbo_weight(masked, t), is_prompt)

    rows = [(ids, int(known.sum())) for ids, known in zip(x0.tolist(), is_prompt, strict=True)]
    stage = Recorded(model, rows, d1.Settings(task="sft_only", sft_length=48), mask_id=MASK, eos_id=EOS)
    return sum(loss_of(d1.Trainer(stage), rows, "key", part=part)[0] for part in parts)


def by_training_in_parts(*batch):
    return by_training(*batch, parts=(slice(0, 1), slice(1, 3), slice(3, 4)))


@pytest.mark.parametrize("case", ["prompt", "noprompt"])
@pytest.mark.parametrize("compute", [by_all_logits, by_token_losses, by_training, by_training_in_parts])
def test_sft_noise_and_loss(llada, compute, case):
    figures, batch = FIGURES["sft"][case], recorded_noise(case)
    assert torch.equal(batch[3], OFFICIAL[f"sft.{case}.input_ids"])
    loss = compute(llada, *batch)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in llada.parameters()]).norm().item()
    llada.zero_grad()
    assert loss.item() == pytest.approx(figures["loss"], abs=1e-5)
    assert norm == pytest.approx(figures["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("case", ["base", "clipped", "beta0"])
def test_log_probabilities_and_grpo_loss(llada, case):
    figures, ids = FIGURES["grpo"]["cases"][case], OFFICIAL["grpo.ids"]
    prompt_mask, live = official_mask(figures["mask_seed"]), d1.live_tokens(ids[:, P:], EOS)
    assert torch.equal(live, OFFICIAL["grpo.completion_mask"].bool())
    logp = d1.one_step_logp(llada, ids[:, :P], ids[:, P:], prompt_mask, MASK)
    if case != "beta0":  # the official log-probabilities of the first two masks are on record
        i = ["base", "clipped"].index(case)
        assert torch.equal(prompt_mask, OFFICIAL["grpo.masks"][i][:, :P])
        assert torch.allclose(logp, OFFICIAL["grpo.logps"][i], atol=1e-5)
    k = figures["iteration_index"]
    old, ref, adv = (OFFICIAL[f"grpo.{case}.{name}"] for name in ("old", "ref", "adv"))
    loss, metrics = d1.diffu_grpo_loss(
        logp, old[k], ref[k], adv, live, eps=figures["epsilon"], beta=figures["beta"], norm="token")
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in llada.parameters()]).norm().item()
    llada.zero_grad()
    assert loss.item() == pytest.approx(figures["loss"], abs=1e-5)
    assert norm == pytest.approx(figures["grad_norm"], rel=1e-4)
    if figures["kl"] is not None:
        assert metrics["kl"].item() == pytest.approx(figures["kl"], abs=1e-6)


def test_official_rewards():
    rows = json.loads((DATA / "rewards.json").read_text())["rows"]
    assert len(rows) == 60
    for row in rows:
        examples = {
            "gsm8k": {"question": "", "answer": row["answer"]},
            "math500": {"problem": "", "answer": d1.last_boxed(row["math"]) or row["math"]},
            "count": {"numbers": row["numbers"], "target": row["target"]},
            "sudoku": {"puzzle": row["puzzle"], "solution": row["solution"]},
        }
        for key, want in row["official"].items():
            task, _, part = key.partition("/")
            got = d1.TASKS[task].rewards(row["text"], examples[task], official=True)
            got = got[part] if part else sum(got.values())
            assert got == (0.1 if want == "HANG" else pytest.approx(want)), (row["id"], key)
