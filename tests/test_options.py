"""Options by method: what a method reads is a flag, what it does not is refused or named; --help; trackers."""

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from common import UserError
from data.datasets import load_images
from distill import LISTINGS as STUDENTS
from distill import DistillConfig
from engine.checkpoint import Progress
from engine.command_line import parse
from engine.config import union
from engine.console import Console
from engine.loop import Loop
from engine.run_folder import RunFolder
from engine.tracking import start_trackers
from losses.registry import METHODS
from models import create_model
from objectives.registry import TEACHERS
from tests.runs import ROOT, TINY, forked, here, python, read_json, read_rows, succeeded
from train_teacher import LISTINGS, TeacherConfig

SMALL = ["--student", "resnet8", "--image_size", "8", "--batch_size", "512", "--epochs", "1"]
OWN = '''
from dataclasses import dataclass

from losses.method import Method


@dataclass
class Options:
    """Options.

    Args:
        zeta: how strongly.
    """

    zeta: float = 2.0


class Own(Method):
    paper, usual, options = "mine", "2", Options

    def __init__(self, context):
        super().__init__(context)
        self.terms = {"own": context.options.zeta}

    def forward(self, student, teacher, batch):
        return {"own": (student.logits - teacher.logits).square().mean()}


class NoForward(Method):
    terms = {"own": 1.0}


class NoTerms(Method):
    forward = Own.forward


class Taken(Own):
    @dataclass
    class options:
        alpha: float = 1.0
'''
FORWARD = "    def forward(self, student, teacher, batch):\n"
WRONG = [  # the rest of a class, its terms, and what is said of it
    (FORWARD + "        return {'own': 1 / 0}", {"own": 1.0}, "wrong0.py:Own: fails, line 8: ZeroDivisionError"),
    (FORWARD + "        return {'own': 1}", {"own": 1.0}, "its term 'own' is int"),
    (FORWARD + "        return {'own': student.logits}", {"own": 1.0}, "'own' is a tensor [512, 10]"),
    (FORWARD + "        return None", {"own": 1.0}, "gives NoneType instead of own"),
    (FORWARD + "        return {'other': student.logits.mean()}", {"own": 1.0}, "gives other instead of own"),
    (FORWARD + "        return {}", 3, "its `terms` are no names with a number each: 3"),
    (FORWARD + "        return {}", {"own": "x"}, "its `terms` are no names with a number each"),
    (
        "    def __init__(self, c):\n        exit(3)\n" + FORWARD + "        pass",
        {"own": 1.0},
        "fails, line 8: SystemExit: 3",
    ),
]


def teacher(*argv) -> TeacherConfig:
    return parse(TeacherConfig, "", LISTINGS, [str(each) for each in argv])


def student(*argv) -> DistillConfig:
    return parse(DistillConfig, "", STUDENTS, [str(each) for each in argv])


def refused(read, *argv) -> str:
    with pytest.raises(UserError) as error:
        read(*argv)
    return str(error.value)


def recipe(folder, text: str):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


@pytest.mark.parametrize("config_class", [TeacherConfig, DistillConfig])
def test_the_command_line_is_the_union_of_the_methods_options(config_class):
    rows = config_class.rows()
    assert rows.keys() == (TEACHERS if config_class is TeacherConfig else METHODS).keys()
    names = {each.name for parts in rows.values() for part in parts for each in fields(part)}
    assert names <= config_class.__dataclass_fields__.keys()


def test_an_option_that_two_classes_declare_apart_is_a_mistake_of_the_programs():
    @dataclass
    class One:
        same: int = 1

    @dataclass
    class Two:
        same: int = 2

    with pytest.raises(TypeError, match="both declare 'same'"):
        union([One, Two])


@pytest.mark.parametrize(
    ("read", "argv", "said"),
    [
        (teacher, "--method vanilla --gate_every 4", ("--gate_every 4", "vanilla", "gtn")),
        (teacher, "--method vanilla --gate_every 2", ("--gate_every 2",)),  # the default
        (teacher, "--alpha=1", ("--alpha=1", "vanilla", "sftn, gtn")),
        (teacher, "--method sftn --full_gates", ("--full_gates", "gtn")),
        (teacher, "--method gtn --student resnet8", ("--student resnet8", "sftn")),
        (teacher, "--pool.stem 8", ("--pool.stem 8", "sftn, gtn")),
        (
            student,
            "--method at --alpha 0.5 --dkd_beta 3",
            ("--alpha 0.5 (for kd, rco), --dkd_beta 3 (for dkd)",),
        ),
        (student, "--method at+kd --alpha 0.5", ("--alpha 0.5",)),
        (student, "--method at --temperature 2", ("--temperature 2",)),
        (student, "--method at --warmup_epochs 2", ("--warmup_epochs 2", "ab, ft")),
        (student, "--method none --teacher x y", ("--teacher x y", "none")),
        (student, "--method kd --peers resnet8", ("--peers resnet8", "dml")),
        (student, "--method dml --ce_weight 1", ("--ce_weight 1",)),
    ],
)
def test_flags_that_the_method_does_not_read_are_refused(read, argv, said):
    message = refused(read, *argv.split())
    assert all(words in message for words in said) and "not read by --method" in message and "\n" not in message


