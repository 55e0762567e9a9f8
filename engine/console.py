"""What the user sees while a run goes on: a bar and a table row an epoch."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

LINE_SECONDS = 60  # between two lines where the output is no terminal


class Console:
    """What the user sees while a run goes on: one bar an epoch, one table row an epoch. Silent unless `main`."""

    def __init__(self, main: bool):
        self.main = main
        self._columns: list[tuple[str, int]] | None = None

    def print(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def bar(self, total: int, done: int, name: str) -> "tqdm | _Lines":
        """A progress bar on a terminal; elsewhere a plain line now and then, besides the table's rows."""
        if self.main and not sys.stderr.isatty():
            return _Lines(total, done, name, self.print)
        return tqdm(total=total, initial=done, desc=name, unit="batch", disable=not self.main, leave=False)

    def through(self, items: Iterable, total: int, name: str) -> Iterator:
        """The items, `total` of them, with a bar that follows them."""
        with self.bar(total, 0, name) as shown:
            for each in items:
                yield each
                shown.update()

    def row(self, row: dict, name: str) -> None:
        """One line of the table; the header comes with the first, and where other columns begin."""
        cells = {"epoch": name, "lr": f"{row['lr']:.4g}"}
        cells |= {name: f"{value:.4f}" for name, value in row["losses"].items()}
        cells |= {f"{name} %": f"{value:.2f}" for name, value in row["accuracy"].items()}
        self.cells(cells | {"img/s": f"{row['images_per_second']:.0f}", "seconds": f"{row['seconds']:.1f}"})

    def cells(self, cells: dict[str, str]) -> None:
        """A table's line, as `row`."""
        if self._columns is None or not cells.keys() <= {column for column, _ in self._columns}:
            self._columns = [(name, max(len(name), len(cell), 7)) for name, cell in cells.items()]
            self.print("  ".join(name.rjust(width) for name, width in self._columns))
        self.print("  ".join(cells.get(name, "").rjust(width) for name, width in self._columns))


class _Lines:
    """What stands in for a bar where the output is no terminal: a line whenever LINE_SECONDS have passed."""

    def __init__(self, total: int, done: int, name: str, say):
        self.total, self.done, self.name, self.print = total, done, name, say
        self.next, self.losses = time.monotonic() + LINE_SECONDS, ""

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def set_postfix(self, losses: dict[str, str]) -> None:
        self.losses = ", ".join(f"{name} {value}" for name, value in losses.items())

    def update(self) -> None:
        self.done += 1
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + LINE_SECONDS
            self.print(f"{self.name}: {self.done} of {self.total} batches  {self.losses}")
