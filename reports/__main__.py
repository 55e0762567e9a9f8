"""python -m reports RUN_FOLDER...: the page report.html of each run, or of each folder with a comparison.json."""

import argparse
import json
import sys
from pathlib import Path

from common import UserError, write_atomically
from reports.page import comparison_page, run_page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        comparison = folder / "comparison.json"
        page = comparison_page(json.loads(comparison.read_text())) if comparison.is_file() else run_page(folder)
        write_atomically(folder / "report.html", page)
        print((folder / "report.html").resolve())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(print(f"error: {error}", file=sys.stderr) or 2) from None
