"""Evaluate trained networks: accuracy, calibration and latency; how alike they and a teacher are; transfer.

python evaluate.py runs/pool7
python evaluate.py runs/pool7 runs/pool7-alone --teacher runs/generic
accelerate launch --config_file accelerate_config.yaml evaluate.py runs/s --teacher runs/t --transfer stl10
python evaluate.py --model resnet18 --pretrained --dataset imagenet --output runs/resnet18/evaluation.json
"""

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from torch import Tensor

from common import UserError, check_writable, read_text, write_atomically
from data.datasets import load_images
from data.pipeline import Pipeline
from data.splits import AnySplit, ImageSet, StreamSplit
from engine.command_line import parse
from engine.config import ScriptOptions
from engine.console import Console
from engine.distributed import keep_freed_memory, run_script, start_accelerator
from engine.run_folder import machine
from models import describe_models
from models.preprocessing import fitted_to, read_mapping
from reports.evaluation import Evaluation
from reports.subject import ImageOptions, Subject, learnt_from, load_subject, part_of
from reports.transfer import TransferOptions, embed, linear_probe

LISTINGS = {"models": describe_models}
OF_THE_RUN = ("data_dir", "cache_dir", "image_size", "data_workers", "augment")  # options that default to the run's


@dataclass
class EvaluateConfig(TransferOptions, ScriptOptions):
    """Options of evaluate.py.

    Args:
        runs: run folders; words without a flag.
        model: instead of run folders: a zoo name (--list_models) or timm:NAME, with --weights or --pretrained.
        weights: a .safetensors, .pth or .pt file, or a run folder, with the weights of --model.
        pretrained: the published weights of --model.
        teacher: a run folder; adds KL, agreement and CKA between its network and each of the others.
        teacher_classes: a JSON file with an object from the networks' classes to the teacher's, as for distill.py.
        dataset: as for train_teacher.py; default: the run's.
        data_dir: a local copy of the named data set; default: the run's.
        cache_dir: where Hugging Face datasets keeps what it fetches; default: the run's.
        offline: fetch nothing, take named data sets from the cache.
        image_size: side of the images; default: that of the run.
        augment: crop (images are resized) or resized_crop (photographs, evaluated at the centre); default: the run's.
        data_workers: processes that decode images; default: the run's.
        split: test, val (what the run kept apart with --val_fraction) or train (without augmentation).
        binary: classes (numbers) against all others: a reduction of the set to two classes. A network for more has its
            probabilities summed.
        batch_size: images a forward pass, in each process.
        latency: measure latency and throughput on this device.
        predictions: also write label, prediction and logits of every image, as parquet.
        output: the file to write to; default: evaluation.json in the run folder, or beside --weights.
    """

    title = "evaluation"
    positional = "runs"

    runs: list[str] = field(default_factory=list)
    model: str | None = None
    weights: str | None = None
    pretrained: bool = False
    teacher: str | None = None
    teacher_classes: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    cache_dir: str | None = None
    offline: bool = False
    image_size: int | None = None
    augment: Literal["crop", "resized_crop"] | None = None
    data_workers: int | None = None
    split: Literal["test", "val", "train"] = "test"
    binary: list[int] = field(default_factory=list)
    batch_size: int = 250
    latency: bool = True
    predictions: bool = False
    output: str | None = None

    def check(self) -> None:
        """Raise UserError for options that do not go together, or outside their range."""
        if bool(self.runs) == bool(self.model):
            raise UserError("RUN...: name run folders, or --model with --weights or --pretrained")
        if (self.weights is not None) + self.pretrained != bool(self.model):
            raise UserError("--model: goes with one of --weights FILE and --pretrained, and these with it")
        if self.model and not (self.dataset and (self.output or self.weights)):
            raise UserError(f"--model {self.model}: needs --dataset{'' if self.weights else ' and --output FILE'}")
        if self.output and len(self.runs) > 1:
            raise UserError(f"--output {self.output}: is one file, for one run; {len(self.runs)} are named")
        if self.teacher_classes and not self.teacher:
            raise UserError(f"--teacher_classes {self.teacher_classes}: there is no teacher")
        least = 8 if self.teacher else 1  # CKA needs batches of 4, and the last ones may be half as large
        limits = {
            "batch_size": (least <= self.batch_size <= 2**24, f"from {least} to 2^24"),
            "image_size": (self.image_size is None or 8 <= self.image_size <= 4096, "from 8 to 4096"),
            "data_workers": (self.data_workers is None or 0 <= self.data_workers <= 1024, "from 0 to 1024"),
            "transfer_epochs": (1 <= self.transfer_epochs <= 10**6, "from 1 to a million"),
            "transfer_lr": (self.transfer_lr > 0, "above 0"),
            "transfer_batch_size": (1 <= self.transfer_batch_size <= 2**24, "from 1 to 2^24"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2^63"),
        }
        for name, (fine, wanted) in limits.items():
            if not fine:
                raise UserError(f"--{name} {getattr(self, name)}: must be {wanted}")


def main() -> None:
    config = parse(EvaluateConfig, __doc__, LISTINGS)
    subjects = find_subjects(config)
    teacher = load_subject(config.teacher, "--teacher").network if config.teacher else None
    mapping = read_mapping(config.teacher_classes) if config.teacher_classes else None
    accelerator = start_accelerator("no", None, ".")
    console = Console(accelerator.is_main_process)
    keep_freed_memory(accelerator.device)
    for subject in subjects:
        with accelerator.main_process_first():
            data = subject.build(load_data(config, subject, accelerator))
        split, pipeline = part_of(data, config.split, subject.options), pipeline_of(data, subject, accelerator)
        seen = learnt_from(subject.folder, config.teacher, mapping) if teacher else {}
        fitting = fitted_to(teacher, subject.network, **seen) if teacher else None
        evaluation = Evaluation(subject.network, fitting, accelerator.device, config.binary)
        run(evaluation, pipeline, split, config, console)
        evaluation.add_up(lambda sums: accelerator.reduce(sums, "sum"))
        results = evaluation.results() | seen_and_unseen(evaluation, subject, data)
        if config.transfer:
            results["transfer"] = transfer(config, subject, accelerator)
        if accelerator.is_main_process:
            results |= evaluation.speed() if config.latency else {}
            results["evaluated"] = describe(config, subject, data, len(split))
            write(subject.output, results, evaluation)
        console.cells(row(subject, subjects, results))
        subject.network = None  # many networks need not be in memory at once
    console.print(f"written: {', '.join(str(subject.output) for subject in subjects)}, and plots/ beside it")


def find_subjects(config: EvaluateConfig) -> list[Subject]:
    """What is to be evaluated, each with the file that its results go to.

    Raises:
        UserError: a folder without a trained network, or a file that may not be written.
    """
    if config.model:
        weights = Path(config.weights or "")
        subjects = [Subject(config.model, weights if weights.is_dir() else weights.parent)]
        subjects[0].weights = config.weights or "pretrained"
    else:
        subjects = [load_subject(folder) for folder in dict.fromkeys(config.runs)]
    for subject in subjects:
        subject.output = Path(config.output) if config.output else subject.folder / "evaluation.json"
        check_output(subject.output)
    return subjects


def check_output(path: Path) -> None:
    """Raise UserError for a file that is not ours to write, or cannot be written."""
    if path.suffix != ".json":
        raise UserError(f"--output {path}: must be a .json file")
    if path.exists():
        try:
            ours = "top1_interval" in json.loads(read_text(path))
        except (OSError, ValueError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise UserError(f"--output {path}: exists and is no evaluation; choose another name")
    check_writable("--output", path)


def load_data(config: EvaluateConfig, subject: Subject, accelerator: Accelerator) -> ImageSet:
    """The images for a network; its options become those that they were loaded with."""
    info, given = subject.info, {name: getattr(config, name) for name in OF_THE_RUN}
    name = config.dataset or info.dataset
    options = subject.options if info and name == info.dataset else ImageOptions()
    options = replace(options, **{key: value for key, value in given.items() if value is not None})
    options.offline |= config.offline
    if config.binary and info and info.num_classes == 2:
        options.binary = config.binary
    subject.options = options
    size = config.image_size or (info.image_size if info else None)
    return load_images(name, size, accelerator.is_main_process, options, accelerator.device)


def pipeline_of(data: ImageSet, subject: Subject, accelerator: Accelerator) -> Pipeline:
    """Batches of this process."""
    where = accelerator.device, accelerator.process_index, accelerator.num_processes
    return Pipeline(data, subject.options, *where)


def run(evaluation: Evaluation, pipeline: Pipeline, split: AnySplit, config: EvaluateConfig, console: Console) -> None:
    """Let the network see all images of a split."""
    kept = {}
    if config.predictions:
        if isinstance(split, StreamSplit):
            raise UserError("--predictions: needs the set to be loaded; its run streamed it")
        kept = {"places": pipeline.evaluated(split, config.batch_size), "count": len(split)}
    share = -(-len(split) // (config.batch_size * pipeline.where["world"]))
    with console.bar(share, 0, "evaluation") as bar:

        def batches():
            for batch in pipeline.evaluation(split, config.batch_size):
                yield batch
                bar.update()

        evaluation.run(batches(), **kept)


def seen_and_unseen(evaluation: Evaluation, subject: Subject, data: ImageSet) -> dict:
    """Top-1 in percent apart on the classes that the run trained on, and on those that it left out."""
    unseen = sorted(set(subject.options.exclude_classes))
    if not unseen or evaluation.positive or subject.options.binary:
        return {}
    seen = [label for label in range(data.num_classes) if label not in unseen]
    top1 = evaluation.classification.top1_of
    return {"top1_seen": top1(seen), "top1_unseen": top1(unseen)}


def transfer(config: EvaluateConfig, subject: Subject, accelerator: Accelerator) -> dict:
    """The accuracy of a linear classifier on the frozen network's embeddings of another set."""
    info = subject.network.info
    options = ImageOptions(data_dir=config.transfer_data_dir, cache_dir=subject.options.cache_dir)
    options = replace(options, offline=config.offline, data_workers=config.data_workers)
    try:
        with accelerator.main_process_first():
            bar = accelerator.is_main_process
            data = load_images(config.transfer, info.image_size, bar, options, accelerator.device)
    except UserError as error:
        said = str(error).replace("--dataset", "--transfer").replace("--data_dir", "--transfer_data_dir")
        raise UserError(said) from None
    pipeline = pipeline_of(replace(data, mean=info.mean, std=info.std), replace(subject, options=options), accelerator)
    embeddings = []
    for split in (data.train, data.test):
        batches, places = (each(split, config.batch_size) for each in (pipeline.evaluation, pipeline.evaluated))
        found = embed(subject.network, batches, places, len(split))
        embeddings.append([accelerator.reduce(each, "sum") for each in found])
    settings = {name: getattr(config, name) for name in ("transfer_epochs", "transfer_lr", "transfer_batch_size")}
    return {"dataset": data.name, **linear_probe(*embeddings, data.num_classes, config), **settings}


def describe(config: EvaluateConfig, subject: Subject, data: ImageSet, images: int) -> dict:
    """What the numbers are of."""
    info = subject.network.info
    return {
        "model": info.name,
        "sha256": info.sha256,
        "dataset": data.name,
        "split": config.split,
        "images": images,
        "image_size": data.image_size,
        "class_names": data.class_names,
        "binary": config.binary,
        "teacher": config.teacher,
        **machine(),
    }


def write(output: Path, results: dict, evaluation: Evaluation) -> None:
    """The results as JSON, plots beside them, and the predictions, if they were kept."""
    from reports.evaluation_plots import plot_evaluation  # slow to import, and needed only here

    plot_evaluation(evaluation, results, output.parent / "plots", output.stem)
    if evaluation.logits is not None:
        write_predictions(output.with_suffix(".parquet"), evaluation.labels, evaluation.logits)
    write_atomically(output, json.dumps(results, indent=1) + "\n")


def write_predictions(path: Path, labels: Tensor, logits: Tensor) -> None:
    """A row an image, in the order of the split: label, prediction, logits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"label": labels.numpy(), "prediction": logits.argmax(1).numpy()}
    flat = pa.FixedSizeListArray.from_arrays(pa.array(logits.flatten().numpy()), logits.shape[1])
    file = io.BytesIO()
    pq.write_table(pa.table(columns | {"logits": flat}), file)
    write_atomically(path, file.getvalue())


def row(subject: Subject, subjects: list[Subject], results: dict) -> dict[str, str]:
    """A line of the table on the screen."""
    width = max(len(each.name) for each in subjects)
    low, high = results["top1_interval"]
    cells = {"run": subject.name.ljust(width), "top-1 %": f"{results['top1']:.2f}", "95%": f"{low:.2f} to {high:.2f}"}
    cells |= {"top-5 %": f"{results['top5']:.2f}", "NLL": f"{results['nll']:.4f}", "ECE": f"{results['ece']:.4f}"}
    for name in ("top1_seen", "top1_unseen", "agreement"):
        if results.get(name) is not None:
            cells[f"{name.removeprefix('top1_')} %"] = f"{results[name]:.2f}"
    cells |= {name: f"{results[key]:.4f}" for name, key in (("KL", "kl"), ("CKA", "cka")) if key in results}
    if "transfer" in results:
        cells["transfer %"] = f"{results['transfer']['top1']:.2f}"
    if "latency_ms" in results:
        cells |= {"ms": f"{results['latency_ms']['1']['p50']:.2f}", "img/s": f"{results['images_per_second']:.0f}"}
    return cells


if __name__ == "__main__":
    run_script(main)
