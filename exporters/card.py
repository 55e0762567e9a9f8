"""The model card: what the files are, where they come from, and what was measured of them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from models import ModelInfo

TEXT = """---
{data}
---

# {name}, {made} for {dataset}

An image classifier of {classes} classes for RGB images of {side}x{side}, with {parameters:,} parameters.

| file | top-1, % | bytes | ms, batch of 1 | ms, batch of 32 |
| --- | ---: | ---: | ---: | ---: |
{rows}

On the {images:,} test images of {measured}; latency is the median on {device}, {threads} thread(s). Every file was run
on all of these images before it was kept (export.json).

## Input and output

{interface}

{names}## How it was trained

{trained}

{commands}## Intended use and limits

For images like those of {dataset}, on which it was trained; nothing was measured on others than the above. It always
names one of its {classes} classes, also where an image shows none of them, and its confidence is no warranty. What the
training images leave out or over-represent, it does too.
"""


def write_card(
    path: Path, info: ModelInfo, export: dict, run: dict, recipe: dict, inputs: Sequence[str], licence: str | None
) -> None:
    """Write a model card. It names no folder of this machine.

    Args:
        path: the file, README.md as the hub wants it.
        info: of the network.
        export: the content of export.json.
        run: the content of the run's summary.json, as far as there is one.
        recipe: the run's options but for places; {} where none are known.
        inputs: the flags, with words in place of the values, that name what the run read.
        licence: an identifier of the hub's, for example apache-2.0.
    """
    name, dataset, measured = map(_anywhere, (info.name, info.dataset, export["dataset"]))
    name = name.removesuffix(".json")
    distilled = bool(run.get("teachers"))
    top1 = next(iter(export["files"].values()))["top1"]
    metric = {"metric_type": "accuracy", "metric_value": round(top1 / 100, 4), "dataset_type": measured}
    data = ModelCardData(
        model_name=name,
        license=licence,
        pipeline_tag="image-classification",
        tags=["knowledge-distillation", "onnx"] if distilled else ["onnx"],
        eval_results=[EvalResult(task_type="image-classification", dataset_name=measured, **metric)],
    )
    rows = [
        f"| {name} | {each['top1']:.2f} | {each['bytes']:,} | {each['latency_ms']['1']['p50']:.2f} | "
        f"{each['latency_ms']['32']['p50']:.2f} |"
        for name, each in export["files"].items()
    ]
    text = TEXT.format(
        data=data.to_yaml(),
        name=name,
        made="distilled" if distilled else "trained",
        dataset=dataset,
        measured=measured,
        classes=info.num_classes,
        side=info.image_size,
        parameters=export["parameters"],
        rows="\n".join(rows),
        images=next(iter(export["files"].values()))["images"],
        device=export["measured_on"],
        threads=export["threads"],
        interface=_interface(info, export),
        names=_names(info.class_names),
        trained=_trained(run, export),
        commands=_commands(recipe, inputs),
    )
    path.write_bytes(str(ModelCard(text)).encode(errors="replace"))


def _interface(info: ModelInfo, export: dict) -> str:
    shape = f"[N, 3, {info.image_size}, {info.image_size}]"
    most = "".join(
        f" `{name}` takes up to {each['max_batch']} images at a time."
        for name, each in export["files"].items()
        if "max_batch" in each
    )
    if export["with_preprocessing"]:
        return f"`images`: uint8 {shape}, RGB from 0 to 255. `probabilities`: float32 [N, {info.num_classes}].{most}"
    mean, std = ([round(each, 4) for each in values] for values in (info.mean, info.std))
    return (
        f"`images`: float32 {shape}, RGB in [0, 1] minus the mean {mean}, over the deviation {std}. "
        f"`logits`: float32 [N, {info.num_classes}].{most}"
    )


def _names(names: list[str] | None) -> str:
    """As JSON in a fence, out of which no name can break."""
    if names is None:
        return ""
    return f"The classes, in the order of the outputs:\n\n```json\n{json.dumps(names, ensure_ascii=False)}\n```\n\n"


def _trained(run: dict, export: dict) -> str:
    lines = [f"Weights: sha256 `{export['sha256']}`."]
    if "method" in run:
        lines.append(f"Method `{_anywhere(run['method'])}`, {run['epochs']} epochs, seed {run['seed']}.")
    for teacher in run.get("teachers", []):
        lines.append(f"Teacher: {_anywhere(teacher['model'])}, sha256 `{teacher['sha256']}`.")
    for name, each in export["files"].items():
        if told := each.get("finetuned"):
            lines.append(f"`{name}`: {told['epochs']} more epochs of KD with its roundings in the forward pass.")
    if run.get("loss"):
        lines.append(f"Loss: `{json.dumps(run['loss'])}`.")
    if run.get("git_commit"):
        lines.append(f"Code: commit `{run['git_commit']}`.")
    return " ".join(lines)


def _commands(recipe: dict, inputs: Sequence[str]) -> str:
    """What makes the weights again: a command and a recipe; a spec is that beside the card."""
    if not recipe:
        return ""
    script, kept = "train_teacher.py", {name: _anywhere(value) for name, value in recipe.items() if value is not None}
    if "model" not in recipe:
        script = "distill.py"
        kept |= {"student": "model.json"} if str(recipe.get("student")).endswith(".json") else {}
    words = ["python", script, "--config recipe.yaml", *inputs, "--output_dir RUN"]
    return (
        f"```bash\n{' '.join(words)}\npython export.py RUN\n```\n\nwith `recipe.yaml`:\n\n"
        f"```yaml\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}```\n\n"
    )


def _anywhere(value: object) -> object:
    """An option's value, or a name, without the folders of this machine: FILE.py:NAME, SPEC.json, folder:IMAGES."""
    if isinstance(value, list):
        return [_anywhere(each) for each in value]
    if not isinstance(value, str):
        return value
    kind, given, place = value.partition(":")
    if kind in ("folder", "parquet"):
        return f"{kind}{given}{Path(place).name}"
    parts = value.split("+")  # of --method
    return "+".join(Path(each).name if re.search(r"^[/~.]|\.json$|\.py:", each) else each for each in parts)
