"""What was tried, what came of it, and how to see each failure again."""

import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

COUNTED = ("kills", "terms", "faults", "full disks", "resumes", "identical", "inputs", "refused", "taken", "failed")
BAD = ("lost", "locked out", "tracebacks", "hung", "untidy")


class Failure(Exception):  # noqa: N818 - not an error of this program
    """What must not happen: `kind` is one of BAD."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind, self.what = kind, what


@dataclass
class Report:
    """Counts by name, and the failures; what a failing case left is kept in `folder`."""

    seed: int
    folder: Path
    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def case(self, part: str, number: int, run, bases) -> None:
        """Run one case in a folder of its own, which is removed unless it fails."""
        place = self.folder / f"{part}-{number}"
        place.mkdir()
        try:
            run(self, place, bases)
        except Failure as failure:
            self.counts[failure.kind] += 1
            again = f"python -m tests.torture --only {part} --seed {self.seed} --case {number}"
            text = f"{failure.kind}: {failure.what}\n    see {place}\n    {again}"
            self.failures.append(text)
            print(f"\n{text}", flush=True)
        else:
            shutil.rmtree(place, ignore_errors=True)

    @property
    def bad(self) -> int:
        return sum(self.counts[name] for name in BAD)

    def table(self) -> str:
        minutes = (time.monotonic() - self.start) / 60
        lines = [f"seed {self.seed}, {minutes:.1f} minutes"]
        lines += [f"{name:<12}{self.counts[name]:>7}" for name in (*COUNTED, *BAD)]
        return "\n".join(lines)
