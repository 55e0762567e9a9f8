"""Sums of an epoch's losses."""

import torch
from accelerate import Accelerator
from torch import Tensor


class Totals:
    """Loss sums of an epoch. Terms stay on the device until `read`."""

    def __init__(self, partial: dict):
        self.sums: dict[str, list[float]] = dict(partial.get("sums", {}))  # term: [sum over images, images]
        self.images: int = partial.get("images", 0)
        self.seconds: float = partial.get("seconds", 0.0)
        self._pending: list[tuple[int, dict[str, Tensor], int]] = []

    def add(self, iteration: int, terms: dict[str, Tensor], images: int) -> None:
        self._pending.append((iteration, terms, images))
        self.images += images

    def read(self) -> list[tuple[int, str, float]]:
        """(iteration, term, value) of everything added since the last call, in one transfer."""
        if not self._pending:
            return []
        values = iter(torch.stack([term for _, terms, _ in self._pending for term in terms.values()]).tolist())
        found = []
        for iteration, terms, images in self._pending:
            for name in terms:
                value = next(values)
                total = self.sums.setdefault(name, [0.0, 0])
                total[0] += value * images
                total[1] += images
                found.append((iteration, name, value))
        self._pending.clear()
        return found

    def means(self) -> dict[str, float]:
        return {name: total / images for name, (total, images) in self.sums.items()}

    def over_processes(self, accelerator: Accelerator) -> "Totals":
        """Sums over all processes, in all processes; the time is this process's own."""
        if accelerator.num_processes == 1:
            return self
        names = list(self.sums)  # in the order of training, the same in all processes
        local = [self.images, *(number for name in names for number in self.sums[name])]
        numbers = torch.tensor(local, dtype=torch.float64, device=accelerator.device)
        images, *rest = accelerator.reduce(numbers, "sum").tolist()
        sums = {name: [rest[2 * i], rest[2 * i + 1]] for i, name in enumerate(names)}
        return Totals({"sums": sums, "images": int(images), "seconds": self.seconds})

    def as_dict(self) -> dict:
        return {"sums": self.sums, "images": self.images, "seconds": self.seconds}
