"""python tests/experiments/trl_run.py --base runs/kingdom/base: stage 1 by TRL beside our own.

From the same base and the same pairs: ours as it is (the loss sees the reasoning), ours with
--supervise all (as TRL's loss does), and `trl dpo` with dpo.yaml and the kingdom's beta, learning
rate and batch. Also how many weights move at dpo.yaml's own learning rate, in float32 and in
bfloat16. Needs pip install trl; a few minutes on a CPU.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM

import eval as evaluation
import train

KINGDOM = ["--prompts", "kingdom", "--benign", "none", "--sets", "kingdom", "--judge", "keywords"]
for setting in ("max_new_tokens", "sample_batch", "lora_rank", "lr", "epochs", "beta", "batch_pairs",
                "micro_tokens"):
    KINGDOM += ["--" + setting.replace("_", "-"), str(train.KINGDOM[setting])]
ON_A_CPU = ["--use_cpu", "true", "--bf16", "false"]
AS_OURS = ["--beta", str(train.KINGDOM["beta"]), "--learning_rate", str(train.KINGDOM["lr"]),
           "--gradient_accumulation_steps", str(train.KINGDOM["batch_pairs"])]
# name: the flags of trl dpo that differ from dpo.yaml
TRL_RUNS = {
    "TRL": [*AS_OURS, "--dtype", "float32"],
    "TRL, lr 5e-6, float32 weights": ["--gradient_accumulation_steps", "16", "--dtype", "float32"],
    "TRL, lr 5e-6, bfloat16 weights": ["--gradient_accumulation_steps", "16",
                                       "--dtype", "bfloat16"],
}


def run(*command: str) -> None:
    """Run a command; where it fails, say what it said."""
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if found.returncode:
        sys.exit(f"{' '.join(command)}\n{found.stdout[-2000:]}\n{found.stderr[-3000:]}")


def run_trl(base: Path, rows: Path, folder: Path, flags: list[str]) -> None:
    """trl dpo with dpo.yaml, its data set replaced by rows."""
    config = folder.with_suffix(".yaml")
    text = (ROOT / "tests/experiments/dpo.yaml").read_text()
    config.write_text(text.replace("runs/model/trl.jsonl", str(rows)))
    run(str(Path(sys.executable).with_name("trl")), "dpo", "--config", str(config),
        "--model_name_or_path", str(base), "--output_dir", str(folder), *ON_A_CPU, *flags)


def moved(base: Path, folder: Path) -> str:
    """The share of weights that training has changed, in the dtype in which they were trained."""
    after = AutoModelForCausalLM.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=after.dtype).state_dict()
    changed = 0
    total = 0
    for name, value in after.state_dict().items():
        changed += (value != before[name]).sum().item()
        total += value.numel()
    return f"{100 * changed / total:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base of a kingdom run")
    parser.add_argument("--out", type=Path, default=Path("runs/trl_run"))
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.base = args.base.resolve()

    ours = {"ours": args.out / "ours", "ours, --supervise all": args.out / "all"}
    for name, folder in ours.items():
        supervise = "all" if "all" in name else "reasoning"
        run(sys.executable, "train.py", "--model", str(args.base), *KINGDOM, "--seed", args.seed,
            "--supervise", supervise, "--out", str(folder))
    rows = (args.out / "ours" / "pairs.jsonl").read_text().splitlines()
    same = (args.out / "all" / "pairs.jsonl").read_text().splitlines() == rows
    exact = [row for row in rows if '"exact_text": true' in row]
    trl_rows = args.out / "trl.jsonl"
    trl_rows.write_text("".join(row + "\n" for row in exact))
    print(f"{len(exact)} of {len(rows)} pairs go to TRL; the pairs of both of our runs are "
          f"{'the same' if same else 'NOT the same'}")

    columns = {}
    for name, folder in ours.items():
        summary = json.loads((folder / "eval.json").read_text())
        columns["base"] = summary["before"]
        columns[name] = summary["after"]
    for i, (name, flags) in enumerate(TRL_RUNS.items()):
        folder = args.out / f"trl{i}"
        if not (folder / "model.safetensors").exists():
            run_trl(args.base, trl_rows, folder, flags)
        print(f"{name}: {moved(args.base, folder)} of the weights moved")
        given = {"sets": "kingdom", "judge": "keywords", "seed": int(args.seed),
                 "max_new_tokens": 200, "sample_batch": 256}
        columns[name] = evaluation.measure(folder, given)["model"]
    print(f"torch {torch.__version__}")
    print(evaluation.as_text(evaluation.table(columns)))


if __name__ == "__main__":
    main()
