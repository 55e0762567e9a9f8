"""Which teacher is good for students: teachers of several kinds, students they have not seen, seeds, intervals.

python -m benchmarks.evidence benchmarks/plans/tin100.yaml --data tin100=parquet:data/tin100-*.parquet --dry_run
python -m benchmarks.evidence benchmarks/plans/tin100.yaml --data tin100=parquet:data/tin100-*.parquet
python -m benchmarks.evidence benchmarks/plans/tin100.yaml --report

A plan names teachers, students, seeds and what both scripts are given. Every run is one call of train_teacher.py or
distill.py and leaves one JSON file under benchmarks/results/evidence/PLAN/: what was asked, what came out, how alike
student and teacher are, on which device and at which commit. Runs that have one are skipped, an interrupted run goes
on from its checkpoint, and --minutes stops in time and continues at the next call. --report computes the tables from
the JSON files alone.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from common import write_atomically
from data.datasets import load_images
from data.pipeline import Pipeline
from engine.config import RunConfig
from models import load_pretrained
from reports import comparison, metrics
from reports.comparison import ALONE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/evidence"
KEPT = ("method", "model", "parameters", "seed", "top1", "top5", "best", "epochs", "seconds", "images_per_second")
KEPT += ("peak_memory_bytes", "warnings", "device", "versions", "git_commit")


@dataclass
class Run:
    """One call of a script. `teacher` is the run whose folder it reads, `student` what is distilled into."""

    name: str
    script: str
    options: dict
    source: str
    seed: int
    student: str | None = None
    teacher: str | None = None


@dataclass
class Plan:
    """What a plan file says; every mapping holds options of the scripts.

    common: of both scripts. teacher, distill: of all teachers, of all students. teachers: by name, what is a teacher's
    own; `for_each_student: true` trains one a student, `weights: NAME` starts from another teacher of the seed, and
    `distill:` holds options of its students. alone: of students without a teacher; `alone: null` leaves them out.
    """

    name: str
    common: dict
    teacher: dict
    teachers: dict[str, dict]
    students: list[str]
    seeds: list[int]
    distill: dict = field(default_factory=dict)
    alone: dict | None = field(default_factory=dict)
    note: str = ""

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed, teachers before their students."""
        for seed in self.seeds:
            for name, options in self.teachers.items():
                own = self.teacher | {k: v for k, v in options.items() if k not in ("for_each_student", "distill")}
                each = options.get("for_each_student", False)
                for student in self.students if each else [None]:
                    extra = {"student": student} if each else {}
                    start = own.get("weights")
                    weights = {"weights": f"seed{seed}-{start}"} if start else {}
                    run = f"seed{seed}-{name}" + (f"-{plain(student)}" if each else "")
                    yield Run(run, "train_teacher.py", self.common | own | extra | weights, name, seed, student, None)
            for student in self.students:
                if self.alone is not None:
                    options = self.common | self.distill | {"method": "none"} | self.alone | {"student": student}
                    name = f"seed{seed}-{plain(student)}-{ALONE}"
                    yield Run(name, "distill.py", options, ALONE, seed, student)
                for name, teacher in self.teachers.items():
                    folder = f"seed{seed}-{name}" + (f"-{plain(student)}" if teacher.get("for_each_student") else "")
                    options = self.common | self.distill | teacher.get("distill", {}) | {"student": student}
                    run = f"seed{seed}-{plain(student)}-{name}"
                    yield Run(run, "distill.py", options, name, seed, student, folder)


@dataclass
class Campaign:
    """Where and how a plan's runs, by name, are made."""

    runs: dict[str, Run]
    work: Path
    data: dict[str, str]
    deadline: float  # by time.monotonic()
    verbose: bool = False


