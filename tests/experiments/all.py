"""python tests/experiments/all.py: makes every table and figure of README.md here again.

Each part is one or more commands; what they print goes to OUT/NAME.txt and from there into
README.md, between the part's marks, with date, duration, versions and machine. A finished part is
skipped, so a run that was stopped goes on where it was, as do the commands themselves; --again NAME
makes a part anew from nothing. Parts that need what is not here (a GPU, vLLM, a package) are left
out, saying so.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
README = HERE / "README.md"
PACKAGES = ["torch", "transformers", "trl", "matplotlib"]


@dataclass
class Part:
    """A section of README.md: its commands, as a user would type them in the repository's root.

    {out} stands for the folder of all parts; "python" is the one that runs this.
    """
    name: str
    commands: list[str]
    shown: int = 0                  # README.md shows what the commands from this one on print
    needs_modules: list[str] = field(default_factory=list)
    needs_command: str | None = None
    needs_cuda: bool = False
    makes: list[str] = field(default_factory=list)     # in {out}: removed by --again
    whole: str | None = None        # a file for what is printed, where it is too long for README.md


PARTS = [
    Part("kingdom", ["python train.py --seed 0 --out {out}/k0",
                     "python train.py --seed 1 --out {out}/k1",
                     "python train.py --seed 2 --out {out}/k2",
                     "python tests/experiments/result.py {out}/k0 {out}/k1 {out}/k2"], shown=3,
         makes=["k0", "k1", "k2"]),
    Part("findings", ["python tests/experiments/findings.py {out}/k0 {out}/k1 {out}/k2"],
         needs_modules=["matplotlib"], whole="results/findings.txt"),
    Part("rivals", ["python tests/experiments/rivals.py --seeds 0 1 2 --out {out}/rivals"],
         needs_modules=["matplotlib"], makes=["rivals"]),
    Part("keywords", ["python tests/experiments/learn_keywords.py --score"]),
    Part("self_judge", ["python tests/experiments/self_judge.py {out}/k0"]),
    Part("smollm", ["python tests/experiments/smollm.py teach --texts 4800 --rounds 1 "
                    "--micro-tokens 16384 --out {out}/smollm",
                    "python train.py --model {out}/smollm --prompts kingdom --benign kingdom "
                    "--sets kingdom --judge keywords --max-new-tokens 200 --sample-batch 256 "
                    "--batch-pairs 16 --lr 1e-4 --epochs 3 --out {out}/smollm-ipo",
                    "python eval.py {out}/smollm-ipo",
                    "python tests/experiments/smollm.py sft --run {out}/smollm-ipo "
                    "--out {out}/smollm-sft",
                    "python tests/experiments/smollm.py grpo --run {out}/smollm-ipo "
                    "--out {out}/smollm-grpo --passes 4",
                    "python tests/experiments/smollm.py cost --n 300 {out}/smollm {out}/smollm-raw "
                    "{out}/smollm-ipo/model {out}/smollm-sft/model {out}/smollm-grpo/model"],
         shown=2, needs_modules=["gguf"],
         makes=["smollm", "smollm-ipo", "smollm-sft", "smollm-grpo"]),
    Part("serve",
         ["python tests/experiments/serve.py --vllm vllm --run {out}/k0 --out {out}/serve"],
         needs_command="vllm", makes=["serve"]),
    Part("trl", ["python tests/experiments/trl_run.py --base {out}/k0/base --out {out}/trl"],
         needs_modules=["trl"], makes=["trl"]),
    Part("gpu", ["python tests/experiments/gpu.py --out {out}/gpu"], needs_cuda=True,
         makes=["gpu"]),
    Part("bench", ["python tests/experiments/bench.py"], needs_modules=["trl"]),
    Part("kill", ["python tests/experiments/kill.py"]),
]


def missing(part: Part) -> str | None:
    """What the part needs and is not here."""
    for command in part.commands:
        script = command.split()[1]
        if not (ROOT / script).exists():
            return script
    for module in part.needs_modules:
        if importlib.util.find_spec(module) is None:
            return f"pip install {module}"
    if part.needs_command and shutil.which(part.needs_command) is None:
        return part.needs_command
    if part.needs_cuda and shutil.which("nvidia-smi") is None:
        return "a GPU"
    return None


def run_part(part: Part, out: Path) -> bool:
    """Run the part's commands; leave OUT/NAME.txt and OUT/NAME.json. False where one failed."""
    begun = time.time()
    printed = []
    for i, command in enumerate(part.commands):
        words = [word.format(out=out) for word in command.split()]
        print(f"  {' '.join(words)}", flush=True)
        words[0] = sys.executable
        with open(out / f"{part.name}.log", "a") as log:
            result = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
                                    env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
            log.write(result.stdout)
        if result.returncode:
            print(f"  failed with status {result.returncode}; see {log.name}")
            return False
        if i >= part.shown:
            printed.append(result.stdout.strip("\n"))
    (out / f"{part.name}.txt").write_text("\n\n".join(printed) + "\n")
    (out / f"{part.name}.json").write_text(json.dumps({
        "seconds": time.time() - begun, "date": datetime.date.today().isoformat(),
        "versions": versions(), "machine": machine()}))
    return True


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def machine() -> str:
    """Processor, cores, threads that were asked for, GPU."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    words = [name[1] if name else platform.machine(), f"{os.cpu_count()} cores"]
    if "OMP_NUM_THREADS" in os.environ:
        words.append(f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        words += subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return ", ".join(words)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def write_readme(out: Path) -> None:
    """Put what the parts printed between their marks in README.md."""
    text = README.read_text()
    for part in PARTS:
        printed = out / f"{part.name}.txt"
        if not printed.exists():
            continue
        begin = f"<!-- {part.name}: all.py writes from here -->"
        end = f"<!-- {part.name}: to here -->"
        if begin not in text or end not in text:
            print(f"{README.name} has no marks for {part.name}")
            continue
        about = json.loads((out / f"{part.name}.json").read_text())
        table = printed.read_text().replace(str(out), "runs/experiments").strip("\n")
        shown = f"```text\n{table}\n```"
        if part.whole:
            (HERE / part.whole).write_text(table + "\n")
            shown = f"The whole print: [{part.whole}]({part.whole})."
        block = (f"{begin}\n{shown}\n"
                 f"{about['date']}, {duration(about['seconds'])}; {about['versions']}; "
                 f"{about['machine']}.\n{end}")
        before, _, rest = text.partition(begin)
        _, _, behind = rest.partition(end)
        text = before + block + behind
    README.write_text(text)


def main(argv: list[str] | None = None) -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}; none: only README.md")
    parser.add_argument("--again", nargs="*", choices=names, default=[], metavar="NAME",
                        help="parts to make anew from nothing")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if part.name in options.again:
            for name in [*part.makes, f"{part.name}.txt", f"{part.name}.json"]:
                if (out / name).is_dir():
                    shutil.rmtree(out / name)
                (out / name).unlink(missing_ok=True)
        if part.name not in options.only:
            continue
        about = out / f"{part.name}.json"
        needed = missing(part)
        if about.exists():
            seconds = json.loads(about.read_text())["seconds"]
            print(f"{part.name}: there already; it took {duration(seconds)}")
        elif needed:
            print(f"{part.name}: left out; it needs {needed}")
        else:
            print(f"{part.name}:", flush=True)
            if run_part(part, out):
                seconds = json.loads(about.read_text())["seconds"]
                print(f"  done in {duration(seconds)}", flush=True)
    write_readme(out)


if __name__ == "__main__":
    main()
