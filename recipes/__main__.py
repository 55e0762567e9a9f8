"""python -m recipes: the papers' tables, and the commands of their rows.

python -m recipes --list
python -m recipes --show sftn/1 --output_dir runs/sftn
"""

import argparse
import shlex
import sys

from common import UserError
from recipes import OUTPUT_DIR, table, tables


def main() -> None:
    options = arguments()
    if options.show is None:
        width = max(map(len, tables()))
        for name, each in tables().items():
            print(
                f"{name:<{width}}  {len(each.rows):>3} rows, {len(each.commands()):>3} runs  {each.paper}: {each.title}"
            )
        return
    shown, printed = table(options.show, "--show"), set()
    print(f"# {shown.paper}: {shown.title}. In the paper: {shown.measure}.")
    for row in shown.rows:
        print(f"# {row.describe()}")
        for command in row.commands(options.output_dir, shlex.split(options.extra)):
            if command not in printed:  # rows share teachers
                print(command)
                printed.add(command)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the tables by name (the default)")
    what.add_argument("--show", metavar="TABLE", help="print the commands of a table's rows, each once, as a script")
    parser.add_argument("--output_dir", default=OUTPUT_DIR, help="folder of the run folders")
    parser.add_argument("--extra", default="", help='arguments of every command, for example "--mixed_precision bf16"')
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(print(f"error: {error}", file=sys.stderr) or 2) from None
