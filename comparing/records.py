"""What is kept of a finished run: one JSON file, from which all tables and the page are computed."""

import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from common import UserError
from comparing.planned import PlannedRun
from data.datasets import load_images
from data.pipeline import Pipeline
from engine.config import RunConfig
from evaluate import EvaluateConfig, transfer
from models import load_pretrained
from models.preprocessing import fitted_to
from reports import metrics
from reports.subject import learnt_from, load_subject

KEPT = ("method", "model", "parameters", "seed", "top1", "top5", "best", "epochs", "seconds", "images_per_second")
KEPT += ("peak_memory_bytes", "warnings", "device", "versions", "git_commit")


def recorded(run: PlannedRun, records: Path) -> dict | None:
    """The record of a run, if it was made with these options; of one that has no key, by its name."""
    path = records / f"{run.name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        known = record.get("key", run.key) == run.key and run.transfer.keys() <= record.get("transfer", {}).keys()
    except (ValueError, AttributeError):
        raise UserError(f"--records {path}: is no record of a run") from None
    return record | {"variant": record.get("variant", run.method)} if known else None


def describe(run: PlannedRun, runs: Path) -> dict:
    """The record of a run whose folder below `runs` is finished.

    `run` is its name, `source` the kind of teacher that it is or has ("alone": none), `variant` how it was distilled,
    `options` what the plan asks, `curve` the test accuracy by epoch (None where it was not evaluated), `kl_curve` the
    training loss's KL in nats, before its weight, by epoch, where there is one, `branches` the accuracy of each branch
    by epoch, `gates` their probabilities at the end, `transfer` top-1 of linear classifiers by data set, `test`
    measures on the test images (KL, entropy and likelihood in nats). The rest is of the run's own summary.json.
    """
    folder = runs / run.folder
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last, epochs = rows[-1], [row for row in rows if row["epoch"] >= 1]  # up to 0 they are the warm-up's
    record = {"run": run.name, "key": run.key, "source": run.source, "student": run.student, "script": run.script}
    record |= {"variant": run.method, "command": shlex.join(["python", *run.command(runs)]), "folder": str(folder)}
    record |= {"options": run.options, **{name: summary[name] for name in KEPT}}
    record |= {"losses": last["losses"], "accuracy": last["accuracy"]}
    name, *branches = last["accuracy"]
    record |= {"curve": accuracies(epochs, name)}
    if "kl" in last["losses"]:
        record["kl_curve"] = [round(row["losses"]["kl"], 4) for row in epochs]
    record |= {"branches": {each: accuracies(epochs, each) for each in branches}}
    if "val_accuracy" in last:
        record["val_accuracy"] = last["val_accuracy"]
    if "gate_entropy" in last:
        entropies = [value for layers in last["gate_entropy"].values() for value in layers.values()]
        record["gate_entropy"] = {"mean": statistics.mean(entropies), "min": min(entropies)}
        record["gates"] = last["gates"]
    taught_by = [runs / run.teacher.folder] if run.teacher else [Path(each) for each in run.options.get("teacher", [])]
    if run.transfer:
        record["transfer"] = transferred(folder, run.transfer)
    return record | {"test": on_test_images(folder, [each for each in taught_by if each.is_dir()][:1])}


def accuracies(rows: Iterable[dict], name: str) -> list[float | None]:
    """Top-1 of a network by the rows of metrics.jsonl; None where it was not evaluated."""
    return [round(row["accuracy"][name], 2) if row["accuracy"] else None for row in rows]


def transferred(folder: Path, sets: Mapping[str, int]) -> dict[str, float]:
    """Top-1 in percent of a linear classifier on a run's frozen embeddings, by data set, trained for so many epochs."""
    accelerator, found = Accelerator(), {}
    subject = load_subject(str(folder))
    subject.network.to(accelerator.device).eval()
    for name, epochs in sets.items():
        config = EvaluateConfig(transfer=name, transfer_epochs=epochs)
        found[name] = transfer(config, subject, accelerator)["top1"]
    return found


@torch.no_grad()
def on_test_images(folder: Path, teachers: Sequence[Path]) -> dict[str, float]:
    """Confidence, entropy and likelihood of a model on the test split and, with its teacher, how alike they are.

    Of a run with --exclude_classes also top-1 in percent on the classes that it trained on, and on those it left out.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text())
    options = RunConfig(**{name: config[name] for name in RunConfig.__dataclass_fields__ if name in config})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load_pretrained(folder).to(device)
    fitting = [fitted_to(load_pretrained(each), student, **learnt_from(folder, each)) for each in teachers]
    models = [student, *(each.to(device) for each in fitting)]
    images = load_images(config["dataset"], models[0].info.image_size, progress=False, options=options)
    images.mean, images.std = models[0].info.mean, models[0].info.std
    seen: list[list[tuple]] = [[] for _ in models]
    labels = []
    for batch, classes in Pipeline(images, options, device).evaluation(images.test, 500):
        labels.append(classes.cpu())
        for model, outputs in zip(models, seen, strict=True):
            logits, _, embedding = model(batch, features=True)
            outputs.append((logits.cpu(), embedding.cpu()))
    (logits, embedding), *others = [[torch.cat(each) for each in zip(*outputs, strict=True)] for outputs in seen]
    answers = torch.cat(labels)
    found = {
        "confidence": metrics.confidence(logits),
        "entropy": metrics.entropy(logits),
        "nll": metrics.cross_entropy(logits, answers),
    }
    if options.exclude_classes and not options.binary:
        right = 100 * (logits.argmax(1) == answers).double()
        unseen = torch.isin(answers, torch.tensor(options.exclude_classes))
        found |= {"seen": right[~unseen].mean().item(), "unseen": right[unseen].mean().item()}
    for teacher_logits, teacher_embedding in others:
        found["kl"] = metrics.kl_divergence(teacher_logits, logits)
        found["kl_reverse"] = metrics.kl_divergence(logits, teacher_logits)
        found["agreement"] = metrics.agreement(logits, teacher_logits)
        found["cka"] = metrics.linear_cka(embedding, teacher_embedding)
    return found
