"""Edits and windows."""

import copy

import pytest
import torch
from conftest import MASK, Scripted, ToyModel, loss_of, rng, stop_at, trainer_of

import d1_full as d1

DEL = 9


def decode(model, prompt, **options):
    options = dict(mask_id=MASK, gen_length=8, block_length=4, steps=8, delete_id=DEL, eos_id=7) | options
    return list(d1.diffuse_steps(model, torch.tensor(prompt), decoder=d1.FullDecoder, **options))


TARGET = torch.tensor([1, 2, 3, 4, 5, 6, 5, 4, 3, 2])


def test_corrupt_is_undone_by_its_target():
    x0, is_prompt = torch.randint(1, 9, (400, 30), generator=rng(1)), torch.zeros(400, 30, dtype=torch.bool)
    is_prompt[:, :6] = True
    before = x0.clone()
    shown, target, surplus = d1.corrupt(x0, is_prompt, 0.2, DEL, rng())
    assert torch.equal(x0, before) and torch.equal(shown[:, :6], x0[:, :6]) and not surplus[:, :6].any()
    assert torch.equal(surplus, target == DEL) and not (shown == DEL).any()
    for clean, made, gone in zip(x0.tolist(), target.tolist(), surplus.tolist(), strict=True):
        kept = [t for t, g in zip(made, gone, strict=True) if not g]
        assert kept == clean[: len(kept)]  # less what fell off the end
    n = 400 * 24
    assert abs(surplus.sum() / n - 0.1) < 0.01  # half of the rate are surplus ...
    wrong = ((shown != target) & ~surplus).sum() / (n - surplus.sum())
    assert abs(wrong - 0.1 * 7 / 8) < 0.012  # ... half replaced, one in eight by the same
    same = d1.corrupt(x0, is_prompt, 0.0, DEL, rng())
    assert torch.equal(same[0], x0) and torch.equal(same[1], x0) and not same[2].any()


def test_edit_sft_learns_edits_from_a_share_of_the_steps_on(tiny, quick, monkeypatch):
    cfg = quick("sudoku", edit_rate=0.2, edit_start=0.5, steps_sft=8, bs_sft=6, sft_length=40, sft_extra=0)
    model, tokenizer = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])
    d1.add_delete_token(model, tokenizer)
    delete, size = tokenizer.convert_tokens_to_ids(d1.DELETE), len(tokenizer)
    assert delete == len(tiny[1]) and model.get_output_embeddings().weight.shape[0] == size
    rows = d1.sft_rows(cfg, tokenizer, [d1.TASKS["sudoku"]], d1.Screen())
    stage = d1.sft_stage(model, tokenizer, rows, cfg)
    shares = []
    for stage.step in range(8):
        shares.append(round(stage.edit_rate_now(), 6))
    assert shares == [0, 0, 0, 0, 0, 0.05, 0.1, 0.15]
    asked, losses = [], d1.token_losses

    def look(model, xt, where, target):
        asked.append(target)
        return losses(model, xt, where, target)

    monkeypatch.setattr(d1, "token_losses", look)
    trainer = d1.Trainer(stage)
    monkeypatch.setattr(stage, "edit_rate_now", lambda: 0.9)
    loss, _ = loss_of(trainer, rows[:6], "a", "key")
    g = d1.keyed_generator(cfg.seed, "a", "key")  # the same draws once more
    d1.draw_uniform((2,), g, "cpu")
    x0, is_prompt = stage.collate(rows[:6], 40)
    t = d1.sample_t(6, g)
    shown, target, surplus = d1.corrupt(x0, is_prompt, 0.9, delete, g)
    xt, masked = d1.forward_process(shown, t, is_prompt | surplus, tokenizer.mask_token_id, g)
    reply = ~is_prompt
    assert torch.equal(asked[0], target[reply]) and (asked[0] == delete).sum() > 5 and not masked[surplus].any()
    logp = model(xt).logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    weight = torch.where(masked, (1 / t)[:, None], 1.0)
    assert torch.allclose(loss, -(logp * weight)[reply].sum() / reply.sum(), rtol=1e-5)
    loss_of(trainer, rows[:6], "a", "key", training=False)  # the held-out check is without edits
    assert len(asked[1]) < len(asked[0]) and not (asked[1] == delete).any()


