"""Whether a change of the code changes what is computed: short runs of everything, compared bit for bit.

python -m tests.golden record golden.json     before the change
python -m tests.golden compare golden.json    after it, on the same machine

Each run's weights (sha256 of model.safetensors) and its losses and accuracies are kept. On another machine the same
code may differ in last bits, so that both halves are run on one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.runs import ROOT, TINY, TINY_GTN, TINY_POOL, free_port

SMALL = ["--image_size", "8", "--batch_size", "128", "--epochs", "2"]
STUDENT = ["--student", "resnet8", *SMALL]
ACCUMULATED = ["--gradient_accumulation_steps", "2"]
CACHED = ["--cache_teacher", "memory"]
# name: (script, arguments, processes); {name} in an argument is that run's folder.
RUNS = {
    "vanilla": ("train_teacher.py", [*TINY, "--val_fraction", "0.2", "--anchors", "1"], 1),
    "mse": ("train_teacher.py", ["--method", "mse", *TINY, "--cutout", "3"], 1),
    "sftn": ("train_teacher.py", ["--method", "sftn", "--student", "pool:1", *TINY, *TINY_POOL], 1),
    "gtn": ("train_teacher.py", [*TINY_GTN, *SMALL, "--gate_holdout", "0.2", "--save_supernet"], 1),
    "gtn-shared": ("train_teacher.py", [*TINY_GTN, "--share_branches", "--freeze_teacher_epochs", "1"], 1),
    "gtn-two": ("train_teacher.py", [*TINY_GTN, *SMALL], 2),
    "kd": ("distill.py", ["--teacher", "{vanilla}", "--method", "kd", *STUDENT, *ACCUMULATED], 1),
    "kd-two": ("distill.py", ["--teacher", "{vanilla}", "--method", "kd", *STUDENT], 2),
    "cached": ("distill.py", ["--teacher", "{vanilla}", "--crop_padding", "0", *CACHED, *STUDENT], 1),
    "none": ("distill.py", ["--method", "none", "--dataset", "digits", *STUDENT], 1),
    "at+kd": ("distill.py", ["--teacher", "{gtn}", "--method", "at+kd", *STUDENT], 1),
    "crd": ("distill.py", ["--teacher", "{vanilla}", "--method", "crd", *STUDENT], 1),
    "ft": ("distill.py", ["--teacher", "{vanilla}", "--method", "ft", "--warmup_epochs", "1", *STUDENT], 1),
    "sskd": ("distill.py", ["--teacher", "{vanilla}", "--method", "sskd", "--warmup_epochs", "1", *STUDENT], 1),
    "dkd": ("distill.py", ["--teacher", "{vanilla}", "--method", "dkd", "--dkd_beta", "2", *STUDENT], 1),
    "reviewkd": ("distill.py", ["--teacher", "{vanilla}", "--method", "reviewkd", *STUDENT], 1),
    "dml": ("distill.py", ["--method", "dml", "--dataset", "digits", "--peers", "resnet8", *STUDENT], 1),
    "rco": ("distill.py", ["--teacher", "{vanilla}", "--method", "rco", *STUDENT], 1),
}
# Runs that get a SIGTERM before iteration 12, in the middle of an epoch, and go on from their checkpoint.
STOP = ["tests/signalled.py", str(int(signal.SIGTERM)), "12"]
RESUMED = {"gtn-resumed": "gtn", "sskd-resumed": "sskd"}
TIMING = ("seconds", "images_per_second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder))
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=1) + "\n")
        return
    expected = json.loads(options.file.read_text())
    differ = [name for name in expected | found if expected.get(name) != found.get(name)]
    for name in expected | found:
        print(
            f"{name:<14} {found.get(name, {}).get('sha256', 'missing')[:16]}  {'DIFFERS' if name in differ else 'same'}"
        )
    sys.exit(f"{len(differ)} of {len(expected)} differ: {', '.join(differ)}" if differ else 0)


def run_all(folder: Path) -> dict[str, dict]:
    found = {}
    for name, (script, arguments, processes) in RUNS.items():
        call(folder, name, script, arguments, processes)
        found[name] = outcome(folder / name)
    for name, source in RESUMED.items():
        script, arguments, processes = RUNS[source]
        call(folder, name, script, arguments, processes, stop=True)
        call(folder, name, script, [*arguments, "--resume_from_checkpoint", "latest"], processes)
        found[name] = outcome(folder / name)
        assert found[name] == found[source], f"{name}: resuming changed the result"
    return found


def call(folder: Path, name: str, script: str, arguments: list[str], processes: int, stop: bool = False) -> None:
    words = [argument.format(**{each: folder / each for each in RUNS}) for argument in arguments]
    words += ["--output_dir", str(folder / name), "--seed", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, *(STOP if stop else [])]
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        launcher += ["-m", "accelerate.commands.launch", "-q", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--main_process_port", str(free_port())]
    done = subprocess.run([*launcher, script, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != (143 if stop else 0):
        sys.exit(f"{name}: {script} {' '.join(words)}\n{done.stdout}\n{done.stderr}")


def outcome(folder: Path) -> dict:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
    return {"sha256": json.loads((folder / "model.json").read_text())["sha256"], "metrics": rows}


if __name__ == "__main__":
    main()
