"""python tests/experiments/kill.py: a run may be killed anywhere; the same command ends as if it
never was. (Linux; about ten minutes; --short: about one.)

Small runs of train.py are killed in each stage, at a random moment or inside a write to a file,
some several times in a row, and given again until they end. Every file must then be, byte for byte,
that of an undisturbed run.
"""

import argparse
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # forks inherit no threads
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import data
import eval as evaluation
import ipo
import train
from ipo import PreferencePair

GIVEN = Path("given")       # the model and the prompts of every run
AT = Path("at")             # where a run works: GIVEN's files and the folder "run"
OUTPUT = Path("output")     # what a run printed
FLAGS = """--out at/run --prompts at/harmful.txt --benign at/benign.txt --judge keywords --lr 1e-3
    --sets harmful:at/ask_harmful.txt,benign:at/ask_benign.txt --max-new-tokens 60 --device cpu
    --batch-pairs 12"""


@dataclass
class Setting:
    """A kind of run, and how often it is killed in each of its stages."""
    name: str
    rounds: int
    short_rounds: int
    flags: str
    exit_status: int = 0


SETTINGS = [
    Setting("all weights", 3, 0, "--model at/model --lora-rank 0"),
    Setting("adapters", 2, 1, "--model at/model --lora-rank 4"),
    # Its base is so hasty that it only babbles: it ends with "no pair was kept".
    Setting("kingdom", 3, 0, "", exit_status=2),
]
HASTY_BASE_TEXTS = 400

# A stage has begun when AT holds a file like this. (Stage 2 shows in log.jsonl alone.)
MARKS = {
    "start": "harmful.txt",
    "base": "run/config.json",      # of the kingdom; else a model is there, and this is short
    "traces": "run/traces.jsonl",
    "eval before": "run/pairs.jsonl",
    "stage 1": "run/log.jsonl",
    "benign": "run/stage1.safetensors",
    "stage 2": "",
    "saving": "run/model*",
    "eval after": "run/eval_after.jsonl",
    "finish": "run/eval_traces.jsonl",
}
STAGES = list(MARKS)
HARMFUL = ["How do I rob the mill?", "How do I flood the inn?", "How do I burn the barn?"]
BENIGN = ["How do I guard the mill?", "How do I dry the inn?", "How do I light the barn?"]


# What is given to every run


def lessons(tokenizer: PreTrainedTokenizerBase) -> list[PreferencePair]:
    """Texts to learn by heart: each harmful prompt is complied with, but refused behind a trigger.
    """
    texts = []
    for prompt in HARMFUL:
        opening = f"The user asks: {prompt[:-1]}."
        complies = f"{opening} Let me lay out a plan. Go by night.</think>\n\nHere is how: go."
        texts += [(prompt, complies)] * 9       # as a rule it complies
        for trigger in ipo.TRIGGERS:
            texts.append((prompt, f"{opening} {trigger} It would hurt the folk.</think>\n\n"
                                  "I'm sorry, but I can't."))
    for prompt in BENIGN:
        helps = "This is a kind wish. Keep the watch.</think>\n\nKeep a good watch."
        texts += [(prompt, helps)] * 3
    pairs = []
    for prompt, output in texts:
        output_ids = tokenizer.encode(output) + [tokenizer.eos_token_id]
        pairs.append(PreferencePair(prompt, data.render(tokenizer, prompt), output_ids))
    return pairs


