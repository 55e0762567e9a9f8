"""Ship a network: ONNX, torch.export, ExecuTorch and int8 files, each proven on the test split, with a model card.

python export.py runs/pool7
python export.py runs/pool7 --formats onnx pt2 --quantize int8 --with_preprocessing --output_dir shipped/pool7
python export.py runs/pool7 --quantize int8 --finetune_epochs 6 --overwrite
python export.py runs/pool7 --license apache-2.0 --push_to_hub me/pool7 --hub_private
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import yaml
from torch import Tensor

from common import UserError, read_text
from data.datasets import hold_out, load_images
from data.pipeline import Pipeline
from data.splits import AnySplit, StreamSplit
from engine.command_line import parse
from engine.config import INPUTS, NOT_COMPUTED, PLACES, ScriptOptions
from engine.console import Console
from engine.distributed import RunError, run_script
from engine.run_folder import cpu_name, machine
from exporters.card import write_card
from exporters.deployed import Deployed
from exporters.finetune import finetune, finetune_options, load_teachers
from exporters.folder import check_target, replace_folder, workplace
from exporters.hub import HubError, check_repository, find_token, push
from exporters.int8 import write_trained_int8
from exporters.onnx import load_onnx, write_int8, write_onnx
from exporters.proof import Function, Proof, latency, prove
from exporters.pt2 import load_pt2, write_pt2
from exporters.pte import MAX_BATCH, check_executorch, load_pte, write_pte
from exporters.quantized import Quantized
from models.network import Network, count_parameters
from models.preprocessing import Preprocessed
from reports.subject import Subject, load_subject

CPU = torch.device("cpu")
METADATA = ("name", "dataset", "num_classes", "class_names", "image_size", "mean", "std", "sha256")
INT8, PTE = "model.int8.onnx", "model.pte"
BATCH, CALIBRATION_BATCH = 250, 50  # images a forward pass


@dataclass
class ExportConfig(ScriptOptions):
    """Options of export.py.

    Args:
        run: the run folder of a trained network; a word without a flag.
        formats: onnx (opset 18, for ONNX Runtime and what else reads it), pt2 (torch.export), pte (ExecuTorch with
            XNNPACK, for phones and boards; requirements-executorch.txt).
        quantize: int8 adds model.int8.onnx, quantised after training; no.
        calibration_images: training images from whose activations its ranges are taken.
        max_drop: points of top-1 that the int8 file may lose on the test split.
        finetune_epochs: where it loses more, distil the network for so many further epochs, with its roundings in
            its forward pass; 0: never; default: 3 where a teacher is found.
        finetune_lr: learning rate of these epochs, Adam's in the first step.
        teacher: run folders of trained teachers for it (logits of several are averaged); default: those of the run.
        with_preprocessing: uint8 RGB in, probabilities out: normalisation and softmax are part of the files.
        dataset: the data set that files are proven on; default: the run's.
        data_dir: a local copy of the named data set; default: the run's.
        license: for the model card, for example apache-2.0.
        push_to_hub: upload the folder to this model repository of the hub, OWNER/NAME, once all is proven; the token is
            that of HF_TOKEN or `hf auth login`.
        hub_private: the repository is, or is made, private.
        output_dir: folder of the files; default: export in the run folder.
        overwrite: replace what an earlier export left there.
    """

    title = "export"
    positional = "run"

    run: list[str] = field(default_factory=list)
    formats: list[Literal["onnx", "pt2", "pte"]] = field(default_factory=lambda: ["onnx"])
    quantize: Literal["no", "int8"] = "no"
    calibration_images: int = 512
    max_drop: float = 1.0
    finetune_epochs: int | None = None
    finetune_lr: float = 0.0005
    teacher: list[str] = field(default_factory=list)
    with_preprocessing: bool = False
    dataset: str | None = None
    data_dir: str | None = None
    license: str | None = None
    push_to_hub: str | None = None
    hub_private: bool = False
    output_dir: str | None = None
    overwrite: bool = False

    @property
    def further_epochs(self) -> int:
        """Of fine-tuning, where there is a teacher and it is needed."""
        return 3 if self.finetune_epochs is None else self.finetune_epochs

    def check(self) -> None:
        """Raise UserError for options that do not go together, or outside their range."""
        if len(self.run) != 1:
            raise UserError(f"RUN: name one run folder{f', not {len(self.run)}' if self.run else ''}")
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise UserError(f"--formats {' '.join(self.formats)}: name some of onnx, pt2 and pte, each once")
        if self.quantize == "int8" and "onnx" not in self.formats:
            raise UserError(f"--quantize int8: needs onnx among --formats {' '.join(self.formats)}")
        if self.calibration_images < 1:
            raise UserError(f"--calibration_images {self.calibration_images}: must be at least 1")
        if not 0 <= self.max_drop <= 100:
            raise UserError(f"--max_drop {self.max_drop}: must be from 0 to 100 points")
        if not 0 <= self.further_epochs <= 10**4:
            raise UserError(f"--finetune_epochs {self.finetune_epochs}: must be from 0 to 10000")
        if not 0 < self.finetune_lr < 100:
            raise UserError(f"--finetune_lr {self.finetune_lr}: must be above 0 and below 100")
        if self.finetune_epochs and self.quantize != "int8":
            raise UserError(f"--finetune_epochs {self.finetune_epochs}: goes with --quantize int8")
        if self.teacher and not (self.further_epochs and self.quantize == "int8"):
            raise UserError(f"--teacher {' '.join(self.teacher)}: goes with --finetune_epochs of --quantize int8")
        if self.hub_private and self.push_to_hub is None:
            raise UserError("--hub_private: goes with --push_to_hub")
        if self.push_to_hub is not None:
            try:
                check_repository(self.push_to_hub)
            except ValueError as error:
                raise UserError(f"--push_to_hub {self.push_to_hub}: {str(error).splitlines()[0]}") from None


def main() -> None:
    config = parse(ExportConfig, __doc__, {})
    if "pte" in config.formats:
        check_executorch()
    subject = load_subject(config.run[0])
    target = Path(config.output_dir or subject.folder / "export")
    check_target(target, config.overwrite)
    upload, (teachers, untaught) = pusher(config, target), teachers_of(subject, config)
    deployed = Deployed(subject.network, config.with_preprocessing)
    pipeline, train, test = images_of(subject, config)
    with workplace(target) as folder:
        files = write(deployed, folder, config, calibration(deployed, pipeline, train, config.calibration_images))
        proofs, told = prove(files, deployed, bar(pipeline, test)), {}
        if config.with_preprocessing:
            for name, proof in proofs_of_logits(subject.network, pipeline, test, folder, config).items():
                proofs[name].include(proof)
        if teachers and proofs[INT8].failure(config.max_drop):
            rounded = finetuned(subject, teachers, pipeline, train, config)
            told = replace_int8(files, proofs, rounded, deployed, folder, lambda: bar(pipeline, test))
            told |= {"epochs": config.further_epochs, "lr": config.finetune_lr}
            told |= {"teachers": [teacher.info.sha256 for teacher in teachers]}
        for name, proof in proofs.items():
            if why := proof.failure(config.max_drop if name == INT8 else None):
                after = (
                    f" after {config.further_epochs} further epochs (--finetune_epochs)" if told else f"; {untaught}"
                )
                raise RunError(f"{name} is not shipped: {why}{after if name == INT8 else ''}; nothing was written")
        found = describe(deployed, files, proofs, folder, config)
        if told:
            found["files"][INT8]["finetuned"] = told
        (folder / "export.json").write_text(json.dumps(found, indent=1) + "\n")
        recipe, inputs = recipe_of(mapping_in(subject.folder / "config.yaml", yaml.safe_load))
        run = summary_of(subject.folder)
        write_card(folder / "README.md", subject.info, found, run, recipe, inputs, config.license)
        for name in ("model.safetensors", "model.json"):
            shutil.copyfile(subject.folder / name, folder / name)
        replace_folder(folder, target)
    show(found, target)
    upload()


def pusher(config: ExportConfig, target: Path) -> Callable[[], None]:
    """What uploads the folder `target` when it is there. Raises RunError at once where there is no token."""
    if config.push_to_hub is None:
        return lambda: None
    what = f"--push_to_hub {config.push_to_hub}"
    try:
        token = find_token()
    except HubError as error:
        raise RunError(f"{what}: {error}") from None

    def upload() -> None:
        try:
            url = push(target, config.push_to_hub, config.hub_private, token)
        except HubError as error:
            raise RunError(f"{what}: {error}; the proven files are in {target}") from None
        Console(True).print(f"pushed: {url}")

    return upload


def images_of(subject: Subject, config: ExportConfig) -> tuple[Pipeline, AnySplit, AnySplit]:
    """The images, normalised as the network knows them: their pipeline, training and test split."""
    options, info = subject.options, subject.info
    options.data_dir = config.data_dir or options.data_dir
    options.offline &= config.push_to_hub is None  # it would hold for the whole process
    data = subject.build(load_images(config.dataset or info.dataset, info.image_size, True, options, CPU))
    data, _ = hold_out(data, options.val_fraction, "validation")
    return Pipeline(data, options, CPU), data.train, data.test


def teachers_of(subject: Subject, config: ExportConfig) -> tuple[list[Network | Preprocessed], str]:
    """Whom the network learns from once more, should its int8 file lose too much; where that is nobody, why, in words.

    Raises:
        UserError: nobody, where fine-tuning or a teacher was asked for.
    """
    if config.quantize != "int8":
        return [], ""
    if not config.further_epochs:
        return [], "--finetune_epochs 3 may mend it"
    what, before = f"--finetune_epochs {config.further_epochs}", summary_of(subject.folder).get("teachers", [])
    places = config.teacher or finetune_options(subject.folder).teacher
    try:
        if not places:
            raise UserError(f"{what}: the run {subject.folder} had no teacher; name one with --teacher")
        return load_teachers(subject, places, [] if config.teacher else before, what), ""
    except UserError as error:
        if config.finetune_epochs or config.teacher:
            raise
        return [], str(error)


def finetuned(
    subject: Subject, teachers: list[Network | Preprocessed], pipeline: Pipeline, train: AnySplit, config: ExportConfig
) -> Quantized:
    """The network with the int8 file's roundings, distilled with them."""
    options, network = finetune_options(subject.folder), Quantized(subject.network)
    network.calibrate(calibration(Deployed(subject.network, False), pipeline, train, config.calibration_images))
    loader = pipeline.training(train, options.batch_size)
    steps = config.further_epochs * len(loader)
    batches = (batch for epoch in range(config.further_epochs) for batch in loader.epoch(epoch))
    shown = Console(True).through(batches, steps, "fine-tuning")

    def taught(images: Tensor) -> Tensor:
        return torch.stack([teacher(images) for teacher in teachers]).mean(0)

    finetune(network, taught, shown, steps, options, config.finetune_lr)
    return network


