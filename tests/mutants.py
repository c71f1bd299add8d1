"""Put one mistake at a time into d1_full.py and see whether the tests notice.

    python tests/mutants.py                      all mutants, after the suite has passed on the file as it is
    python tests/mutants.py --only KL --jobs 1   those with "KL" in their name
    python tests/mutants.py --skip-baseline

Each mutant is a copy of the repository with one piece of text replaced, on which the whole suite runs until a test
fails, the likeliest files first. It is killed if one does or if the suite takes longer than 20 minutes, it survives if
none does, and is invalid if the tests cannot even be collected. The status is 0 if at least 95 % are killed.

No mutant is to have the meaning of the file as it is: one that lives is a test that is missing.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SECONDS, SHARE = 20 * 60, 0.95  # of a mutant at most; that must be killed at least
GROUPS: set[int] = set()  # of processes that run, to end with this one
# what follows the files that a mutant names: the quick ones first
ORDER = ("02", "03", "04", "06", "07", "08", "part", "parity", "14", "13", "18", "19", "12", "05", "09", "10", "11",
         "15", "16", "17", "21", "22", "20_checkpoints", "20_exports", "20_logs", "24", "20_backends")

# (name, beginnings of the files that should notice, a piece of d1_full.py that occurs once, what replaces it)
MUTANTS = [
    # ---- 2. forward process
    ("noise levels from 0", "02", "* (high - low) + low", "* high"),
    ("the prompt is masked too", "02", "masked = (u < t[:, None]) & ~is_prompt", "masked = u < t[:, None]"),
    ("one draw for all tokens of a row", "02 parity", "u = draw_uniform(x0.shape, generator, x0.device)",
     "u = draw_uniform((len(x0), 1), generator, x0.device)"),
    # ---- 3. logits
    ("the completion is padding", "06", "(0, missing), value=True)", "(0, missing), value=False)"),
    # ---- 4. masked SFT loss
    ("1/t dropped", "04", "torch.where(masked, (1 / t)[:, None], 0.0)", "masked.to(t.dtype)"),
    ("t for 1/t", "04", "torch.where(masked, (1 / t)[:, None], 0.0)", "torch.where(masked, t[:, None], 0.0)"),
    ("divided by the masked tokens", "04", "n_reply = (~is_prompt).sum().clamp(min=1)\n    return",
     "n_reply = (weight > 0).sum().clamp(min=1)\n    return"),
    ("divided by all tokens", "04", "n_reply = (~is_prompt).sum().clamp(min=1)\n    return",
     "n_reply = is_prompt.numel()\n    return"),
    ("accuracy counts visible tokens", "04", "(right & masked).sum() / n", "right.sum() / n"),
    # ---- 5. MaskedSFT
    ("the same noise in every step", "parity 05", 'self.make_loss(rows, trainer, "sft_mask", self.step,',
     'self.make_loss(rows, trainer, "sft_mask",'),
    ("padding is not trained", "05", "is_prompt[i, :prompt_len] = True",
     "is_prompt[i, :prompt_len] = is_prompt[i, len(ids) :] = True"),
    ("parts weigh by their rows", "05", "share = (~noised.is_prompt[part]).sum() / n_reply",
     "share = torch.tensor(len(noised.x0[part]) / len(noised.x0))"),
    ("the rate does not warm up", "05", "warm = min(1.0, (self.step + 1) / max(self.cfg.warmup_sft, 1))",
     "warm = 1.0"),
    ("the cosine ends at half", "05", "((1 + math.cos(math.pi * done)) / 2)",
     "((1 + math.cos(math.pi * done / 2)) / 2)"),
    # ---- 6. one-step estimator
    ("Dream's logits are not shifted", "03", "column = (column - 1).clamp(min=0)", "column = column.clamp(min=0)"),
    ("learned positions count padding", "03 17_models", "(attention_mask.cumsum(1) - 1).clamp(min=0))",
     "attention_mask.cumsum(1).clamp(max=0) + torch.arange(ids.shape[1]))"),
    ("guidance one too weak", "03 parity", "unconditional + (cfg_scale + 1) * (cond",
     "unconditional + cfg_scale * (cond"),
    ("guidance away from the prompt", "03 parity", "* (conditional - unconditional)",
     "* (unconditional - conditional)"),
    ("padding is hidden", "06", "(u < pmask) & attention_mask", "u < pmask"),
    ("the prompt mask is not applied", "06", "masked_prompt = torch.where(prompt_mask, mask_id, prompt)",
     "masked_prompt = prompt"),
    ("the padding of other rows", "06", "attention_mask = distinct[:, length:].bool()",
     "attention_mask = attention_mask[: len(distinct)]"),
    ("other padding makes no other row", "06", "rows = torch.cat([canvas, attention_mask.long()], dim=1)",
     "rows = torch.cat([canvas, torch.ones_like(canvas)], dim=1)"),
    ("a token of the row above", "06", "number.view_as(n_asked)[row_of]", "number.view_as(n_asked)[row_of - 1]"),
    # ---- 7. diffu-GRPO
    ("the mean of other groups", "07",
     'above.mean(1, keepdim=True)',
     'above.mean(0, keepdim=True)'),
    ("divided by the deviation", "07",
     '(above - above.mean(1, keepdim=True))',
     '((above - above.mean(1, keepdim=True)) / (above.std(1, keepdim=True) + 1e-4))'),
    ("EOS is dead", "07", "is_eos.cumsum(1) - is_eos == 0", "is_eos.cumsum(1) == 0"),
    ("live to the second EOS", "07", "is_eos.cumsum(1) - is_eos == 0", "is_eos.cumsum(1) <= 1"),
    ("max for min in the clip", "07", "torch.min(unclipped, clipped)", "torch.max(unclipped, clipped)"),
    ("clipped whatever the sign", "07", "torch.min(unclipped, clipped)", "clipped"),
    ("no lower bound of the ratio", "07", "rho.clamp(1 - eps, 1 + eps)", "rho.clamp(max=1 + eps)"),
    ("clip_frac counts what min undoes", "07", "clipped < unclipped", "clipped != unclipped"),
    ("ratio upside down", "07",
     'rho = ratio(logp, old)',
     'rho = ratio(old, logp)'),
    ("no detach", "07", "old = logp.detach() if", "old = logp if"),
    ("KL reversed", "07", "d = logp_ref - logp", "d = logp - logp_ref"),
    ("KL by k1", "07",
     'kl = ratio(logp_ref, logp) - d - 1',
     'kl = -d'),
    ("KL by k2", "07",
     'kl = ratio(logp_ref, logp) - d - 1',
     'kl = d.square() / 2'),
    ("the gain is minimised", "07", "token_loss = beta * kl - surrogate", "token_loss = beta * kl + surrogate"),
    ("divided by the full length", "07", "lengths = completion_mask.sum(1).clamp(min=1)",
     "lengths = completion_mask.shape[1]"),
    ("dead tokens in a sequence's loss", "07", "loss = ((token_loss * completion_mask).sum(1)",
     "loss = (token_loss.sum(1)"),
    ("KL logged over dead tokens", "07", '"kl": (kl * completion_mask).sum() / n_live', '"kl": kl.sum() / n_live'),
    ("ratio_max of dead tokens", "07", "torch.where(completion_mask, rho, 0.0).max()", "rho.max()"),
    # ---- 8. block decoder
    ("all rows draw alike", "08", "torch.randint(2**62, (rows,), generator=generator, device=generator.device)",
     "torch.randint(2**62, (1,), generator=generator, device=generator.device).repeat(rows)"),
    ("multiplied by the temperature", "08", "(logits / temperature -", "(logits * temperature -"),
    ("one token too many", "18_decoder", "device=score.device) < number[:, None]",
     "device=score.device) <= number[:, None]"),
    ("[MASK] can be drawn", "08", "allowed = logits.index_fill(-1, never, -math.inf)", "allowed = logits.clone()"),
    ("confidence without [MASK]'s share", "18_caches", "[:, 0] - logits.logsumexp(-1)",
     "[:, 0] - allowed.logsumexp(-1)"),
    ("the least sure first", "parity", "score = torch.where(masked, logp.exp(), -math.inf)",
     "score = torch.where(masked, -logp.exp(), -math.inf)"),
    ("log p against the threshold", "08", "score = torch.where(masked, logp.exp(), -math.inf)",
     "score = torch.where(masked, logp, -math.inf)"),
    ("an ancestral step too slow", "08", "1 - 1 / steps_left", "1 - 1 / (steps_left + 1)"),
    ("the remainder last", "08", "-(-counts // steps_left)", "(counts // steps_left).clamp(min=1)"),
    ("a step too few", "08", "max(self.steps_per_block - step, 1)", "max(self.steps_per_block - step - 1, 1)"),
    ("all blocks at once", "08", "masked = (x[:, block] == self.mask_id) & active[:, None]",
     "masked = (x[:, (block := slice(block.start, self.length))] == self.mask_id) & active[:, None]"),
    ("rows that are finished go on", "08", "active = active & ~self.ended(x, block)", "self.ended(x, block)"),
    ("EOS of the prompt ends a reply", "08", "(x[:, block] == self.eos_id).any(1)", "(x == self.eos_id).any(1)"),
    ("masks of the prompt become EOS", "08", "unwritten[:, : self.prompt_length] = False",
     "unwritten[:, :0] = False"),
    ("stop sees the last block alone", "22_chat", "x[:, self.prompt_length : block.stop]", "x[:, block]"),
    ("EOS overrides stop", "22_chat", "ended |= torch.tensor([bool(self.stop(row)) for",
     "ended &= torch.tensor([bool(self.stop(row)) for"),
    ("padding of the first rows", "18_caches", "self.attention_mask[open_rows, seen]",
     "self.attention_mask[: int(open_rows.sum()), seen]"),
    ("guidance in a window hides too much", "18_decoder", "prompt_length=max(0, self.prompt_length - seen.start)",
     "prompt_length=self.prompt_length"),
    # ---- 9. DiffuGRPO
    ("groups are not adjacent", "09", "return [i for i in chosen for _ in range(self.cfg.group)]",
     "return [i for _ in range(self.cfg.group) for i in chosen]"),
    ("every batch draws alike", "09", '"rollout", i) for i in self.row_numbers(micro)]',
     '"rollout", i - micro * cfg.bs_rl) for i in self.row_numbers(micro)]'),
    ("a group draws alike", "09", '"rollout", i) for i in self.row_numbers(micro)]',
     '"rollout", i // cfg.group) for i in self.row_numbers(micro)]'),
    ("padding is hidden for the prompt", "09", "masks[:, b, -length:]", "masks[:, b, :length]"),
    ("prompt masks of each reply's own", "09 19", '"hide", i // self.mask_group)', '"hide", i)'),
    ("one prompt mask for all inner updates", "09", "all_real = torch.ones(cfg.mu, length,",
     "all_real = torch.ones(1, length,"),
    ("EOS is not trained", "09", "completion_mask = live_tokens(completion, self.eos_id)",
     "completion_mask = completion != self.eos_id"),
    ("the mean of the batch", "09", "advantages = group_advantages(rewards, self.cfg.group)",
     "advantages = rewards - rewards.mean()"),
    ("old log p on the mask before", "09", "self.logps(self.model, rollout, rollout.prompt_masks[1:])",
     "self.logps(self.model, rollout, rollout.prompt_masks[:-1])"),
    ("the policy is its own reference", "09", "return old, self.logps(reference, rollout, rollout.prompt_masks)",
     "return old, self.logps(self.model, rollout, rollout.prompt_masks)"),
    ("always the first prompt mask", "09", "logp = self.logp(net, rollout, rollout.prompt_masks[n])",
     "logp = self.logp(net, rollout, rollout.prompt_masks[0])"),
    ("old and reference swapped", "09", "old, ref, mask = rollout.logp_old[n], rollout.logp_ref[n],",
     "ref, old, mask = rollout.logp_old[n], rollout.logp_ref[n],"),
    ("rewards for advantages", "09", "old, ref, rollout.advantages, mask", "old, ref, rollout.rewards, mask"),
    ("micro-batches add up", "09",
     'return [1 / len(self.rollouts)] * len(self.rollouts)',
     'return [1.0] * len(self.rollouts)'),
    ("rollouts are never drawn anew", "09 20_checkpoints", "if first == 0 or not self.rollouts:",
     "if not self.rollouts:"),
    ("dropout in the update", "09 18_caches", "without_dropout(trainer.net)", "trainer.net.train()"),
    ("entropy's sign", "09", "nll = -(logp", "nll = (logp"),
    ("deviation over groups", "09", "rollout.rewards.view(-1, self.cfg.group).std(1).mean()",
     "rollout.rewards.std()"),
    ("rows and prompt masks swapped", "09", "getattr(r, name).repeat(len(masks), 1)",
     "getattr(r, name).repeat_interleave(len(masks), 0)"),
    # ---- 10. the loop
    ("patience counts equal checks as better", "10", "self.stale = 0 if self.score > best else self.stale + 1",
     "self.stale = 0 if self.score >= best else self.stale + 1"),
    ("the last weights for the best", "10", "if self.score >= best:", "if True:"),
    ("an update that is not finite is made", "10",
     'norm = float(self.clip_gradient(params, clip or math.inf))\n        if math.isfinite(norm):',
     'norm = float(self.clip_gradient(params, clip or math.inf))\n        if True:'),
    ("a check at a signal", "20_checkpoints", "if due and not stopped:", "if due:"),
    # ---- 13 and 14. readers, rewards and grades
    ("the first answer", "14", 'text.rpartition("</answer>")[0]', 'text.partition("</answer>")[0]'),
    ("the first box", "13",
     'box_from(text, openers[-1].end() - 1)',
     'box_from(text, openers[0].end() - 1)'),
    ("commas anywhere", "13",
     "(?<![\\w.,])[1-9]\\d{0,2}([ ,'])\\d{3}(?:\\1\\d{3})*(?!\\d|[,']\\d)",
     "(?<![\\w.,])[1-9]\\d{0,4}([ ,'])\\d{2,4}(?:\\1\\d{3})*(?!\\d|[,']\\d)"),
    ("numbers left out", "13",
     'sorted(map(int, used)) == sorted(example["numbers"])',
     '{*map(int, used)} <= {*example["numbers"]}'),
    ("numbers used twice", "13",
     'sorted(map(int, used)) == sorted(example["numbers"])',
     '{*map(int, used)} == {*example["numbers"]}'),
    ("the target in floats", "13",
     'return set(values.values()) == {example["target"]}',
     'return all(abs(v - example["target"]) < 0.5 for v in values.values())'),
    ("a division by zero is a try", "13",
     '    return {} if None in values else',
     '    values = [v or 0 for v in values]\n    return {} if None in values else'),
    ("any answer is a try", "14", "{True: 1.0, False: 0.1, None: 0.0}[right]",
     "{True: 1.0, False: 0.1, None: 0.1}[right]"),
    ("12.5 is an integer", "14", "number is not None and number.denominator == 1", "number is not None"),
    ("work of several lines pays nothing", "14",
     'def has_form(completion, flags=re.DOTALL, end="\\n?$")',
     'def has_form(completion, flags=0, end="\\n?$")'),
    ("tags that come twice are paid", "parity", "if completion.count(tag) == 1", "if completion.count(tag) >= 1"),
    ("what follows the answer is paid", "parity", "0.125 - 0.001 * n for", "0.125 + 0.001 * n for"),
    ("the first number said", "13",
     'len(values) != 1 else values.pop()',
     'not values else min(values)'),
    ("a box outside the answer is paid", "14", "0.5 if box in inside", "0.5 if box in completion"),
    ("the last box, not that of the answer", "13",
     'boxed = last_boxed(completion if block is None else block)',
     'boxed = last_boxed(completion)'),
    ("countdown: the right side", "13",
     'return set(values.values()) == {example["target"]}',
     'return [*values.values()][-1] == example["target"]'),
    ("countdown: order makes another problem", "14 16",
     "{sorted(example['numbers'])}/{example['target']}",
     "{example['numbers']}/{example['target']}"),
    ("another split in every process", "14", "hashlib.sha256(key.encode()).digest()[0] / 256",
     "hash(key) % 256 / 256"),
    ("sudoku: given cells count", "14 parity",
     'for given, solution, cell in cells if given == "0"]',
     'for given, solution, cell in cells]'),
    ("sudoku: given cells may change", "13",
     'not all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))',
     'False'),
    ("sudoku: the first answer is paid", "13",
     'text.rpartition("</answer>")[0].rpartition("<answer>")',
     'text.partition("</answer>")[0].rpartition("<answer>")'),
    ("a reward of 1 is wrong", "16_custom", "Grade(value >= 1, value", "Grade(value > 1, value"),
    # ---- 17 and 18. decoder extras
    ("long prompts lose their end", "24_runs", "[ids[-limit:] for", "[ids[:limit] for"),
    ("a cache without Dream's shift", "18_caches",
     'block.start - bool(getattr(self.model.config, "shift_logits", False))', "block.start"),
    ("the wrong keys are kept", "18_caches", "slice(len(self.kept))", "slice(len(self.fresh), None)"),
    ("a cache without positions", "18_caches", "position_ids=places[None]",
     "position_ids=torch.arange(len(places))[None]"),
    ("a cache of the first rows", "18_caches", "torch.isin(self.rows, rows).nonzero()[:, 0]",
     "torch.arange(len(rows))"),
    ("refreshed a step late", "18_caches", "% (self.refresh or self.length)",
     "% (self.refresh + 1 if self.refresh else self.length)"),
    ("a cache's error with the wrong sign", "18_caches", "(ce + frame.logp[frame.new]).abs()",
     "(ce - frame.logp[frame.new]).abs()"),
    ("edits do not shrink", "18_decoder", "self.edit_rate * max(0, 1 - step / self.steps_per_block)",
     "self.edit_rate"),
    ("edits of masks", "18_decoder", "replaced = largest(gain, most) & (gain > 0)", "replaced = largest(gain, most)"),
    ("marks stay where tokens are deleted", "18_decoder", "other.gather(1, order).masked_fill(end, 0) for",
     "other for"),
    ("a mask is filled with the delete token", "18_decoder", "self.never.append(self.delete_id)", "self.never"),
    ("surplus tokens in the prompt", "18_decoder", "preceded, replaced = (u < rate / 2) & ~is_prompt,",
     "preceded, replaced = u < rate / 2,"),
    ("surplus tokens are masked", "18_decoder", "forward_process(shown, t, is_prompt | surplus,",
     "forward_process(shown, t, is_prompt,"),
    ("visible tokens weigh 1/t", "18_decoder",
     "torch.where(masked, (1 / t)[:, None], 1.0).masked_fill(is_prompt, 0.0)",
     "(1 / t)[:, None].expand(masked.shape).masked_fill(is_prompt, 0.0)"),
    ("edits are not asked for", "18_decoder",
     "torch.where(masked, (1 / t)[:, None], 1.0).masked_fill(is_prompt, 0.0)",
     "torch.where(masked, (1 / t)[:, None], 0.0)"),
    # ---- 19. the official rules
    ("official: work of several lines pays", "parity 19", r'has_form(completion, flags=0, end="\n$")',
     r'has_form(completion, end="\n$")'),
    ("official: 2.5 is 2 and 5", "19",
     'CHARACTERS + ".\\n\\r\\t\\f"',
     'CHARACTERS + "\\n\\r\\t\\f"'),
    ("official: first number of the answer", "14", 'numbers("".join(answers(completion)[:1]))[-1:]',
     'numbers("".join(answers(completion)[:1]))[:1]'),
    ("official: the bonus for a box is paid", "parity", r'box="\boxed")', r'box="\\boxed")'),
    ("official countdown: the last answer", "14", "*answers(completion)[:1], completion",
     "*answers(completion)[-1:], completion"),
    ("official countdown: the first answer is paid", "parity", 'official_reaches("".join(found[-1:])',
     'official_reaches("".join(found[:1])'),
    ("official sudoku: a given cell may not change", "19 14", "return Grade(score == 1, score, found)",
     'return Grade((found or "").split() == [example["solution"]], score, found)'),
]


def tests(first: str, *options: str) -> list[str]:
    """The command that runs the whole suite, files whose names begin as `first` says before the others."""
    names = sorted(p.name for p in (ROOT / "tests").glob("test_*.py"))
    files = dict.fromkeys(f"tests/{name}" for start in (*first.split(), *ORDER, "") for name in names
                          if name.startswith(f"test_{start}") and name != "test_docs.py")  # which looks at the form
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *files]


def run(command: list[str], repository: Path, source: str) -> tuple[int | None, str]:
    """Status, None if it took too long, and output of a command in a copy of the repository with this d1_full.py."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shutil.copytree(repository, f"{folder}/copy")
        Path(folder, "copy", "d1_full.py").write_text(source)
        # a group of its own, so that what the tests start ends with them, and files that go with the folder
        process = subprocess.Popen([*command, f"--basetemp={folder}/tmp"], cwd=f"{folder}/copy", text=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
        GROUPS.add(process.pid)
        try:
            said = process.communicate(timeout=SECONDS)[0]
            return process.returncode, said.strip() or "no output"
        except subprocess.TimeoutExpired:
            return None, "time out"
        finally:
            end(process.pid)

def end(group: int) -> None:
    GROUPS.discard(group)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)

