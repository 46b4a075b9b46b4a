"""python tests/experiments/serve.py --vllm VENV/bin/vllm --run runs/kingdom: a real vLLM server in
the place of ipo.sample and of the judge.

It starts vLLM on the base of a finished kingdom run (RUN/base), then on what was trained from it
(RUN/model), and prints a line a check; with --speed it measures tokens a second of both samplers
instead, with --small FOLDER on that model too. vLLM may live in an environment of its own. On a CPU
with little memory: VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind. What it makes lies in
--out; a whole run on the server and one without it are among that and take some minutes.
"""

import argparse
import http.server
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch

import data
import eval as evaluation
import ipo
import judge
import train
from data import httpx
from ipo import ReasoningModel, TokenIds

NAME = "served"         # what the server calls its model
KINGDOM = []            # the kingdom's settings, as flags
for setting, value in train.KINGDOM.items():
    if setting not in ("out", "judge"):
        KINGDOM += ["--" + setting.replace("_", "-"), str(value)]
SELF = ["--judge", "self", "--judge-questions", "kingdom"]
COLUMNS = "{:60} {:13} {}"


class Server:
    """A vLLM server of one model, as a context: with Server(...) as server: server.url."""

    def __init__(self, vllm: str, folder: Path, port: int, log: Path) -> None:
        self.url = f"http://localhost:{port}/v1"
        self.command = [
            vllm, "serve", str(folder.resolve()), "--served-model-name", NAME, "--port", str(port),
            "--max-model-len", "512", "--dtype", "float32", "--enforce-eager"]
        self.log = log

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with open(self.log, "a") as log:
            # A group of its own: its workers are stopped with it. Not in this folder: Python would
            # take our data.py for its own.
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, cwd="/",
                env={"HF_HUB_OFFLINE": "1", **os.environ})
        start = time.time()
        while time.time() - start < 600:
            if self.process.poll() is not None:
                sys.exit(f"vLLM has ended; see {self.log}")
            try:
                if httpx.get(f"{self.url}/models").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(1)
        sys.exit(f"vLLM does not answer; see {self.log}")

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def cpu_seconds(self) -> float:
        """What all processes of the server have used so far (Linux)."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:         # it has ended meanwhile
                continue
            if int(fields[2]) == self.process.pid:              # its process group
                ticks += int(fields[11]) + int(fields[12])      # in the program, in the kernel
        return ticks / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """As if its machine went down."""
        self.signal(signal.SIGKILL)
        self.process.wait()


class NoIds(http.server.BaseHTTPRequestHandler):
    """A server as many are: it completes prompts and knows nothing of token ids."""

    def do_GET(self) -> None:
        self.answer({"data": [{"id": NAME}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"choices": [{"text": "Hello.", "finish_reason": "stop"}]})

    def answer(self, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        """Nothing: it would stand between the lines of the table."""


def show(what: str, right: bool, found: str) -> None:
    print(COLUMNS.format(what, "yes" if right else "NO", found), flush=True)


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    """A script of the project with the kingdom's settings."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *flags], capture_output=True, text=True)


def first_words(result: subprocess.CompletedProcess) -> str:
    """The status and the last line of what a script says of an error."""
    lines = result.stderr.strip().splitlines() or [""]
    return f"status {result.returncode}: {lines[-1][:150]}"


def line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# The checks


def check_ids(base: ReasoningModel, url: str) -> list[TokenIds]:
    """Greedy: the server's ids are ipo.sample's."""
    settings = data.Settings(max_new_tokens=200)
    records = data.kingdom_prompts("train", "harmful", 64, 7)
    prompts = data.render_all(records, base)
    keys = [str(i) for i in range(64)]
    here = data.make_sampler(base, settings, temperature=0)(prompts, keys)
    there = data.make_sampler(base, settings, temperature=0, url=url)(prompts, keys)
    same = sum(a == b for a, b in zip(here, there))
    show("greedy ids are those of ipo.sample", same == 64,
         f"{same} of 64 outputs, {sum(map(len, here))} tokens")
    return here


