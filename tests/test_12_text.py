"""Text and ids: round trip, the border of prompt and reply, the end of a reply."""

import random

import torch
from conftest import GOOD

import d1_full as d1


def test_tokenizer_round_trip_and_short_prompts(tiny):
    tok = tiny[1]
    for text in ("Any text: é, 中, \t\n<answer>\n7\n</answer>", GOOD.format(7), d1.SYSTEM):
        assert tok.decode(tok(text)["input_ids"]) == text
    for task in d1.TASKS.values():
        example = task.examples("test", 1)[0]
        assert len(d1.encode_prompt(tok, task.messages(example))) <= 24  # an instruction is one token


def test_encode_example_has_an_exact_border_of_prompt_and_reply(tiny):
    tok = tiny[1]
    task = d1.TASKS["count"]
    example = task.examples("test", 1)[0]
    reply = task.demonstrate(example, random.Random(0), True)
    ids, n = d1.encode_example(tok, task.messages(example), reply)
    assert ids[:n] == d1.encode_prompt(tok, task.messages(example))
    assert ids[-1] == tok.eos_token_id and tok.decode(ids[n:-1]) == reply


def test_reply_texts_end_at_their_first_eos(tiny):
    tok = tiny[1]
    rows = [tok("ab")["input_ids"] + [tok.eos_token_id] + tok("c")["input_ids"], tok("abcd")["input_ids"]]
    assert d1.reply_texts(tok, torch.tensor(rows)) == ["ab", "abcd"]
