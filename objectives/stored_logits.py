"""Teachers' logits for drawn views of the training images, on disk, where later runs find them."""

import fcntl
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from common import UserError, lock, write_atomically
from data.loader import Loader
from engine.console import Console

LOCK = ".lock"
SHARD_BYTES = 2**26  # what a killed process may have computed in vain, and what is in memory beside a view


class Shard(NamedTuple):
    """The batches from `first` to before `last` of the epoch that draws view `view`."""

    view: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"view{self.view:05}-batches{self.first:07}-{self.last:07}.safetensors"


class StoredLogits:
    """Logits of `views` views of every training image: view v is how epoch v, of a run with this seed, meets the image.

    A run whose loader has `cycle` = `views` meets it so again every `views` epochs. Logits are computed on whole
    batches of the run, as a run of one process computes them, by whichever process comes to them: the files are the
    same for any number of processes. How many views there are is no part of the key: they are the first ones of more.

    Args:
        place: a folder; logits of a key have a folder of their own in it.
        key: what the logits depend on besides the loader and the precision: teachers and images; as JSON can hold it.
        num_classes: C.
        views: how many are wanted.
        parts: in how many parts a batch goes through a network.
        top_k: classes an image whose logits are kept; None: all.
    """

    def __init__(
        self, place: Path, key: Mapping, num_classes: int, views: int, parts: int = 1, top_k: int | None = None
    ):
        self.place, self.key, self.num_classes, self.views = place, dict(key), num_classes, views
        self.parts, self.top_k = parts, top_k
        self._view: tuple[int, View | None] = (-1, None)

    def bytes_for(self, images: int) -> int:
        """What a view of so many images takes, in float32."""
        return images * (4 * self.num_classes if self.top_k is None else 8 * self.top_k + 4)

    def fill(
        self,
        predict: Callable[[Tensor], Tensor],
        loader: Loader,
        accelerator: Accelerator,
        console: Console,
        compiled: bool = False,
    ) -> None:
        """Compute what is not there yet.

        Args:
            predict: logits [n, C] of images [n, 3, H, W].
            loader: of the run's training batches.
            accelerator, console: the run's.
            compiled: whether networks are compiled: their graphs are for the parts of this process alone.

        Raises:
            UserError: a file that does not belong there, or that other processes have written and this one cannot see.
        """
        self.device, self.rows = accelerator.device, loader.undivided(len(loader.split))
        self.key |= {"classes": self.num_classes, "top_k": self.top_k, "seed": loader.seed}
        self.key |= {"augmentation": asdict(loader.augmentation), "images": len(loader.split)}
        self.key |= {"batch_size": loader.batch_size, "parts": self.parts}  # they decide on the last bits
        self.key |= {"precision": accelerator.mixed_precision, "device": self.device.type}
        written = json.dumps(self.key, sort_keys=True, indent=1) + "\n"
        self.digest = hashlib.sha256(written.encode()).hexdigest()
        self.folder = self.place / self.digest[:16]
        if accelerator.is_main_process:
            write_atomically(self.folder / "key.json", written)
            self._remove_leftovers()
        accelerator.wait_for_everyone()
        shards = [shard for view in range(self.views) for shard in self.shards(view)]
        there = [self._is_there(shard) for shard in shards]
        console.print(f"teacher logits: {sum(there)} of {len(shards)} files are in {self.folder}")
        with self._writing():
            for number, shard in enumerate(console.through(shards, len(shards), "teacher logits")):
                if number % accelerator.num_processes == accelerator.process_index and not there[number]:
                    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
                    with accelerator.autocast(), eager:
                        self._write(shard, predict)
        accelerator.wait_for_everyone()
        for shard in shards:
            if not self._is_there(shard):
                raise UserError(
                    f"--cache_folder {self.place}: '{shard.name}', which another process has written, is not seen by "
                    f"process {accelerator.process_index}; give a folder that all machines share"
                )

    def shards(self, view: int) -> list[Shard]:
        """Those of a view."""
        size, batches = max(1, SHARD_BYTES // self.bytes_for(self.rows.batch_size)), len(self.rows)
        return [Shard(view, first, min(first + size, batches)) for first in range(0, batches, size)]

    def view(self, epoch: int) -> "View":
        """The logits for the images as an epoch meets them; those of one view are in memory."""
        view = epoch % self.views
        if view != self._view[0]:
            self._view = view, self._read_view(view)
        return self._view[1]

    def _remove_leftovers(self) -> None:
        """Remove what killed processes have half written, where none writes now."""
        with suppress(OSError), lock(self.folder / LOCK):  # others write, or there are no locks
            for leftover in self.folder.glob(".view*.tmp"):
                leftover.unlink(missing_ok=True)

    def _writing(self) -> AbstractContextManager:
        """Within it no process takes what this one writes for a leftover."""
        try:
            return lock(self.folder / LOCK, fcntl.LOCK_SH)
        except OSError:
            return nullcontext()

    @torch.no_grad()
    def _write(self, shard: Shard, predict: Callable[[Tensor], Tensor]) -> None:
        batches = self.rows.undivided(shard.last).epoch(shard.view, shard.first)
        logits = torch.cat([predict(part.images) for batch in batches for part in batch.parts(self.parts)])
        kept = {name: each.contiguous().cpu() for name, each in reduced(logits, self.top_k).items()}
        write_atomically(self.folder / shard.name, safetensors.torch.save(kept, {"key": self.digest}))

    def _read_view(self, view: int) -> "View":
        order, tensors = self.rows.plan(view).order, {}
        for shard in self.shards(view):
            rows = order[self.rows.edges[shard.first] : self.rows.edges[shard.last]]
            for name, part in self._read(shard, whole=True).items():
                whole = tensors.setdefault(name, part.new_empty(len(order), part.shape[1]))
                if whole.dtype != part.dtype:
                    raise self._wrong(shard, f"'{name}' is {part.dtype}, elsewhere {whole.dtype}")
                whole[rows] = part
        return View({name: each.to(self.device) for name, each in tensors.items()}, self.num_classes)

    def _is_there(self, shard: Shard) -> bool:
        """Whether a shard has been written. Raises UserError for a file of its name that is something else."""
        return (self.folder / shard.name).exists() and self._read(shard, whole=False) is not None

    def _read(self, shard: Shard, whole: bool) -> dict[str, Tensor]:
        """The tensors of a shard that has been checked; with `whole`, otherwise nothing but the check."""
        count = self.rows.edges[shard.last] - self.rows.edges[shard.first]
        widths = {"logits": self.num_classes if self.top_k is None else self.top_k}
        widths |= {} if self.top_k is None else {"classes": self.top_k, "rest": 1}
        try:
            with safetensors.safe_open(self.folder / shard.name, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
                if (file.metadata() or {}).get("key") != self.digest:
                    raise self._wrong(shard, "it was made for another key")
                if shapes != {name: [count, width] for name, width in widths.items()}:
                    raise self._wrong(shard, f"its tensors are {shapes}")
                tensors = {name: file.get_tensor(name) for name in shapes} if whole else {}
        except (OSError, SafetensorError) as error:
            raise self._wrong(shard, str(error).splitlines()[0]) from None
        if "classes" in tensors and not ((tensors["classes"] >= 0) & (tensors["classes"] < self.num_classes)).all():
            raise self._wrong(shard, f"it names classes that are none of {self.num_classes}")
        return tensors

    def _wrong(self, shard: Shard, why: str) -> UserError:
        return UserError(
            f"--cache_folder {self.place}: '{self.folder / shard.name}' is none of its files ({why}); delete it"
        )


class View(NamedTuple):
    """Logits of every training image in one view, as `reduced` keeps them."""

    tensors: dict[str, Tensor]
    num_classes: int

    def logits(self, indices: Tensor) -> Tensor:
        """Logits [n, C] of the images `indices` int64 [n] of the split."""
        kept = {name: each[indices] for name, each in self.tensors.items()}
        if "rest" not in kept:
            return kept["logits"]
        others = kept["rest"].expand(-1, self.num_classes)
        return others.scatter(1, kept["classes"].long(), kept["logits"])


def reduced(logits: Tensor, top_k: int | None) -> dict[str, Tensor]:
    """What is kept of logits [n, C]: all, or the `top_k` largest with their classes, and one value for all others.

    The value is log(sum over the others of exp(logit) / (C - top_k)): with it the softmax at temperature 1 gives the
    kept classes their own probabilities, and each other class the mean of what the others had.
    """
    if top_k is None:
        return {"logits": logits}
    kept, classes = logits.topk(top_k, dim=1)
    others = logits.float().scatter(1, classes, -torch.inf)
    rest = others.logsumexp(1, keepdim=True) - math.log(logits.shape[1] - top_k)
    return {"logits": kept, "classes": classes.int(), "rest": rest.to(logits.dtype)}
