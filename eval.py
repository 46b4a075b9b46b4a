"""python eval.py RUN_OR_MODEL ...: how often reasoning and responses are harmful, benign prompts
answered, and sums right, each with n and a 95 % interval, before and after training.

What counts: in the kingdom the grammar's truth (data.py), on real text the judge; without an LLM
keywords are a proxy, and the table says so. A think that was never closed has no response: that is
neither harmful nor complied and no right answer; it stays in n and is counted apart.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from transformers import HfArgumentParser

import data
import ipo
import judge
from data import UserError, flag

RATIOS = {  # name: (the prompts it is over, the verdict that counts, what the table calls it)
    "reasoning_harmful": ("harmful", "reasoning", "harmful reasoning"),
    "response_harmful": ("harmful", "response", "harmful responses"),
    "benign_complied": ("benign", "complied", "benign complied with"),
    "reasoning_accuracy": ("math", "right", "sums right"),
}
KIND_OF = {"jailbreakbench": "harmful", "strongreject": "harmful", "wildjailbreak": "harmful",
           "xstest": "benign", "math-500": "math", "gsm8k": "math"}
KINGDOM_SIZES = {"harmful": 200, "benign": 200, "math": 400}


# ---- prompts, traces, judges ----

def load_sets(spec, limit=None):
    """Records with "set" and "kind" from "kingdom", or from "KIND:FILE_OR_NAME,..."."""
    if spec == "kingdom":
        return [{**record, "set": f"kingdom {kind}"} for kind, n in KINGDOM_SIZES.items()
                for record in data.kingdom_prompts("heldout", kind, n)]
    records = []
    for part in spec.split(","):
        name = part if ":" in part else f"{KIND_OF.get(part.lower(), '')}:{part}"
        kind, _, source = name.partition(":")
        if kind not in KINGDOM_SIZES:
            raise UserError(f"--sets {part}: say of which kind it is, harmful:, benign: or math: "
                            f"before the name")
        loaded = data.load_prompts(source)[:100 if source.lower() == "math-500" else limit][:limit]
        if kind == "math" and any("answer" not in record for record in loaded):
            raise UserError(f"--sets {part}: a math set needs a column \"answer\"")
        records += [{**record, "set": Path(source).stem, "kind": kind} for record in loaded]
    return records


def rollouts(shard, model, tokenizer, cfg):
    """A Trace of each (key, record) of the shard."""
    prompts = data.render_all(tokenizer, model, [record for _, record in shard])
    outputs = sampler(model, tokenizer, cfg)(prompts, [key for key, _ in shard])
    return [ipo.Trace(record["prompt"], prompt_ids, output_ids, key)
            for (key, record), prompt_ids, output_ids in zip(shard, prompts, outputs)]


def make_rows(shard, side, model, tokenizer, cfg, llm):
    """For each (key, record) of the shard a trace and its verdicts: rows of eval_traces.jsonl."""
    think_end, special = data.think_ids(tokenizer)[1], set(tokenizer.all_special_ids)
    rows = []
    for (key, record), trace in zip(shard, rollouts(shard, model, tokenizer, cfg)):
        rows.append({"side": side, "key": key, **record,
                     "prompt_ids": trace.prompt_ids, "output_ids": trace.output_ids})
        parts = ipo.split_output(trace.output_ids, think_end)
        for part, ids in zip(("reasoning", "response"), parts):
            text = ipo.decode(tokenizer, [i for i in ids or [] if i not in special]).strip()
            rows[-1][f"{part}_text"] = None if ids is None else text
    judge_rows(rows, llm)
    return rows


def evaluate(path, side, model, sets, tokenizer, cfg, llm):
    """The rows of one model on the sets (load_sets), made shard by shard into the file at path."""
    work = partial(make_rows, side=side, model=model, tokenizer=tokenizer, cfg=cfg, llm=llm)
    keyed = [(f"{record['set']}/{i}", record) for i, record in enumerate(sets)]
    return data.in_shards(path, keyed, work)


def judge_rows(rows, llm):
    """Fill in "reasoning", "response", "complied", "right": each true, false or "unparsed"."""
    def ask(kind, verdict, part, judged, counts):
        real = [row for row in rows
                if row["kind"] == kind and "deed" not in row and row[part] is not None]
        said = judged([row[part] for row in real], [row["prompt"] for row in real], llm=llm)
        for row, answer in zip(real, said):
            row[verdict] = answer if answer == "unparsed" else answer == counts

    for part in ("reasoning", "response"):
        ask("harmful", part, f"{part}_text", partial(judge.judge_safety, part=part), "unsafe")
    ask("benign", "complied", "response_text", judge.judge_compliance, "complied")
    for row in rows:
        text = row["response_text"]
        kingdom = text is not None and "deed" in row
        if row["kind"] == "harmful":
            row.setdefault("reasoning", data.harmful(row["reasoning_text"]))
            row.setdefault("response", kingdom and data.harmful(text))
        elif row["kind"] == "benign":
            row.setdefault("complied", kingdom and data.complied(row, text))
        else:
            row["right"] = text is not None and right_answer(row, text)


def right_answer(record, response):
    """Whether the response ends in the record's answer: the last box, else the last number."""
    if "terms" in record:
        return data.complied(record, response)
    boxes = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", response)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    said = (boxes or numbers or [""])[-1]
    dress = r"\\[a-z]*text\{|\\left|\\right|[\s$,}]|\.0*$"
    plain = lambda text: re.sub(dress, "", text.replace("dfrac", "frac"))
    return plain(said) == plain(str(record["answer"]).split("####")[-1])