def plain(name: str) -> str:
    """A name in names of folders."""
    return Path(name).stem.replace(":", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument(
        "--data", nargs="*", default=[], help="NAME=DATASET: what --dataset is where the plan says NAME"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="where the runs' folders are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files are kept")
    parser.add_argument("--only", nargs="*", default=[], help="runs whose names hold one of these words")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the plan's")
    parser.add_argument("--minutes", type=float, help="stop after this long; the next call goes on")
    parser.add_argument("--verbose", action="store_true", help="show every command and what it prints")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, what is done and what is left")
    parser.add_argument("--report", action="store_true", help="print the table of what is done, and write it")
    options = parser.parse_args()
    plan = Plan(name=options.plan.stem, **yaml.safe_load(options.plan.read_text()))
    plan.seeds = options.seeds or plan.seeds
    data = dict(each.split("=", 1) for each in options.data)
    results = options.results / plan.name
    if options.report:
        print(report(plan, results))
        return
    runs = [run for run in plan.runs() if not options.only or any(word in run.name for word in options.only)]
    left = [run for run in runs if not (results / f"{run.name}.json").is_file()]
    print(f"{plan.name}: {len(runs)} runs, {len(runs) - len(left)} done, {len(left)} left")
    if options.dry_run:
        for run in left:
            print(shlex.join(command(run, options.work / plan.name, data)))
        return
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    every = {run.name: run for run in plan.runs()}
    campaign = Campaign(every, options.work / plan.name, data, deadline, options.verbose)
    for run in left:
        record = describe(run, train(run, campaign), campaign)
        write_atomically(results / f"{run.name}.json", json.dumps(record, indent=1) + "\n")
        print(f"{run.name}: {record['top1']:.2f}% in {record['seconds']:.0f} s", flush=True)
    print(f"\n{report(plan, results)}\nwritten: {results}/table.md, and a JSON file a run beside it")


def report(plan: Plan, results: Path) -> str:
    """The plan's tables as Markdown, from its JSON files; written beside them, too."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("seed*.json"))]
    if not records:
        sys.exit(f"{results}: no run is done yet")
    text = f"{plan.note.strip()}\n\n{len(records)} of {len(list(plan.runs()))} runs are done.\n\n".lstrip()
    text += comparison.as_markdown(records, plan.students, list(plan.teachers))
    write_atomically(results / "table.md", text)
    return text


def command(run: Run, work: Path, data: dict[str, str]) -> list[str]:
    """The command that starts a run, its folders below `work`."""
    options = run.options | {"dataset": data.get(run.options["dataset"], run.options["dataset"]), "seed": run.seed}
    if run.teacher:
        options["teacher"] = [str(work / run.teacher)]
    if "weights" in options:
        options["weights"] = str(work / options["weights"])
    recipe = work / f"{run.name}.yaml"  # what a plan says of all students, not every method reads
    write_atomically(recipe, yaml.safe_dump({name: each for name, each in options.items() if each is not None}))
    return [sys.executable, str(ROOT / run.script), "--config", str(recipe), "--output_dir", str(work / run.name)]


def train(run: Run, campaign: "Campaign") -> Path:
    """The finished folder of a run, which is trained, or gone on with, if need be. Exits at the deadline."""
    folder = campaign.work / run.name
    if (folder / "summary.json").is_file():
        return folder
    for needed in filter(None, (run.options.get("weights"), run.teacher)):
        train(campaign.runs[needed], campaign)  # its folder may be on another machine
    words = command(run, campaign.work, campaign.data)
    if (folder / "config.yaml").is_file():
        words += ["--resume_from_checkpoint", "latest"]
    campaign.work.mkdir(parents=True, exist_ok=True)
    left = campaign.deadline - time.monotonic()
    with open(campaign.work / f"{run.name}.log", "a") as log:
        if campaign.verbose:
            print(f"\n$ {shlex.join(words)}", flush=True)
        output = {} if campaign.verbose else {"stdout": log, "stderr": log}
        process = subprocess.Popen(words, cwd=ROOT, **output)
        try:
            code = process.wait(None if left == math.inf else max(1.0, left))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            sys.exit(f"stopped in {run.name}, as --minutes asks; the same command goes on")
    if code:
        tail = (campaign.work / f"{run.name}.log").read_text().splitlines()[-1:]
        sys.exit(f"{shlex.join(words)}\nfailed with exit code {code}: {' '.join(tail)}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # it is finished: only its model is needed
    return folder


def describe(run: Run, folder: Path, campaign: "Campaign") -> dict:
    """What is kept of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    record = {"run": run.name, "source": run.source, "student": run.student, "script": run.script}
    record |= {"options": run.options, **{name: summary[name] for name in KEPT}}
    record |= {"losses": last["losses"], "accuracy": last["accuracy"]}
    record |= {"curve": [round(next(iter(row["accuracy"].values())), 2) for row in rows if row["accuracy"]]}
    if "val_accuracy" in last:
        record["val_accuracy"] = last["val_accuracy"]
    if "gate_entropy" in last:
        entropies = [value for layers in last["gate_entropy"].values() for value in layers.values()]
        record["gate_entropy"] = {"mean": statistics.mean(entropies), "min": min(entropies)}
    teacher = campaign.work / run.teacher if run.teacher else None
    return record | {"test": on_test_images(folder, teacher)}


@torch.no_grad()
def on_test_images(folder: Path, teacher: Path | None) -> dict[str, float]:
    """Confidence, entropy and likelihood of a model on the test split and, with its teacher, how alike they are."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    options = RunConfig(**{name: config[name] for name in RunConfig.__dataclass_fields__ if name in config})
    images = load_images(config["dataset"], config["image_size"], progress=False, options=options)
    models = [load_pretrained(each) for each in (folder, teacher) if each]
    images.mean, images.std = models[0].info.mean, models[0].info.std
    pipeline = Pipeline(images, options, torch.device("cpu"))
    seen: list[list[tuple]] = [[] for _ in models]
    labels = []
    for batch, answers in pipeline.evaluation(images.test, 500):
        labels.append(answers)
        for model, outputs in zip(models, seen, strict=True):
            logits, _, embedding = model(batch, features=True)
            outputs.append((logits, embedding))
    (logits, embedding), *others = [[torch.cat(each) for each in zip(*outputs, strict=True)] for outputs in seen]
    found = {
        "confidence": metrics.confidence(logits),
        "entropy": metrics.entropy(logits),
        "nll": metrics.cross_entropy(logits, torch.cat(labels)),
    }
    for teacher_logits, teacher_embedding in others:
        found["kl"] = metrics.kl_divergence(teacher_logits, logits)
        found["kl_reverse"] = metrics.kl_divergence(logits, teacher_logits)
        found["agreement"] = metrics.agreement(logits, teacher_logits)
        found["cka"] = metrics.linear_cka(embedding, teacher_embedding)
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    main()
