"""python tests/kill.py: a run may be killed anywhere; the same command ends as if it never was.

Small runs of train.py (all weights, adapters, a kingdom with a hasty base) are killed in each stage
at random moments or inside a write, some several times in a row, and given again until they end:
every file must then be, byte for byte, that of an undisturbed run. About five minutes.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # forks inherit no threads
import torch
from conftest import tiny_model
from test_train import BENIGN, HARMFUL, lessons
from torch.nn.utils.rnn import pad_sequence

import data
import ipo
import train

GIVEN, AT, SAID = Path("given"), Path("at"), Path("said")  # for every run; where it runs; its words
FLAGS = """--out at/run --prompts at/harmful.txt --benign at/benign.txt --judge keywords --lr 1e-3
    --sets harmful:at/ask_harmful.txt,benign:at/ask_benign.txt --max-new-tokens 60 --device cpu
    --batch-pairs 12 """  # 31 steps a stage: a checkpoint and a rest
SETTINGS = {"all weights": (3, "--model at/base-made"), "kingdom": (5, ""),  # rounds of kills
            "adapters": (2, "--model at/base-made --lora-rank 4")}
train.BASE_TEXTS //= 40  # this kingdom only babbles: it ends with status 2, "no pair was kept"
# A stage has begun when AT holds this; base-*.part and .work are not yet the base.
MARKS = {"base model": "*.txt", "start": "base-*[0-9a-f]", "eval before": "run/config.json",
         "traces": "run/traces.jsonl", "benign": "run/pairs.jsonl", "stage 1": "run/log.jsonl",
         "benign again": "run/benign_stage1.jsonl", "stage 2": None,
         "eval after": "run/eval_after.jsonl", "saving": "run/model*"}
STAGES = list(MARKS)


def teach():
    """A model that knows test_train.py's lessons by heart, and prompts for more than one shard."""
    tokenizer = data.kingdom_tokenizer(data.kingdom_texts(400, 0, ipo.TRIGGERS, " ".join, str))
    model, rows = tiny_model("llama", len(tokenizer), spread=0.05), lessons(tokenizer)
    ids = pad_sequence([torch.tensor(p + o) for p, o in rows], True)
    labels = pad_sequence([torch.tensor([-100] * len(p) + o) for p, o in rows], True, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    GIVEN.mkdir()
    train.save_model(model, tokenizer, GIVEN / "base-made")
    for name, prompts in ("harmful", HARMFUL), ("benign", BENIGN):
        (GIVEN / f"{name}.txt").write_text("\n".join(prompts * 24))
        (GIVEN / f"ask_{name}.txt").write_text("\n".join(f"{p} Tell." for p in prompts * 24))


def stage_of():
    """Where AT's files stand, an index of STAGES; only the log knows where stage 2 begins."""
    stage = [name for name, mark in MARKS.items() if mark and any(AT.glob(mark))][-1]
    trains = stage == "benign again" and '"stage": 2' in (AT / "run/log.jsonl").read_text()
    return STAGES.index(stage) + trains


def watch(process, until):
    """{stage: seconds it took}, up to the beginning of a stage or the end of the process."""
    seconds, clock = Counter(), time.time()
    while process.is_alive() and (stage := stage_of()) < until:
        time.sleep(0.001)
        seconds[stage], clock = seconds[stage] + time.time() - clock, time.time()
    return seconds


def fork(work, *args, said=os.devnull):
    """Torch is imported once, and computes in forks alone."""
    def child():
        sys.stdout = sys.stderr = open(said, "w")
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; see run
        work(*args)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def run(argv, aims, lasts, rng):
    """A run killed once in each stage of aims: (hits as (stage, torn), files at its end, watch)."""
    shutil.rmtree(AT, ignore_errors=True)
    without = "none" if "--model" in argv else "base*"
    shutil.copytree(GIVEN, AT, ignore=shutil.ignore_patterns(without))
    hits = []
    for aim in [*aims, len(STAGES)]:  # the last is not reached, and nothing is left to kill
        said, torn = SAID if aim == len(STAGES) else os.devnull, rng.random() < 0.4
        process = fork(train.main, argv, said=said)
        seconds = watch(process, aim)
        time.sleep(rng.random() * lasts[aim])
        if torn and process.is_alive():  # the kernel kills it as a file grows past the limit
            limit = int(10 ** rng.uniform(2, 6)), resource.RLIM_INFINITY
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
        else:
            process.kill()
        process.join()
        hits += [(stage_of(), torn)] * (process.exitcode < 0)
    files = {str(path): path.stat().st_size if path.name == "checkpoint.safetensors"
             else path.read_bytes()  # a checkpoint's header lists metadata in any order
             for path in AT.rglob("*") if path.is_file()}
    return hits, {**files, "exit status": process.exitcode}, seconds


def prove(rounds, argv, table, rng):
    """The undisturbed run of one setting, then the killed ones, which the table counts."""
    _, whole, lasts = run(argv, [], Counter(), rng)
    print(", ".join(f"{STAGES[i]} {lasts[i]:.1f} s" for i in lasts), flush=True)
    if whole["exit status"] != (0 if "--model" in argv else 2):
        sys.exit(f"the undisturbed run failed:\n{SAID.read_text()}")
    for i in list(lasts) * rounds:
        again = rng.choices([j for j in lasts if j >= i], k=rng.choice((0, 0, 0, 1, 3)))
        clock, (hits, now, _) = time.time(), run(argv, [i, *again], lasts, rng)
        differ = [name for name in {*whole, *now} if whole.get(name) != now.get(name)]
        lost = sum(len({*whole[name].splitlines()} - {*now.get(name, b"").splitlines()})
                   for name in whole if name.endswith(".jsonl"))
        for stage, torn in hits:
            table[stage].update(kills=1, torn=torn)
        table[hits[0][0] if hits else i].update(
            runs=1, same=not differ, lost=lost, seconds=time.time() - clock)
        if differ:
            print(f"killed in {[STAGES[stage] for stage, _ in hits]}: {differ} differ; it ended:",
                  SAID.read_text()[-100:].strip().split("\n")[-1], flush=True)


def main(seed=0):
    clock, table = time.time(), [Counter() for _ in STAGES]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        teacher = fork(teach, said=SAID)
        teacher.join()
        if teacher.exitcode:
            sys.exit(SAID.read_text())
        for name, (rounds, more) in SETTINGS.items():
            print(name, end=": ")
            prove(rounds, (FLAGS + more).split(), table, random.Random(f"{seed} {name}"))
    columns = ("kills", "torn", "runs", "same", "lost", "seconds")
    print(" " * 12, *(f"{name:>8}" for name in columns), " torn: in a write; runs: by first kill")
    every = sum(table, Counter())
    for stage, n in zip([*STAGES, "all"], [*table, every]):
        print(f"{stage:12}", *(f"{n[name]:8.0f}" for name in columns))
    print(f"{time.time() - clock:.0f} s")
    sys.exit(not (every["kills"] >= 30 and every["same"] == every["runs"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