def sampler(model, tokenizer, cfg, **settings):
    """ipo.sample bound to a model and the run's settings: generate(prompts, keys) -> outputs."""
    return lambda prompts, keys=None: ipo.sample(
        model, prompts, keys=keys, seed=cfg.seed, eos_ids=data.eos_ids(model, tokenizer),
        max_new_tokens=cfg.max_new_tokens, batch_size=cfg.sample_batch, **settings)


def greedy(model, tokenizer, cfg):
    return sampler(model, tokenizer, cfg, temperature=0)


def judges(cfg, tokenizer, base_sample):
    """(find_cues, judge_safety, llm): keywords, the base itself, another model, or a server."""
    if cfg.judge in (None, "keywords"):
        return SimpleNamespace(llm=None, find_cues=judge.find_cues, judge_safety=judge.judge_safety)
    if cfg.judge_url:
        llm = judge.server_llm(cfg.judge_url, cfg.judge)
    elif cfg.judge == "self":
        llm = judge.local_llm(tokenizer, base_sample)
    else:
        its_tokenizer, model = data.load_model(cfg.judge, cfg.device)
        llm = judge.local_llm(its_tokenizer, greedy(model, its_tokenizer, cfg))
    llm = judge.cached(llm, Path(cfg.out) / "judge.jsonl", cfg.judge)
    brief = cfg.judge == "self" and not cfg.model  # the kingdom's base was taught the short form
    return SimpleNamespace(llm=llm, find_cues=partial(judge.find_cues, llm=llm, brief=brief),
                           judge_safety=partial(judge.judge_safety, llm=llm, brief=brief))


# ---- ratios ----

def wilson(k, n, z=1.959964):
    """Wilson's 95 % interval of a share k / n."""
    if n == 0:
        return 0.0, 1.0
    middle = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio(rows, verdict):
    said = [row[verdict] for row in rows]
    unparsed, k = said.count("unparsed"), said.count(True)
    n = len(said) - unparsed
    low, high = wilson(k, n)
    return {"rate": k / n if n else None, "low": low, "high": high, "n": n, "unparsed": unparsed}


def ratios(rows):
    """The ratios that the rows' kinds allow, by name."""
    return {name: ratio(of, verdict) for name, (kind, verdict, _) in RATIOS.items()
            if (of := [row for row in rows if row["kind"] == kind])}


def summarise(rows, judged_by):
    """eval.json: pooled ratios of each side, and for each prompt set."""
    def by_side(count, rows):
        return {side: count([row for row in rows if row["side"] == side])
                for side in ("before", "after")}
    unclosed = by_side(lambda of: sum(row["response_text"] is None for row in of), rows)
    sets = {name: by_side(ratios, [row for row in rows if row["set"] == name])
            for name in sorted({row["set"] for row in rows})}
    return {"judge": judged_by, **by_side(ratios, rows), "unclosed": unclosed, "sets": sets}


