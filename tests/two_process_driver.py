"""Run by tests/test_two_processes.py in every process: trains GTN and writes down what each process saw."""

import hashlib
import json
import sys
from pathlib import Path

import torch

from data.datasets import load_images
from engine.command_line import parse
from engine.console import Console
from engine.distributed import run_script, start_accelerator
from engine.loop import Loop
from engine.run_folder import RunFolder
from models import create_model
from objectives.gtn import GTN
from train_teacher import TeacherConfig


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def main() -> None:
    report_folder, *arguments = sys.argv[1:]
    config = parse(TeacherConfig, "", {}, arguments)
    accelerator = start_accelerator(None, None, config.output_dir)
    data = load_images("digits", config.image_size)
    torch.manual_seed(config.seed)
    objective = GTN(create_model(config.model, data.num_classes), config, data.image_size)
    paths, seen, undrawn = [], [], []

    def recording(draw):
        def wrapped(generator, *rest):
            draws = draw(generator, *rest)
            paths.append([(one.active, one.candidates) for one in draws])
            return draws

        return wrapped

    objective.gates.draw = recording(objective.gates.draw)
    objective.gates.draw_gate_step = recording(objective.gates.draw_gate_step)
    loop = Loop(objective, data, config, accelerator, RunFolder(config.output_dir), Console(False))
    epoch_of, step = loop.train.epoch, loop.step

    def remember(epoch, start=0):
        plan, edges = loop.train.plan(epoch), loop.train.edges
        for number, batch in enumerate(epoch_of(epoch, start), start):
            order = plan.order[edges[number] : edges[number + 1]][loop.rank :: loop.world]
            assert torch.equal(batch.labels, data.train.labels[order])
            seen.extend(order.tolist())
            yield batch

    def watch(batch, totals):
        before = {n: p.detach().clone() for n, p in objective.branches.named_parameters() if ".candidates." in n}
        step(batch, totals)
        drawn = iter(paths[-1])
        names = [
            f"{b}.supernet.layers.{i}.candidates.{layer.names[next(drawn)[0]]}."
            for b, branch in enumerate(objective.branches)
            for i, layer in enumerate(branch.supernet.layers)
        ]
        now = dict(objective.branches.named_parameters())
        undrawn.append(all(torch.equal(now[n], old) for n, old in before.items() if not n.startswith(tuple(names))))

    loop.train.epoch, loop.step = remember, watch
    loop.run()
    report = {
        "paths": paths,
        "seen": seen,
        "undrawn_untouched": all(undrawn),
        "weights": digest([*objective.parameters(), objective.gates.phi]),
        "buffers": digest(objective.buffers()),
    }
    (Path(report_folder) / f"rank{accelerator.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
