"""The end of a run: summary.json, plots, and a summary in words that says what to do next."""

from engine.loop import Loop
from engine.tracking import machine, peak_memory_bytes


def finish_run(loop: Loop, described: dict, warnings: list[str], next_command: str) -> None:
    """Write summary.json and plots/, and tell the user. Does nothing but in the main process.

    Args:
        loop: a loop that has run.
        described: what the script knows of the run: method, model, parameters, teacher.
        warnings: things the user should know, each a sentence or two.
        next_command: the command that makes use of the result.
    """
    if not loop.accelerator.is_main_process:
        return
    from engine.plots import plot_run  # slow to import, and needed only here

    config, progress, folder, screen = loop.config, loop.progress, loop.folder, loop.screen
    last = progress.history[-1]
    name, top1 = next(iter(last["accuracy"].items()))
    images = sum(row["images"] for row in progress.history)
    plots = plot_run(progress.history, folder.path / "plots")
    summary = described | {
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
        "warnings": warnings,
        **machine(),
    }
    folder.write_summary(summary)
    if config.with_tracking:
        loop.accelerator.end_training()
    best = progress.best
    screen.say("")
    for warning in warnings:
        screen.say(f"warning: {warning}")
    screen.say(f"done: {name} {config.last_epoch} epochs in {progress.seconds:.0f} s, seed {config.seed}")
    screen.say(
        f"  accuracy  {top1:.2f}% top-1 on the test split at the last epoch (best: {best['top1']:.2f}% on the "
        f"{best['chosen_on']} split in epoch {best['epoch']})"
    )
    screen.say(f"  model     {folder.path}/model.safetensors (load it with models.load_pretrained('{folder.path}'))")
    screen.say(f"  numbers   {folder.path}/summary.json, {folder.path}/metrics.jsonl")
    screen.say(f"  plots     {', '.join(str(path) for path in plots)}")
    if config.with_tracking and "tensorboard" in config.report_to:
        screen.say(f"  tracked   tensorboard --logdir {folder.path}/tensorboard")
    screen.say(f"next: {next_command}")
