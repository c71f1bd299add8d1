"""The rest of the family: BERT and ModernBERT, pre-training, chats, edits, ways of decoding, long text."""

import copy
import itertools
import json
import math
import re

import pytest
import torch
from conftest import MASK, ToyModel
from test_faults import stop_at

import d1_full as d1

DEL = 9


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Scripted(torch.nn.Module):
    """Logits from a function (ids (B, L) -> tokens to say (B, L)), sure of them; remembers the canvases it saw."""

    def __init__(self, says, vocab=10):
        super().__init__()
        self.says, self.vocab, self.seen = says, vocab, []

    def forward(self, ids, attention_mask=None):
        self.seen.append(ids.clone())
        logits = 8.0 * torch.nn.functional.one_hot(self.says(ids), self.vocab).float()
        return type("Output", (), {"logits": logits})


# --- forward process with edits
def test_corruption_is_undone_by_its_target():
    x0, keep = torch.randint(1, 9, (400, 30), generator=rng(1)), torch.zeros(400, 30, dtype=torch.bool)
    keep[:, :6] = True
    before = x0.clone()
    shown, target, surplus = d1.corrupt(x0, keep, 0.2, DEL, rng())
    assert torch.equal(x0, before) and torch.equal(shown[:, :6], x0[:, :6]) and not surplus[:, :6].any()
    assert torch.equal(surplus, target == DEL) and not (shown == DEL).any()
    for clean, made, gone in zip(x0.tolist(), target.tolist(), surplus.tolist(), strict=True):
        kept = [t for t, g in zip(made, gone, strict=True) if not g]
        assert kept == clean[: len(kept)]  # less what fell off the end
    n = 400 * 24
    assert abs(surplus.sum() / n - 0.1) < 0.01  # half of the rate are surplus ...
    wrong = ((shown != target) & ~surplus).sum() / (n - surplus.sum())
    assert abs(wrong - 0.1 * 7 / 8) < 0.012  # ... half replaced, one in eight by the same
    same = d1.corrupt(x0, keep, 0.0, DEL, rng())
    assert torch.equal(same[0], x0) and torch.equal(same[1], x0) and not same[2].any()


def test_visible_tokens_weigh_one_and_masked_ones_the_inverse_of_t():
    g = rng(3)
    logits = torch.randn(4, 9, 7, generator=g, dtype=torch.float64)
    x0, keep = torch.randint(7, (4, 9), generator=g), torch.rand(4, 9, generator=g) < 0.3
    masked, t = (torch.rand(4, 9, generator=g) < 0.5) & ~keep, d1.sample_t(4, g)
    visible = ~masked & ~keep
    logp = logits.float().log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    want = -sum(logp[b, k] * (1 / t[b] if masked[b, k] else 1.0) for b in range(4) for k in range(9) if not keep[b, k])
    asked = masked | visible
    loss, metrics = d1.weighted_nelbo(*d1.token_losses(logits[asked], x0[asked]), masked, t, keep, asked)
    assert torch.allclose(loss, want / (~keep).sum(), rtol=1e-5)
    right = logits.argmax(-1) == x0  # the metrics are of masked tokens alone
    assert torch.allclose(metrics["accuracy"], (right & masked).sum() / masked.sum()) and (right & visible).any()
    assert torch.allclose(metrics["ce"], -(logp * masked).sum() / masked.sum(), rtol=1e-5)


