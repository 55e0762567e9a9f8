"""Search a teacher's pool for the students that are best within budgets of latency, parameters and MACs.

python search.py --teacher runs/generic --budgets 0.05ms 0.08ms 100kparams,2Mmacs
python search.py --teacher runs/generic --write_blocks blocks   # then on the device: python profile_device.py
python search.py --teacher runs/generic --budgets 0.5ms --profile profile.json --output_dir runs/searched
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

import torch

from common import UserError, check_writable, write_atomically
from engine.command_line import parse
from engine.config import ScriptOptions
from engine.console import Console
from engine.distributed import run_script
from engine.run_folder import machine
from models import ModelInfo, serialised
from models.network import cost
from models.pool import NAS_STUDENTS, Pool, PoolNet
from models.weights import LAYERS
from reports.subject import Subject, load_subject
from searching import device
from searching.blocks import write_folder, write_whole
from searching.budget import check_possible, is_name, parse_budgets
from searching.choice import Field, choose
from searching.members import Members
from searching.options import SearchOptions
from searching.pareto import MOST, front, plot, rows
from searching.paths import FILE as SUPERNET
from searching.profile import Profile, read_profile
from searching.ranking import Ranking, by_macs
from searching.scoring import Paths, score_pool
from searching.trained import Trained, judge_ranking, read_trained

RESULT, PROFILE, PLOT = "search.json", "profile.json", "pareto.png"


@dataclass
class SearchConfig(SearchOptions, ScriptOptions):
    """Options of search.py.

    Args:
        teacher: the run folder of a trained teacher; one of --method gtn brings its pool and, where it was trained with
            --save_supernet, the supernet that members are scored by.
        pool: the pool of a teacher that brings none; default: the paper's.
        write_blocks: a new folder for what is to be measured on another device; nothing is searched then.
        output_dir: folder of what is found; default: search in the teacher's.
        overwrite: replace what an earlier search left there.
    """

    title = "search"

    teacher: str | None = None
    pool: Pool | None = None
    write_blocks: str | None = None
    output_dir: str | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise UserError for options that do not go together, or outside their range."""
        if self.teacher is None:
            raise UserError("--teacher: name the run folder of a trained teacher")
        if self.write_blocks is None:
            parse_budgets(self.budgets)
        if self.finalists < 1:
            raise UserError(f"--finalists {self.finalists}: must be at least 1")
        if self.pool is not None:
            self.pool.check()


def main() -> None:
    config, console = parse(SearchConfig, __doc__, {}), Console(True)
    subject = load_subject(config.teacher, "--teacher")
    info, members = subject.info, Members(pool_of(subject, config))
    if config.write_blocks:
        return write_blocks(Path(config.write_blocks), members, info, config, console)
    budgets, target = parse_budgets(config.budgets), Path(config.output_dir or subject.folder / "search")
    check_target(target, config.overwrite)
    costs = members.sizes(info.num_classes, info.image_size)
    console.print(f"{len(members):,} members for {info.num_classes} classes of {info.image_size}x{info.image_size}")
    profile = None
    if config.profile or any("ms" in budget.limits for budget in budgets):
        profile = find_profile(target, members, info, config, console)
        costs["ms"] = profile.latency()
        console.print("\n".join(profile.lines()))
        if not measured_here(profile):
            console.print(
                f"latencies: not of this device ({', ONNX Runtime '.join(device.here())}): no finalist is measured "
                "whole here; leave budgets in ms some room"
            )
    for budget in budgets:  # before what takes long
        check_possible(budget, members, costs)
    ranking, paths, trained = rank(members, costs, subject, config, console)
    latencies = Latencies(members, info) if profile and measured_here(profile) else None
    score = paths.score if ranking.measured else None
    every = Field(members, costs, ranking, config.finalists, score, latencies)
    chosen = {budget.name: choose(budget, every) for budget in console.through(budgets, len(budgets), "budgets")}
    others = other_students(info, latencies, console)
    remove_earlier(target)
    chosen = write_students(target, chosen, members, paths)
    found = {"profile": profile and profile.summary(), "trained": trained and asdict(trained)}
    show(write(target, chosen, every, others, found, config), target, console)


def pool_of(subject: Subject, config: SearchConfig) -> Pool:
    """The pool that the teacher was trained for, else that of --pool, else the paper's."""
    info = subject.info
    if info.pool and config.pool:
        raise UserError(f"--pool: the teacher in {config.teacher} has a pool of its own; leave --pool out")
    return (Pool(**info.pool) if info.pool else config.pool or Pool()).for_images(info.image_size)