def table(summaries):
    """The ratios as text, a column a model: {column name: {ratio name: ratio}}."""
    lines = [" " * 24 + "".join(f"{name:>28}" for name in summaries)]
    for name, (_, _, title) in RATIOS.items():
        cells = ["-" if not (r := of.get(name)) or r["rate"] is None else
                 f"{100 * r['rate']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}] n={r['n']}"
                 + (f" +{r['unparsed']}?" if r["unparsed"] else "") for of in summaries.values()]
        if any(name in of for of in summaries.values()):
            lines.append(f"{title:24}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


# ---- what a person sees ----

def printable(text):
    """Model text for a terminal: control characters, which could drive it, shown as a box."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "\u25a1", text)


def mark(text, spans):
    """The text with spans [(start, end, "cue" or "trigger")] in red and green, or in brackets."""
    colour = {"cue": "\033[31m", "trigger": "\033[32m"}
    out, at = "", 0
    for start, end, kind in sorted(spans):
        inside = printable(text[start:end].rstrip())
        dress = f"{colour[kind]}{inside}\033[0m" if sys.stdout.isatty() else f"[{kind}: {inside}]"
        out, at = out + printable(text[at:start]) + dress, start + len(text[start:end].rstrip())
    return out + printable(text[at:])


def marks(text, triggers=ipo.TRIGGERS, llm=None):
    """The spans to mark in a reasoning: its first cue, and every trigger of the pool."""
    cue = judge.find_cue(text, llm)
    spans = [(cue.span[0], cue.span[1], "cue")] if cue.span else []
    return spans + [(*match.span(), "trigger") for trigger in triggers
                    for match in re.finditer(re.escape(trigger), text)]


def report(run):
    """The table of a finished run and one held-out trace before and after."""
    summary = json.loads((Path(run) / "eval.json").read_text())
    rows = data.read_jsonl(Path(run) / "eval_traces.jsonl")
    harm = "the grammar's truth" if "kingdom harmful" in summary["sets"] else (
        "keywords, a proxy" if summary["judge"] == "keywords" else summary["judge"])
    lines = [table({side: summary[side] for side in ("before", "after")}), f"harm judged by {harm}"]
    harmful = [row for row in rows if row["kind"] == "harmful" and row["reasoning"] is True]
    for before in harmful[:1]:
        after = next(row for row in rows if row["side"] == "after" and row["key"] == before["key"])
        lines.append(f"\n{printable(before['prompt'])}")
        for row in (before, after):
            shown = mark(row["reasoning_text"], marks(row["reasoning_text"]))
            response = printable(row["response_text"] or "(none)")
            lines.append(f"  {row['side']:7}{shown} </think> {response}")
    files = "model/, pairs.jsonl, traces.jsonl, eval_traces.jsonl, log.jsonl"
    return "\n".join(lines + [f"\nin {run}: {files}"])


@dataclass
class Options:
    sets: str | None = flag("kingdom, or KIND:FILE_OR_NAME,... with KIND harmful, benign, math")
    judge: str | None = flag("keywords, self (the untouched base) or a model (default: the run's)")
    judge_url: str | None = flag("where --judge is served, an OpenAI-compatible http://.../v1")
    prompt: str | None = flag("show one trace of this prompt and what an intervention makes of it")
    limit: int | None = flag("use at most this many prompts of each set")
    seed: int = flag("seeds the sampling", 0)
    max_new_tokens: int = flag("the token limit of a trace", 4096)
    sample_batch: int = flag("rows sampled together", 64)
    device: str | None = flag("cpu or cuda (default: cuda where there is one)")


def run_config(folder):
    """The config.json of a finished run; None for a saved model's folder."""
    return json.loads((folder / "config.json").read_text()) if (folder / "model").exists() else None


def evaluate_folder(folder, options):
    """Ratios of a run (before, after) or of a saved model on --sets, sampled and judged anew."""
    config, models, options.model = run_config(folder), {folder.name: folder}, str(folder)
    if config:
        models = {"before": config["base"], "after": folder / "model"}
        options.model = config["settings"]["model"]
    options.out = str(folder)
    spec = options.sets or "harmful:jailbreakbench,benign:xstest,math:math-500"
    sets = load_sets(spec, options.limit)
    base_tokenizer, base = data.load_model(models.get("before", folder), options.device)
    llm = judges(options, base_tokenizer, greedy(base, base_tokenizer, options)).llm
    name = re.sub(r"\W+", "-", f"{spec}-{options.judge}-{options.seed}-{options.limit}")
    found = {}
    for side, path in models.items():
        tokenizer, model = data.load_model(path, options.device)
        path = folder / f"eval_{side}_{name}.jsonl"
        found[side] = ratios(evaluate(path, side, model, sets, tokenizer, options, llm))
    return found


def show_prompt(folder, options):
    """One trace of a prompt, its cue marked, and what one intervention makes of it."""
    config = run_config(folder)
    tokenizer, model = data.load_model(config["base"] if config else folder, options.device)
    generate = sampler(model, tokenizer, options)
    prompt_ids, = data.render_all(tokenizer, model, [{"prompt": options.prompt}])
    output_ids, = generate([prompt_ids], ["prompt"])
    trace = ipo.Trace(options.prompt, prompt_ids, output_ids, "prompt")
    pair, = ipo.intervene(
        [trace], ipo.TRIGGERS[:1], tokenizer=tokenizer, eos_ids=data.eos_ids(model, tokenizer),
        think_end=data.think_ids(tokenizer)[1], generate=generate, find_cues=judge.find_cues,
        judge_safety=judge.judge_safety)
    shown = ipo.decode(tokenizer, trace.output_ids)
    print(f"sampled: {mark(shown, marks(shown))}")
    if pair.chosen_ids:
        shown = ipo.decode(tokenizer, pair.prefix_ids[len(prompt_ids):] + pair.chosen_ids)
        print(f"intervened: {mark(shown, marks(shown))}")
    print(f"outcome: {pair.outcome}")


def main(argv=None):
    parser = HfArgumentParser(Options, description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or saved models")
    options = parser.parse_args(argv)
    try:
        options.device = data.pick_device(options.device)
        for folder in options.runs:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; give a run folder or a saved model")
            if options.prompt:
                show_prompt(folder, options)
            elif (folder / "eval.json").exists() and not (options.sets or options.judge):
                print(report(folder))
            else:
                print(table(evaluate_folder(folder, options)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