def test_sft_learns_edits_from_a_share_of_the_steps_on(tiny, quick, tmp_path, monkeypatch):
    cfg = quick("sudoku", edit_rate=0.2, edit_start=0.5, steps_sft=8, bs_sft=6, sft_length=40, sft_extra=0)
    model, tokenizer = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])
    d1.add_delete_token(model, tokenizer)
    delete, size = tokenizer.convert_tokens_to_ids(d1.DELETE), len(tokenizer)
    assert delete == len(tiny[1]) and model.get_output_embeddings().weight.shape[0] == size
    rows = d1.sft_rows(cfg, tokenizer, [d1.TASKS["sudoku"]], d1.Screen())
    stage = d1.MaskedSFT(model, tokenizer, rows, cfg, tmp_path)
    shares = []
    for stage.step in range(8):
        shares.append(round(stage.edit_rate_now(), 6))
    assert shares == [0, 0, 0, 0, 0, 0.05, 0.1, 0.15]
    asked = []
    def look(layer, hidden, target, size):
        asked.append(target)
        return d1.token_losses(layer(hidden), target)
    monkeypatch.setattr(d1, "chunked_losses", look)
    loss, _ = stage.nelbo(rows[:6], ("a", "key"), edit_rate=0.9)
    g = d1.keyed_generator(cfg.seed, "a", "key")  # the same draws once more
    d1.draw_uniform((2,), g, "cpu")
    x0, keep = stage.collate(rows[:6], 40)
    t = d1.sample_t(6, g)
    shown, target, surplus = d1.corrupt(x0, keep, 0.9, delete, g)
    xt, masked = d1.forward_process(shown, t, keep | surplus, tokenizer.mask_token_id, g)
    assert torch.equal(asked[0], target[~keep]) and (asked[0] == delete).sum() > 5 and not masked[surplus].any()
    logp = model(xt).logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    weight = torch.where(masked, (1 / t)[:, None], 1.0)
    assert torch.allclose(loss, -(logp * weight)[~keep].sum() / (~keep).sum(), rtol=1e-5)
    stage.nelbo(rows[:6], ("a", "key"))
    assert len(asked[1]) < len(asked[0]) and not (asked[1] == delete).any()


def test_noise_levels_keep_to_their_range():
    t = d1.sample_t(20000, rng(), low=0.5, high=0.75)
    assert 0.5 <= t.min() < 0.501 and 0.749 < t.max() < 0.75 and abs(t.mean() - 0.625) < 0.002


# --- edits while decoding
def decode(model, prompt, **options):
    options = dict(mask_id=MASK, gen_length=8, block_length=4, steps=8, delete_id=DEL, eos_id=7) | options
    return list(d1.diffuse_steps(model, torch.tensor(prompt), **options))


TARGET = torch.tensor([1, 2, 3, 4, 5, 6, 5, 4, 3, 2])


def test_wrong_tokens_of_a_draft_are_replaced_and_the_prompt_never():
    model = Scripted(lambda ids: TARGET.expand_as(ids))
    draft = TARGET[2:].clone()
    draft[[1, 5]] = 8
    frames = decode(model, [[8, 8]], draft=draft[None], edit_rate=0.2)
    assert frames[-1].ids[0].tolist() == [8, 8, *TARGET[2:].tolist()]
    assert sum(f.edited.sum().item() for f in frames) == 2 and not any(f.edited[:, :2].any() for f in frames)
    with pytest.raises(ValueError, match="draft"):
        decode(model, [[8, 8]], draft=draft[None])  # without edits there is nothing to do
    assert draft.tolist().count(8) == 2  # and the one that was given stays


def test_edits_of_a_step_are_a_share_that_shrinks():
    model = Scripted(lambda ids: TARGET[:1].expand_as(ids))  # wants 1 everywhere
    frames = decode(model, [[8]], draft=torch.full((1, 8), 6), block_length=8, steps=4, edit_rate=0.5)
    assert [f.edited.sum().item() for f in frames] == [4, 3, 1, 0]  # of 8: at most 4, 3, 2, 1


def test_a_surplus_token_is_deleted_and_what_follows_moves_up():
    def says(ids):
        out = TARGET.repeat(len(ids), 1)
        for row, made in zip(ids, out, strict=True):
            wrong = [k for k in range(len(row)) if row[k] not in (MASK, TARGET[k])]
            if wrong and wrong[0] + 1 < len(row) and row[wrong[0] + 1] == TARGET[wrong[0]]:
                made[:] = row.where(row != MASK, TARGET)
                made[wrong[0]] = DEL
        return out
    draft = torch.cat([TARGET[2:5], torch.tensor([8]), TARGET[5:9]])  # 8 does not belong there; the last is missing
    frames = decode(Scripted(says), [[1, 2]], draft=draft[None], edit_rate=0.2)
    assert frames[-1].ids[0].tolist() == TARGET.tolist()
    first = frames[0]
    assert first.ids[0].tolist() == [*TARGET[:9].tolist(), MASK]  # the canvas keeps its length