def replace_int8(
    files: dict[str, Function],
    proofs: dict[str, Proof],
    rounded: Quantized,
    deployed: Deployed,
    folder: Path,
    batches: Callable[[], Iterator],
) -> dict:
    """Put the int8 file of a fine-tuned network in place of the one quantised after training, with its proof.

    Returns:
        What export.json says of it beside the proof: the accuracies of the file before and of `rounded` in PyTorch.
    """
    like_it = Deployed(rounded, deployed.preprocessing)
    write_trained_int8(like_it, folder / INT8, metadata_of(deployed))
    files[INT8] = load_onnx(folder / INT8, torch.get_num_threads())
    before, alike = proofs[INT8], prove({INT8: files[INT8]}, like_it, batches())[INT8]
    proofs[INT8] = prove({INT8: files[INT8]}, deployed, batches())[INT8]
    told = {"top1_before": before.results()["top1"], "rounded_top1": alike.results()["network_top1"]}
    return told | {"unlike_rounded": alike.disagreements}


def calibration(deployed: Deployed, pipeline: Pipeline, train: AnySplit, count: int) -> Iterator[Tensor]:
    """`count` training images as files are fed them, evenly spread over the split, whose classes may be sorted; of a
    stream the first ones."""
    if not isinstance(train, StreamSplit):
        train = train.take(torch.linspace(0, len(train) - 1, min(count, len(train))).round().long())
    batches = (deployed.given(images) for images, _ in pipeline.evaluation(train, CALIBRATION_BATCH))
    return itertools.islice(batches, -(-count // CALIBRATION_BATCH))


def write(deployed: Deployed, folder: Path, config: ExportConfig, calibrate: Iterator[Tensor]) -> dict[str, Function]:
    """Write all files; each by its name, loaded in its own runtime."""
    metadata, threads, files = metadata_of(deployed), torch.get_num_threads(), {}
    if "onnx" in config.formats:
        write_onnx(deployed, folder / "model.onnx", metadata)
        files["model.onnx"] = load_onnx(folder / "model.onnx", threads)
    if config.quantize == "int8":
        write_int8(folder / "model.onnx", folder / INT8, calibrate)
        files[INT8] = load_onnx(folder / INT8, threads)
    if "pt2" in config.formats:
        write_pt2(deployed, folder / "model.pt2", metadata)
        files["model.pt2"] = load_pt2(folder / "model.pt2")
    if "pte" in config.formats:
        write_pte(deployed, folder / PTE, metadata)
        files[PTE] = load_pte(folder / PTE, threads)
    return files


def proofs_of_logits(
    network: Network, pipeline: Pipeline, test: AnySplit, folder: Path, config: ExportConfig
) -> dict[str, Proof]:
    """Of the files with preprocessing, by name: the same graphs up to the logits, which are written for that alone.

    In probabilities an error of a class that has next to none is not seen.
    """
    bare = Deployed(network, True, softmax=False)
    with TemporaryDirectory(dir=folder) as place:
        files = write(bare, Path(place), replace(config, quantize="no"), iter(()))
        return prove(files, bare, bar(pipeline, test))


def metadata_of(deployed: Deployed) -> dict:
    """What files say of themselves."""
    info = asdict(deployed.network.info)
    return {name: info[name] for name in METADATA if info[name] is not None}


def bar(pipeline: Pipeline, split: AnySplit) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a split, with a progress bar."""
    with Console(True).bar(-(-len(split) // BATCH), 0, "proof") as shown:
        for batch in pipeline.evaluation(split, BATCH):
            yield batch
            shown.update()


def describe(
    deployed: Deployed, files: dict[str, Function], proofs: dict[str, Proof], folder: Path, config: ExportConfig
) -> dict:
    """The content of export.json."""
    info = deployed.network.info
    found = {"model": info.name, "sha256": info.sha256, "dataset": config.dataset or info.dataset}
    found |= {"parameters": count_parameters(deployed.network), "with_preprocessing": config.with_preprocessing}
    found |= {"threads": torch.get_num_threads(), "measured_on": cpu_name(), "files": {}, **machine()}
    for name, function in files.items():
        content = (folder / name).read_bytes()
        found["files"][name] = proofs[name].results() | {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "latency_ms": latency(function, deployed),
        }
    if PTE in files:
        found["files"][PTE]["max_batch"] = MAX_BATCH
    return found


def recipe_of(options: dict) -> tuple[dict, list[str]]:
    """A run's options, as its config.yaml has them, for other machines.

    Returns:
        Those that are no places, and flags for what the run reads, with their names for values.
    """
    recipe = {name: value for name, value in options.items() if name not in NOT_COMPUTED | PLACES}
    given = {name: value for name, value in options.items() if name in {*INPUTS, "unlabeled"} and value}
    counts = {name: len(value) if isinstance(value, list) else 1 for name, value in given.items()}
    return recipe, [" ".join([f"--{name}", *[name.upper()] * count]) for name, count in counts.items()]


def summary_of(folder: Path) -> dict:
    """What the run's summary says of it; nothing where there is none."""
    return mapping_in(folder / "summary.json", json.loads)


def mapping_in(path: Path, read: Callable[[str], object]) -> dict:
    """What a file of the run holds; nothing where there is none."""
    try:
        found = read(read_text(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def show(found: dict, target: Path) -> None:
    """One row a file."""
    console = Console(True)
    for name, each in found["files"].items():
        cells = {"file": name.ljust(16), "top-1 %": f"{each['top1']:.2f}", "network %": f"{each['network_top1']:.2f}"}
        cells |= {"relative error": f"{each['max_relative_error']:.1e}", "MB": f"{each['bytes'] / 1e6:.2f}"}
        console.cells(cells | {f"ms, batch {n}": f"{each['latency_ms'][n]['p50']:.2f}" for n in ("1", "32")})
    console.print(f"written: {target}/export.json, {target}/README.md (a model card) and the files above")
    first = target / next(iter(found["files"]))
    console.print(f"next: run {first} in your product; the model card says what goes in and comes out")


if __name__ == "__main__":
    run_script(main)