def test_editing_decoder_replaces_wrong_tokens_of_a_draft_and_the_prompt_never():
    model = Scripted(lambda ids: TARGET.expand_as(ids))
    draft = TARGET[2:].clone()
    draft[[1, 5]] = 8
    frames = decode(model, [[8, 8]], draft=draft[None], edit_rate=0.2)
    assert frames[-1].ids[0].tolist() == [8, 8, *TARGET[2:].tolist()]
    assert sum(f.edited.sum().item() for f in frames) == 2 and not any(f.edited[:, :2].any() for f in frames)
    with pytest.raises(ValueError, match="draft"):
        decode(model, [[8, 8]], draft=draft[None])  # without edits there is nothing to do
    assert draft.tolist().count(8) == 2  # and the one that was given stays


def test_editing_decoder_edits_a_share_that_shrinks():
    model = Scripted(lambda ids: TARGET[:1].expand_as(ids))  # wants 1 everywhere
    frames = decode(model, [[8]], draft=torch.full((1, 8), 6), block_length=8, steps=4, edit_rate=0.5)
    assert [f.edited.sum().item() for f in frames] == [4, 3, 1, 0]  # of 8: at most 4, 3, 2, 1


def test_editing_decoder_deletes_a_surplus_token_and_what_follows_moves_up():
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


def test_editing_decoder_moves_marks_up_with_their_tokens():
    def says(ids):
        return torch.where(ids == 8, DEL, 3)
    first = decode(Scripted(says), [[1]], draft=torch.tensor([[8, 3]]), edit_rate=0.5, steps=2)[0]
    assert first.ids[0, :5].tolist() == [1, 3, 3, 3, MASK]
    assert first.new[0].tolist() == [False] * 2 + [True] * 2 + [False] * 5
    assert ((first.logp != 0) == first.new).all()


def test_editing_decoder_looks_at_a_block_again_after_a_token_was_only_deleted():
    def says(ids):  # two surplus 8s, of which only one is noticed at a time
        out = ids.where(ids != MASK, torch.tensor(3))
        out[0, (ids[0] == 8).nonzero()[:1]] = DEL
        return out
    frames = decode(Scripted(says), [[1]], draft=torch.tensor([[8, 3, 8, 3, 3, 3, 3, 3]]), edit_rate=0.1)
    assert frames[-1].ids[0].tolist() == [1] + [3] * 8


def test_editing_decoder_touches_committed_tokens_alone_and_leaves_the_pace_of_the_others():
    model, before = ToyModel(10, 8, seed=3), torch.tensor([[3, 4] + [MASK] * 8])
    edited = 0
    for frame in d1.diffuse_steps(model, before[:, :2], mask_id=MASK, gen_length=8, block_length=8, steps=4,
                                  decoder=d1.EditingDecoder, edit_rate=0.9):
        assert torch.equal(frame.new, (before == MASK) & (frame.ids != MASK)) and frame.new.sum() == 2
        assert torch.equal(frame.edited, (before != MASK) & (frame.ids != before))
        before, edited = frame.ids, edited + frame.edited.sum()
    assert edited > 0


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_editing_decoder_never_fills_a_mask_with_the_delete_token(rate):
    says_delete = Scripted(lambda ids: torch.full_like(ids, DEL))
    assert not any((f.ids == DEL).any() for f in decode(says_delete, [[1, 2]], edit_rate=rate))


def test_editing_decoder_edits_rows_alone_or_in_company_alike():
    model = ToyModel(10, 8, seed=2)
    prompts = torch.tensor([[3, 4], [5, 6], [2, 2]])
    drafts = torch.randint(1, 7, (3, 8), generator=rng(4))
    options = dict(mask_id=MASK, gen_length=8, block_length=4, steps=6, decoder=d1.EditingDecoder, edit_rate=0.3,
                   delete_id=7)
    together = d1.diffuse_decode(model, prompts, draft=drafts, **options)
    alone = [d1.diffuse_decode(model, p[None], draft=x[None], **options) for p, x in zip(prompts, drafts, strict=True)]
    assert torch.equal(together, torch.cat(alone)) and not (together == MASK).any()
    assert not (together == 7).any() and not torch.equal(together[:, 2:], drafts)


