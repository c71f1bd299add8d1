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
# these look at the clock, so on a busy machine they would kill any mutant
LEFT_OUT = ("tests/test_cli.py::test_import_is_silent_quick_and_needs_no_network",
            "tests/test_faults.py::test_a_hub_that_is_out_of_reach_or_says_nothing_is_one_line_in_seconds")
# what follows the files that a mutant names: the quick ones first
ORDER = ("math", "decoder", "tasks", "grading", "parity", "family", "fast", "stages", "faults", "benchmarks", "chat",
         "docs", "cli", "sweep", "models")

# (name, files of the tests that should notice, a piece of d1_full.py that occurs once, what takes its place)
MUTANTS = [
    # ---- 3. forward process
    ("noise levels from 0", "math", "* (high - low) + low", "* high"),
    ("the prompt is masked too", "math", "masked = (u < t[:, None]) & ~keep", "masked = u < t[:, None]"),
    ("one draw for all tokens of a row", "math parity", "u = draw_uniform(x0.shape, generator, x0.device)",
     "u = draw_uniform((len(x0), 1), generator, x0.device)"),
    ("surplus tokens in the prompt", "family", "((u < rate / 2) & ~keep).cumsum(1)", "(u < rate / 2).cumsum(1)"),
    # ---- 4. masked SFT loss
    ("1/t dropped", "math", "torch.where(masked, (1 / t)[:, None], 1.0)", "torch.ones_like(masked, dtype=t.dtype)"),
    ("t for 1/t", "math", "torch.where(masked, (1 / t)[:, None], 1.0)", "torch.where(masked, t[:, None], 1.0)"),
    ("visible tokens weigh 1/t", "family", "torch.where(masked, (1 / t)[:, None], 1.0)[asked]",
     "(1 / t)[:, None].expand(masked.shape)[asked]"),
    ("divided by the masked tokens", "math", "/ (~keep).sum().clamp(min=1), metrics",
     "/ masked.sum().clamp(min=1), metrics"),
    ("divided by all tokens", "math", "/ (~keep).sum().clamp(min=1), metrics", "/ keep.numel(), metrics"),
    ("accuracy counts visible tokens", "family", "(hit & hidden).sum() / n}", "hit.sum() / n}"),
    # ---- 5. one-step estimator
    ("the completion is padding", "decoder", "attention_mask.shape[1]), value=True)",
     "attention_mask.shape[1]), value=False)"),
    ("Dream's logits are not shifted", "fast", "column = (column - 1).clamp(min=0)", "column = column.clamp(min=0)"),
    ("learned positions count padding", "fast family", "(attention_mask.cumsum(1) - 1).clamp(min=0))",
     "attention_mask.cumsum(1).clamp(max=0) + torch.arange(ids.shape[1]))"),
    ("guidance one too weak", "math parity", "uncond + (cfg_scale + 1) * (cond", "uncond + cfg_scale * (cond"),
    ("guidance away from the prompt", "math parity", "* (cond - uncond)", "* (uncond - cond)"),
    ("padding is hidden", "math", "< pmask) & real", "< pmask)"),
    ("hide is not applied", "math", "torch.cat([torch.where(hide, mask_id, prompt), attend]",
     "torch.cat([prompt, attend]"),
    ("the padding of other rows", "fast", "else distinct[:, plen:].bool()", "else attend[: len(distinct)].bool()"),
    ("rows and prompt masks swapped", "fast", "v.repeat(n, 1)", "v.repeat_interleave(n, 0)"),
    # ---- 6. diffu-GRPO
    ("the mean of other groups", "math", "(r - r.mean(1, keepdim=True))", "(r - r.mean(0, keepdim=True))"),
    ("divided by the deviation", "math", "(r - r.mean(1, keepdim=True))",
     "((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4))"),
    ("EOS is dead", "math", "(ended - (completion == eos_id).long()) == 0", "ended == 0"),
    ("live to the second EOS", "math", "(ended - (completion == eos_id).long()) == 0", "ended <= 1"),
    ("max for min in the clip", "math", "torch.min(gain, bound)", "torch.max(gain, bound)"),
    ("clipped whatever the sign", "math", "torch.min(gain, bound)", "bound"),
    ("no lower bound of the ratio", "math", "rho.clamp(1 - eps, 1 + eps)", "rho.clamp(max=1 + eps)"),
    ("clip_frac counts what min undoes", "math", "bound < gain", "bound != gain"),
    ("ratio upside down", "math", "rho = (logp - old).exp()", "rho = (old - logp).exp()"),
    ("no detach", "math", "old = logp.detach() if", "old = logp if"),
    ("KL reversed", "math", "d = logp_ref - logp", "d = logp - logp_ref"),
    ("KL by k1", "math", "kl = d.exp() - d - 1", "kl = -d"),
    ("KL by k2", "math", "kl = d.exp() - d - 1", "kl = d.square() / 2"),
    ("the gain is minimised", "math", "loss = beta * kl - gain", "loss = beta * kl + gain"),
    ("divided by the full length", "math", "/ live.sum(1).clamp(min=1)).mean()", "/ live.shape[1]).mean()"),
    ("dead tokens in a sequence's loss", "math", "loss = ((loss * live).sum(1)", "loss = (loss.sum(1)"),
    ("KL logged over dead tokens", "math", '"kl": (kl * live).sum() / n_live', '"kl": kl.sum() / n_live'),
    ("ratio_max of dead tokens", "math", "torch.where(live, rho, 0.0).max()", "rho.max()"),
    # ---- 7. block decoder
    ("all rows draw alike", "decoder", "(rows,), generator=generator, device=generator.device).tolist()",
     "(1,), generator=generator, device=generator.device).tolist() * rows"),
    ("multiplied by the temperature", "decoder", "(logits / temperature -", "(logits * temperature -"),
    ("a cache without Dream's shift", "fast", 'reads = lo - bool(getattr(model.config, "shift_logits", False))',
     "reads = lo"),
    ("the wrong keys are kept", "fast", "slice(len(self.kept))", "slice(len(self.fresh), None)"),
    ("a cache without positions", "fast", "position_ids=fresh[None]", "position_ids=torch.arange(len(fresh))[None]"),
    ("a cache of the first rows", "fast", "torch.isin(self.rows, rows).nonzero()[:, 0]", "torch.arange(len(rows))"),
    ("refreshed a step late", "fast", "% (self.refresh or len(ids[0]))",
     "% (self.refresh + 1 if self.refresh else len(ids[0]))"),
    ("one token too many", "family", "device=score.device) < number[:, None]",
     "device=score.device) <= number[:, None]"),
    ("edits of masks", "family", ".ceil()) & (gain > 0)", ".ceil())"),
    ("marks stay where tokens are deleted", "family", "v.gather(1, order).masked_fill(end, 0) for", "v for"),
    ("[MASK] can be drawn", "decoder", "logits.index_fill(-1, torch.tensor([mask_id], device=x.device), -math.inf)",
     "logits.clone()"),
    ("a mask is filled with the delete token", "family", "allowed[:, delete_id] = -math.inf", "allowed[:, delete_id]"),
    ("confidence without [MASK]'s share", "fast", "[:, 0] - logits.logsumexp(-1)", "[:, 0] - allowed.logsumexp(-1)"),
    ("the least sure first", "parity", "score[open_] = chosen.exp()", "score[open_] = -chosen.exp()"),
    ("log p against the threshold", "decoder", "score[open_] = chosen.exp()", "score[open_] = chosen"),
    ("an ancestral step too slow", "family", "1 - 1 / steps_left", "1 - 1 / (steps_left + 1)"),
    ("the remainder last", "decoder", "-(-counts // steps_left)", "(counts // steps_left).clamp(min=1)"),
    ("a step too few", "decoder", "max(steps_per_block - step, 1)", "max(steps_per_block - step - 1, 1)"),
    ("blocks reach to the end", "decoder", "plen + (b + 1) * block_length, 0", "total, 0"),
    ("EOS of the prompt ends a reply", "decoder", "(x[active, lo:hi] == eos_id).any(1)",
     "(x[active] == eos_id).any(1)"),
    ("masks of the prompt become EOS", "fast", "rest[:, :plen] = False", "rest[:, :0] = False"),
    ("stop sees the last block alone", "chat", "stop(row[plen:hi])", "stop(row[lo:hi])"),
    ("EOS overrides stop", "chat", "ended |= (x", "ended = (x"),
    ("edits do not shrink", "family", "edit_rate=edit_rate * max(0, 1 - step / steps_per_block)",
     "edit_rate=edit_rate"),
    ("streams of the first rows", "decoder", "[generators[i] for i in rows.tolist()]", "generators[: len(rows)]"),
    ("padding of the first rows", "fast", "attend[rows, first:end]", "attend[: len(rows), first:end]"),
    ("guidance in a window hides too much", "fast", "torch.arange(first, end, device=x.device) < plen",
     "torch.arange(end - first, device=x.device) < plen"),
    ("a cache's error with the wrong sign", "fast", "+ frame.logp[frame.new]).abs()", "- frame.logp[frame.new]).abs()"),
    # ---- 10. rewards and grading
    ("the first answer", "tasks", 'text.rpartition("</answer>")[0]', 'text.partition("</answer>")[0]'),
    ("the first box", "tasks", r'box_from(text, text.rfind("\\boxed{"))', r'box_from(text, text.find("\\boxed{"))'),
    ("commas anywhere", "tasks", r"(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?", r"[\d,]*(\.\d+)?"),
    ("2.5 passes for 2 and 5", "tasks", 'point = "." * (number is float)', 'point = "."'),
    ("numbers left out", "tasks", "sorted(map(int, used)) != given", "not {*map(int, used)} <= {*given}"),
    ("numbers used twice", "tasks", "sorted(map(int, used)) != given", "{*map(int, used)} != {*given}"),
    ("the target in floats", "tasks", "< 1e-5 if official else value == target", "< 1e-5"),
    ("a division by zero is a try", "tasks", "None\n    return abs(value - target)",
     "False\n    return abs(value - target)"),
    ("any answer is a try", "tasks", "else right is False", "else right is not True"),
    ("12.5 is an integer", "tasks", "number is not None and number.denominator == 1", "number is not None"),
    ("official: work of several lines pays", "parity tasks", r'flags, final = (0, "\n$") if official else (re.DOTALL,',
     r'flags, final = (re.DOTALL, "\n$") if official else (re.DOTALL,'),
    ("strict: work of several lines pays nothing", "tasks", r'else (re.DOTALL, "\n?$")', r'else (0, "\n?$")'),
    ("tags that come twice are paid", "parity", "(completion.count(tag) == 1)", "(completion.count(tag) >= 1)"),
    ("what follows the answer is paid", "parity", "(0.125 - 0.001 * more)", "(0.125 + 0.001 * more)"),
    ("official: first number of the answer", "tasks", "answers(completion)[:1]))[-1:]])",
     "answers(completion)[:1]))[:1]])"),
    ("the first number said", "tasks", "said[-1]", "said[0]"),
    ("official: the bonus for a box is paid", "parity", r'("\boxed" if official else "\\boxed")', r'"\\boxed"'),
    ("a box outside the answer is paid", "tasks", r'"\\boxed") in inside', r'"\\boxed") in completion'),
    ("the last box, not that of the answer", "tasks",
     'last_boxed(last_answer(completion) or "") or last_boxed(completion)', "last_boxed(completion)"),
    ("countdown: the right side", "tasks", '(found or "").split("=")[0]', '(found or "").split("=")[-1]'),
    ("countdown: order makes another problem", "tasks", 'numbers = sorted(example["numbers"])',
     'numbers = list(example["numbers"])'),
    ("official countdown: the last answer", "tasks", "*answers(completion)[:1], completion)",
     "*answers(completion)[-1:], completion)"),
    ("official countdown: the first answer is paid", "parity", '"".join(answers(completion)[-1:]) if official',
     '"".join(answers(completion)[:1]) if official'),
    ("another split in every process", "tasks", "hashlib.sha256(key.encode()).digest()[0] / 256",
     "hash(key) % 256 / 256"),
    ("sudoku: given cells count", "tasks parity", 'for i, c in enumerate(example["puzzle"]) if c == "0"]\n',
     'for i, c in enumerate(example["puzzle"])]\n'),
    ("sudoku: given cells may change", "tasks", 'score == 1 if official else digits == example["solution"]',
     "score == 1"),
    ("sudoku: the first answer is paid", "tasks", 'str.isdigit, "".join(answers(completion)[-1:])',
     'str.isdigit, "".join(answers(completion)[:1])'),
    ("a reward of 1 is wrong", "benchmarks", "Grade(value >= 1, value", "Grade(value > 1, value"),
    # ---- 11. MaskedSFT.nelbo, DiffuGRPO.roll_out and update
    ("the same noise in every step", "family", "generator = keyed_generator(self.cfg.seed, *key)",
     "generator = keyed_generator(self.cfg.seed)"),
    ("padding is not trained", "stages", "keep[i, :prompt_len] = True",
     "keep[i, :prompt_len] = keep[i, len(ids) :] = True"),
    ("surplus tokens are masked", "family", "keep | surplus, self.tokenizer", "keep, self.tokenizer"),
    ("edits are not asked for", "family", "asked = ~keep if edit_rate else masked", "asked = masked"),
    ("parts weigh by their rows", "stages", "share = (~keep[mine]).sum() / (~keep).sum()",
     "share = torch.tensor(len(keep[mine]) / len(keep))"),
    ("groups are not adjacent", "stages", "for i in self.problem_indices(micro) for _ in range(cfg.group)]",
     "for _ in range(cfg.group) for i in self.problem_indices(micro)]"),
    ("long prompts lose their end", "stages", "return [p[-limit:] for", "return [p[:limit] for"),
    ("every batch draws alike", "stages", '"rollout", i) for i in rows]', '"rollout", i - rows[0]) for i in rows]'),
    ("a group draws alike", "stages", '"rollout", i) for i in rows]', '"rollout", i // cfg.group) for i in rows]'),
    ("padding is hidden for the prompt", "stages", "hide[:, b, -len(prompts[b]) :]", "hide[:, b, : len(prompts[b])]"),
    ("prompt masks of each reply's own", "stages", '"hide", i // cfg.masks_shared_by())', '"hide", i)'),
    ("one prompt mask for all inner updates", "stages", "torch.ones(cfg.mu, len(prompts[b])",
     "torch.ones(1, len(prompts[b])"),
    ("EOS is not trained", "stages", "live_tokens(completion, tok.eos_token_id), group",
     "completion != tok.eos_token_id, group"),
    ("the mean of the batch", "stages", "group_advantages(rewards, cfg.group)\n", "rewards - rewards.mean()\n"),
    ("old log p on the mask before", "stages", "[None, *logps(self.model, hide[1:])]",
     "[None, *logps(self.model, hide[:-1])]"),
    ("the policy is its own reference", "stages", "logp_ref = logps(ref, hide)", "logp_ref = logps(self.model, hide)"),
    ("always the first prompt mask", "stages", "r.completion, r.hide[k]", "r.completion, r.hide[0]"),
    ("old and reference swapped", "stages", "logp, r.logp_old[k], r.logp_ref[k] if r.logp_ref else None,",
     "logp, r.logp_ref[k] if r.logp_ref else None, r.logp_old[k],"),
    ("rewards for advantages", "stages", "else None, r.advantages, r.live", "else None, r.rewards, r.live"),
    ("micro-batches add up", "models", "self.backward(loss, 1 / len(self.batch))", "self.backward(loss)"),
    ("rollouts are never drawn anew", "stages", "if k == 0 or not self.batch:", "if not self.batch:"),
    ("dropout in the update", "fast", "without_dropout(self.net)", "self.net.train()"),
    ("entropy's sign", "stages", '"entropy": -(logp', '"entropy": (logp'),
    ("deviation over groups", "stages", "r.rewards.view(-1, self.cfg.group).std(1).mean()", "r.rewards.std()"),
]


def tests(first: str, *options: str) -> list[str]:
    """The command that runs the whole suite, the files that `first` names before the others."""
    known = [f"tests/test_{name}.py" for name in (*first.split(), *ORDER)]
    files = dict.fromkeys((*known, *sorted(f"tests/{p.name}" for p in (ROOT / "tests").glob("test_*.py"))))
    left_out = [f"--deselect={test}" for test in LEFT_OUT]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *files, *left_out]

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