def write_blocks(folder: Path, members: Members, info: ModelInfo, config: SearchConfig, console: Console) -> None:
    """What another device is measured with: all of it or nothing, and a second start ends what a killed one began."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--write_blocks {folder}: is there already; name a new folder")
    check_writable("--write_blocks", folder)
    target = Path(os.path.realpath(folder))  # no link: it is replaced
    place = target.with_name(f".{target.name}.blocks.tmp")
    shutil.rmtree(place, ignore_errors=True)
    try:
        write_folder(place, members, info.num_classes, info.image_size, config.seed, console.through)
        place.replace(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    console.print(
        f"written: {folder}\nnext: copy it to the device, there pip install onnxruntime, python profile_device.py, and "
        "bring profile.json back for search.py --profile profile.json"
    )


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError for a folder that is not this script's to write."""
    names = {each.name for each in target.iterdir()} if target.is_dir() else set()
    names -= {name for name in names if name.startswith(".") and name.endswith(".tmp")}  # of a killed search
    if target.exists() and (not target.is_dir() or names - {RESULT, PROFILE, PLOT, "students"}):
        raise UserError(f"--output_dir {target}: holds files that are no search's; choose another folder")
    if RESULT in names and not overwrite:
        raise UserError(f"--output_dir {target}: holds a search; --overwrite replaces it")
    check_writable("--output_dir", target / RESULT)


def remove_earlier(target: Path) -> None:
    """Remove what an earlier search found, or a killed one wrote, but for its latencies; other files in students/ stay.

    search.json goes first, and is written last: a folder that has one holds what it names, and no other specs.
    """
    for name in (RESULT, PLOT):
        (target / name).unlink(missing_ok=True)
    for path in list((target / "students").glob("*")):
        if path.suffix in (".json", ".safetensors") and is_name(path.stem):
            path.unlink()
    for leftover in [*target.glob(".*.tmp"), *target.glob("students/.*.tmp")]:
        leftover.unlink(missing_ok=True)


def find_profile(target: Path, members: Members, info: ModelInfo, config: SearchConfig, console: Console) -> Profile:
    """That of --profile, or what an earlier search on this device left in `target`, if it is to be trusted, or a new
    one."""
    if config.profile:
        return read_profile(Path(config.profile), members, info.num_classes, info.image_size)
    if (target / PROFILE).is_file():
        try:
            profile = read_profile(target / PROFILE, members, info.num_classes, info.image_size)
        except UserError:  # of another teacher's pool
            profile = None
        if profile and profile.trusted and measured_here(profile):
            return profile
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), members, info.num_classes, info.image_size, config.seed, console.through)
        total = device.PASSES * len(list(Path(folder).glob("*.onnx")))
        with console.bar(total, 0, "latencies") as shown:
            content = device.measure(Path(folder), device.SECONDS, lambda done, total: shown.update())
    write_atomically(target / PROFILE, json.dumps(content, indent=1) + "\n")
    return Profile(content, members)


def measured_here(profile: Profile) -> bool:
    """Whether a profile is of this device, as far as its name tells."""
    return (profile.content["device"], profile.content["onnxruntime"]) == device.here()


class Latencies:
    """Milliseconds of whole members, or of other students by their spec, on this device; each is measured once."""

    def __init__(self, members: Members, info: ModelInfo):
        self.members, self.info, self.known = members, info, {}

    def __call__(self, member: int) -> float:
        if member not in self.known:
            self.known[member] = self.of(self.members.pool.spec(self.members.choice(member)))
        return self.known[member]

    def of(self, spec: dict) -> float:
        """Of the student of a spec."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "student.onnx"
            shape = write_whole(spec, self.info.num_classes, self.info.image_size, path)
            return min(device.milliseconds(path, shape, device.SECONDS) for _ in range(device.PASSES))


def rank(
    members: Members, costs: dict, subject: Subject, config: SearchConfig, console: Console
) -> tuple[Ranking, Paths | None, Trained | None]:
    """The ranking of all members; where a supernet was looked at, their paths, and what trained members say of it."""
    kept, macs = (subject.folder / SUPERNET).is_file(), costs["macs"]
    if config.rank == "supernet" and not kept:
        raise UserError(f"--rank supernet: {subject.folder} holds no {SUPERNET}; train_teacher.py --save_supernet")
    if config.rank == "macs" or not kept:
        why = "as --rank says" if config.rank == "macs" else f"as {subject.folder} holds no {SUPERNET}"
        console.print(f"scores: by multiply-accumulates, {why}: the more the better")
        return by_macs(macs), None, None
    trained = read_trained(subject.folder, subject.info.sha256)
    ranking, paths = score_pool(members, macs, subject, config, console.through, console.print)
    if config.rank == "supernet":
        return ranking, paths, trained
    by_scores, why = judge_ranking(ranking, trained)
    if by_scores:
        console.print(f"scores: by the supernet, {why}")
    else:
        console.print(f"scores: by multiply-accumulates, {why} (--rank supernet takes the scores all the same)")
    if trained is None:
        console.print(
            "scores: no member of this teacher's pool has been trained to check the ranking: "
            f"python -m benchmarks.ranking --teacher {quote(config.teacher)}"
        )
    return (ranking if by_scores else by_macs(macs)), paths, trained


def other_students(info: ModelInfo, latencies: Latencies | None, console: Console) -> dict[str, dict[str, float]]:
    """What the paper's students cost: they are no members, and have no score."""
    found = {}
    for name, spec in console.through(NAS_STUDENTS.items(), len(NAS_STUDENTS), "nas_s, nas_m, nas_l"):
        with torch.device("meta"):
            parameters, flops, _ = cost(PoolNet(spec, info.num_classes).eval(), info.image_size)
        found[name] = {"params": parameters, "macs": flops / 2} | ({"ms": latencies.of(spec)} if latencies else {})
    return found