def test_pretraining_with_edits_that_stopped_and_resumed_is_the_unbroken_one(tiny, quick, tmp_path, screen):
    def make(folder):
        model, tokenizer = copy.deepcopy(tiny)
        d1.add_delete_token(model, tokenizer)
        cfg = quick("pretrain", steps_sft=6, sft_length=24, edit_rate=0.3, edit_start=0.2)
        rows = d1.pretraining_rows(cfg, tokenizer, d1.Screen())
        return trainer_of(d1.sft_stage(model, tokenizer, rows, cfg), tokenizer, cfg, tmp_path / folder)

    whole, part = make("whole"), make("part")
    d1.train(whole, screen)
    stop_at(part, 3)
    with pytest.raises(d1.Stopped, match="SIGTERM after pretrain step 3"):
        d1.train(part, screen)
    last = make("part")
    assert d1.load_trainer(last, screen) and last.stage.step == 3
    d1.train(last, screen)
    assert all(torch.equal(a, b) for a, b in zip(whole.params, last.params, strict=True))


def test_windowed_decoder_slides_and_the_model_never_sees_more():
    model = Scripted(lambda ids: ids.clamp(min=1))
    prompt = torch.randint(1, 7, (2, 5), generator=rng())
    frames = list(d1.diffuse_steps(model, prompt, mask_id=MASK, gen_length=64, block_length=4, context=12,
                                   decoder=d1.WindowedDecoder))
    final = frames[-1].ids
    assert final.shape == (2, 69) and not (final == MASK).any() and torch.equal(final[:, :5], prompt)
    assert {ids.shape[1] for ids in model.seen} == {12}
    for frame, seen in zip(frames, model.seen, strict=True):
        end = min(69, max(12, 5 + 4 * (frame.block + 1) + 4))  # one block ahead of the one in work
        before = torch.where(frame.new, MASK, frame.ids)
        assert torch.equal(seen, before[:, end - 12 : end])


def test_windowed_decoder_with_a_context_that_holds_all_changes_nothing():
    model, prompt = ToyModel(11, 8), torch.tensor([[3, 4, 5]])
    options = dict(mask_id=MASK, gen_length=8, block_length=4, temperature=0.8)
    windowed = dict(decoder=d1.WindowedDecoder, context=11)
    assert torch.equal(d1.diffuse_decode(model, prompt, generator=rng(), **windowed, **options),
                       d1.diffuse_decode(model, prompt, generator=rng(), **options))


@pytest.mark.parametrize(("wrong", "word"), [
    (dict(context=6), "context"), (dict(context=9, cache="prefix"), "context"), (dict(stop=len, eos_id=None), "eos_id"),
    (dict(remasking="ancestral"), "generator"), (dict(remasking="random", threshold=0.9), "threshold")])
def test_full_decoder_refuses_what_cannot_run(wrong, word):
    with pytest.raises(ValueError, match=word):
        decode(ToyModel(10, 10), [[1, 2]], **wrong)


def test_windowed_decoder_hides_the_prompts_part_under_guidance(tiny):
    model, mask, seen = copy.deepcopy(tiny[0]), tiny[1].mask_token_id, []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    options = dict(mask_id=mask, gen_length=24, block_length=4, steps=6, cfg_scale=1.0)
    d1.diffuse_decode(model, torch.arange(6)[None], decoder=d1.WindowedDecoder, context=12, **options)
    firsts = [2, 6, 10, 14, 18, 18]  # of the window in each block, which ends one block ahead of it, or at the end
    for (shown, without), first in zip(seen, firsts, strict=True):
        hidden = max(6 - first, 0)
        assert len(shown) == 12 and shown[:hidden].tolist() == list(range(6))[first:]
        assert (without[:hidden] == mask).all() and torch.equal(without[hidden:], shown[hidden:])
