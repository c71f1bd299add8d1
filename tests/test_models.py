"""Other people's models: LLaDA's format, Dream, causal and masked models; adapters, 4-bit, exports, launch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import d1_full as d1

ROOT = Path(d1.__file__).parent
LLADA = ROOT / "tests" / "data" / "tiny-llada"
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


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def build(kind, folder):
    """A random small model of another family, saved as its owners would."""
    torch.manual_seed(0)
    tok = wordpiece_tokenizer() if "bert" in kind else chatml_tokenizer()
    ids = dict(vocab_size=len(tok), pad_token_id=0 if "bert" in kind else None, bos_token_id=None)
    if kind == "bert":
        config = transformers.BertConfig(**ids, **SMALL, max_position_embeddings=512)
        model = transformers.BertForMaskedLM(config)
    elif kind == "modernbert":
        special = dict(eos_token_id=3, cls_token_id=2, sep_token_id=3, bos_token_id=2)
        model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**{**ids, **special}, **SMALL))
    else:
        config = transformers.Qwen2Config(
            **ids, **SMALL, num_key_value_heads=2, eos_token_id=tok.eos_token_id, tie_word_embeddings=True)
        model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"llada": str(LLADA)} | {kind: build(kind, root / kind) for kind in ("bert", "modernbert", "qwen")}


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
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in range(80)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


SHORT = [str(w) for pair in dict(
    steps_sft=2, bs_sft=4, rows_sft=2, sft_length=420, steps_rl=2, mu=2, group=2, bs_rl=2, grad_accum=1, gen_length=32,
    eval_lengths=32, limit=2, max_prompt=64, threads=1).items() for w in (f"--{pair[0]}", pair[1])]


def command(*flags):
    assert d1.main([str(f) for f in flags]) == 0


# ---------------------------------------------------------------- loading
def test_llada_sharded_and_with_an_embedding_wider_than_the_vocabulary(tmp_path):
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


def test_bf16_error_is_no_worse_than_the_official_models():
    exact, _ = d1.load_model(str(LLADA), device="cpu")
    rough, _ = d1.load_model(str(LLADA), device="cpu", dtype=torch.bfloat16)
    ids = torch.randint(0, 480, (4, 480), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (rough(ids).logits.float() - exact(ids).logits).pow(2).mean().sqrt().item()
    assert 1e-4 < error < 0.0195  # .019 for the official model at this length


def test_dreams_shifted_logits_and_its_tokens(tmp_path):
    folder = Path(build("qwen", tmp_path / "dream"))
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


def test_4_bit_gradients_are_those_of_the_same_weights_unpacked():
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
def test_other_models_see_both_ways_have_a_mask_token_and_an_end(folders, kind):
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


def test_a_model_that_only_looks_left_is_refused(tmp_path, monkeypatch):
    folder = build("qwen", tmp_path / "m")
    network_of = d1.network_of

    def causal(*args):
        network, config = network_of(*args)
        config.is_causal = True
        return network, config

    monkeypatch.setattr(d1, "network_of", causal)
    with pytest.raises(d1.UserError, match="attends to the left only"):
        d1.load_model(folder, device="cpu")


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


@pytest.mark.parametrize("kind,word", [
    ("truncated", "cannot load"), ("missing", "layers.0.self_attn.q_proj.weight is missing"),
    ("shape", "is (32, 64), not (64, 64)"), ("unknown", "q_norm"), ("no weights", "cannot load"),
    ("config", "cannot load"), ("type", "nobody"), ("mask id", "9999"),
])
def test_a_broken_checkpoint_is_one_line_and_nothing_is_written(kind, word, tmp_path, capsys):
    folder = broken(tmp_path / "m", kind)
    flags = ["--task", "gsm8k", "--model", folder, "--eval_only", "--output_dir", str(tmp_path / "out")]
    assert d1.main([*flags, *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error and "Traceback" not in error, error
    assert not list(tmp_path.glob("out/*/*"))


# ---------------------------------------------------------------- the two commands of the README
@pytest.mark.parametrize("kind", ["llada", "llada 4-bit", "bert", "modernbert", "qwen"])
def test_sft_saves_an_adapter_rl_starts_from_it_and_evaluation_runs(kind, folders, traces, problems, tmp_path, capsys):
    four = ["--load_4bit"] if "4-bit" in kind else []
    if four:
        pytest.importorskip("bitsandbytes")
    base = folders[kind.split()[0]]
    common = ["--use_lora", "--preset", "paper", "--output_dir", tmp_path, *SHORT, *four]
    command("--model", base, "--task", "sft_only", "--sft_data", traces, *common)
    said = capsys.readouterr().out
    assert "1 left out, malformed or without room for a reply: row 4" in said
    assert "1 cut at --sft_length 420: row 6" in said
    assert "LoRA r 8, alpha 16 on " in said and " x2" in said and "mask " in said
    folder = tmp_path / "sft"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    command("--model", folder, "--task", "gsm8k", "--data", problems, *common, "--max_prompt", 12)
    said = capsys.readouterr().out
    assert "LoRA r 128, alpha 64" in said and "over --max_prompt 12: cut on the left" in said
    entries = json.loads((tmp_path / "gsm8k" / "eval.json").read_text())
    assert [e["row"] for e in entries] == ["sft", "d1"] and entries[0]["prompts_cut"] == 2
    saved = json.loads((tmp_path / "gsm8k" / "adapter_config.json").read_text())
    assert saved["r"] == 8 + 128 and Path(saved["base_model_name_or_path"]) == Path(base).resolve()
    assert json.loads((tmp_path / "gsm8k" / "d1_state.json").read_text())["stages"] == ["sft", "diffu_grpo"]
    command("--model", tmp_path / "gsm8k", "--task", "gsm8k", "--eval_only", "--data", problems, "--preset", "paper",
            "--output_dir", tmp_path, *SHORT, *four)


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


@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj"])
def test_the_first_stages_adapter_is_never_lost(tmp_path, targets):
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        first, _ = trained_adapter(str(LLADA), tmp_path / "one", (4, 8, 0.05, "all"))
        want = first.eval()(ids).logits
        second, _ = d1.load_model(str(tmp_path / "one"), device="cpu", lora=(6, 3, 0.0, targets))
        assert torch.allclose(second(ids).logits, want, atol=1e-6)  # stage 2 begins where stage 1 ended
        with d1.freeze_reference(second)() as reference:
            assert torch.allclose(reference(ids).logits, want, atol=1e-6)
        both, _ = trained_adapter(str(LLADA), tmp_path / "two", (6, 3, 0.0, targets), model=str(tmp_path / "one"))
        moved = both.eval()(ids).logits
        with d1.freeze_reference(second)() as reference:
            assert torch.allclose(reference(ids).logits, want, atol=1e-6)
        assert not torch.allclose(moved, want, atol=1e-2)
        joined, _ = d1.load_model(str(tmp_path / "two"), device="cpu")
        assert torch.allclose(joined(ids).logits, moved, atol=1e-5)  # one adapter file holds both
    trained = [n for n, p in second.named_parameters() if p.requires_grad]
    assert trained and all(".default." in n for n in trained)


def test_two_stages_in_one_run_have_the_second_start_as_reference(tiny, quick, tmp_path):
    model, _ = trained_adapter(str(LLADA), tmp_path / "one", (4, 8))
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        want = model.eval()(ids).logits
        with d1.freeze_reference(model)() as reference:
            assert torch.allclose(reference(ids).logits, want, atol=1e-6)
        assert torch.allclose(model(ids).logits, want, atol=1e-6)


def test_lora_targets_are_the_models_own_and_a_wrong_one_is_an_error(folders):
    model, _ = d1.load_model(folders["bert"], device="cpu", lora=(2, 4, 0.0, "query,value"))
    adapted = {n.split(".")[-4] for n, p in model.named_parameters() if "lora_A" in n}
    assert adapted == {"query", "value"}
    with pytest.raises(d1.UserError, match="no linear layer q_proj to adapt; it has dense, key, query, value"):
        d1.load_model(folders["bert"], device="cpu", lora=(2, 4, 0.0, "q_proj,value"))
    official = d1.settle({k: (v, "") for k, v in dict(task="gsm8k", model=str(LLADA), preset="official").items()})[0]
    assert official.lora_targets == "q_proj,k_proj,v_proj,up_proj"


def test_an_adapter_for_another_base_is_refused(tmp_path, folders):
    trained_adapter(str(LLADA), tmp_path / "one", (4, 8))
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    for other, word in ((folders["qwen"], "does not fit"), (str(tmp_path / "gone"), "no such folder")):
        (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": other}))
        with pytest.raises(d1.UserError, match=word):
            d1.load_model(str(tmp_path / "one"), device="cpu")


# ---------------------------------------------------------------- exports
LLADA_DEFAULTS = dict(  # of ModelConfig in LLaDA's own configuration_llada.py: what a config.json may leave out
    alibi=False, alibi_bias_max=8.0, attention_layer_norm=False, attention_layer_norm_with_affine=True,
    block_group_size=1, flash_attention=False, include_bias=False, include_qkv_bias=False, init_cutoff_factor=None,
    init_std=0.02, input_emb_norm=False, layer_norm_with_affine=True, mlp_ratio=4, multi_query_attention=None,
    rope_full_precision=True, scale_logits=False, use_cache=False)


@pytest.mark.parametrize("form", ["hf", "merged", "llada"])
def test_exports_reload_with_the_same_logits(form, tmp_path):
    model, _ = trained_adapter(str(LLADA), tmp_path / "one", (4, 8))
    command("--export", form, "--model", tmp_path / "one", "--output_dir", tmp_path / "out")
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        want = model.eval()(ids).logits
        ours, _ = d1.load_model(str(tmp_path / "out"), device="cpu")
        assert torch.allclose(ours(ids).logits, want, atol=1e-5)
        if form != "llada":
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            assert torch.allclose(theirs(ids).logits, want, atol=1e-5)
    if form == "llada":
        official, exported = (json.loads((p / "config.json").read_text()) for p in (LLADA, tmp_path / "out"))
        changed = {k for k in official if official[k] != exported.get(k, LLADA_DEFAULTS.get(k, "absent"))}
        assert changed <= {"transformers_version", "train_max_sequence_length"}, changed
        keys = load_file(tmp_path / "out" / "model.safetensors").keys()
        assert keys == load_file(LLADA / "model.safetensors").keys()


def test_a_full_run_exports_too_and_a_bert_has_no_llada_form(folders, traces, tmp_path, capsys):
    command("--model", LLADA, "--task", "sft_only", "--sft_data", traces, "--output_dir", tmp_path, "--export", "llada",
            *SHORT)
    a, _ = d1.load_model(str(tmp_path / "sft"), device="cpu")
    b, _ = d1.load_model(str(tmp_path / "sft" / "llada"), device="cpu")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    keys = load_file(tmp_path / "sft" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in keys  # our own checkpoints are plain Llama
    capsys.readouterr()
    assert d1.main(["--export", "llada", "--model", folders["bert"], "--output_dir", str(tmp_path / "x")]) == 2
    assert "LLaDA's network" in capsys.readouterr().err and not (tmp_path / "x").exists()


# ---------------------------------------------------------------- memory, launch, plan
@pytest.mark.parametrize("lora", [None, (4, 8, 0.5, "all")])
def test_gradient_checkpointing_changes_no_number_and_dropout_is_off_in_stage_2(lora, quick, tmp_path):
    losses, grads = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, tok = d1.load_model(str(LLADA), device="cpu", lora=lora)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:  # so that dropout would show
                    p.normal_(std=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        task = d1.TASKS["sudoku"]
        stage = d1.DiffuGRPO(model, tok, task.examples("train", 8), task.messages,
                             lambda texts, examples: [{"n": float(len(t))} for t in texts], quick(), tmp_path)
        recomputed = []
        layer = next(m for m in model.modules() if type(m).__name__ == "LlamaAttention")
        layer.register_forward_pre_hook(lambda *a: recomputed.append(torch.is_grad_enabled()))  # noqa: B023
        stage.apply_gradient = lambda: 0.0
        row = stage.update()
        losses.append(row["loss"])
        grads.append([p.grad.clone() for p in stage.params])
        assert row["ratio_max"] == 1.0 and sum(recomputed) == 1 + checkpointing
    assert losses[0] == losses[1] and all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


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
    given, lora, kills = json.loads(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    cfg = d1.settle({k: (v, "") for k, v in given.items()})[0]
    torch.set_num_threads(1)
    screen = d1.Screen()
    out = d1.Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    task = d1.TASKS["sudoku"]
    rows = d1.sft_rows(cfg, d1.build_tokenizer(), [task], screen)
    save = d1.save_trainer

    def save_and_die(stage):
        save(stage)
        if kills and stage.step == 4:
            raise Killed

    d1.save_trainer = save_and_die
    try:
        model, tok = d1.load_model("tiny", seed=0, lora=lora)
        stage = d1.MaskedSFT(model, tok, rows, cfg, out)
        stage.run(screen)
        stage.finish(screen)
    except Killed:
        model, tok = d1.load_model("tiny", seed=1, lora=lora)
        if lora:  # the adapter is in the checkpoint, what lies below it is not
            below = dict(d1.load_model("tiny", seed=0, lora=lora)[0].named_parameters())
            for name, p in model.named_parameters():
                p.data.copy_(below[name]) if "lora_" not in name else None
        stage = d1.MaskedSFT(model, tok, rows, cfg, out)
        assert d1.load_trainer(stage, screen) and stage.step == 4
        stage.run(screen)
        stage.finish(screen)
    d1.save_trainer = save
    reward = lambda texts, examples: [{"n": float(len(t))} for t in texts]
    weight = lambda model: -sum(float(p.detach().double().square().sum()) for p in model.parameters())
    world, drawn = d1.processes().num_processes, []

    def reinforce(model):
        stage = d1.DiffuGRPO(model, tok, task.examples("train", 16), task.messages, reward, cfg, out, weight)
        draw = stage.roll_out
        stage.roll_out = lambda micro: drawn.append(draw(micro)) or drawn[-1]
        return stage

    stage = reinforce(copy.deepcopy(model))
    if world > 1 and not stage.engine:  # the last process is asked to stop between two inner updates
        update = stage.update
        stage.update = lambda: (stage.step == 2 and stage.rank == world - 1 and signal.raise_signal(15)) or update()
        try:
            stage.run(screen)
        except d1.Stopped as e:
            assert "step 3" in str(e)
        stage = reinforce(model)
        assert d1.load_trainer(stage, screen) and stage.step == 3 and stage.batch
    stage.run(screen)
    stage.finish(screen)
    model = stage.model
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
    """launched(processes, kind, lora) -> the folder of a run, made once."""
    made = {}

    def launch(n, kind="ddp", lora=None):
        if (n, kind, lora) in made:
            return made[n, kind, lora]
        out = tmp_path_factory.mktemp(f"{kind}{n}")
        (out / "run.py").write_text(LAUNCHED)
        settings = dict(task="sudoku", steps_sft=6, bs_sft=8, rows_sft=2, n_traces=40, steps_rl=4, mu=2, group=2,
                        limit=4, eval_lengths="32", save_steps=2, warmup_sft=2, bs_rl=4, grad_accum=4 // n,
                        logits_gib=5e-5,  # in pieces
                        output_dir=str(out))
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n),
             str(out / "run.py"), json.dumps(settings), json.dumps(lora), json.dumps(kind != "ddp")],
            env={**os.environ, **SHARDED[kind], "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        made[n, kind, lora] = out
        return out

    return launch


@pytest.mark.parametrize("lora", [None, (4, 8, 0.1, "all")], ids=["full", "lora"])
@pytest.mark.parametrize("kind", SHARDED)
def test_two_processes_do_what_one_does(kind, lora, launched):
    """Each holding the model, or with its weights sharded, in a run that is killed in stage 1 and resumed."""
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    folders = launched(1, lora=lora), launched(2, kind, lora)
    one, two = (([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()],
                 json.loads((f / "texts.json").read_text())) for f in folders)
    assert one[1] == two[1] and len(one[1]) == 32
    assert len(one[0]) == len(two[0])
    for a, b in zip(one[0], two[0], strict=True):
        assert a.keys() == b.keys()
        for k in set(a) - {"seconds", "stage", "accuracy"}:
            assert b[k] == pytest.approx(a[k], rel=1e-3, abs=1e-5), (a["stage"], a["step"], k)
    evals = [json.loads((f / "eval.json").read_text()) for f in folders]
    assert evals[0] == evals[1] and evals[0][0]["n"] == 5
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    weights = [load_file(f / name) for f in folders]
    assert max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0]) < 1e-4


@pytest.mark.parametrize(
    ("kind", "stage", "advice"), [("FSDP", None, "fsdp_version: 2"), ("DEEPSPEED", 3, "zero_stage: 2")])
def test_fsdp_1_and_zero_3_are_refused(kind, stage, advice, quick, tmp_path, monkeypatch):
    """The launch as accelerate tells of it, since it makes neither on a CPU."""
    state = SimpleNamespace(deepspeed_plugin=stage and SimpleNamespace(zero_stage=stage))
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=False, state=state)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator)
    model, tok = d1.load_model("tiny", device="cpu")
    with pytest.raises(d1.UserError, match=advice):
        d1.MaskedSFT(model, tok, [([1, 2, 3], 1)], quick(), tmp_path)


def test_the_plan_counts_what_backward_keeps():
    """The formula against the tensors that autograd saves for a small Llama in bf16 with LoRA."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                                      num_attention_heads=4, is_causal=False, use_cache=False)
    model = d1.adapt_with_lora(transformers.LlamaForCausalLM(config).bfloat16(), 16, 8)
    model.get_output_embeddings().weight.requires_grad_(False)
    kept, fixed = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in fixed:
            kept[storage._cdata] = (storage.nbytes(), t)
        return t

    ids = torch.randint(0, 64, (2, 96))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.base_model.model.model(ids)
    adapters = sum(2 * p.numel() for n, p in model.named_parameters() if "lora_" in n)  # their bf16 copies
    measured = (sum(n for n, _ in kept.values()) - adapters) / ids.numel()
    assert d1.bytes_per_token(config, 16, False) == pytest.approx(measured, rel=0.03)


def test_dry_run_of_llada_8b_needs_no_network(capsys, tmp_path):
    command("--model", "llada/llada-8b-instruct", "--use_lora", "--task", "gsm8k", "--skip_sft", "--dry_run",
            "--output_dir", tmp_path / "o")
    out = capsys.readouterr().out
    assert "8,351,125,504" in out and "335,544,320" in out and "memory: peak" in out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags,word", [
    (["--attn", "flash_attention_2"], "flash_attention_2 needs"),
    (["--load_4bit"], "add --use_lora"), (["--sft_length", "600", "--model", "BERT"], "512 positions"),
])
def test_impossible_models_are_refused(flags, word, folders, traces, tmp_path, capsys):
    model = folders["bert"] if "BERT" in flags else str(LLADA)
    flags = [f for f in flags if f not in ("--model", "BERT")]
    assert d1.main(["--task", "sft_only", "--model", model, "--sft_data", str(traces), "--output_dir",
                    str(tmp_path / "o"), *SHORT, *flags]) == 2
    assert word in capsys.readouterr().err and not list(tmp_path.glob("o/*/*.safetensors"))


