"""What is written for others to load."""

import json

import pytest
import torch
import transformers
from conftest import LLADA, SHORT, command, flip, trained_adapter
from safetensors.torch import load_file

import d1_full as d1

LLADA_DEFAULTS = dict(  # of ModelConfig in LLaDA's own configuration_llada.py: what a config.json may leave out
    alibi=False, alibi_bias_max=8.0, attention_layer_norm=False, attention_layer_norm_with_affine=True,
    block_group_size=1, flash_attention=False, include_bias=False, include_qkv_bias=False, init_cutoff_factor=None,
    init_std=0.02, input_emb_norm=False, layer_norm_with_affine=True, mlp_ratio=4, multi_query_attention=None,
    rope_full_precision=True, scale_logits=False, use_cache=False)


def test_export_model_is_checked_when_loaded_and_an_index_stays_in_its_folder(tiny, tmp_path):
    d1.export_model(*tiny, tmp_path, {"stages": ["sft"]})
    d1.load_model(str(tmp_path))
    flip(tmp_path / "model.safetensors")
    with pytest.raises(d1.UserError, match=r"model\.safetensors is not the file that was saved"):
        d1.load_model(str(tmp_path))
    d1.export_model(*tiny, tmp_path, {"stages": ["sft"]})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../b.safetensors"}}))
    with pytest.raises(d1.UserError, match="not the file"):
        d1.load_model(str(tmp_path))


@pytest.mark.parametrize("form", ["hf", "merged", "llada"])
def test_export_model_reloads_with_the_same_logits(form, tmp_path):
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


def test_export_model_after_a_full_run_and_a_bert_has_no_llada_form(folders, traces, tmp_path, capsys):
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


def test_export_model_loads_in_transformers_and_here(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(trained / "sudoku")
    model, tok = d1.load_model(str(trained / "sudoku"), device="cpu")
    ids = torch.tensor([AutoTokenizer.from_pretrained(trained / "sudoku")("123")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    assert tok.mask_token_id == 257 and theirs.config.is_causal is False
