"""A planned run: its options as the script itself resolves them, the key that they give, and its command."""

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path

import yaml

from common import UserError
from distill import DistillConfig
from engine.command_line import flags, parse
from engine.config import INPUTS, NOT_COMPUTED, RunConfig
from engine.run_folder import plain
from losses.registry import find_methods
from models.own import is_own
from train_teacher import TeacherConfig

CONFIGS = {"train_teacher.py": TeacherConfig, "distill.py": DistillConfig}
ROOT = Path(__file__).parents[1]
KEY_LENGTH = 12


@dataclass
class PlannedRun:
    """One call of a script.

    Attributes:
        name: what it is called in this comparison.
        script: train_teacher.py or distill.py.
        options: of the script, `seed` among them; without output_dir, and without the two below.
        source: the kind of teacher that it is, or learns from, or ALONE.
        student: what is distilled into, or what a teacher's branches are of; None: a teacher for all students.
        method: how it is distilled, as the comparison calls it; None: a teacher.
        teacher: the run that it learns from.
        weights: the run that it starts from.
        transfer: sets on whose frozen embeddings a linear classifier is trained when it is done, with the epochs.
        dataset: where the images are, where the plan's name for them is another; the key has the plan's.
        place: the name of its run folder, where that is not to tell its key.
    """

    name: str
    script: str
    options: dict
    source: str
    seed: int
    student: str | None = None
    method: str | None = None
    teacher: "PlannedRun | None" = None
    weights: "PlannedRun | None" = None
    dataset: str | None = None
    transfer: dict[str, int] = field(default_factory=dict)
    place: str | None = None

    @property
    def needs(self) -> list["PlannedRun"]:
        """The runs whose folders it reads."""
        return [each for each in (self.weights, self.teacher) if each]

    @cached_property
    def config(self) -> RunConfig:
        """The options as the script would resolve them. Raises UserError, naming the run, where it would refuse."""
        options = self.options | {name: "x" for name in ("weights",) if self.weights}
        options |= {"teacher": ["x"]} if self.teacher else {}
        without_seed = {name: value for name, value in options.items() if name != "seed"}
        try:
            return _resolved(self.script, yaml.safe_dump(without_seed, sort_keys=True))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    @cached_property
    def key(self) -> str:
        """A hash of all that its result depends on: shared by all comparisons, on any machine.

        Options at their defaults do not count, so that a new option leaves old runs as they are. Runs and files that it
        reads count by what they hold, the data set by its name.
        """
        config, places = self.config, {}
        for name in INPUTS & {each.name for each in fields(config)}:
            if run := getattr(self, name, None):
                places[name] = run.key
            elif given := getattr(config, name):
                places[name] = [_content(place) for place in ([given] if isinstance(given, str) else given)]
        own = differing(config) | {"seed": self.seed, **places}
        own |= {"files": files} if (files := _files(config)) else {}
        text = json.dumps([self.script, own], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        if self.place:
            return self.place
        config = self.weights.config if self.weights and not getattr(self.config, "model", "student") else self.config
        model = getattr(config, "model", None) or config.student or "model"
        return f"{plain(model)}-{plain(self.config.method)}-{self.key}"

    def command(self, runs: Path) -> list[str]:
        """What follows `python`, its folder and those that it reads below `runs`."""
        given = {name: value for name, value in self.options.items() if name not in self.config.unread}
        given |= {"dataset": self.dataset} if self.dataset else {}
        given |= {"teacher": [str(runs / self.teacher.folder)]} if self.teacher else {}
        given |= {"weights": str(runs / self.weights.folder)} if self.weights else {}
        return [self.script, *flags(given | {"seed": self.seed}), "--output_dir", str(runs / self.folder)]


def differing(config: RunConfig) -> dict:
    """The options of a run that are not at their defaults, but for run folders and what is not computed."""
    config_class = type(config).with_method(config.method)
    usual = asdict(config_class(method=config.method))
    ignored = NOT_COMPUTED | INPUTS | {"seed"}
    found = {name: value for name, value in asdict(config).items() if name not in ignored and value != usual[name]}
    return found | {"method": config.method}


@cache
def _resolved(script: str, options: str) -> RunConfig:
    """The configuration of options in YAML: the same for every seed."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(options)
        file.flush()
        try:
            return parse(CONFIGS[script], "", {}, ["--config", file.name])
        except UserError as error:
            raise UserError(str(error).replace(f"--config {file.name}: ", "")) from None


def _content(place: str) -> str:
    """What a run folder or file holds, as a hash; a name that is none of them itself."""
    path = Path(place)
    path = path / "model.json" if path.is_dir() else path  # which holds the hash of the weights
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else place


def _files(config: RunConfig) -> dict[str, str]:
    """Hashes of the files that options name: specs, and methods and networks of the user's own."""
    named = [place for option, places in config.inputs().items() if option == "the spec" for place in places]
    for part in config.method.split("+"):
        if ".py:" in part and find_methods(part):
            named.append(part.rpartition(":")[0])
    networks = [getattr(config, "model", None), config.student, *getattr(config, "teacher", [])]
    named += [name.rpartition(":")[0] for name in networks if name and is_own(name)]
    return {name: _content(name) for name in named}
