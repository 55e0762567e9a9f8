"""What was promised, beside what is shipped: each exported file is measured, each network counted, once more."""

import hashlib
import sys
from pathlib import Path
from shlex import join

import torch

from common import UserError, read_json
from engine.run_folder import machine
from models import load_pretrained
from models.network import cost
from searching import device
from searching.budget import in_words
from searching.trained import Trained
from shipping.fleet import Fleet
from shipping.folder import STUDENTS

TOLERANCE = 0.05  # of a latency that was measured before: what two measurements may differ by


def measure_fleet(fleet: Fleet) -> dict:
    """The content of fleet.json."""
    searched, measurable = fleet.searched, of_this_device(fleet.searched.get("profile"))
    students = {name: measure_student(fleet.folder / STUDENTS / name) for name in fleet.shipped}
    budgets = []
    for name, budget in fleet.budgets.items():
        entry, student = searched["students"][name], students.get(fleet.students[name])
        promised = dict(entry["costs"])
        promised |= {"ms": entry["measured_ms"]} if "measured_ms" in entry else {}
        each = {"budget": name, "limits": budget.limits, "student": fleet.students[name], "promised": promised}
        limits = {unit: limit for unit, limit in budget.limits.items() if unit != "ms" or measurable}
        each |= {"choice": entry["choice"], "why": entry["why"], "checked": limits.keys() == budget.limits.keys()}
        budgets.append(each | {"over": excess(limits, student) if student else {}})
    teacher = {"path": fleet.teacher, "model": fleet.info.name, "sha256": fleet.info.sha256}
    teacher["top1"] = accuracy(Path(fleet.teacher))
    names = list(dict.fromkeys(fleet.students.values()))
    commands = [fleet.search_command, fleet.distill_command(names), *map(fleet.export_command, names)]
    found = {"command": join(["python", *sys.argv]), "teacher": teacher, "dataset": fleet.info.dataset}
    found |= {"seed": fleet.config.seed, "method": fleet.config.method, "budgets": budgets, "students": students}
    found["failed"] = fleet.failed
    found |= {"ranked_by": searched["ranked_by"], "commands": [join(["python", *words]) for words in commands]}
    name, version = device.here()
    found |= {"measured_on": name, "onnxruntime": version, **machine()}
    return found | {"doubts": doubts(fleet, measurable)}


def of_this_device(profile: dict | None) -> bool:
    """Whether the latencies that members were chosen by are those of this device, as far as its name tells."""
    return profile is None or (profile["device"], profile["onnxruntime"]) == device.here()


def measure_student(folder: Path) -> dict:
    """What is known of a student: its accuracy, its size counted anew, and of each file the accuracy that it loses and
    the milliseconds of an image with one thread, measured now as search.py measures."""
    network, exported = load_pretrained(folder), read_json(folder / "export/export.json")
    if exported.get("with_preprocessing"):
        raise UserError(f"{folder}/export: was made --with_preprocessing; a fleet measures files that take float32")
    side = network.info.image_size
    with torch.no_grad():
        parameters, flops, _ = cost(network.eval(), side)
    found = {"top1": accuracy(folder), "sha256": network.info.sha256, "params": parameters, "macs": flops / 2}
    found["files"] = {}
    for name, each in exported["files"].items():
        if not name.endswith(".onnx"):  # export.py's own, which no latency was promised for
            continue
        path = folder / "export" / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != each["sha256"]:
            raise UserError(f"{path}: is not the file that was proven; remove {path.parent}, and it is exported again")
        times = [device.milliseconds(path, (3, side, side), device.SECONDS) for _ in range(device.PASSES)]
        kept = {key: each[key] for key in ("top1", "bytes", "sha256")}
        found["files"][name] = kept | {"ms": min(times), "drop": each["network_top1"] - each["top1"]}
    return found


def excess(limits: dict[str, float], student: dict) -> dict[str, list[str]]:
    """By file: where it, or the student, costs more than the limits, in words; without the files that keep to them."""
    sizes = [
        f"takes {in_words(unit, student[unit])}, more than {in_words(unit, limit)}"
        for unit, limit in limits.items()
        if unit != "ms" and student[unit] > limit
    ]
    found = {}
    for name, each in student["files"].items():
        found[name] = list(sizes)
        if (limit := limits.get("ms")) and each["ms"] > (1 + TOLERANCE) * limit:
            most = f"{in_words('ms', limit)} + {TOLERANCE:.0%}"
            found[name].append(f"{name} takes {in_words('ms', each['ms'])}, more than {most}")
    return {name: why for name, why in found.items() if why}


def accuracy(folder: Path) -> float | None:
    """Top-1 on the test split as a run's summary has it, percent; None where there is none."""
    try:
        found = read_json(folder / "summary.json").get("top1")
    except UserError:
        return None
    return found if isinstance(found, float) else None


def doubts(fleet: Fleet, measurable: bool) -> list[str]:
    """What the user should not believe without more."""
    profile, spearman, found = fleet.searched.get("profile"), fleet.searched["spearman"], []
    if profile and not profile["trusted"]:
        found.append("The profile does not predict whole members well: a faster or better one may have been missed.")
    if not measurable:
        found.append(f"Members were chosen by latencies of {profile['device']}; here no budget in ms could be checked.")
    trained = Trained(**known).in_words() if (known := fleet.searched.get("trained")) else None
    if fleet.searched["scored_paths"] == 0:
        why = trained or "nothing was looked at of what they can learn"
        found.append(f"Members were ranked by multiply-accumulates: {why}.")
    else:
        known = "" if spearman is None else f"; Spearman's correlation on paths not seen was {spearman:.2f}"
        why = trained or "no member was trained to check that"
        found.append(f"Members were ranked by scores of the supernet{known}; {why}.")
    if fleet.searched["scored_paths"] and not fleet.held_out:
        found.append("These scores are on images that the teacher was trained on: it held none out.")
    if len({*fleet.students.values()}) < len(fleet.budgets):
        found.append("Budgets whose best member is the same share a student.")
    found.append(f"One seed ({fleet.config.seed}): another gives other accuracies, and maybe other members.")
    found.append("Latency is the least processor time of one image with one thread; batches and load change it.")
    return found