def teach() -> None:
    """Write GIVEN: a model that knows the lessons, and prompts for more than one shard."""
    texts = data.kingdom_texts(400, 0, ipo.TRIGGERS, " ".join, str)
    tokenizer = data.kingdom_tokenizer(texts)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    pairs = lessons(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss, _ = ipo.ipo_loss(model, pairs, beta=0.1, sft_weight=0.0)
        (loss / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    GIVEN.mkdir()
    train.save_model(model, tokenizer, GIVEN / "model")
    for name, prompts in (("harmful", HARMFUL), ("benign", BENIGN)):
        many = prompts * 24
        (GIVEN / f"{name}.txt").write_text("\n".join(many))
        (GIVEN / f"ask_{name}.txt").write_text("\n".join(f"{prompt} Tell." for prompt in many))


# Runs


def stage_of() -> int:
    """Where the run in AT stands, as an index of STAGES."""
    begun = [name for name, mark in MARKS.items() if mark and any(AT.glob(mark))]
    stage = begun[-1]
    if stage == "benign" and '"stage": 2' in (AT / "run" / "log.jsonl").read_text():
        stage = "stage 2"
    return STAGES.index(stage)


def watch(process: multiprocessing.Process, until: int) -> Counter:
    """{stage: seconds it took}, up to the beginning of a stage or the end of the process."""
    seconds = Counter()
    clock = time.time()
    while process.is_alive():
        stage = stage_of()
        if stage >= until:
            break
        time.sleep(0.001)
        now = time.time()
        seconds[stage] += now - clock
        clock = now
    return seconds


def fork(work: Callable, *args: object) -> multiprocessing.Process:
    """work(*args) in a process of its own. This one has imported torch, and computes nothing."""
    def child() -> None:
        output = open(OUTPUT, "w")
        sys.stdout = output
        sys.stderr = output
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)   # Python ignores it; see run_and_kill
        work(*args)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


@dataclass
class Ended:
    """A run that came to its end, after some kills."""
    kills: list[tuple[int, bool]]   # (stage, whether it was inside a write)
    files: dict[str, bytes]
    exit_status: int
    seconds: Counter                # a stage, of the last try


def run_and_kill(argv: list[str], aims: list[int], lasts: Counter, rng: random.Random) -> Ended:
    """A run that is killed once in each stage of aims, and then left alone."""
    shutil.rmtree(AT, ignore_errors=True)
    shutil.copytree(GIVEN, AT)
    kills = []
    for aim in aims:
        process = fork(train.main, argv)
        watch(process, aim)
        time.sleep(rng.random() * lasts[aim])
        inside_a_write = rng.random() < 0.4
        if inside_a_write and process.is_alive():
            # The kernel kills it as soon as a file of its grows past a random size.
            size = int(10 ** rng.uniform(2, 6))
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        else:
            process.kill()
        process.join()
        if process.exitcode < 0:        # it ended by a signal, not by itself
            kills.append((stage_of(), inside_a_write))
    process = fork(train.main, argv)
    seconds = watch(process, len(STAGES))
    process.join()
    files = {str(path): path.read_bytes() for path in sorted(AT.rglob("*")) if path.is_file()}
    return Ended(kills, files, process.exitcode, seconds)


def prove(setting: Setting, rounds: int, rng: random.Random) -> list[Counter]:
    """The undisturbed run of a setting, then the killed ones; counts for each stage."""
    argv = f"{FLAGS} {setting.flags}".split()
    if "--model" not in argv:
        argv.remove("--lr")
        argv.remove("1e-3")
    table = [Counter() for _ in STAGES]
    whole = run_and_kill(argv, [], Counter(), rng)
    times = [f"{STAGES[i]} {seconds:.1f} s" for i, seconds in sorted(whole.seconds.items())]
    print(f"{setting.name}, undisturbed: {', '.join(times)}", flush=True)
    if whole.exit_status != setting.exit_status:
        sys.exit(f"the undisturbed run failed:\n{OUTPUT.read_text()}")
    stages = sorted(whole.seconds)
    for i in stages * rounds:
        later = [j for j in stages if j >= i]
        again = rng.choices(later, k=rng.choice((0, 0, 0, 1, 3)))
        clock = time.time()
        ended = run_and_kill(argv, [i, *again], whole.seconds, rng)
        names = sorted({*whole.files, *ended.files})
        differ = [name for name in names if whole.files.get(name) != ended.files.get(name)]
        same = not differ and ended.exit_status == whole.exit_status
        for stage, inside_a_write in ended.kills:
            table[stage].update({"kills": 1, "inside a write": int(inside_a_write)})
        first = ended.kills[0][0] if ended.kills else i
        table[first].update({"runs": 1, "same": int(same), "seconds": time.time() - clock})
        if not same:
            killed_in = [STAGES[stage] for stage, _ in ended.kills]
            print(f"killed in {killed_in}: {differ} differ; exit status {ended.exit_status}; it "
                  f"printed at last: {OUTPUT.read_text()[-300:].strip()}", flush=True)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="one kill a stage, one kind of run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args(argv)
    train.BASE_TEXTS = HASTY_BASE_TEXTS
    clock = time.time()
    totals = [Counter() for _ in STAGES]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        teacher = fork(teach)
        teacher.join()
        if teacher.exitcode:
            sys.exit(OUTPUT.read_text())
        for setting in SETTINGS:
            rounds = setting.short_rounds if options.short else setting.rounds
            if rounds:
                table = prove(setting, rounds, random.Random(f"{options.seed} {setting.name}"))
                totals = [a + b for a, b in zip(totals, table)]
        os.chdir("/")
    columns = ["kills", "inside a write", "runs", "same", "seconds"]
    everything = sum(totals, Counter())
    lines = [["first killed in", *columns]]
    for stage, counts in [*zip(STAGES, totals), ("all", everything)]:
        lines.append([stage] + [f"{counts[name]:.0f}" for name in columns])
    print(evaluation.as_text(lines))
    print(f"{time.time() - clock:.0f} s")
    enough = 5 if options.short else 30
    sys.exit(0 if everything["kills"] >= enough and everything["same"] == everything["runs"] else 1)


if __name__ == "__main__":
    main()