def test_flags_that_the_method_reads_are_taken():
    assert teacher("--model", "pool:3", "--pool.stem", "8").pool.stem == 8
    assert student("--method", "at", "--kd_weight", "1", "--temperature", "2").temperature == 2
    assert student("--method", "at+dkd", "--dkd_beta", "3").dkd_beta == 3
    assert student("--method", "dml", "--peers", "resnet8", "--kd_weight", "2").peers == ["resnet8"]


def test_flags_of_timms_scripts_that_are_called_otherwise_here():
    config = parse(TeacherConfig, "", {}, ["--sched", "linear", "--model_ema", "--epochs", "3"])
    assert (config.lr_schedule, config.model_ema_decay, config.epochs) == ("linear", 0.9998, 3)
    assert parse(TeacherConfig, "", {}, ["--sched=constant"]).lr_schedule == "constant"


def test_a_recipes_keys_that_the_method_does_not_read_keep_their_defaults_and_are_named(tmp_path):
    path = recipe(tmp_path, "method: kd\nalpha: 0.5\ntemperature: 3\nkd_weight: 1\nteacher: [x]\nepochs: 1\n")
    assert student("--config", path).unread == ()
    config = student("--config", path, "--method", "none")
    assert config.unread == ("alpha", "temperature", "kd_weight", "teacher")
    assert config == DistillConfig(method="none", epochs=1)
    assert "--alpha 0.5" in refused(student, "--config", path, "--method", "none", "--alpha", "0.5")
    done = succeeded(here("distill.py", "--config", path, "--method", "none", *SMALL, "--output_dir", tmp_path / "run"))
    assert "not read by --method none: alpha, temperature, kd_weight, teacher\n" in done.stdout
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["alpha"] == 0.9


def test_a_method_of_ones_own_brings_its_options(own, tmp_path, capsys):
    assert student("--method", f"{own}:Own").zeta == 2.0
    assert student(f"--method={own}:Own+kd", "--zeta", "3").zeta == 3.0
    path = recipe(tmp_path, f"method: {own}:Own\nzeta: 4\n")
    assert student("--config", path).zeta == 4.0
    assert "--zeta fast: expected float" in refused(student, "--config", path, "--zeta", "fast")
    assert "unknown option --zeta" in refused(student, "--zeta", "3")
    with pytest.raises(SystemExit):
        student("--method", f"{own}:Own", "--help")
    assert "how strongly" in capsys.readouterr().out


def test_a_method_of_ones_own_trains_with_its_options(own, tmp_path):
    succeeded(here("train_teacher.py", *TINY, "--output_dir", tmp_path / "t"))
    run = ["--teacher", tmp_path / "t", "--student", "resnet8", "--epochs", 1, "--batch_size", 512]
    arguments = [*run, "--method", f"{own}:Own", "--zeta", 3, "--output_dir", tmp_path / "run"]
    succeeded(here("distill.py", *arguments))
    assert read_json(tmp_path / "run" / "summary.json")["loss"] == {"ce": 1.0, "own": 3.0}
    done = here("distill.py", *run, "--method", f"{own}:NoTerms", "--output_dir", tmp_path / "none")
    assert done.returncode == 2 and "NoTerms: has no `terms`" in done.stderr
    for number, (body, terms, said) in enumerate(WRONG):
        path = tmp_path / f"wrong{number}.py"
        path.write_text(f"from losses.method import Method\n\n\nclass Own(Method):\n    terms = {terms}\n\n{body}\n")
        done = here("distill.py", *run, "--method", f"{path}:Own", "--output_dir", tmp_path / f"wrong{number}")
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_methods_of_ones_own_that_cannot_be_are_refused(own, tmp_path):
    assert "NoForward has no forward" in refused(student, "--method", f"{own}:NoForward")
    assert "alpha" in refused(student, "--method", f"{own}:Taken")
    for number, (text, said) in enumerate(
        [
            ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
            ("x = 1\n\nraise OSError('boom')\n", "line 3: OSError: boom"),
            ("x = (\n", "line 1: SyntaxError"),
        ]
    ):
        path = tmp_path / f"own{number}.py"
        path.write_text(text)
        message = refused(student, "--method", f"{path}:Own")
        assert f"your file cannot be imported: {path}, {said}" in message


