"""Whether search.py ranks members of a pool better than multiply-accumulates do.

python -m benchmarks.ranking --teacher runs/generic-s --members 16 --epochs 10

Uniform members of the teacher's pool are distilled from it, each alike, for a short schedule. Kendall's tau between
their top-1 on the test split and what was known of them before: the score that search.py predicts, that of their own
path, multiply-accumulates and parameters; 0 where all are alike. The teacher's run needs --save_supernet, and is left
ranking.json, by which search.py --rank auto decides. A run that is there is not repeated.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from common import UserError, check_writable, derive_seed, write_atomically
from engine.console import Console
from engine.distributed import run_script
from engine.run_folder import machine
from models.pool import Pool
from reports.subject import Subject, load_subject
from searching.members import Members
from searching.scoring import ScoringOptions, score_pool
from searching.trained import FILE

LEAST = 3  # members of which a rank correlation says anything


def main() -> None:
    options = arguments()
    subject, console = load_subject(options.teacher, "--teacher"), Console(True)
    if not subject.info.pool or options.members < LEAST:
        raise UserError(f"--teacher {options.teacher}: needs a pool, and --members at least {LEAST}")
    check_writable("--teacher", record := subject.folder / FILE)
    members = Members(Pool(**subject.info.pool))
    generator = np.random.default_rng(derive_seed(options.seed, "ranking"))
    drawn = generator.choice(len(members), options.members, replace=False).tolist()
    known = predicted(members, drawn, subject, options, console)
    bar = console.through(drawn, len(drawn), "members")
    trained = [train(members, each, options.seed, options.teacher, options) for each in bar]
    tau = {name: float(np.nan_to_num(kendalltau(values, trained).statistic)) for name, values in known.items()}
    report = {"command": f"python -m benchmarks.ranking {' '.join(sys.argv[1:])}", **machine(), "tau": tau}
    report |= {"teacher": subject.info.sha256, "members": len(drawn), "epochs": options.epochs}
    report |= {"choices": [members.choice(each) for each in drawn], "top1": trained, **known}
    for path in (record, Path(options.output)):
        write_atomically(path, json.dumps(report, indent=1) + "\n")
    print(f"Kendall's tau with the top-1 of {len(drawn)} members after {options.epochs} epochs:")
    for name, value in tau.items():
        print(f"  {name}: {value:.2f}")
    ranked = "the supernet's scores" if tau["predicted"] > tau["macs"] else "multiply-accumulates"
    print(f"search.py --rank auto now ranks this teacher's members by {ranked}")
    print(f"written: {record}, {options.output}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="the run folder of a GTN teacher with its supernet")
    parser.add_argument("--members", type=int, default=16, help="how many are trained")
    parser.add_argument("--epochs", type=int, default=10, help="of each")
    parser.add_argument("--batch_size", type=int, default=64, help="of each")
    parser.add_argument("--paths", type=int, default=300, help="as for search.py")
    parser.add_argument("--first_steps", type=int, default=300, help="as for search.py")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, the scores and the students")
    parser.add_argument("--runs", default="runs/ranking", help="folder of the students' runs")
    parser.add_argument("--output", default="benchmarks/results/ranking.json")
    parser.add_argument("further", nargs="*", help="after --: further options of distill.py, for all")
    return parser.parse_args()


def predicted(
    members: Members, drawn: list[int], subject: Subject, options: argparse.Namespace, console: Console
) -> dict[str, list[float]]:
    """What is known of the members before they are trained, by name."""
    scoring = ScoringOptions(paths=options.paths, first_steps=options.first_steps, seed=options.seed)
    scoring.check()
    sizes = members.sizes(subject.info.num_classes, subject.info.image_size)
    ranking, paths = score_pool(members, sizes["macs"], subject, scoring, console.through, console.print)
    known = {"predicted": ranking.scores[drawn].tolist(), "path": [paths.score(each) for each in drawn]}
    return known | {name: values[drawn].tolist() for name, values in sizes.items()}


def train(members: Members, member: int, seed: int, teacher: str, options: argparse.Namespace) -> float:
    """The top-1 of a member that is distilled from the teacher; `options`: epochs, batch_size, runs, further."""
    folder = run_folder(members, member, seed, teacher, options)
    if not (folder / "summary.json").is_file():
        spec = folder.with_name(f"{folder.name}.json")
        write_atomically(spec, json.dumps(members.pool.spec(members.choice(member))) + "\n")
        words = ["--teacher", teacher, "--student", spec, "--output_dir", folder, "--overwrite", *given(seed, options)]
        subprocess.run([sys.executable, "distill.py", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "summary.json").read_text())["top1"]


def given(seed: int, options: argparse.Namespace) -> list[str]:
    """The options of distill.py that all members have in common, but for the teacher."""
    words = ["--epochs", options.epochs, "--batch_size", options.batch_size, "--seed", seed, *options.further]
    return list(map(str, words))


def run_folder(members: Members, member: int, seed: int, teacher: str, options: argparse.Namespace) -> Path:
    """Where the run of a member is; its name has a hash of all that it depends on, so that no other is taken for it."""
    parts = [json.dumps(members.pool.spec(members.choice(member))), *map(content, [teacher, *given(seed, options)])]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return Path(options.runs) / f"seed{seed}-{member}-{key}"


def content(word: str) -> str:
    """A word of a command; a run folder or a file (FILE, or FILE:NAME) as what it holds."""
    name, _, rest = word.partition(":")
    path = Path(name, "model.json") if Path(name).is_dir() else Path(name)  # which holds the hash of the weights
    return hashlib.sha256(path.read_bytes()).hexdigest() + rest if path.is_file() else word


if __name__ == "__main__":
    run_script(main)