def test_marks_move_up_with_their_tokens():
    def says(ids):
        return torch.where(ids == 8, DEL, 3)
    first = decode(Scripted(says), [[1]], draft=torch.tensor([[8, 3]]), edit_rate=0.5, steps=2)[0]
    assert first.ids[0, :5].tolist() == [1, 3, 3, 3, MASK]
    assert first.new[0].tolist() == [False] * 2 + [True] * 2 + [False] * 5
    assert ((first.logp != 0) == first.new).all()


def test_a_block_is_looked_at_again_after_a_token_was_only_deleted():
    def says(ids):  # two surplus 8s, of which only one is noticed at a time
        out = ids.where(ids != MASK, torch.tensor(3))
        out[0, (ids[0] == 8).nonzero()[:1]] = DEL
        return out
    frames = decode(Scripted(says), [[1]], draft=torch.tensor([[8, 3, 8, 3, 3, 3, 3, 3]]), edit_rate=0.1)
    assert frames[-1].ids[0].tolist() == [1] + [3] * 8


def test_edits_touch_committed_tokens_alone_and_leave_the_pace_of_the_others():
    model, before = ToyModel(10, 8, seed=3), torch.tensor([[3, 4] + [MASK] * 8])
    edited = 0
    for frame in d1.diffuse_steps(model, before[:, :2], mask_id=MASK, gen_length=8, block_length=8, steps=4,
                                  edit_rate=0.9):
        assert torch.equal(frame.new, (before == MASK) & (frame.ids != MASK)) and frame.new.sum() == 2
        assert torch.equal(frame.edited, (before != MASK) & (frame.ids != before))
        before, edited = frame.ids, edited + frame.edited.sum()
    assert edited > 0


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_mask_is_never_filled_with_the_delete_token(rate):
    says_delete = Scripted(lambda ids: torch.full_like(ids, DEL))
    assert not any((f.ids == DEL).any() for f in decode(says_delete, [[1, 2]], edit_rate=rate))


def test_rows_are_edited_alone_or_in_company_alike():
    model = ToyModel(10, 8, seed=2)
    prompts = torch.tensor([[3, 4], [5, 6], [2, 2]])
    drafts = torch.randint(1, 7, (3, 8), generator=rng(4))
    options = dict(mask_id=MASK, gen_length=8, block_length=4, steps=6, edit_rate=0.3, delete_id=7)
    together = d1.diffuse_decode(model, prompts, draft=drafts, **options)
    alone = [d1.diffuse_decode(model, p[None], draft=x[None], **options) for p, x in zip(prompts, drafts, strict=True)]
    assert torch.equal(together, torch.cat(alone)) and not (together == MASK).any()
    assert not (together == 7).any() and not torch.equal(together[:, 2:], drafts)


# --- ways of decoding
class Pair(torch.nn.Module):
    """Exact conditionals of a joint law of two tokens, 1 or 2 each, after one prompt token."""

    joint = torch.tensor([[0.45, 0.05], [0.1, 0.4]])  # p(a, b)

    def forward(self, ids, attention_mask=None):
        logits = torch.full((*ids.shape, 4), -30.0)
        for row, out in zip(ids.tolist(), logits, strict=True):
            for k, other in ((1, 2), (2, 1)):
                table = self.joint if k == 1 else self.joint.T
                law = table.sum(1) if row[other] == MASK else table[:, row[other] - 1]
                out[k, 1:3] = (law / law.sum()).log()
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(("remasking", "steps", "share"), [
    ("ancestral", 1, None), ("ancestral", 2, 0.5), ("random", 2, 1.0), ("low_confidence", 2, 1.0)])
def test_samples_follow_the_law_of_the_reverse_process(remasking, steps, share):
    """One step draws from the product of marginals; one token a step from the joint; ancestral with 2 steps between.

    Both tokens come in the same one of two ancestral steps with probability 1/2.
    """
    n = 6000
    prompt = torch.full((n, 1), 3)
    out = d1.diffuse_decode(Pair(), prompt, mask_id=MASK, gen_length=2, block_length=2, steps=steps, temperature=1.0,
                            remasking=remasking, generator=rng(5))
    found = torch.bincount((out[:, 1] - 1) * 2 + out[:, 2] - 1, minlength=4) / n
    joint, apart = Pair.joint, Pair.joint.sum(1)[:, None] * Pair.joint.sum(0)
    if remasking == "low_confidence":  # the surer token comes first, then the other given it: still the joint law?
        assert abs(found.view(2, 2).sum(1)[0] - 0.5) < 0.3
        return
    want = apart if share is None else share * joint + (1 - share) * apart
    assert (found - want.flatten()).abs().max() < 4 * math.sqrt(0.25 / n)