def shown(read, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


def options_in(text: str) -> int:
    return sum(line.startswith(("  --", "  -h")) for line in text.splitlines())


@pytest.mark.parametrize("method", [None, *TEACHERS])
def test_help_for_teachers(capsys, method):
    text = shown(teacher, capsys, "--help", *(["--method", method] if method else []))
    assert options_in(text) <= 40
    for title in ("teacher:", "data:", "training:", "where and how it runs:", "help and listings:"):
        assert f"\n{title}\n" in text
    assert ("--gate_every" in text) == (method == "gtn") and ("--student" in text) == (method == "sftn")
    assert ("--alpha" in text) == (method in ("sftn", "gtn"))


@pytest.mark.parametrize("method", METHODS)
def test_help_for_students(capsys, method):
    text = shown(student, capsys, "--method", method, "-h")
    assert options_in(text) <= 40 and ("--dkd_beta" in text) == (method == "dkd") and "--student" in text


@pytest.mark.parametrize(("read", "config_class"), [(teacher, TeacherConfig), (student, DistillConfig)])
def test_help_all_shows_every_option(capsys, read, config_class):
    text = shown(read, capsys, "--help_all")
    assert all(f"  --{name} " in text or f"  --{name}\n" in text for name in config_class.__dataclass_fields__)
    assert "--pool.widths" in text and "\nhelp and listings:\n" in text


def test_help_imports_no_library_that_only_runs_need():
    unwanted = {"torchvision", "sklearn", "datasets", "timm", "matplotlib"}
    code = f"import sys, distill, train_teacher; sys.exit(str({unwanted} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr.strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr_gamma:\n", "'lr_gamma' has no value"),
        ("pool: null\n", "'pool' has no value"),
        ("lr: 1\nepochs: 2\nlr: 0.5\n", "line 3: 'lr' is given twice"),
        ("method: gtn\npool:\n  stem: 4\n  stem: 8\n", "line 4: 'stem' is given twice"),
        ("branches: &all\n- *all\n", "line 2: aliases are not supported"),
        (f"branches: {'[' * 3000}{']' * 3000}\n", "line 1: nested too deeply"),
        ("1: 2\n", "mapping"),
        ("weights: ''\n", "--weights '': is empty"),
        ("help: true\n", "unknown key 'help'"),
    ],
)
def test_recipes_that_yaml_would_be_silent_about(tmp_path, text, said):
    message = refused(teacher, "--config", recipe(tmp_path, text))
    assert said in message and "\n" not in message


def test_a_recipes_null_for_an_optional_value_is_its_default(tmp_path):
    path = recipe(tmp_path, "weights:\nstop_after: null\n")
    assert teacher("--config", path) == TeacherConfig()
    assert student("--config", recipe(tmp_path, "pool:\n")).pool is None


@pytest.mark.parametrize("flag", ["--weights", "--dataset", "--output_dir", "--model"])
def test_an_empty_value_is_not_one_that_is_left_out(flag):
    assert refused(teacher, flag, "").startswith(f"{flag} '': is empty")
    assert refused(teacher, f"{flag}=").startswith(f"{flag} '': is empty")


def test_a_newline_in_a_name_does_not_split_the_line_of_an_error():
    done = here("train_teacher.py", "--model", "resnet\n\x1b[31m20")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "resnet\\n\\x1b" in done.stderr


