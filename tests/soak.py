"""Kill -9 at random moments, resume, and compare with a run that nobody disturbed.

    python tests/soak.py --kills 50

Rounds of five kills, each round a run of both stages of the embedded model or of LoRA on top of it, each kill at a
random moment. After every kill all JSON and every checkpoint of the manifest must be readable; after every round
weights, optimizer, metrics and evaluation must be bit for bit those of the undisturbed run.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors.torch import load_file

import d1_full as d1

SCRIPT = Path(d1.__file__)
FLAGS = dict(task="sudoku", steps_sft=60, bs_sft=16, n_traces=200, steps_rl=24, mu=4, group=4, bs_rl=8, save_steps=5,
             limit=8, eval_lengths=32, warmup_sft=5, threads=1)

def start(out: Path, *more: str) -> subprocess.Popen:
    words = [w for k, v in FLAGS.items() for w in (f"--{k}", str(v))]
    resume = ["--resume"] if (out / "sudoku" / "trainer" / "manifest.json").exists() else []
    return subprocess.Popen([sys.executable, str(SCRIPT), *words, *more, *resume, "--output_dir", str(out)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})

def finish(process: subprocess.Popen) -> None:
    said = process.communicate()[1]
    assert process.returncode == 0, said

def unreadable(folder: Path) -> list[str]:
    """What a kill has spoilt: JSON that does not parse, checkpoints that are not as they were written."""
    bad = []
    for file in folder.rglob("*.json"):
        try:
            json.loads(file.read_text())
        except ValueError:
            bad.append(str(file))
    for files in d1.read_json(folder / "trainer" / "manifest.json").values():
        for saved in files.values():
            bad += [name for name, digest in saved.items() if not d1.is_whole(folder / "trainer" / name, digest)]
    return bad

def left_behind(out: Path) -> dict:
    """All that must be equal in two runs."""
    folder = out / "sudoku"
    rows = [{k: v for k, v in r.items() if k != "seconds"} for r in d1.read_log(folder / "metrics.jsonl")]
    weights = {f.name: load_file(f) for f in folder.glob("*.safetensors")}
    states = {}
    for stage, files in d1.read_json(folder / "trainer" / "manifest.json").items():
        for name in list(files.values())[-1]:
            states[stage] = torch.load(folder / "trainer" / name, weights_only=True)["optimizer"]["state"]
    entries = json.loads((folder / "eval.json").read_text())
    return dict(rows=rows, weights=weights, states=states, entries=entries)

def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b or (a != a and b != b)

def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, root = random.Random(args.seed), Path(tempfile.mkdtemp())
    began = time.monotonic()
    finish(start(root / "full"))
    kinds = {"full": (), "lora": ("--model", str(root / "full" / "sudoku"), "--use_lora", "--lora_r", "8",
                                  "--sft_data", "", "--preset", "tiny")}
    seconds = {}
    for kind, more in kinds.items():
        once = time.monotonic()
        finish(start(root / f"{kind}0", *more))
        seconds[kind] = time.monotonic() - once
    kills = broken = differences = rounds = 0
    while kills < args.kills:
        kind = list(kinds)[rounds % 2]
        out = root / f"round{rounds}"
        for _ in range(min(5, args.kills - kills)):
            process = start(out, *kinds[kind])
            time.sleep(rng.uniform(0, seconds[kind]))
            process.kill()
            process.wait()
            kills += 1
            broken += len(bad := unreadable(out / "sudoku"))
            saved = d1.read_json(out / "sudoku" / "trainer" / "manifest.json")
            print(f"kill {kills}: saved {({stage: list(files) for stage, files in saved.items()})}", *bad, flush=True)
        finish(start(out, *kinds[kind]))
        same = {k: equal(v, left_behind(out)[k]) for k, v in left_behind(root / f"{kind}0").items()}
        differences += sum(not v for v in same.values())
        rounds += 1
        print(f"round {rounds}, {kind}: equal in {', '.join(k for k, v in same.items() if v)}", flush=True)
    print(f"{kills} kills, {differences} differences, {broken} unreadable files, {rounds} runs, "
          f"{(time.monotonic() - began) / 60:.1f} min")
    shutil.rmtree(root)
    return int(differences + broken > 0)

if __name__ == "__main__":
    sys.exit(main())
