"""The training loop. It knows objectives (losses/objective.py), not methods."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common import UserError, derive_seed
from engine.checkpoint import Progress, copy_checkpoint, load_checkpoint, save_checkpoint, state_tensors
from engine.config import NOT_COMPUTED, RunConfig
from engine.data import AnySplit, ImageSet
from engine.gradients import GradientAverager
from engine.graphs import CudaRecorder, StepGraph, Terms, check_recordable
from engine.loader import Batch
from engine.pipeline import Pipeline
from engine.processes import Interrupted, RunError, StopSignals, keep_freed_memory
from engine.tracking import RunFolder, Screen

READ_EVERY = 20  # iterations between two looks at the losses: each look waits for the device
EVALUATION_BATCH = 500


def learning_rate(config: RunConfig, epoch: int) -> float:
    """The learning rate in epoch `epoch`, counted from 0."""
    length = -(-config.epochs // (config.lr_restarts or 1))  # of one run through the schedule
    epoch %= length
    if config.lr_schedule == "multistep":
        return config.peak_lr * config.lr_gamma ** sum(epoch >= milestone for milestone in config.lr_milestones)
    if config.lr_schedule == "cosine":
        return config.peak_lr * (1 + math.cos(math.pi * epoch / length)) / 2
    return config.peak_lr


class Loop:
    """Trains `objective` on `data` as `config` says, recording into `folder`.

    `after_epoch` is called in the main process with the number of every epoch that is done, from 1, and its row.

    After `run` the objective is trained and in eval mode, and `progress` tells what happened.
    """

    def __init__(
        self,
        objective: nn.Module,
        data: ImageSet,
        config: RunConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        screen: Screen,
        after_epoch: Callable[[int, dict], None] = lambda epoch, row: None,
    ):
        self.config, self.accelerator, self.folder, self.screen = config, accelerator, folder, screen
        self.after_epoch = after_epoch
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.warmup = objective.warmup_epochs  # epochs before the first of config.epochs
        self.objective = objective.to(accelerator.device, memory_format=torch.channels_last)
        # DDP averages weight gradients over processes, except where they come and go.
        sparse = objective.sparse_gradients
        self.network = accelerator.prepare_model(self.objective, evaluation_mode=sparse)
        self.averager = GradientAverager(objective.weight_parameters()) if sparse and self.world > 1 else None
        weights = torch.optim.SGD(
            objective.weight_parameters(),
            lr=config.peak_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        self.optimizers = {"weights": weights} | objective.extra_optimizers()
        self.steppers = {name: accelerator.prepare_optimizer(each) for name, each in self.optimizers.items()}
        self.scalers = {"scaler": accelerator.scaler} if accelerator.scaler else {}
        self.graph = None
        if config.cuda_graph:
            check_recordable(accelerator, objective.recordable)
            self.graph = StepGraph(self._update, CudaRecorder())
        self._load_data(data)
        self.progress = Progress()
        self.signs: dict[str, int] = {}  # of failure, and for how many epochs they have been there

    def _eager_unless(self, steady: bool) -> AbstractContextManager:
        """Blocks are compiled for the steady step alone: every other number of images would compile them again."""
        if steady or not self.config.compile:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _load_data(self, data: ImageSet) -> None:
        config = self.config
        if 1 < config.gradient_accumulation_steps > config.batch_size // self.world // 2:
            raise UserError(
                f"--gradient_accumulation_steps {config.gradient_accumulation_steps}: --batch_size {config.batch_size} "
                f"over {self.world} process(es) does not leave 2 images for each part"
            )
        self.pipeline = Pipeline(data, config, self.accelerator.device, self.rank, self.world)
        self.train = self.pipeline.training(data.train, config.batch_size, self.objective.copies)
        self.gates = None
        if data.gates:
            self.gates = self.pipeline.training(data.gates, min(config.batch_size, len(data.gates)))
        self.test, self.val = data.test, data.val

    def run(self) -> Progress:
        """Train to the last epoch.

        Raises:
            UserError: a checkpoint to resume from that does not fit.
            RunError: a loss that is not finite, or processes that fell out of step.
            Interrupted: Ctrl-C or SIGTERM, after the step under way has finished and was saved.
        """
        self._resume()
        if self.accelerator.is_main_process:  # whatever may be wrong with the command has been found by now
            self.folder.lock()
            self.folder.begin(self.config.as_dict())
            self.folder.write_history(self.progress.history)
        if self.config.with_tracking:
            self.accelerator.init_trackers("tensorboard")
        keep_freed_memory(self.accelerator.device)
        if self.objective.in_advance is not None:
            self._ask_in_advance()
        with StopSignals() as signals:
            while self.progress.epoch < self.warmup + self.config.last_epoch:
                self._epoch(signals)
        self.objective.eval()
        return self.progress

    def _resume(self) -> None:
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return
        path = self.folder.last if wanted == "latest" else Path(wanted)
        if wanted == "latest" and not path.is_file():
            self.screen.say(f"no checkpoint in {self.folder.path} yet: starting from the beginning")
            return
        self.progress = load_checkpoint(
            path, self.objective, self.optimizers, self.scalers, self.config.as_dict(), NOT_COMPUTED
        )
        if not self.accelerator.is_main_process:
            self.progress.partial = {}  # sums over all processes: counted once
        where = f"{self._name(self.progress.epoch)}, batch {self.progress.batch + 1}"
        self.screen.say(f"resuming from {path} at {where}")

    @torch.no_grad()
    def _ask_in_advance(self) -> None:
        """Fill `Objective.known`; every process asks about its share of the images."""
        start, views, table = time.perf_counter(), self.train.augmentation.views, None
        with self.screen.bar(views, 0, "teacher in advance") as bar:
            for view in range(views):
                for rows, images in self.train.view(view, EVALUATION_BATCH):
                    with self.accelerator.autocast(), self._eager_unless(False):
                        answers = self.objective.in_advance(images)
                    if table is None:
                        table = answers.new_zeros(len(self.train.split), views, answers.shape[1])
                    table[rows, view] = answers
                bar.update()
        # Each process has zeros for the others' images. Not every backend sums in half precision.
        self.objective.known = self.accelerator.reduce(table.float(), "sum").to(table.dtype)
        self.progress.seconds += time.perf_counter() - start

    def _name(self, epoch: int) -> str:
        if epoch < self.warmup:
            return f"warm-up {epoch + 1}/{self.warmup}"
        return f"epoch {epoch - self.warmup + 1}/{self.config.last_epoch}"

    def _epoch(self, signals: StopSignals) -> None:
        progress = self.progress
        epoch = progress.epoch - self.warmup
        self.objective.begin_epoch(epoch)
        if epoch >= 0:
            for group in self.optimizers["weights"].param_groups:
                group["lr"] = learning_rate(self.config, epoch)
        lr = self.optimizers[self.objective.phase(progress.iteration) if epoch < 0 else "weights"].param_groups[0]["lr"]
        totals, stop = _Totals(progress.partial), 0
        start = time.perf_counter()
        self.objective.train()
        with self.screen.bar(len(self.train), progress.batch, self._name(progress.epoch)) as bar:
            for batch in self.train.epoch(progress.epoch, progress.batch):
                while self.objective.extra_steps and self.objective.phase(progress.iteration) != "weights":
                    number = progress.iteration - progress.epoch * len(self.train) - progress.batch
                    self._step(self.gates.one(number) if self.gates else batch, totals)
                self._step(batch, totals)
                progress.batch += 1
                bar.update()
                if progress.batch % READ_EVERY == 0:
                    bar.set_postfix(self._read(totals))
                if stop := self._asked_to_stop(signals):
                    break
        self._read(totals)
        totals.seconds += time.perf_counter() - start
        if stop and progress.batch < len(self.train):
            self._stop(stop, totals)
        self._finish_epoch(lr, totals)
        if stop:
            self._stop(stop, None)

    def _step(self, batch: Batch, totals: "_Totals") -> None:
        iteration, objective = self.progress.iteration, self.objective
        torch.manual_seed(derive_seed(self.config.seed, "step", iteration, self.rank))
        phase = objective.phase(iteration)
        steady = len(batch.labels) * self.world == self.config.batch_size
        with self._eager_unless(steady):
            if self.graph is not None and steady and phase == "weights":
                said = self.graph(batch, self.progress.epoch)
            else:
                said = self._update(batch)
        for terms, images in said:
            totals.add(iteration, terms, images)
        self.progress.iteration += 1

    def _update(self, batch: Batch) -> Terms:
        """A step: forward and backward passes of all parts of the batch, and the optimiser's."""
        objective, phase = self.objective, self.objective.phase(self.progress.iteration)
        # Another phase than the weights' averages what it needs by itself.
        network = self.network if phase == "weights" else objective
        *before, last = batch.parts(self.config.gradient_accumulation_steps, self.world)
        said = []
        for part in before:
            with self.accelerator.no_sync(network):
                said.append(self._backward(network, part, phase))
        averager = self.averager if phase == "weights" else None
        if averager:
            averager.armed = True
        said.append(self._backward(network, last, phase))
        if averager:
            averager.finish()
        objective.before_update(phase, self._average)
        self.steppers[phase].step()
        self.steppers[phase].zero_grad()
        objective.after_update(phase)
        return said

    def _backward(self, network: nn.Module, batch: Batch, phase: str) -> tuple[dict[str, Tensor], int]:
        """Add the gradient of a batch, or of a part of one, to what there is."""
        iteration, objective = self.progress.iteration, self.objective
        terms = network(batch.images, batch.labels, iteration, batch.rows, batch.views)
        loss = sum(objective.term_weights[name] * term for name, term in terms.items())
        self.accelerator.backward(loss * batch.share, inputs=objective.leaves(phase))
        return {name: term.detach() for name, term in terms.items()}, len(batch.labels)

    def _average(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean")

    def _read(self, totals: "_Totals") -> dict[str, str]:
        """Fetch the losses since the last look; raises RunError at the first that is not finite."""
        latest = {}
        for iteration, name, value in totals.read():
            if not math.isfinite(value):
                saved = self.folder.last if self.folder.last.is_file() else "none yet"
                raise RunError(
                    f"the loss term '{name}' became {value} in iteration {iteration} "
                    f"({self._name(self.progress.epoch)}); "
                    f"last good checkpoint: {saved}. A lower --lr usually helps."
                )
            latest[name] = f"{value:.3f}"
        return latest

    def _asked_to_stop(self, signals: StopSignals) -> int:
        if self.world == 1:
            return signals.received
        if self.progress.batch % READ_EVERY and self.progress.batch < len(self.train):
            return 0
        # All processes must stop after the same step: they agree every few.
        flag = torch.tensor([signals.received], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())

    def _stop(self, signum: int, totals: "_Totals | None") -> None:
        if totals is not None:
            self._check_in_step()  # also averages BatchNorm statistics: the checkpoint is every process's
            self.progress.partial = self._gather(totals).as_dict()
        self._save()
        raise Interrupted(
            signum,
            f"interrupted; saved. Continue with the same command and --output_dir {self.folder.path} "
            "--resume_from_checkpoint latest",
        )

    def _finish_epoch(self, lr: float, totals: "_Totals") -> None:
        progress, config = self.progress, self.config
        self._check_finite()
        self._check_in_step()
        totals = self._gather(totals)
        progress.seconds += totals.seconds
        row = {
            "epoch": progress.epoch + 1 - self.warmup,
            "lr": lr,
            "losses": totals.means(),
            "accuracy": {},
            "images": totals.images,
            "images_per_second": totals.images / totals.seconds,
            "seconds": totals.seconds,
        }
        better = progress.epoch >= self.warmup and self._judge(row)
        progress.history.append(row)
        progress.epoch, progress.batch, progress.partial = progress.epoch + 1, 0, {}
        if (
            better
            or progress.epoch % config.checkpointing_epochs == 0
            or progress.epoch == self.warmup + config.last_epoch
        ):
            self._save()
        if self.accelerator.is_main_process:
            if better:
                copy_checkpoint(self.folder.last, self.folder.best)
            self.folder.write_history(progress.history)
        self.screen.row(row, self._name(progress.epoch - 1).removeprefix("epoch "))
        self._track(row)
        if self.accelerator.is_main_process and progress.epoch > self.warmup:
            self.after_epoch(progress.epoch - self.warmup, row)
        self._warn()

    def _warn(self) -> None:
        """Say each sign of failure once, when it has been there for three epochs."""
        signs = self.objective.warnings(self.progress.history) if self.progress.epoch > self.warmup else {}
        self.signs = {name: self.signs.get(name, 0) + 1 for name in signs}
        for name, text in signs.items():
            if self.signs[name] == 3:
                self.screen.say(f"warning: {text}")

    def _judge(self, row: dict) -> bool:
        """Add accuracies to an epoch's row; whether it is the best so far."""
        row["accuracy"], row["top5"] = self._evaluate(self.test)
        chosen_on, top1 = "test", next(iter(row["accuracy"].values()))
        if self.val is not None:
            row["val_accuracy"], _ = self._evaluate(self.val)
            chosen_on, top1 = "val", next(iter(row["val_accuracy"].values()))
        row |= self.objective.record()
        better = top1 > self.progress.best["top1"]
        if better:
            self.progress.best = {"top1": top1, "epoch": row["epoch"], "chosen_on": chosen_on}
        return better

    def _track(self, row: dict) -> None:
        if self.config.with_tracking:  # trackers want flat plain numbers
            values = {f"loss/{name}": value for name, value in row["losses"].items()}
            values |= {f"accuracy/{name}": value for name, value in row["accuracy"].items()}
            values |= {name: row[name] for name in ("lr", "images_per_second")}
            self.accelerator.log(values, step=self.progress.epoch)

    @torch.no_grad()
    def _evaluate(self, split: AnySplit) -> tuple[dict[str, float], dict[str, float]]:
        """Top-1 and top-5 in percent, by network name, over all images of `split` exactly once."""
        self.objective.eval()
        correct: dict[str, Tensor] = {}
        seen = 0
        batches = self.pipeline.evaluation(split, EVALUATION_BATCH, self.train)
        for number, (images, labels) in enumerate(batches):
            with self.accelerator.autocast(), self._eager_unless(False):
                answers = self.objective.predict(images, derive_seed(self.progress.epoch, number))
            if split is self.val:
                self.objective.look_at_validation(answers, labels)
            for name, logits in answers.items():
                ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                counts = torch.stack([ranked[:, 0].sum(), ranked.sum()])
                correct[name] = correct.get(name, 0) + counts
            seen += len(labels)
        if split is self.val:
            self.objective.end_validation(self._average)
        names = list(correct)
        sums = torch.stack([*correct.values(), torch.full_like(correct[names[0]], seen)]).double()
        *sums, (met, _) = self.accelerator.reduce(sums, "sum").cpu()
        if met != len(split):  # only a stream can be mistaken about its length
            raise UserError(f"--streaming: {len(split)} images were promised for evaluation, {met:.0f} came")
        percent = (100 * torch.stack(sums) / len(split)).tolist()
        tops = [{name: top[k] for name, top in zip(names, percent, strict=True)} for k in (0, 1)]
        return tops[0], tops[1]

    @torch.no_grad()
    def _check_finite(self) -> None:
        """A finite loss can be followed by an update that is not: stop before it is saved as good."""
        device = self.accelerator.device
        norms = torch.stack([tensor.abs().max().to(device) for tensor in self._floating_state()])
        if not norms.isfinite().all():
            saved = self.folder.last if self.folder.last.is_file() else "none yet"
            raise RunError(
                f"the weights are no longer finite after iteration {self.progress.iteration - 1} "
                f"({self._name(self.progress.epoch)}); last good checkpoint: {saved}. A lower --lr usually helps."
            )

    @torch.no_grad()
    def _check_in_step(self) -> None:
        """Average BatchNorm statistics over processes, and make sure that the weights are the same in all."""
        if self.world == 1:
            return
        for buffer in self.objective.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self._average(buffer))
        device = self.accelerator.device
        sums = torch.stack([tensor.double().sum().to(device) for tensor in self._floating_state()])
        everyone = self.accelerator.gather(sums[None])
        if not torch.equal(everyone, everyone[:1].expand_as(everyone)):
            raise RunError(f"the processes no longer hold the same weights ({self._name(self.progress.epoch)})")

    def _floating_state(self) -> list[Tensor]:
        """Weights and statistics; a method may keep some of its state on the host."""
        return [tensor for tensor in state_tensors(self.objective).values() if tensor.is_floating_point()]

    def _gather(self, totals: "_Totals") -> "_Totals":
        """Sums over all processes, in all processes; the time is the main process's own."""
        if self.world == 1:
            return totals
        names = list(totals.sums)  # in the order of training, the same in all processes
        local = [totals.images, *(number for name in names for number in totals.sums[name])]
        numbers = torch.tensor(local, dtype=torch.float64, device=self.accelerator.device)
        images, *rest = self.accelerator.reduce(numbers, "sum").tolist()
        sums = {name: [rest[2 * i], rest[2 * i + 1]] for i, name in enumerate(names)}
        return _Totals({"sums": sums, "images": int(images), "seconds": totals.seconds})

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            config = self.config.as_dict()
            save_checkpoint(self.folder.last, self.objective, self.optimizers, self.scalers, self.progress, config)
        self.accelerator.wait_for_everyone()


class _Totals:
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

    def as_dict(self) -> dict:
        return {"sums": self.sums, "images": self.images, "seconds": self.seconds}
