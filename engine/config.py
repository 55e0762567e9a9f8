"""The command line: dataclasses become flags, a recipe sets their defaults, flags win over the recipe."""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter

from common import UserError
from data.datasets import DataOptions

Config = TypeVar("Config", bound="RunConfig")
Listing = list[str] | Callable[[], Iterable[str]]


@dataclass
class RunConfig(DataOptions):
    """Options that every run has, whatever its method.

    Args:
        pretrained: start from torchvision's ImageNet weights, or for timm:NAME from timm's.
        weights: start from the weights in this run folder, or .safetensors, .pth or .pt file. From a run folder,
            train_teacher.py also takes the model, data set, image size and normalisation.
        epochs: passes over the training split.
        stop_after: stop after this many epochs of a schedule that is made for all of them (early-stopped teachers).
        batch_size: images a step over all processes together.
        gradient_accumulation_steps: compute a step's gradient in this many parts of its batch, one after the other, in
            about as many times less memory. BatchNorm, and losses that compare images, see a part at a time.
        lr: peak learning rate of SGD.
        lr_batch_size: the batch size that lr is for: it is multiplied by batch_size over this (linear scaling, Goyal et
            al., arXiv 1706.02677; warm-ups of methods keep theirs); default: lr as it is.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        nesterov: Nesterov momentum.
        lr_schedule: multistep (x lr_gamma at lr_milestones), cosine (to 0 over all epochs) or constant.
        lr_milestones: epochs after which the learning rate falls, for multistep.
        lr_gamma: factor of each fall, for multistep.
        lr_restarts: run the schedule this many times, each in its share of the epochs; default: once (--method rco:
            once an anchor).
        seed: seeds everything random in the run.
        output_dir: the run folder; default: runs/DATE-METHOD-MODEL-DATASET.
        overwrite: replace what an earlier run left in output_dir.
        resume_from_checkpoint: a checkpoint file, or "latest" for the one in output_dir.
        checkpointing_epochs: epochs between checkpoints.
        mixed_precision: no, fp16 or bf16; default: what accelerate launch says.
        process_timeout: seconds that a process waits for the others before it gives up; default: PyTorch's.
        compile: compile the networks' blocks with torch.compile, each once, when they first run.
        cuda_graph: record the steady step as a CUDA graph and replay it: one launch instead of hundreds. On one GPU,
            not for gtn, and for methods of your own only if they decide nothing on the host within an epoch.
        kernels: triton or reference (plain PyTorch) for losses and gates; auto is Triton on an NVIDIA GPU.
        with_tracking: also log to the trackers of --report_to.
        report_to: tracker names known to Accelerate, comma-separated.
    """

    pretrained: bool = False
    weights: str | None = None
    epochs: int = 30
    stop_after: int | None = None
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    lr: float = 0.05
    lr_batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    lr_schedule: Literal["multistep", "cosine", "constant"] = "cosine"
    lr_milestones: list[int] = field(default_factory=lambda: [150, 180, 210])
    lr_gamma: float = 0.1
    lr_restarts: int | None = None
    seed: int = 0
    output_dir: str | None = None
    overwrite: bool = False
    resume_from_checkpoint: str | None = None
    checkpointing_epochs: int = 1
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    process_timeout: float | None = None
    compile: bool = False
    cuda_graph: bool = False
    kernels: Literal["auto", "triton", "reference"] = "auto"
    with_tracking: bool = False
    report_to: str = "tensorboard"

    def check(self) -> None:
        """Raise UserError for the first value outside its range."""
        limits = {
            "image_size": (self.image_size is None or 8 <= self.image_size <= 4096, "from 8 to 4096"),
            "crop_padding": (self.crop_padding is None or 0 <= self.crop_padding <= 4096, "from 0 to 4096"),
            "cutout": (0 <= self.cutout <= 4096, "from 0 to 4096"),
            "data_workers": (self.data_workers is None or 0 <= self.data_workers <= 1024, "from 0 to 1024"),
            "train_fraction": (0 < self.train_fraction <= 1, "in (0, 1]"),
            "val_fraction": (0 <= self.val_fraction < 1, "in [0, 1)"),
            "epochs": (1 <= self.epochs <= 10**6, "from 1 to a million"),
            "batch_size": (2 <= self.batch_size <= 2**24, "from 2 to 2^24"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps >= 1, "at least 1"),
            "lr": (self.lr > 0, "above 0"),
            "lr_batch_size": (self.lr_batch_size is None or self.lr_batch_size >= 1, "at least 1"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "nesterov": (not self.nesterov or self.momentum > 0, "off when --momentum is 0"),
            "lr_gamma": (0 < self.lr_gamma <= 1, "in (0, 1]"),
            "checkpointing_epochs": (self.checkpointing_epochs >= 1, "at least 1"),
            "process_timeout": (self.process_timeout is None or self.process_timeout > 0, "above 0 seconds"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2^63"),
        }
        for name, (fine, wanted) in limits.items():
            if not fine:
                raise UserError(f"--{name} {getattr(self, name)}: must be {wanted}")
        if self.stop_after is not None and not 1 <= self.stop_after <= self.epochs:
            raise UserError(f"--stop_after {self.stop_after}: must be between 1 and --epochs {self.epochs}")
        if self.lr_restarts is not None and not 1 <= self.lr_restarts <= self.epochs:
            raise UserError(f"--lr_restarts {self.lr_restarts}: must be between 1 and --epochs {self.epochs}")
        if self.pretrained and self.weights is not None:
            raise UserError(f"--weights {self.weights}: cannot be combined with --pretrained")

    @property
    def last_epoch(self) -> int:
        """Epochs that are trained."""
        return self.stop_after or self.epochs

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr_batch_size is None else self.lr * self.batch_size / self.lr_batch_size

    def inputs(self) -> dict[str, list[str]]:
        """Folders and files that the run reads, by the option that names them."""
        given = {"--weights": self.weights, "--data_dir": self.data_dir}
        return {option: [place] for option, place in given.items() if place}

    def as_dict(self) -> dict:
        return asdict(self)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the example commands, shows types and defaults."""


# Where and whether a run is written, not what is computed: free to differ when a run is resumed.
NOT_COMPUTED = {"output_dir", "overwrite", "resume_from_checkpoint", "with_tracking", "report_to"}
NOT_COMPUTED |= {"checkpointing_epochs", "config", "process_timeout"}


def parse(config_class: type[Config], usage: str, listings: dict[str, Listing], argv=None) -> Config:
    """The command line as an instance of `config_class`.

    Args:
        config_class: a dataclass whose docstring describes its fields under "Args:".
        usage: example commands, shown by --help.
        listings: lines to print for each flag --list_<key>, or a function that makes them when asked for.
        argv: arguments; default: those of the process.

    Raises:
        UserError: an unknown flag or recipe key (with the nearest known one), or a value of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, values in listings.items():
        if f"--list_{name}" in argv:
            for value in values() if callable(values) else values:
                print(value, flush=True)
            raise SystemExit(0)
    parser = ArgumentParser(description=usage, formatter_class=_HelpFormatter, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="recipe: a YAML file of these options")
    parser.add_class_arguments(config_class, fail_untyped=True)
    for name in listings:
        parser.add_argument(f"--list_{name}", action="store_true", help=f"print the known {name} and stop")
    known = {name for action in parser._actions for name in action.option_strings}
    known |= {f"--{name}" for name, _ in _field_types(config_class)}
    try:
        _check_flags(argv, known)
        _check_recipe(argv, known)
        namespace = parser.parse_args(_recipe_first(_spell_out(argv, config_class)))
        for name in ["config", *(f"list_{name}" for name in listings)]:
            namespace.pop(name, None)
        config = config_class(**vars(parser.instantiate(namespace)))
    except (ArgumentError, TypeError) as error:
        raise UserError(_in_words(error)) from None
    config.check()
    return config


def _recipe_first(argv: list[str]) -> list[str]:
    """jsonargparse lets the later of recipe and flag win; flags shall win wherever they stand."""
    recipes, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            recipes += [argument, next(arguments, "")]
        else:
            (recipes if argument.startswith("--config=") else rest).append(argument)
    return recipes + rest


def _spell_out(argv: list[str], config_class: type) -> list[str]:
    """`--flag` alone is `--flag=true` for a boolean, `--list 1 2` is `--list=[1,2]` for a list."""
    kinds = {f"--{name}": hint for name, hint in _field_types(config_class)}
    spelled, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        values = []
        while rest and not re.match(r"--[a-z]", rest[0]):
            values.append(rest.pop(0))
        name, given, value = argument.partition("=")
        hint = str(kinds.get(name, ""))
        if given and "list" in hint:
            argument, values = name, [value]
        if "bool" in hint and not values and not given:
            argument += "=true"
        elif "list" in hint and values and not values[0].startswith("["):
            # Words are quoted, so that a path may hold what means something in a list.
            words = [json.dumps(word) for word in values] if "str" in hint else values
            argument, values = f"{argument}=[{','.join(words)}]", []
        spelled += [argument, *values]
    return spelled


def _field_types(config_class: type) -> list[tuple[str, object]]:
    """(dotted name, type) of every field, those of nested dataclasses included."""
    found = []
    for name, hint in get_type_hints(config_class).items():
        found.append((name, hint))
        for part in get_args(hint) or (hint,):  # a nested dataclass may be optional
            if is_dataclass(part):
                found += [(f"{name}.{inner}", inner_hint) for inner, inner_hint in _field_types(part)]
    return found


def _check_flags(argv: list[str], known: set[str]) -> None:
    for argument in argv:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in known:
            raise UserError(f"unknown option {flag}{_nearest(flag, known)}")


def _check_recipe(argv: list[str], known: set[str]) -> None:
    recipes = _recipe_first(argv)
    for flag, value in pairwise(recipes):
        if flag != "--config":
            continue
        if not value:
            raise UserError("--config: name a recipe, for example --config recipes/digits_gtn.yaml")
        try:
            content = yaml.safe_load(Path(value).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {value}: cannot read the recipe ({_one_line(str(error))})") from None
        if not isinstance(content, dict):
            raise UserError(f"--config {value}: a recipe is a YAML mapping of options")
        for key in content:
            if f"--{key}" not in known:
                raise UserError(f"--config {value}: unknown key '{key}'{_nearest(f'--{key}', known)}")


def _nearest(flag: str, known: set[str]) -> str:
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; --help lists the options"


def _in_words(error: Exception) -> str:
    """jsonargparse's account of a wrong value as one line: --name value: expected type."""
    message = _one_line(str(error))
    value = r"(?:Got|Given) value: (.*?)(?: - Expected a .*)?$"
    simple = re.search(rf'Parser key "([^"]+)": Expected an? (.+?)\. {value}', message)
    union = re.search(rf'Parser key "([^"]+)": Does not validate .*?Subtypes: \[(.+?)\] .*{value}', message)
    match = simple or union
    if not match:
        return message
    name, wanted, got = match.groups()
    if simple and union:  # a field of an optional nested dataclass
        name = f"{union[1]}.{name}"
    wanted = re.sub(r"<class '(\w+)'>", r"\1", wanted).replace("NoneType", "null").replace("typing.Literal", "one of ")
    return f"--{name} {got}: expected {wanted}"


def _one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message).strip()