def check_judge(base: ReasoningModel, url: str, outputs: list[TokenIds]) -> None:
    """The base as a judge: here, through --judge-url, and through --sampler-url."""
    settings = data.Settings(judge="self", judge_questions="kingdom", judge_tokens=200,
                             max_new_tokens=200)
    served = data.Settings(judge=NAME, judge_url=url, judge_questions="kingdom", judge_tokens=200)
    here = judge.load_judge(settings, base)
    ways = {"--judge-url": judge.load_judge(served, base),
            "--sampler-url --judge self": judge.load_judge(settings, base, url)}
    texts = []
    for output_ids in outputs:
        reasoning_ids, _ = ipo.split_output(output_ids, base.think_end)
        texts.append(ipo.decode(base.tokenizer, reasoning_ids))
    prompts = [""] * len(texts)
    cues = here.find_cues(texts)
    verdicts = here.judge_safety(texts, prompts, "reasoning")
    for way, judge_there in ways.items():
        same = sum(a == b for a, b in zip(cues, judge_there.find_cues(texts)))
        same_verdicts = sum(
            a == b for a, b in zip(verdicts, judge_there.judge_safety(texts, prompts, "reasoning")))
        show(f"{way}: verdicts of --judge self", same == same_verdicts == len(texts),
             f"cues {same} and verdicts {same_verdicts} of {len(texts)}; "
             f"unsafe {verdicts.count('unsafe')}, by the LLM {sum(c.by == 'llm' for c in cues)}")
        found, = judge_there.judge_safety(["They go to the mill. " * 400], [""], "reasoning")
        show(f"{way}: too long a question is unparsed", found == "unparsed", found)


def check_bad_input(base: Path, url: str, out: Path) -> None:
    """What is no server of this model: one line, status 2."""
    port = 8999
    no_ids = http.server.ThreadingHTTPServer(("localhost", port), NoIds)
    threading.Thread(target=no_ids.serve_forever, daemon=True).start()
    cases = {
        "no server": ["--sampler-url", "http://localhost:8998/v1"],
        "a wrong path": ["--sampler-url", url.removesuffix("/v1")],
        "no http://": ["--sampler-url", "localhost:8998/v1"],
        "a server without token ids": ["--sampler-url", f"http://localhost:{port}/v1"],
        "a judge that is not served": ["--judge-url", url, "--judge", "nobody"],
    }
    for what, flags in cases.items():
        found = run("train.py", "--model", str(base), *KINGDOM, "--judge-questions", "kingdom",
                    "--out", str(out / "bad"), *flags)
        shutil.rmtree(out / "bad", ignore_errors=True)
        one_line = found.returncode == 2 and found.stderr.count("\n") == 1
        show(f"{what}: one line", one_line, first_words(found))
    no_ids.shutdown()


def check_no_weights(base: Path, url: str, out: Path) -> None:
    """--until pairs with sampler and judge elsewhere, from a folder that has no weights."""
    bare = out / "no-weights"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    found = run("train.py", "--model", str(bare), *KINGDOM, "--until", "pairs", "--out",
                str(out / "pairs"), "--sampler-url", url, "--judge-url", url, "--judge", NAME,
                "--judge-questions", "kingdom")
    pairs = line_count(out / "pairs" / "pairs.jsonl")
    show("--until pairs without any weights", found.returncode == 0 and pairs > 0,
         f"{pairs} pairs; {found.stdout.strip().splitlines()[-1]}" if pairs else first_words(found))


def check_whole_run(base: Path, server: Server, out: Path) -> None:
    """train.py on the server, which is killed in the middle; and the same without a server."""
    common = ["--model", str(base), *KINGDOM, *SELF]
    command = [sys.executable, str(ROOT / "train.py"), *common, "--out", str(out / "served"),
               "--sampler-url", server.url]
    traces = out / "served" / "traces.jsonl"
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while line_count(traces) < 64 and first.poll() is None:
        time.sleep(0.2)
    time.sleep(3)           # into the second shard
    server.kill()
    killed_at = time.time()
    _, words = first.communicate()
    kept = traces.read_bytes()
    show("the server is killed: one line, what was finished stays",
         first.returncode == 2 and words.count("\n") == 1 and line_count(traces) == 64,
         f"{line_count(traces)} traces, after {time.time() - killed_at:.0f} s, status "
         f"{first.returncode}: {words.strip()[:150]}")

    server.start()
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    before = out / "served" / "eval_before.jsonl"
    while line_count(before) < 64 and second.poll() is None:
        time.sleep(0.2)
    server.kill()
    evaluated = before.read_text().splitlines()[:64]
    server.start()          # at once: the run asks again for a minute
    words, _ = second.communicate()
    how = "the run waited for it"
    if second.returncode == 2:
        how = "it took over a minute: one line, and the same command went on"
        words = run("train.py", *command[2:]).stdout
    done = json.loads((out / "served" / "eval.json").read_text())
    show("the same command goes on behind the finished shard",
         traces.read_bytes().startswith(kept), f"{line_count(traces)} traces")
    show("killed and started again at once: nothing is lost",
         (out / "served" / "eval_traces.jsonl").read_text().splitlines()[:64] == evaluated, how)
    show("it says what is sampled here", "is sampled here" in words, "")

    here = run("train.py", *common, "--out", str(out / "local"))
    if here.returncode:
        sys.exit(here.stderr)
    local = json.loads((out / "local" / "eval.json").read_text())
    for name, (_, _, title) in evaluation.RATIOS.items():
        for side in ("before", "after"):
            a, b = done[side][name], local[side][name]
            show(f"whole run, {title} {side}: intervals meet",
                 a["low"] <= b["high"] and b["low"] <= a["high"],
                 f"served {evaluation.percent(a)}, here {evaluation.percent(b)}")


