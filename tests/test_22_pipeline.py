"""The pipeline writes what the decoder writes."""

import ast
import copy
import re

import pytest
import torch
from conftest import ROOT, Writer, frame

import d1_full as d1


@pytest.fixture(scope="module")
def pipe(untrained):
    import transformers

    from d1_full import TextDiffusionPipeline

    made = transformers.pipeline("text-diffusion", model=str(untrained), device="cpu")
    assert type(made) is TextDiffusionPipeline and not made.model.training
    return made


def decoded(model, tok, chat, **options):
    ids = torch.tensor([d1.encode_prompt(tok, chat)])
    out = d1.diffuse_decode(model.eval(), ids, mask_id=tok.mask_token_id, eos_id=tok.eos_token_id, stop_at_eos=True,
                            gen_length=32, **options)
    return d1.reply_texts(tok, out[:, ids.shape[1] :])[0]


def test_pipeline_writes_what_the_decoder_writes(pipe, tiny):
    chat = [{"role": "user", "content": "Who am I?"}]
    want = decoded(*tiny, chat)
    assert len(want) > 5 and pipe("Who am I?") == pipe(chat) == [{"generated_text": want}]
    options = dict(num_steps=4, block_length=8, max_length=32)
    assert pipe(chat, **options)[0]["generated_text"] == decoded(*tiny, chat, steps=4, block_length=8) != want
    draws = [pipe(chat, temperature=1.0, seed=s)[0]["generated_text"] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and want not in draws
    by_chance = decoded(*tiny, chat, remasking="ancestral", generator=[d1.keyed_generator(0, "pipeline", 0)])
    assert pipe(chat, use_confidence=False, seed=0) == [{"generated_text": by_chance}]
    assert pipe(chat, use_confidence=True) == [{"generated_text": want}]


def test_pipeline_runs_by_the_lines_of_the_readme(untrained, tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(from d1_full import TextDiffusionPipeline.*?)```", readme, re.S)
    assert lines.count("\n") == 3
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "sft").symlink_to(untrained)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    (said,) = ast.literal_eval(capsys.readouterr().out)
    assert list(said) == ["generated_text"] and isinstance(said["generated_text"], str)


def test_pipeline_on_a_batch_equals_singles(pipe):
    texts = ["Who am I?", "Count.", "What is the opposite of hot, and who lives in the sea?"]
    singles = [pipe(text) for text in texts]
    assert len({s[0]["generated_text"] for s in singles}) > 1
    assert pipe(texts) == pipe(texts, batch_size=2) == singles


def test_pipeline_without_a_template_takes_the_text_as_the_prompt(pipe, monkeypatch):
    ids, tok = [], copy.deepcopy(pipe.tokenizer)
    monkeypatch.setattr(pipe, "tokenizer", tok)
    tok.chat_template = None
    monkeypatch.setattr(d1, "replies", lambda model, tok, prompts, *rest: ids.extend(prompts) or iter([(["x"], None)]))
    assert pipe("abc") == [{"generated_text": "x"}] and ids == [tok.encode("abc")]
    tok.mask_token = None
    with pytest.raises(d1.UserError, match="lacks a mask"):
        pipe("abc")


def test_pipeline_passes_edits_and_the_stop_text_to_the_decoder(pipe, tiny, monkeypatch):
    monkeypatch.setattr(pipe, "model", Writer(tiny[1], length=256))
    pipe.model.name_or_path = ""
    assert pipe("?", stop_token=". One") == [{"generated_text": "Hello Ada"}]
    seen = []
    monkeypatch.setattr(d1, "diffuse_steps", lambda *a, **k: seen.append(k) or iter([frame([5, 6])]))
    pipe("?", allow_edits=True), pipe("?")
    assert [k["edit_rate"] for k in seen] == [0.1, 0] and seen[0]["gen_length"] == 256


def test_pipeline_streams_one_prompt(pipe, capsys):
    reply = pipe("Who am I?", stream=True)[0]["generated_text"]
    printed = capsys.readouterr().out
    assert printed.endswith(reply + "\n") and "\033[33m" in printed
    with pytest.raises(d1.UserError, match="one prompt"):
        pipe(["a", "b"], stream=True)
    with pytest.raises(TypeError, match="unknown option top_k"):
        pipe("a", top_k=3)
    with pytest.raises(d1.UserError, match="max_length 33"):
        pipe("a", max_length=33)
    with pytest.raises(d1.UserError, match="two blocks are over"):
        pipe("a" * 2000)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-modernbert", "adapter"])
def test_pipeline_loads_what_this_script_saves(name, untrained, tmp_path):
    import transformers

    assert d1.TextDiffusionPipeline is d1.TextDiffusionPipeline
    lora = (4, 8, 0.0, "all") if name == "adapter" else None
    model, tok = d1.load_model(str(untrained) if lora else name, lora=lora, device="cpu")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(0, 0.1)
    d1.export_model(model, tok, tmp_path, {"preset": "tiny", "stages": []})
    made = transformers.pipeline("text-diffusion", model=str(tmp_path), device="cpu")
    assert made("Hi")[0]["generated_text"] == decoded(model, tok, [{"role": "user", "content": "Hi"}])
