"""Disturbs real runs and tries odd inputs, until the time is up; ends non-zero if anything was lost.

python -m tests.torture --minutes 10
python -m tests.torture --only kills --seed 7 --case 12
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.torture import faults, inputs, kills
from tests.torture.report import Report
from tests.torture.runs import Bases

PARTS = {"kills": kills.case, "faults": faults.case, "inputs": inputs.case}
SHARE = {"kills": 0.5, "faults": 0.15, "inputs": 0.35}  # of the time
SAY_EVERY = 60  # seconds


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long; a case under way is finished")
    parser.add_argument("--seed", type=int, default=0, help="draws everything but what the clock decides")
    parser.add_argument("--only", choices=PARTS, help="one part of the three")
    parser.add_argument("--case", type=int, help="one case of --only, by its number")
    options = parser.parse_args(argv)
    if options.case is not None and options.only is None:
        parser.error("--case needs --only")
    return options


def main() -> int:
    options = read_options()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    report, bases = Report(options.seed, folder), Bases(folder)
    if options.case is not None:
        report.case(options.only, options.case, PARTS[options.only](options.seed, options.case), bases)
    else:
        work(report, bases, [options.only] if options.only else list(PARTS), options.minutes * 60)
    print(f"\n{report.table()}", flush=True)
    for failure in report.failures:
        print(f"\n{failure}")
    return int(report.bad > 0)


def work(report: Report, bases: Bases, parts: list[str], seconds: float) -> None:
    """Cases of the part that is furthest behind its share of the time, until that is up."""
    spent, numbers = dict.fromkeys(parts, 0.0), {part: itertools.count() for part in parts}
    end, say = time.monotonic() + seconds, time.monotonic() + SAY_EVERY
    while (now := time.monotonic()) < end:
        part = min(parts, key=lambda each: spent[each] / SHARE[each])
        number = next(numbers[part])
        report.case(part, number, PARTS[part](report.seed, number), bases)
        spent[part] += time.monotonic() - now
        if time.monotonic() > say:
            print(f"\n{report.table()}", flush=True)
            say = time.monotonic() + SAY_EVERY


if __name__ == "__main__":
    sys.exit(main())
