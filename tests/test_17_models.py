"""Other people's models: LLaDA's format, Dream, causal and masked models; adapters, 4 bit."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import LLADA, SHORT, length_reward, logged, paid, saved_network, settled, trained_adapter, trainer_of
from safetensors.torch import load_file, save_file

import d1_full as d1


def broken(folder, kind):
    """A copy of the LLaDA folder with one fault."""
    shutil.copytree(LLADA, folder)
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    weights = load_file(file)
    first = "model.transformer.blocks.0.q_proj.weight"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-5000])
    elif kind == "missing":
        save_file({k: v for k, v in weights.items() if k != first}, file)
    elif kind == "shape":
        save_file({**weights, first: torch.zeros(32, 64)}, file)
    elif kind == "unknown":
        save_file({**weights, "model.transformer.blocks.0.q_norm.weight": torch.ones(64)}, file)
    elif kind == "no weights":
        file.unlink()
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "type":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nobody"}))
    elif kind == "mask id":
        (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 9999}))
    return str(folder)


class NoLinear(torch.nn.Module):
    def get_output_embeddings(self):
        return None


def small_bert(folder):
    """A folder in hub format with config and tokenizer of a small uncased BERT, and no weights."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789<>/+=*-.,:?!'$",
              *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"), "has", "apples", "how", "many"]
    core = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                        sep_token="[SEP]", mask_token="[MASK]")
    tokenizer.save_pretrained(folder)
    BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
               intermediate_size=48, max_position_embeddings=512).save_pretrained(folder)
    return str(folder)