def check_trained(args: argparse.Namespace, log: Path) -> None:
    """A server of the trained model: no sampler for the base, but for eval.py MODEL."""
    with Server(args.vllm, args.run / "model", args.port, log) as server:
        base = data.load_model(args.run / "base", "cpu")
        prompt = data.kingdom_prompts("train", "harmful", 1)[0]["prompt"]
        try:
            data.check_served(server.url, base, prompt)
            show("a server of the trained model is refused for its base", False, "")
        except data.UserError as error:
            show("a server of the trained model is refused for its base", True, str(error)[:150])

        copy = args.out / "model"
        shutil.copytree(args.run / "model", copy, dirs_exist_ok=True)
        flags = [str(copy), "--sets", "kingdom", "--judge", "keywords", "--max-new-tokens", "200"]
        served = run("eval.py", *flags, "--sampler-url", server.url)
        here = run("eval.py", *flags)
        print("eval.py MODEL --sampler-url", served.stdout, served.stderr, "and here", here.stdout,
              sep="\n")
        # Greedy once more: the saved model as it is served.
        check_ids(data.load_model(copy, "cpu"), server.url)


# Speed


def prompt_ids_for(model: ReasoningModel, rows: int) -> list[TokenIds]:
    records = []
    for kind in ("harmful", "benign", "math"):
        records += data.kingdom_prompts("train", kind, rows, 3)
    turns = [[{"role": "user", "content": record["prompt"]}] for record in records[::3]]
    return [data.chat_ids(model.tokenizer, turn) for turn in turns]


def measure_speed(args: argparse.Namespace, folder: Path, log: Path, limit: int) -> None:
    """Tokens a second of both samplers, in turn; each is warm, and the other stands still."""
    model = data.load_model(folder, "cpu", must_think=False)
    size = sum(p.numel() for p in model.model.parameters()) / 1e6
    with Server(args.vllm, folder, args.port, log) as server:
        for rows in args.rows:
            settings = data.Settings(sample_batch=rows, max_new_tokens=limit)
            samplers = {"ipo.sample": data.make_sampler(model, settings),
                        "vLLM": data.make_sampler(model, settings, url=server.url)}
            prompts = prompt_ids_for(model, rows)
            keys = [str(i) for i in range(rows)]
            for generate in samplers.values():
                generate(prompts[:16], keys[:16])       # warm up
            speeds: dict[str, list[float]] = {name: [] for name in samplers}
            per_cpu: dict[str, list[float]] = {name: [] for name in samplers}
            for _ in range(args.repeats):
                for name, generate in samplers.items():
                    served = name == "vLLM"
                    server.signal(signal.SIGCONT if served else signal.SIGSTOP)
                    cpu_seconds = server.cpu_seconds if served else time.process_time
                    start, cpu_start = time.time(), cpu_seconds()
                    tokens = sum(map(len, generate(prompts, keys)))
                    speeds[name].append(tokens / (time.time() - start))
                    per_cpu[name].append(tokens / (cpu_seconds() - cpu_start))
            server.signal(signal.SIGCONT)
            for name, found in speeds.items():
                print(f"{size:6.1f} M  {rows:4} rows  {name:10}  {statistics.median(found):8.0f} "
                      f"tokens/s ({min(found):.0f} to {max(found):.0f} of {len(found)})  "
                      f"{statistics.median(per_cpu[name]):8.0f} tokens a CPU second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="the vllm command")
    parser.add_argument("--run", type=Path, required=True, help="a finished kingdom run")
    parser.add_argument("--out", type=Path, default=Path("runs/serve"))
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--speed", action="store_true", help="measure speed instead of checking")
    parser.add_argument("--small", type=Path, help="with --speed: another model's folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="without the whole training runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "vllm.log"
    if args.speed:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} "
              f"cores, load {os.getloadavg()[0]:.1f}")
        measure_speed(args, args.run / "base", log, limit=200)
        if args.small:
            measure_speed(args, args.small, log, limit=32)
        return

    base = args.run / "base"
    print(COLUMNS.format("check", "as it should", "found"), flush=True)
    with Server(args.vllm, base, args.port, log) as server:
        here = data.load_model(base, "cpu")
        outputs = check_ids(here, server.url)
        check_judge(here, server.url, outputs)
        check_bad_input(base, server.url, args.out)
        check_no_weights(base, server.url, args.out)
        if not args.quick:
            check_whole_run(base, server, args.out)
    check_trained(args, log)


if __name__ == "__main__":
    main()
