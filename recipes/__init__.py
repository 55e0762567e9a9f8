"""Settings to train by (the YAML files) and the papers' tables as data: every row resolves to its commands.

from recipes import table

for row in table("sftn/1").rows:
    print(row.describe(), row.commands("runs/papers"))
"""

from functools import cache

from common import check_name
from recipes import eskd, gtn, mse, sftn
from recipes.rows import OUTPUT_DIR as OUTPUT_DIR
from recipes.rows import Row as Row
from recipes.rows import Table as Table
from recipes.rows import Teacher as Teacher


@cache
def tables() -> dict[str, Table]:
    """All tables by name, PAPER/TABLE."""
    return {name: each for paper in (sftn, gtn, mse, eskd) for name, each in paper.tables().items()}


def table(name: str, argument: str = "--paper") -> Table:
    """One table by its name. Raises UserError, with the nearest names, where there is none."""
    return tables()[check_name(argument, name, tables())]