def test_ancestral_steps_unmask_what_the_process_says():
    model, n = ToyModel(41, 3), 200
    frames = list(d1.diffuse_steps(model, torch.ones(n, 1, dtype=torch.long), mask_id=MASK, gen_length=40, steps=4,
                                   block_length=40, remasking="ancestral", generator=rng(6)))
    shares = [f.new.sum().item() / (n * 40) for f in frames]
    assert len(frames) == 4 and all(abs(s - 0.25) < 0.02 for s in shares)
    assert torch.stack([f.new for f in frames]).sum(0)[:, 1:].eq(1).all()


# --- longer than the context
def test_a_window_slides_and_the_model_never_sees_more():
    model = Scripted(lambda ids: ids.clamp(min=1))
    prompt = torch.randint(1, 7, (2, 5), generator=rng())
    frames = list(d1.diffuse_steps(model, prompt, mask_id=MASK, gen_length=64, block_length=4, context=12))
    final = frames[-1].ids
    assert final.shape == (2, 69) and not (final == MASK).any() and torch.equal(final[:, :5], prompt)
    assert {ids.shape[1] for ids in model.seen} == {12}
    for frame, seen in zip(frames, model.seen, strict=True):
        end = min(69, max(12, 5 + 4 * (frame.block + 1) + 4))  # one block ahead of the one in work
        before = torch.where(frame.new, MASK, frame.ids)
        assert torch.equal(seen, before[:, end - 12 : end])


def test_a_context_that_holds_all_changes_nothing():
    model, prompt = ToyModel(11, 8), torch.tensor([[3, 4, 5]])
    options = dict(mask_id=MASK, gen_length=8, block_length=4, temperature=0.8)
    assert torch.equal(d1.diffuse_decode(model, prompt, context=11, generator=rng(), **options),
                       d1.diffuse_decode(model, prompt, generator=rng(), **options))


def test_a_stop_ends_a_reply_after_its_block():
    model = Scripted(lambda ids: TARGET.expand_as(ids))
    frames = decode(model, [[1, 2]], stop=lambda ids: 4 in ids.tolist())
    assert frames[-1].ids[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]  # the block [3 4 5 6], then EOS
    whole = decode(model, [[8, 2]], stop=lambda ids: 8 in ids.tolist())[-1].ids[0].tolist()
    assert whole == [8, *TARGET[1:].tolist()]  # what the prompt says stops nothing


@pytest.mark.parametrize(("wrong", "word"), [
    (dict(context=6), "context"), (dict(context=9, cache="prefix"), "context"), (dict(stop=len, eos_id=None), "eos_id"),
    (dict(remasking="ancestral"), "generator"), (dict(remasking="random", threshold=0.9), "threshold")])
def test_decoding_that_cannot_run_says_so(wrong, word):
    with pytest.raises(ValueError, match=word):
        decode(ToyModel(10, 10), [[1, 2]], **wrong)


# --- models
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-modernbert"])
def test_a_padded_prompt_of_an_embedded_masked_lm_gives_the_same_reply(name):
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


def test_a_bert_from_scratch_writes_the_form_that_rewards_read(tmp_path):
    model, tokenizer = d1.load_model(small_bert(tmp_path / "bert"), device="cpu", from_scratch=True, seed=3)
    again, _ = d1.load_model(str(tmp_path / "bert"), device="cpu", from_scratch=True, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, _ = d1.load_model(str(tmp_path / "bert"), device="cpu", from_scratch=True, seed=4)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))
    reply = "<reasoning>\n3+4=7\n</reasoning>\n<answer>\n7\n</answer>"
    (text,) = d1.reply_texts(tokenizer, torch.tensor([tokenizer.encode(reply, add_special_tokens=False)]))
    rewards = d1.TASKS["gsm8k"].rewards(text, {"question": "", "answer": "7"})
    assert rewards["correctness"] == 2 and rewards["strict_format"] == 0.5 and rewards["soft_format"] == 0.5