def test_load_model_reads_llada_in_shards_and_with_an_embedding_wider_than_the_vocabulary(tmp_path):
    whole, tok = d1.load_model(str(LLADA), device="cpu")
    assert tok.mask_token_id == 500 and d1.turn_end(tok) == [508, 481]
    weights = load_file(LLADA / "model.safetensors")
    shutil.copytree(LLADA, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    config = json.loads((LLADA / "config.json").read_text())
    config |= {"embedding_size": 520, "vocab_size": 512}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(8, 64)])
    names, where = sorted(weights), {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({n: weights[n] for n in names[i::3]}, tmp_path / "m" / file)
        where |= dict.fromkeys(names[i::3], file)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    wide, _ = d1.load_model(str(tmp_path / "m"), device="cpu")
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(wide(ids).logits[..., :512], whole(ids).logits)
    assert wide.config.vocab_size == 520


def test_load_model_in_bf16_errs_no_more_than_the_official_model():
    exact, _ = d1.load_model(str(LLADA), device="cpu")
    rough, _ = d1.load_model(str(LLADA), device="cpu", dtype=torch.bfloat16)
    ids = torch.randint(0, 480, (4, 480), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (rough(ids).logits.float() - exact(ids).logits).pow(2).mean().sqrt().item()
    assert 1e-4 < error < 0.0195  # .019 for the official model at this length


def test_load_model_shifts_dreams_logits_and_keeps_its_tokens(tmp_path):
    folder = Path(saved_network("qwen", tmp_path / "dream"))
    plain, _ = d1.load_model(str(folder), device="cpu")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 257}
    (folder / "config.json").write_text(json.dumps(config))
    network, made = d1.network_of(str(folder), config)
    assert network is transformers.Qwen2ForCausalLM and made.shift_logits and made.is_causal is False
    assert made.num_key_value_heads == 2
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2", "shift_logits": True}))
    dream, tok = d1.load_model(str(folder), device="cpu")
    ids = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        a, b = dream(ids).logits, plain(ids).logits[..., : len(tok)]
    assert a.shape == b.shape and torch.equal(a[:, 1:], b[:, :-1]) and torch.equal(a[:, 0], b[:, 0])
    dream.save_pretrained(tmp_path / "again")
    tok.save_pretrained(tmp_path / "again")
    again, _ = d1.load_model(str(tmp_path / "again"), device="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, a)


def test_load_model_in_4_bit_has_the_gradients_of_the_same_weights_unpacked():
    pytest.importorskip("bitsandbytes")
    ids, hide = torch.arange(60).view(2, 30), torch.zeros(2, 14, dtype=torch.bool)
    packed, tok = d1.load_model(str(LLADA), device="cpu", load_4bit=True, lora=(4, 8), dtype=torch.bfloat16)
    linears = d1.block_linears(packed)
    assert len(linears) == 14 and all("4bit" in type(m).__name__ for m in linears.values())
    with torch.no_grad():  # rollouts and updates take turns
        for name, p in packed.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
        packed(ids)
    plain, _ = d1.load_model(str(LLADA), device="cpu", lora=(4, 8), dtype=torch.bfloat16)
    with torch.no_grad():
        loose = d1.block_linears(plain)
        from bitsandbytes.functional import dequantize_4bit
        for name, m in linears.items():
            loose[name].weight.copy_(dequantize_4bit(m.weight.data, m.weight.quant_state))
        for (_, a), (_, b) in zip(plain.named_parameters(), packed.named_parameters(), strict=True):
            if a.dtype == torch.float32:
                a.copy_(b)
    grads = []
    for model in (packed, plain):
        model.eval()
        d1.one_step_logp(model, ids[:, :14], ids[:, 14:], hide, tok.mask_token_id).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen"])
def test_load_model_makes_others_see_both_ways_with_a_mask_token_and_an_end(folders, kind):
    model, tok = d1.load_model(folders[kind], device="cpu")
    rows = model.get_input_embeddings().weight
    assert tok.mask_token_id < len(rows) and tok.eos_token_id is not None and tok.pad_token_id is not None
    assert model.get_output_embeddings().weight.shape[0] == len(rows)
    if kind == "qwen":  # it had none: the new row is the mean of the others
        assert tok.mask_token == "<|mask|>" and len(rows) == tok.mask_token_id + 1
        assert torch.allclose(rows[-1], rows[:-1].mean(0), atol=1e-6)
        assert d1.turn_end(tok) == [tok.convert_tokens_to_ids("<|im_end|>"), tok.eos_token_id]
    ids, n = d1.encode_example(tok, [{"role": "user", "content": "two plus two"}], "four")
    assert tok.decode(ids[n:], skip_special_tokens=True).strip() == "four" and ids[-1] == tok.eos_token_id
    assert ids[:n] == d1.encode_prompt(tok, [{"role": "user", "content": "two plus two"}])
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    x = torch.tensor([[9, 9, 11, 12, 13], [10, 11, 12, 13, 14]])
    with torch.no_grad():  # padding is not seen
        a = model(x, attention_mask=real).logits[0, 2:]
        x[0, :2] = 20
        assert torch.allclose(model(x, attention_mask=real).logits[0, 2:], a, atol=1e-5)


def test_load_model_refuses_a_model_that_only_looks_left(tmp_path, monkeypatch):
    folder = saved_network("qwen", tmp_path / "m")
    network_of = d1.network_of

    def causal(*args):
        network, config = network_of(*args)
        config.is_causal = True
        return network, config

    monkeypatch.setattr(d1, "network_of", causal)
    with pytest.raises(d1.UserError, match="attends to the left only"):
        d1.load_model(folder, device="cpu")


@pytest.mark.parametrize("kind,word", [
    ("truncated", "cannot load"), ("missing", "layers.0.self_attn.q_proj.weight is missing"),
    ("shape", "is (32, 64), not (64, 64)"), ("unknown", "q_norm"), ("no weights", "cannot load"),
    ("config", "cannot load"), ("type", "nobody"), ("mask id", "9999"),
])
def test_load_model_refuses_a_broken_checkpoint_in_one_line_and_nothing_is_written(kind, word, tmp_path, capsys):
    folder = broken(tmp_path / "m", kind)
    flags = ["--task", "gsm8k", "--model", folder, "--eval_only", "--output_dir", str(tmp_path / "out")]
    assert d1.main([*flags, *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error and "Traceback" not in error, error
    assert not list(tmp_path.glob("out/*/*"))


@pytest.mark.parametrize("flags,word", [
    (["--attn", "flash_attention_2"], "flash_attention_2 needs"),
    (["--load_4bit"], "add --use_lora"), (["--sft_length", "600", "--model", "BERT"], "512 positions"),
])
def test_load_model_refuses_impossible_models(flags, word, folders, traces, tmp_path, capsys):
    model = folders["bert"] if "BERT" in flags else str(LLADA)
    flags = [f for f in flags if f not in ("--model", "BERT")]
    assert d1.main(["--task", "sft_only", "--model", model, "--sft_data", str(traces), "--output_dir",
                    str(tmp_path / "o"), *SHORT, *flags]) == 2
    assert word in capsys.readouterr().err and not list(tmp_path.glob("o/*/*.safetensors"))


def test_load_model_refuses_an_adapter_for_another_base(tmp_path, folders):
    trained_adapter(str(LLADA), tmp_path / "one", (4, 8))
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    for other, word in ((folders["qwen"], "does not fit"), (str(tmp_path / "gone"), "no such folder")):
        (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": other}))
        with pytest.raises(d1.UserError, match=word):
            d1.load_model(str(tmp_path / "one"), device="cpu")


@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj"])
def test_lora_of_the_first_stage_is_never_lost(tmp_path, targets):
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        first, _ = trained_adapter(str(LLADA), tmp_path / "one", (4, 8, 0.05, "all"))
        want = first.eval()(ids).logits
        second, _ = d1.load_model(str(tmp_path / "one"), device="cpu", lora=(6, 3, 0.0, targets))
        assert torch.allclose(second(ids).logits, want, atol=1e-6)  # stage 2 begins where stage 1 ended
        with d1.reference_of(second)() as reference:
            assert torch.allclose(reference(ids).logits, want, atol=1e-6)
        both, _ = trained_adapter(str(LLADA), tmp_path / "two", (6, 3, 0.0, targets), model=str(tmp_path / "one"))
        moved = both.eval()(ids).logits
        with d1.reference_of(second)() as reference:
            assert torch.allclose(reference(ids).logits, want, atol=1e-6)
        assert not torch.allclose(moved, want, atol=1e-2)
        joined, _ = d1.load_model(str(tmp_path / "two"), device="cpu")
        assert torch.allclose(joined(ids).logits, moved, atol=1e-5)  # one adapter file holds both
    trained = [n for n, p in second.named_parameters() if p.requires_grad]
    assert trained and all(".default." in n for n in trained)


def test_lora_reference_of_two_stages_in_one_run_is_the_second_start(tiny, quick, tmp_path):
    model, _ = trained_adapter(str(LLADA), tmp_path / "one", (4, 8))
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        want = model.eval()(ids).logits
        with d1.reference_of(model)() as reference:
            assert torch.allclose(reference(ids).logits, want, atol=1e-6)
        assert torch.allclose(model(ids).logits, want, atol=1e-6)


def test_lora_targets_are_the_models_own_and_a_wrong_one_is_an_error(folders):
    model, _ = d1.load_model(folders["bert"], device="cpu", lora=(2, 4, 0.0, "query,value"))
    adapted = {n.split(".")[-4] for n, p in model.named_parameters() if "lora_A" in n}
    assert adapted == {"query", "value"}
    with pytest.raises(d1.UserError, match="no linear layer q_proj to adapt; it has dense, key, query, value"):
        d1.load_model(folders["bert"], device="cpu", lora=(2, 4, 0.0, "q_proj,value"))
    official = settled(task="gsm8k", model=str(LLADA), preset="official")
    assert official.lora_targets == "q_proj,k_proj,v_proj,up_proj"


def test_adapt_with_lora_draws_from_the_seed_alone(tiny):
    def first(seed):
        model = d1.adapt_with_lora(copy.deepcopy(tiny[0]), 4, 8, seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    before = torch.random.get_rng_state()
    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_adapt_with_lora_takes_every_linear_layer_of_the_blocks_in_fp32(tiny):
    model = d1.adapt_with_lora(copy.deepcopy(tiny[0]).bfloat16(), 4, 8)
    adapted = {n.split(".")[-4] for n, p in model.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    with pytest.raises(d1.UserError, match="no linear layer"):
        d1.adapt_with_lora(NoLinear(), 4, 8)


def test_load_model_of_a_bert_from_scratch_writes_the_form_that_rewards_read(tmp_path):
    model, tokenizer = d1.load_model(small_bert(tmp_path / "bert"), device="cpu", from_scratch=True, seed=3)
    again, _ = d1.load_model(str(tmp_path / "bert"), device="cpu", from_scratch=True, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, _ = d1.load_model(str(tmp_path / "bert"), device="cpu", from_scratch=True, seed=4)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))
    reply = "<reasoning>\n3+4=7\n</reasoning>\n<answer>\n7\n</answer>"
    (text,) = d1.reply_texts(tokenizer, torch.tensor([tokenizer.encode(reply, add_special_tokens=False)]))
    rewards = d1.TASKS["gsm8k"].rewards(text, {"question": "", "answer": "7"})
    assert rewards["correctness"] == 2 and rewards["strict_format"] == 0.5 and rewards["soft_format"] == 0.5


def test_load_model_of_a_bert_goes_through_both_stages_with_a_reward_of_ones_own(tmp_path, quick):
    model, tokenizer = d1.load_model(small_bert(tmp_path / "bert"), device="cpu", from_scratch=True)
    cfg = quick("gsm8k", preset="tiny", t_low=0.5, max_prompt=60, gen_length=32, sft_length=320, sft_extra=0)
    task = d1.TASKS["gsm8k"]
    rows = d1.sft_rows(cfg, tokenizer, [task], d1.Screen())
    d1.train(trainer_of(d1.sft_stage(model, tokenizer, rows, cfg), tokenizer, cfg, tmp_path), d1.Screen())
    calls = []

    def reward(texts, examples):
        calls.extend(texts)
        return length_reward(texts, examples)

    stage = d1.rl_stage(model, tokenizer, paid(reward, "gsm8k"), task.examples("train", 8), cfg)
    d1.train(trainer_of(stage, tokenizer, cfg, tmp_path), d1.Screen())
    rows = logged(tmp_path)
    assert len(calls) == 8 and any(r.get("stage") == "diffu_grpo" and "reward/length" in r for r in rows)
    assert all(math.isfinite(r["loss"]) for r in rows if "loss" in r)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-modernbert"])
def test_embedded_masked_lm_gives_the_same_reply_to_a_padded_prompt(name):
    model, tokenizer = d1.load_model(name, device="cpu")
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.1e6
    texts = "Count from one to six.", "Where does the dog live? Tell me.", "Who am I?"
    prompts = [tokenizer.encode(text) for text in texts]
    options = dict(mask_id=tokenizer.mask_token_id, gen_length=16, block_length=8)
    ids, real = d1.pad_left(prompts, tokenizer.pad_token_id)
    assert not real.all()
    together = d1.diffuse_decode(model, ids, attention_mask=real, **options)[:, ids.shape[1] :]
    alone = [d1.diffuse_decode(model, torch.tensor([p]), **options)[:, len(p) :] for p in prompts]
    assert torch.equal(together, torch.cat(alone))