class Recording(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "recording", False

    def __init__(self):
        super().__init__()
        self.options, self.rows = {}, []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.options = values

    def log(self, values, step=None):
        self.rows.append((step, values))


def test_a_tracker_is_told_the_options_and_every_epoch(tmp_path):
    tracker = Recording()
    size = ("--image_size", 8, "--batch_size", 512, "--epochs", 2)
    config = teacher(*size, "--with_tracking", "--output_dir", tmp_path / "r")
    objective = TEACHERS["vanilla"].build(create_model("resnet8", 10), config, 8)
    accelerator = Accelerator(log_with=tracker)
    Loop(objective, load_images("digits", 8), config, accelerator, RunFolder(tmp_path / "r"), Console(False)).run()
    assert tracker.options["lr"] == 0.05 and tracker.options["pool.stem"] == 16
    assert all(type(value) in (bool, int, float, str) for value in tracker.options.values())
    assert [step for step, _ in tracker.rows] == [1, 2] and tracker.rows[0][1].keys() >= {"loss/ce", "lr"}


@pytest.mark.parametrize(("given", "called"), [(("--run_name", "mine"), "mine"), ((), "folder")])
def test_trackers_call_a_run_as_they_are_told_or_as_its_folder(given, called):
    """Each library has a keyword of its own for it."""
    told = []
    accelerator = SimpleNamespace(
        init_trackers=lambda *arguments: told.append(arguments), trackers=[], is_main_process=True
    )
    config = teacher("--with_tracking", "--output_dir", "some/folder", *given)
    start_trackers(accelerator, config, Progress())
    ((project, _, names),) = told
    assert project == "student-friendly-teachers" and names["wandb"] == {"name": called}
    assert names["mlflow"] == {"run_name": called} and names["swanlab"] == {"experiment_name": called}
    known = {"tensorboard": called, "wandb": "a1", "mlflow": "b2"}
    start_trackers(accelerator, config, Progress(epoch=3, trackers=known))
    assert told[1][2]["wandb"] == {"name": called, "id": "a1", "resume": "allow"}
    assert told[1][2]["mlflow"] == {"run_name": called, "run_id": "b2"}
    assert told[1][2]["tensorboard"] == {"purge_step": 4}  # what was said of the fourth epoch is said again


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "trackio"])
def test_a_resumed_run_goes_on_with_its_curve(tmp_path, tracker):
    """A run of three epochs that is stopped after two of them, and the same one again."""
    pytest.importorskip(tracker, reason=f"pip install {tracker}")
    places = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "TRACKIO_DIR": str(tmp_path / "trackio")}
    places |= {"MLFLOW_ALLOW_FILE_STORE": "true"}
    arguments = [*TINY[:-1], "3", "--with_tracking", "--report_to", tracker, "--output_dir", tmp_path / "run"]
    batches = -(-1437 // 128)
    stopped = forked("tests/signalled.py", 15, 2 * batches + 3, "train_teacher.py", *arguments, **places)
    assert stopped.returncode == 143, stopped.stderr
    succeeded(forked("train_teacher.py", *arguments, "--resume_from_checkpoint", "latest", **places))
    expected = [row["losses"]["ce"] for row in read_rows(tmp_path / "run/metrics.jsonl")]
    curves = json.loads(succeeded(forked("-c", CURVES[tracker], **places, FOLDER=str(tmp_path / "run"))).stdout)
    assert curves == [[[number, pytest.approx(value, rel=1e-5)] for number, value in enumerate(expected, start=1)]]


# Each prints every run that holds loss/ce, as pairs of epoch and value.
CURVES = {
    "tensorboard": """
import json, os
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
found = EventMultiplexer().AddRunsFromDirectory(os.environ["FOLDER"] + "/tensorboard").Reload()
runs = [run for run, content in found.Runs().items() if "loss/ce" in content["scalars"]]
print(json.dumps([[(each.step, each.value) for each in found.Scalars(run, "loss/ce")] for run in runs]))
""",
    "mlflow": """
import json, mlflow
client = mlflow.MlflowClient()
runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
found = [client.get_metric_history(run.info.run_id, "loss/ce") for run in runs]
print(json.dumps([[(each.step, each.value) for each in history] for history in found]))
""",
    "trackio": """
import json
from trackio.sqlite_storage import SQLiteStorage
project = "student-friendly-teachers"
found = [SQLiteStorage.get_logs(project, run) for run in SQLiteStorage.get_runs(project)]
print(json.dumps([[(row["step"], row["loss/ce"]) for row in rows if "loss/ce" in row] for rows in found]))
""",
}


def test_tensorboard_gets_the_project_and_the_options(tmp_path):
    arguments = [*TINY, "--with_tracking", "--tracker_project_name", "mine", "--output_dir", tmp_path / "run"]
    done = succeeded(python("train_teacher.py", *arguments))
    folder = tmp_path / "run" / "tensorboard"
    assert f"tensorboard --logdir {folder}" in done.stdout and [each.name for each in folder.iterdir()] == ["mine"]
    (stored,) = folder.glob("mine/*/hparams.yml")
    assert yaml.safe_load(stored.read_text())["batch_size"] == 128
    assert "--tracker_project_name ../x" in refused(teacher, "--tracker_project_name", "../x")