def test_bert_goes_through_both_stages_with_a_reward_of_ones_own(tmp_path, quick):
    model, tokenizer = d1.load_model(small_bert(tmp_path / "bert"), device="cpu", from_scratch=True)
    cfg = quick("gsm8k", preset="tiny", t_low=0.5, max_prompt=60, gen_length=32, sft_length=320, sft_extra=0)
    task = d1.TASKS["gsm8k"]
    rows = d1.sft_rows(cfg, tokenizer, [task], d1.Screen())
    d1.MaskedSFT(model, tokenizer, rows, cfg, tmp_path).run(d1.Screen())
    calls = []
    def reward(texts, examples):
        calls.extend(texts)
        return [{"length": float(len(t))} for t in texts]
    stage = d1.DiffuGRPO(model, tokenizer, task.examples("train", 8), task.messages, reward, cfg, tmp_path)
    stage.run(d1.Screen())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(calls) == 8 and any(r.get("stage") == "diffu_grpo" and "reward/length" in r for r in rows)
    assert all(math.isfinite(r["loss"]) for r in rows if "loss" in r)


# --- text and chats
def test_text_is_packed_whole_with_an_end_after_each(tiny):
    _, tokenizer = tiny
    texts = ["abc", "defgh", "ij"]
    rows = d1.pack(iter(texts), tokenizer, 4, 1000)
    eos = tokenizer.eos_token_id
    flat = [i for t in texts for i in (*tokenizer.encode(t, add_special_tokens=False), eos)]
    assert rows.shape == (3, 4) and rows.flatten().tolist() == flat[:12]
    endless = d1.pack(itertools.repeat("abc"), tokenizer, 8, 100)
    assert endless.shape == (12, 8)
    with pytest.raises(d1.UserError, match="not one row"):
        d1.pack(["a"], tokenizer, 4, 10)


def test_texts_come_from_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("plain text")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe")
    assert list(d1.texts_of(str(tmp_path))) == ["plain text", "one", "two"]
    assert list(d1.texts_of(str(tmp_path / "b.txt"))) == ["plain text"]
    (tmp_path / "e.csv").write_text("other\n1\n")
    with pytest.raises(d1.UserError, match="row 1: no column text"):
        list(d1.texts_of(str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(d1.UserError, match="holds no"):
        list(d1.texts_of(str(tmp_path / "empty")))


def test_a_hub_set_is_streamed_as_far_as_it_is_needed(monkeypatch, tiny):
    import datasets
    asked, given = [], []
    def load_dataset(*name, split, streaming):
        assert name == ("some/corpus", "en") and split == "train" and streaming
        for i in itertools.count():
            given.append(i)
            yield {"text": f"document {i}"}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(d1, "ask_hub", lambda name, kind: asked.append((name, kind)))
    rows = d1.pack(d1.texts_of("some/corpus:en"), tiny[1], 16, 500)
    assert 480 <= rows.numel() <= 520 and len(given) < 60 and asked == [("some/corpus", "dataset")]


def test_every_turn_of_the_assistant_is_a_row_that_ends_there(tiny):
    _, tokenizer = tiny
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "A1"}, {"role": "user", "content": "more"},
            {"role": "assistant", "content": "A2"}]
    first, second = d1.chat_turns(tokenizer, chat, 50)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(second[0]) == whole and tokenizer.decode(second[0][second[1] :]) == "A2<|endoftext|>"
    assert tokenizer.decode(first[0]) == whole[: whole.index("<|user|>more")]
    for bad in ("text", [{"role": "user"}], [{"role": "assistant", "content": "A"}], [1], None):
        assert d1.chat_turns(tokenizer, bad, 50) == [([], 50)]


def test_a_chat_that_the_template_refuses_is_a_malformed_row(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert d1.chat_turns(tokenizer, chat, 50) == [([], 50)]


def test_a_window_knows_where_robertas_positions_begin():
    from transformers import RobertaConfig, RobertaForMaskedLM
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                             intermediate_size=16, max_position_embeddings=34)).eval()
    assert d1.context_of(model) == 32
    out = d1.diffuse_decode(model, torch.tensor([[5, 6]]), mask_id=4, gen_length=48, block_length=8, context=32)
    assert not (out == 4).any()


