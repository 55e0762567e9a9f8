"""What several processes cost: averaging a supernet's gradients, and training a student with one process or more.

python -m benchmarks.processes --output benchmarks/results/processes.json

GTN's weight step, of the pools of benchmarks/steps.py, is taken with engine.gradients.GradientAverager and with
DistributedDataParallel(find_unused_parameters=True), on the same paths, one right after the other, in changing order; a
step is as long as in the slowest process. Then distill.py, resnet14 to resnet8, with the same global batch in one
process and in several, which share the machine's cores or have a GPU each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.steps import SETTINGS, Options, Setting, clock
from common import write_atomically
from data.batch import Batch
from engine.distributed import keep_freed_memory
from engine.gradients import GradientAverager
from engine.objective import weighted_sum
from engine.run_folder import machine
from models import ModelInfo, create_model, save_pretrained
from objectives.gtn import GTN

ROOT = Path(__file__).parents[1]
STEPS = {"digits": 20, "cifar100": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--output", default="benchmarks/results/processes.json")
    options = parser.parse_args()
    if "RANK" in os.environ:  # one of the processes that measure
        work(options.settings)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", options.processes]
    averaging = json.loads(run([*launcher, "-m", "benchmarks.processes", "--settings", *options.settings]))
    report = {"command": "python -m benchmarks.processes", **machine(), "processes": options.processes}
    report |= {"averaging": averaging, "students": [student(count) for count in (1, options.processes)]}
    write_atomically(Path(options.output), json.dumps(report, indent=1) + "\n")
    print(f"{options.processes} processes on {report['device']}")
    for row in averaging:
        sent = f"{row['averager_megabytes']:.1f} of {row['ddp_megabytes']:.1f} MB a step"
        times = f"{row['averager_ms']:.1f} ms, with DDP {row['ddp_ms']:.1f}"
        print(f"  {row['setting']}: weight step {times} ({row['ddp_over_averager']:.2f} times); sent {sent}")
    for row in report["students"]:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in row["losses"].items())
        print(f"  {row['processes']} process(es): {row['images_per_second']:,.0f} images/s; {losses}")
    print(f"written: {options.output}")


def run(command: list) -> str:
    """Run a command; what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def work(settings: list[str]) -> None:
    """In every process; the first prints what was found."""
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    keep_freed_memory(device)  # as the loop does
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // dist.get_world_size()))
    found = [compare(SETTINGS[name], STEPS[name], device) for name in settings]
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def compare(setting: Setting, steps: int, device: torch.device) -> dict:
    """A row of the report: milliseconds of a step either way, and what is sent."""
    objectives = {name: make(setting, device) for name in ("averager", "ddp")}
    averager = GradientAverager(objectives["averager"].weight_parameters())
    wrapped = DistributedDataParallel(objectives["ddp"], find_unused_parameters=True, broadcast_buffers=False)
    torch.manual_seed(dist.get_rank())
    images = torch.randn(setting.batch, 3, setting.size, setting.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.randint(0, setting.classes, (setting.batch,), device=device))

    def step(name: str, iteration: int) -> None:
        objective = objectives[name]
        objective.zero_grad()
        terms = (wrapped if name == "ddp" else objective)(batch, iteration)
        loss = weighted_sum(objective, terms)
        averager.armed = name == "averager"
        loss.backward()
        if averager.armed:
            averager.finish()

    times: dict[str, list[float]] = {name: [] for name in objectives}
    megabytes = []
    for number in range(-1, steps):  # the first warms up
        for name in objectives if number % 2 else reversed(objectives):
            dist.barrier()
            seconds = torch.tensor([clock(lambda name=name: step(name, 2 * (number + 1)), device)], device=device)  # noqa: B023
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if number >= 0:
                times[name].append(seconds.item())
        grads = [each.grad for each in objectives["averager"].weight_parameters() if each.grad is not None]
        megabytes.append(sum(grad.nbytes for grad in grads) / 1e6)
    return {
        "setting": setting.name,
        "batch": setting.batch,
        **{f"{name}_ms": 1000 * statistics.median(each) for name, each in times.items()},
        "ddp_over_averager": statistics.median(a / b for a, b in zip(times["ddp"], times["averager"], strict=True)),
        "averager_megabytes": statistics.mean(megabytes),
        "ddp_megabytes": sum(each.nbytes for each in objectives["ddp"].weight_parameters()) / 1e6,
    }


def make(setting: Setting, device: torch.device) -> nn.Module:
    """The objective of a setting, the same in every process."""
    torch.manual_seed(0)
    teacher = create_model(setting.model, setting.classes)
    return GTN(teacher, Options(pool=setting.pool), setting.size).to(device, memory_format=torch.channels_last)


def student(processes: int) -> dict:
    """An epoch of distill.py after a first one."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        info = ModelInfo("resnet14", "digits", 10, 32, [0.3] * 3, [0.4] * 3)
        save_pretrained(create_model("resnet14", 10), info, Path(folder) / "teacher")
        command = [sys.executable, "distill.py"]
        if processes > 1:
            command[1:1] = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
        flags = ["--student", "resnet8", "--image_size", 32, "--batch_size", 64, "--lr", 0.02, "--epochs", 2]
        run([*command, "--teacher", f"{folder}/teacher", *flags, "--output_dir", f"{folder}/run"])
        row = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return {"processes": processes, "images_per_second": row["images_per_second"], "losses": row["losses"]}


if __name__ == "__main__":
    main()
