"""The training loop. It knows objectives (engine/objective.py), not methods."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from common import UserError, derive_seed
from data.batch import Batch
from data.loader import Loader
from data.mixing import mix
from data.pipeline import Pipeline
from data.splits import AnySplit, ImageSet
from engine import replicas
from engine.averaging import WeightAverage
from engine.checkpoint import Progress, copy_checkpoint, load_checkpoint, save_checkpoint
from engine.config import NOT_COMPUTED, RunConfig
from engine.console import Console
from engine.cuda_graph import Terms
from engine.distributed import Interrupted, RunError, StopSignals, keep_freed_memory
from engine.evaluate import evaluate
from engine.gradients import GradientAverager
from engine.objective import Objective, Phase, weighted_sum
from engine.optimiser import make_optimizer, parameters_of
from engine.piece_graphs import recorded_steps
from engine.run_folder import RunFolder
from engine.schedule import learning_rate
from engine.totals import Totals
from engine.tracking import log_epoch, start_trackers

READ_EVERY = 20  # iterations between two looks at the losses: each look waits for the device
EVALUATION_BATCH = 500


class Loop:
    """Trains `objective` on `data` as `config` says, recording into `folder`.

    `after_epoch` is called in the main process with the number of every epoch that is done, from 1, and its row.

    `fingerprints` say what the run was made from (data, teachers): a checkpoint of others is refused.

    After `run` the objective is trained and in eval mode, and `progress` tells what happened. With the same options and
    data, loops of one `batch_kind` train on the same batches.
    """

    def __init__(
        self,
        objective: Objective,
        data: ImageSet,
        config: RunConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        console: Console,
        after_epoch: Callable[[int, dict], None] = lambda epoch, row: None,
        fingerprints: Mapping[str, str] | None = None,
    ):
        self.config, self.accelerator, self.folder, self.console = config, accelerator, folder, console
        self.after_epoch, self.fingerprints = after_epoch, dict(fingerprints or {})
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.warmup = objective.warmup_epochs  # epochs before the first of config.epochs
        if config.model_ema_decay:
            objective.average = WeightAverage(objective.trained_model(), config.model_ema_decay)
        self.objective: Objective = objective.to(accelerator.device, memory_format=torch.channels_last)
        # DDP averages weight gradients over processes, except where they come and go.
        sparse = objective.sparse_gradients
        self.network = accelerator.prepare_model(self.objective, evaluation_mode=sparse)
        self.averager = GradientAverager(objective.trained_parameters()) if sparse and self.world > 1 else None
        weights = make_optimizer(config, objective.trained_parameters())
        self.optimizers = {"weights": weights} | {phase.name: phase.optimizer for phase in objective.phases}
        self.steppers = {name: accelerator.prepare_optimizer(each) for name, each in self.optimizers.items()}
        self.scalers = {"scaler": accelerator.scaler} if accelerator.scaler else {}
        if config.mixes and not objective.mixable:
            raise UserError(f"--mixup, --cutmix: --method {config.method} needs images of one label each")
        self.graph = config.cuda_graph and recorded_steps(self._gradients, self._apply, objective, config, accelerator)
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
        kinds = (self.objective.copies, self.objective.cycle, data.unlabeled)
        self.train = self.pipeline.training(data.train, config.batch_size, *kinds)
        self.batch_kind = (*kinds[:2], *data.mean, *data.std)
        self.own_images = {
            phase.name: self.pipeline.training(phase.split, min(config.batch_size, len(phase.split)))
            for phase in self.objective.phases
            if phase.split is not None
        }
        self.test, self.val = data.test, data.val

    def run(self) -> Progress:
        """Train to the last epoch.

        Raises:
            UserError: a checkpoint to resume from that does not fit.
            RunError: a loss that is not finite, or processes that fell out of step.
            Interrupted: Ctrl-C or SIGTERM, after the step under way has finished and was saved.
        """
        self.start()
        with StopSignals() as signals:
            for _ in self.batches(signals):
                pass
        return self.progress

    def start(self) -> None:
        """What comes before the first batch of a run, or of the rest of one: see `run`."""
        self._resume()
        if self.accelerator.is_main_process:  # whatever may be wrong with the command has been found by now
            self.folder.lock()
            self.folder.begin(self.config.as_dict())
            self._follow_up()
        start_trackers(self.accelerator, self.config, self.progress)
        keep_freed_memory(self.accelerator.device)
        start = time.perf_counter()
        self.objective.before_training(self.train, self.accelerator, self.console)
        self.progress.seconds += time.perf_counter() - start

    def batches(self, signals: StopSignals, train: Loader | None = None) -> Iterator[None]:
        """Train to the last epoch, after `start`, on batches of `train` if there are shared ones.

        It pauses after every batch's step: time for other loops.
        """
        self.train = train or self.train
        while self.progress.epoch < self.warmup + self.config.last_epoch:
            yield from self._epoch(signals)
        self.objective.eval()
        if self.objective.average is not None:
            self.objective.average.exchange()  # what is kept of the run

    @property
    def position(self) -> tuple[int, int]:
        """The epoch and the batch of it that come next."""
        return self.progress.epoch, self.progress.batch

    def _resume(self) -> None:
        wanted = self.config.resume_from_checkpoint
        if wanted is None:
            return
        path = self.folder.last if wanted == "latest" else Path(wanted)
        replicas.check_all_see(path, self.accelerator)
        if wanted == "latest" and not path.is_file():
            self.console.print(f"no checkpoint in {self.folder.path} yet: starting from the beginning")
            return
        self.progress, local_buffers = load_checkpoint(
            path, self.objective, self.optimizers, self.scalers, self.config.as_dict(), NOT_COMPUTED, self.fingerprints
        )
        if self.progress.batch >= len(self.train):
            raise UserError(
                f"--resume_from_checkpoint: '{path}' is at batch {self.progress.batch} of {len(self.train)}"
            )
        replicas.scatter_statistics(self.objective, self.accelerator, local_buffers)
        if not self.accelerator.is_main_process:
            self.progress.partial = {}  # sums over all processes: counted once
        where = f"at {self._name(self.progress.epoch)}, batch {self.progress.batch + 1}"
        ended = self.progress.epoch == self.warmup + self.config.last_epoch
        self.console.print(f"resuming from {path} {'after its last epoch' if ended else where}")

    def _name(self, epoch: int) -> str:
        if epoch < self.warmup:
            return f"warm-up {epoch + 1}/{self.warmup}"
        return f"epoch {epoch - self.warmup + 1}/{self.config.last_epoch}"

    def _epoch(self, signals: StopSignals) -> Iterator[None]:
        progress = self.progress
        epoch = progress.epoch - self.warmup
        self.objective.begin_epoch(epoch)
        if epoch >= 0:
            for group in self.optimizers["weights"].param_groups:
                group["lr"] = learning_rate(self.config, epoch)
        phase = self.objective.phase(progress.iteration) if epoch < 0 else None
        lr = self.optimizers[phase.name if phase else "weights"].param_groups[0]["lr"]
        totals, stop = Totals(progress.partial), 0
        start = time.perf_counter()
        self.objective.train()
        with self.console.bar(len(self.train), progress.batch, self._name(progress.epoch)) as bar:
            for batch in self.train.epoch(progress.epoch, progress.batch):
                try:
                    self._steps(batch, totals)
                except FloatingPointError:  # what became nan first is among the losses
                    self._read(totals)
                    raise
                progress.batch += 1
                bar.update()
                if progress.batch % READ_EVERY == 0:
                    bar.set_postfix(self._read(totals))
                if stop := self._asked_to_stop(signals):
                    break
                totals.seconds += time.perf_counter() - start
                yield
                start = time.perf_counter()
        self._read(totals)
        totals.seconds += time.perf_counter() - start
        if stop and progress.batch < len(self.train):
            self._stop(stop, totals)
        self._finish_epoch(lr, totals)
        if stop:
            self._stop(stop, None)

    def _steps(self, batch: Batch, totals: Totals) -> None:
        """A batch's step, and before it those of phases that come on top."""
        progress = self.progress
        while (phase := self.objective.phase(progress.iteration)) and phase.additional:
            number = progress.iteration - progress.epoch * len(self.train) - progress.batch
            own = self.own_images.get(phase.name)
            self.step(own.one(number) if own else batch, totals)
        self.step(batch, totals)

    def step(self, batch: Batch, totals: Totals) -> None:
        iteration, objective = self.progress.iteration, self.objective
        torch.manual_seed(derive_seed(self.config.seed, "step", iteration, self.rank))
        phase = objective.phase(iteration)
        if self.config.mixes and phase is None:
            batch = mix(batch, self.config, iteration, self.rank)
        steady = batch.labeled * self.world == self.config.batch_size
        with self._eager_unless(steady):
            if self.graph and steady:
                losses = self.graph(batch, phase, self.progress.epoch)
            else:
                losses = self._gradients(batch, phase)
                self._apply(phase)
        for terms, images in losses:
            totals.add(iteration, terms, images)
        if phase is None and objective.average is not None:
            objective.average.update(iteration)
        self.progress.iteration += 1

    def _gradients(self, batch: Batch, phase: Phase | None = None) -> Terms:
        """Forward and backward passes of all parts of the batch."""
        # Gradients of the weights are averaged over processes by DDP or by the averager, with the last part's.
        network, averager = (self.network, self.averager) if phase is None else (self.objective, None)
        parts, losses = batch.parts(self.config.gradient_accumulation_steps, self.world), []
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            if averager:
                averager.armed = last
            with nullcontext() if last else self.accelerator.no_sync(network):
                terms = network(part, self.progress.iteration)
                loss = weighted_sum(self.objective, terms) * part.loss_scale
                self.accelerator.backward(loss, inputs=phase.grad_inputs() if phase else None)
            losses.append(({name: term.detach() for name, term in terms.items()}, part.labeled))
        if averager:
            averager.finish()
        if phase is not None:
            phase.before_update(self._average)
        elif self.config.clip_grad is not None:
            self.accelerator.clip_grad_norm_(parameters_of(self.optimizers["weights"]), self.config.clip_grad)
        return losses

    def _apply(self, phase: Phase | None = None) -> None:
        """The optimiser's part of a step."""
        stepper = self.steppers[phase.name if phase else "weights"]
        stepper.step()
        stepper.zero_grad()
        (phase.after_update if phase else self.objective.after_step)()

    def _average(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean")

    def _read(self, totals: Totals) -> dict[str, str]:
        """Fetch the losses since the last look; raises RunError at the first that is not finite."""
        latest = {}
        for iteration, name, value in totals.read():
            if not math.isfinite(value):
                raise self._diverged(f"the loss term '{name}' became {value} in iteration {iteration}")
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

    def _stop(self, signum: int, totals: Totals | None) -> None:
        local = None
        if totals is not None:
            self._check_in_step()
            self.progress.partial = totals.over_processes(self.accelerator).as_dict()
            local = replicas.gather_statistics(self.objective, self.accelerator)
        self._save(local)
        raise Interrupted(
            signum,
            f"interrupted; saved. Continue with the same command and --output_dir {self.folder.path} "
            "--resume_from_checkpoint latest",
        )

    def _finish_epoch(self, lr: float, totals: Totals) -> None:
        progress, config = self.progress, self.config
        self._check_finite()
        replicas.average_statistics(self.objective, self.accelerator)
        self._check_in_step()
        totals = totals.over_processes(self.accelerator)
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
        with self.objective.averaged():
            better = config.evaluates(row["epoch"]) and self._judge(row)
        progress.history.append(row)
        progress.epoch, progress.batch, progress.partial = progress.epoch + 1, 0, {}
        if (
            better
            or progress.epoch % config.checkpointing_epochs == 0
            or progress.epoch == self.warmup + config.last_epoch
        ):
            self._save()
        self.console.row(row, self._name(progress.epoch - 1).removeprefix("epoch "))
        log_epoch(self.accelerator, row, progress.epoch)
        if self.accelerator.is_main_process:
            self._follow_up()
        self._warn()

    def _follow_up(self) -> None:
        """What follows an epoch's checkpoint; done again on resume, as the run may have been killed in between."""
        progress, done = self.progress, self.progress.epoch - self.warmup
        self.folder.write_history(progress.history)
        if progress.batch or done < 1:
            return
        if progress.best["epoch"] == done and self.folder.last.is_file():
            copy_checkpoint(self.folder.last, self.folder.best)
        with self.objective.averaged():
            self.after_epoch(done, progress.history[-1])

    def _warn(self) -> None:
        """Say each sign of failure once, when it has been there for three epochs."""
        signs = self.objective.warnings(self.progress.history) if self.progress.epoch > self.warmup else {}
        self.signs = {name: self.signs.get(name, 0) + 1 for name in signs}
        for name, text in signs.items():
            if self.signs[name] == 3:
                self.console.print(f"warning: {text}")

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

    def _evaluate(self, split: AnySplit) -> tuple[dict[str, float], dict[str, float]]:
        """Top-1 and top-5 in percent, by network name, over all images of `split` exactly once."""
        objective, epoch = self.objective.eval(), self.progress.epoch

        def predict(images: Tensor, number: int) -> dict[str, Tensor]:
            with self.accelerator.autocast(), self._eager_unless(False):
                return objective.predict(images, derive_seed(epoch, number))

        observe = {"observe": objective.observe_validation} if split is self.val else {}
        batches = self.pipeline.evaluation(split, EVALUATION_BATCH)
        return evaluate(predict, batches, len(split), lambda counts: self.accelerator.reduce(counts, "sum"), **observe)

    def _check_finite(self) -> None:
        """A finite loss can be followed by an update that is not: stop before it is saved as good."""
        if not replicas.is_finite(self.objective, self.accelerator):
            raise self._diverged(f"the weights are no longer finite after iteration {self.progress.iteration - 1}")

    def _diverged(self, what: str) -> RunError:
        saved, epoch = self.folder.last if self.folder.last.is_file() else "none yet", self._name(self.progress.epoch)
        return RunError(f"{what} ({epoch}); last good checkpoint: {saved}. A lower --lr usually helps.")

    def _check_in_step(self) -> None:
        if not replicas.are_equal(self.objective, self.accelerator):
            raise RunError(f"the processes no longer hold the same weights ({self._name(self.progress.epoch)})")

    def _save(self, local_buffers: Tensor | None = None) -> None:
        if self.accelerator.is_main_process:
            state = (self.objective, self.optimizers, self.scalers, self.progress)
            save_checkpoint(self.folder.last, *state, self.config.as_dict(), self.fingerprints, local_buffers)
        self.accelerator.wait_for_everyone()