def test_steps_that_are_given_go_before_the_ratio_and_random_weights_have_no_stages(tmp_path):
    def settle(**flags):
        return d1.settle({k: (v, "test") for k, v in {"task": "pretrain", "model": "tiny-bert", **flags}.items()})[0]
    assert settle().data_ratio == 2 and settle(steps_sft=7).data_ratio == 0
    assert settle(steps_sft=7, data_ratio=3.0).data_ratio == 3
    (tmp_path / "d1_state.json").write_text('{"stages": ["sft"]}')
    cfg = d1.Settings(model=str(tmp_path), from_scratch=False)
    assert d1.stages_passed(cfg) == ["sft"]
    cfg.from_scratch = True
    assert d1.stages_passed(cfg) == []


def test_the_world_holds_what_the_chat_asks_and_splits_share_no_question():
    text = " ".join(itertools.islice(d1.world_texts(0), 4000))
    task = d1.Talk()
    splits = {s: {task.key(e): e for e in task.examples(s, 600)} for s in ("train", "test")}
    assert not splits["train"].keys() & splits["test"].keys() and len(splits["test"]) > 20
    for example in splits["test"].values():  # nobody is asked for what the text does not tell
        told = example["question"].startswith(("Where", "Who", "I am"))
        assert not told or all(s.strip(". ") in text for s in re.findall(r"The \w+ [^.]*\.", example["answer"]))


def test_pretraining_with_edits_that_stopped_and_resumed_is_the_unbroken_one(tiny, quick, tmp_path):
    def stage(folder):
        model, tokenizer = copy.deepcopy(tiny)
        d1.add_delete_token(model, tokenizer)
        cfg = quick("pretrain", steps_sft=6, sft_length=24, edit_rate=0.3, edit_start=0.2)
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = d1.pretraining_rows(cfg, tokenizer, d1.Screen())
        return d1.Pretraining(model, tokenizer, rows, cfg, tmp_path / folder)
    whole, part = stage("whole"), stage("part")
    whole.run(d1.Screen())
    stop_at(part, 3)
    with pytest.raises(d1.Stopped, match="SIGTERM after pretrain step 3"):
        part.run(d1.Screen())
    last = stage("part")
    assert d1.load_trainer(last, d1.Screen()) and last.step == 3
    last.run(d1.Screen())
    assert all(torch.equal(a, b) for a, b in zip(whole.params, last.params, strict=True))


def test_pretraining_then_chat_with_edits(tmp_path, quick, capsys):
    """Both commands, the token for edits in the vocabulary, the ratio as stop rule, cosine, evaluation on the chat."""
    small = ["--threads", "1", "--output_dir", str(tmp_path), "--edit_rate", "0.2", "--edit_start", "0.5",
             "--warmup_sft", "2", "--save_steps", "5"]
    pre = ["--task", "pretrain", "--model", "tiny-modernbert", "--data_ratio", "0.02", "--bs_sft", "8", "--rows_sft",
           "4", "--sft_length", "64", *small]
    assert d1.main(pre) == 0
    rows = [json.loads(line) for line in (tmp_path / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in rows if "lr" in r]
    n = math.ceil(0.02 * 898_265 / (8 * 64))
    assert abs(len(rates) - n) <= 1 and rates[0] == 0.00075 and rates[-1] < 0.02 * max(rates)
    assert abs(rates[len(rates) // 2] / 0.0015 - (1 + math.cos(math.pi * (len(rates) // 2) / len(rates))) / 2) < 1e-6
    state = json.loads((tmp_path / "pretrain" / "d1_state.json").read_text())
    assert state["stages"] == ["pretrain"] and state["preset"] == "tiny"
    sft = ["--task", "sft_only", "--model", str(tmp_path / "pretrain"), "--sft_data", "talk",
           "--steps_sft", "4", "--bs_sft", "8", "--n_traces", "50", "--limit", "6", "--eval_lengths", "32",
           "--allow_edits", *small]
    assert d1.main(sft) == 0
    assert "talk" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "sft" / "eval.json").read_text())
    assert entry["task"] == "talk" and entry["row"] == "sft" and entry["allow_edits"] is True
    model, tokenizer = d1.load_model(str(tmp_path / "sft"), device="cpu")
    assert tokenizer.convert_tokens_to_ids(d1.DELETE) < model.get_input_embeddings().num_embeddings
    assert json.loads((tmp_path / "sft" / "d1_state.json").read_text())["stages"] == ["pretrain", "sft"]
