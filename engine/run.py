"""The beginning and the end of every script: folder, accelerator, console, kernels, data; summary and plots."""

from collections.abc import Callable, Mapping, Sequence

import kernels
from common import UserError
from data.datasets import load_images
from data.splits import ImageSet
from engine.config import RunConfig
from engine.console import Console
from engine.distributed import start_accelerator
from engine.loop import Loop
from engine.objective import Objective
from engine.run_folder import RunFolder, default_folder, machine, peak_memory_bytes


class Run:
    """A run that has begun: `folder`, `accelerator`, `console`, and in words which `kernels` implementation runs.

    Args:
        config: the run's options; `dataset` is set, `output_dir` is given its default here.
        names: method and model, for that default.

    Raises:
        UserError: a folder that is in use or not free, processes without devices, kernels that cannot run.
    """

    def __init__(self, config: RunConfig, *names: str):
        config.output_dir = config.output_dir or default_folder(*names, config.dataset)
        self.config = config
        self.folder = RunFolder(config.output_dir, config.overwrite, config.resume_from_checkpoint, config.inputs())
        trackers = config.report_to if config.with_tracking else None
        self.accelerator = start_accelerator(
            config.mixed_precision, trackers, config.output_dir, config.process_timeout
        )
        self.is_main = self.accelerator.is_main_process
        self.console = Console(self.is_main)
        try:
            self.kernels = kernels.use(config.kernels, self.accelerator.device)
        except ValueError as error:
            raise UserError(f"--kernels {config.kernels}: {error}") from None

    def load_data(self, image_size: int | None) -> ImageSet:
        """The data set of the options, loaded by the main process first."""
        config = self.config
        with self.accelerator.main_process_first():
            return load_images(config.dataset, image_size, self.is_main, config, self.accelerator.device)

    def first(self, function: Callable, *arguments):
        """A function's result, called by the main process before the others: what it fetches is fetched once."""
        with self.accelerator.main_process_first():
            return function(*arguments)

    def introduce(self, what: str, data: ImageSet, lines: Sequence[str | None]) -> None:
        """Print what is trained, on what and where, and further lines."""
        self.console.print(
            f"{what} on {data.name}: {len(data.train):,} training and {len(data.test):,} test images of "
            f"{data.image_size}x{data.image_size}, {data.num_classes} classes; seed {self.config.seed}, "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}, kernels: {self.kernels}"
        )
        unread = f"not read by --method {self.config.method}: {', '.join(self.config.unread)}"
        for line in (data.described, unread if self.config.unread else None, *lines):
            if line:
                self.console.print(line)

    def loop(self, objective: Objective, data: ImageSet, teachers: Mapping[str, str] | None = None, **hooks) -> Loop:
        """The loop that trains `objective`; `teachers`: their weights' sha256 by name; `hooks` as Loop takes them."""
        seen = {"the data set": data.fingerprint(), **(teachers or {})}
        parts = (self.config, self.accelerator, self.folder, self.console)
        return Loop(objective, data, *parts, fingerprints=seen, **hooks)

    def finish(self, loop: Loop, described: dict, warnings: list[str], next_command: str) -> None:
        """Write summary.json and plots/, and tell the user what came out. Only the main process does.

        Args:
            loop: the loop, which has run.
            described: what the script knows of the run: method, model, parameters, teacher.
            warnings: what the user should know, each a sentence or two.
            next_command: the command that makes use of the result.
        """
        if not self.is_main:
            return
        from engine.plots import plot_run  # slow to import, and needed only here

        config, progress, folder = self.config, loop.progress, self.folder
        plots = plot_run(progress.history, folder.path / "plots")
        summary = described | {"kernels": self.kernels} | summarise(loop) | {"warnings": warnings, **machine()}
        folder.write_summary(summary)
        if config.with_tracking:
            self.accelerator.end_training()
        best, show = progress.best, self.console.print
        show("")
        for warning in warnings:
            show(f"warning: {warning}")
        name = next(iter(progress.history[-1]["accuracy"]))
        show(f"done: {name} {config.last_epoch} epochs in {progress.seconds:.0f} s, seed {config.seed}")
        show(
            f"  accuracy  {summary['top1']:.2f}% top-1 on the test split at the last epoch (best: {best['top1']:.2f}% "
            f"on the {best['chosen_on']} split in epoch {best['epoch']})"
        )
        show(f"  model     {folder.path}/model.safetensors (load it with models.load_pretrained('{folder.path}'))")
        show(f"  numbers   {folder.path}/summary.json, {folder.path}/metrics.jsonl")
        show(f"  plots     {', '.join(str(path) for path in plots)}")
        if config.with_tracking and "tensorboard" in config.report_to:
            show(f"  tracked   tensorboard --logdir {folder.path}/tensorboard")
        show(f"next: {next_command}")


def summarise(loop: Loop) -> dict:
    """The numbers of summary.json."""
    config, progress = loop.config, loop.progress
    last = progress.history[-1]
    name, top1 = next(iter(last["accuracy"].items()))
    images = sum(row["images"] for row in progress.history)
    return {
        "dataset": config.dataset,
        "seed": config.seed,
        "top1": top1,
        "top5": last["top5"][name],
        "best": progress.best,
        "epochs": config.last_epoch,
        "seconds": progress.seconds,
        "images_per_second": images / progress.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "processes": loop.world,
    }