def judge(mutant: tuple[str, str, str, str], repository: Path, source: str) -> tuple[str, str, float]:
    """("killed", "survived" or "invalid"; by what; seconds)"""
    _, files, old, new = mutant
    began = time.monotonic()
    status, said = run(tests(files, "-x", "-n", "0"), repository, source.replace(old, new))
    verdict = {0: "survived", 1: "killed", None: "killed"}.get(status, "invalid")  # else the tests were not collected
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    why = failed[1] if failed else f"{said.splitlines()[-1]} (status {status})"
    return verdict, why, time.monotonic() - began

def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME_PART")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--skip-baseline", action="store_true")
    args = parser.parse_args()
    source, console, began = (ROOT / "d1_full.py").read_text(), Console(highlight=False), time.monotonic()
    for name, _, old, _ in MUTANTS:
        if source.count(old) != 1:
            sys.exit(f"mutant {name!r}: its text occurs {source.count(old)} times in d1_full.py, not once: {old}")
    chosen, found = [m for m in MUTANTS if args.only in m[0]], {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        repository = Path(folder) / "copy"  # as it is now, whoever edits it meanwhile
        left_out = (ROOT / ".gitignore").read_text().replace("/", "").split()
        shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".git", *left_out))
        if not args.skip_baseline:
            status, said = run(tests("", "-n", str(args.jobs), "--dist", "loadfile"), repository, source)
            if status != 0:
                sys.exit(f"{said[-5000:]}\nthe suite does not pass on d1_full.py as it is")
            console.print(f"on d1_full.py as it is: {said.splitlines()[-1]}")
        pool = ThreadPoolExecutor(args.jobs)
        task = progress.add_task("mutants", total=len(chosen))
        futures = {pool.submit(judge, m, repository, source): m[0] for m in chosen}
        try:
            for done in as_completed(futures):
                name = futures[done]
                found[name] = verdict, why, seconds = done.result()
                word = verdict if verdict == "killed" else verdict.upper()
                console.print(f"{word:8}  {name}: {why}, {seconds:.0f} s", markup=False, soft_wrap=True)
                progress.advance(task)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for group in list(GROUPS):
                end(group)
            return 130
    left = [m for m in chosen if found[m[0]][0] != "killed"]
    killed, share = len(chosen) - len(left), 1 - len(left) / max(len(chosen), 1)
    table = Table(title=f"{killed} of {len(chosen)} mutants killed, {100 * share:.1f} %, "
                        f"{(time.monotonic() - began) / 60:.1f} min")
    for column in "mutant", "verdict", "old", "new":
        table.add_column(column, overflow="fold")
    for name, _, old, new in left:
        table.add_row(*map(escape, (name, found[name][0], old, new)))
    console.print(table)
    return int(share < SHARE)

if __name__ == "__main__":
    sys.exit(main())
