"""How well a checkpoint chats: python tests/talk.py ckpt/sft [--long ckpt/pretrain]

On held-out prompts of the generated chat: right replies, and how far their length is off, at once and block by block,
with and without edits; then how many right replies it restores of which a tenth of the tokens was spoilt by hand.
--long: seconds and memory of text of 256 to 2048 tokens from a model that sees 256, and from one that sees all of it.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench

import d1_full as d1

LENGTH = 32


def replies(model, tokenizer, prompts, **options):
    """Reply ids (B, C) to the prompts, greedily."""
    ids, real = d1.pad_left(prompts, tokenizer.pad_token_id)
    cfg = d1.Settings(block_length=options.pop("block_length", LENGTH), allow_edits=options.pop("allow_edits", False))
    out = d1.diffuse_decode(model, ids, attention_mask=real, gen_length=LENGTH, **d1.decoding(tokenizer, cfg) | options)
    return out[:, ids.shape[1] :]


def spoil(ids, others, rng, how):
    """A reply with a tenth of its tokens, at least one, replaced, or preceded by one that does not belong there."""
    ids = list(ids)
    for k in sorted(rng.sample(range(len(ids)), max(1, round(len(ids) / 10))), reverse=True):
        wrong = rng.choice([o for o in others if o != ids[k]])
        ids[k : k + (how == "replaced")] = [wrong]
    return ids


def long_text(checkpoint):
    """Block by block, 8 tokens a step, through a window of 256 tokens and with the whole canvas in sight."""
    model, tokenizer = d1.load_model(checkpoint, device="cpu")
    model.eval()
    prompt = torch.tensor([tokenizer.encode("The dog barks.", add_special_tokens=False)])
    for context in (256, None):
        for n in (256, 512, 1024, 2048):
            def run(n=n, context=context):
                return d1.diffuse_decode(model, prompt, mask_id=tokenizer.mask_token_id, gen_length=n,
                                         block_length=32, steps=n // 8, decoder=d1.WindowedDecoder,
                                         context=context)
            began = time.perf_counter()
            out, mib = bench.peak(run, torch.device("cpu"))
            seconds = time.perf_counter() - began
            print(f"sees {context or 'all':>4}  {n:5} tokens  {seconds:6.2f} s  {1e3 * seconds / n:5.1f} ms a token  "
                  f"{mib:6.1f} MiB  ends {tokenizer.decode(out[0, -20:])!r}")


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--long", metavar="CHECKPOINT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.long:
        long_text(args.long)
    model, tokenizer = d1.load_model(args.checkpoint, device="cpu")
    model.eval()
    task, eos = d1.Talk(), tokenizer.eos_token_id
    examples = task.examples("test", args.n)
    prompts = [d1.encode_prompt(tokenizer, task.messages(e)) for e in examples]
    gold = [tokenizer.encode(e["answer"], add_special_tokens=False) for e in examples]
    print(f"{len(examples)} held-out prompts, {len(set(map(task.key, examples)))} different")
    for name, options in (("at once", {}), ("blocks of 8", dict(block_length=8))):
        for edits in (False, True):
            made = replies(model, tokenizer, prompts, allow_edits=edits, **options)
            texts = d1.reply_texts(tokenizer, made)
            right = sum(task.grade(t, e).correct for t, e in zip(texts, examples, strict=True))
            lengths = (d1.live_tokens(made, eos).sum(1) - (made == eos).any(1).long()).tolist()
            off = [abs(n - len(g)) for n, g in zip(lengths, gold, strict=True)]
            print(f"{name:12} edits {'on ' if edits else 'off'}  right {100 * right / len(texts):5.1f} %   "
                  f"length off by {sum(off) / len(off):.2f} tokens, at most {max(off)}")
    words, rng = sorted({i for g in gold for i in g}), random.Random(0)
    for how in ("replaced", "surplus"):
        spoilt = [spoil(g, words, rng, how) for g in gold]
        draft = torch.tensor([(s + [eos] * LENGTH)[:LENGTH] for s in spoilt])
        for name, options in (("at once", {}), ("blocks of 8", dict(block_length=8))):
            made = replies(model, tokenizer, prompts, draft=draft, allow_edits=True, **options)
            texts = d1.reply_texts(tokenizer, made)
            whole = sum(t == e["answer"] for t, e in zip(texts, examples, strict=True))
            print(f"{name:12} a tenth {how:8}  restored {100 * whole / len(texts):5.1f} %")


if __name__ == "__main__":
    main()