def write_students(target: Path, chosen: dict, members: Members, paths: Paths | None) -> dict:
    """students/: specs and, where there are paths, weights to start from; the entries of search.json with both."""
    written = {}
    for name, entry in chosen.items():
        path = target / "students" / f"{name}.json"
        write_atomically(path, json.dumps(members.pool.spec(entry["choice"]), indent=1) + "\n")
        written[name] = entry | {"spec": str(path)}
        if paths:
            network, weights = paths.network(members.number(entry["choice"])), path.with_suffix(".safetensors")
            write_atomically(weights, serialised(network, {LAYERS: network.described}))
            written[name]["weights"] = str(weights)
    return written


def write(target: Path, chosen: dict, every: Field, others: dict, found: dict, config: SearchConfig) -> dict:
    """pareto.png and search.json; the latter's content."""
    costs, ranking = every.costs, every.ranking
    fronts = {
        unit: [
            {"choice": every.members.choice(each), "costs": every.cost(each), "score": float(ranking.scores[each])}
            for each in front(values, ranking.scores).tolist()
        ]
        for unit, values in costs.items()
    }
    points = {name: (entry["costs"], entry["predicted_score"]) for name, entry in chosen.items()}
    write_atomically(target / PLOT, plot(costs, ranking.scores, ranking.unit, points, others))
    content = {"teacher": config.teacher, "seed": config.seed, "members": len(every.members), "ranked_by": ranking.by}
    content |= {"scored_paths": ranking.measured, "spearman": ranking.spearman, **found, "students": chosen}
    content |= {"others": others, "fronts": fronts, **machine()}
    write_atomically(target / RESULT, json.dumps(content, indent=1) + "\n")
    return content


def show(found: dict, target: Path, console: Console) -> None:
    """The fronts, a row a budget, why each was chosen, and what to do with them; `found` is search.json's content."""
    chosen = found["students"]
    console.print(f"Pareto fronts by {found['ranked_by']}: at most {MOST} members of each, evenly along it")
    for row in rows(found["fronts"]):
        console.cells(row)
    width = max(map(len, chosen))
    for name, entry in chosen.items():
        costs = entry["costs"]
        cells = {
            "budget": name.rjust(width),
            "params": f"{costs['params']:,.0f}",
            "MMACs": f"{costs['macs'] / 1e6:.2f}",
        }
        cells |= {"ms": f"{costs['ms']:.3f}"} if "ms" in costs else {}
        cells |= {"measured": f"{entry['measured_ms']:.3f}"} if "measured_ms" in entry else {}
        console.cells(cells | {"score": f"{entry['score']:.2f}", "layers": " ".join(entry["choice"])})
    for name, entry in chosen.items():
        console.print(f"{name}: {entry['why']}")
    first = next(iter(chosen.values()))
    also = ", with weights to start from (--weights)" if "weights" in first else ""
    console.print(f"written: {target}/{RESULT}, {target}/{PLOT} and the specs in {target}/students{also}")
    console.print(
        f"next: python distill.py --teacher {quote(found['teacher'])} --student {quote(first['spec'])} --method kd "
        f"--output_dir {quote(f'{target}-{next(iter(chosen))}')}"
    )


if __name__ == "__main__":
    run_script(main)
