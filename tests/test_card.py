"""The model card says what was measured, where, and how to do it again."""

from typing import get_type_hints

import pytest
import yaml
from huggingface_hub import ModelCard

from distill import DistillConfig
from export import recipe_of
from exporters.card import write_card
from models import ModelInfo
from train_teacher import TeacherConfig

FILE = {"top1": 60.0, "bytes": 9, "images": 360, "latency_ms": {size: {"p50": 1.0} for size in ("1", "32")}}
EXPORT = {"dataset": "cifar10", "sha256": "1f", "parameters": 7, "threads": 1, "with_preprocessing": False}
EXPORT |= {"measured_on": "AMD EPYC", "device": "NVIDIA H100", "files": {"model.onnx": FILE}}


def card_of(path, names=("resnet8", "cifar10"), run=None, options=None, **export) -> ModelCard:
    info = ModelInfo(*names, 10, 32, [0.5] * 3, [0.25] * 3)
    write_card(path / "README.md", info, EXPORT | export, run or {}, *recipe_of(options or {}), None)
    return ModelCard.load(path / "README.md")


def test_accuracies_are_those_on_the_images_that_were_measured(tmp_path):
    card = card_of(tmp_path, dataset="stl10")
    (found,) = card.data.eval_results
    assert found.dataset_name == found.dataset_type == "stl10" and "360 test images of stl10" in card.text
    assert "images like those of cifar10, on which it was trained" in card.text


def test_latencies_are_those_of_the_processor(tmp_path):
    assert "median on AMD EPYC, 1 thread" in (card := card_of(tmp_path).text) and "H100" not in card


HOME = "/home/me/private"
KINDS = {"dataset": "folder:PLACE/images", "student": "PLACE/spec.json", "method": "kd+PLACE/own.py:Own"}
KINDS |= {"model": "PLACE/own.py:net", "unlabeled": "parquet:PLACE/*.parquet", "peers": "PLACE/peer.json"}


@pytest.mark.parametrize("place", [HOME, "../private"])
@pytest.mark.parametrize("config", [DistillConfig, TeacherConfig])
def test_no_folder_of_the_machine_is_told(config, place, tmp_path):
    """Whatever option it is in, and also of what the run's records say."""
    options = {}
    for name, hint in get_type_hints(config).items():
        if name in config.__dataclass_fields__ and "str" in str(hint) and "Literal" not in str(hint):
            value = KINDS.get(name, "PLACE/thing").replace("PLACE", place)
            options[name] = [value, value] if "list" in str(hint) else value
    assert {"output_dir", "teacher" if config is DistillConfig else "vanilla_run"} < options.keys()
    run = {"method": options["method"], "epochs": 1, "seed": 0}
    run |= {"teachers": [{"model": f"{place}/own.py:net", "sha256": "2e", "path": f"{place}/t"}]}
    names, dataset = (f"{place}/own.py:net", f"folder:{place}/images"), f"folder:{place}/test"
    card = card_of(tmp_path, names, run, options, dataset=dataset)
    assert "private" not in (tmp_path / "README.md").read_text()
    assert (
        card.data.eval_results[0].dataset_name == "folder:test"
        and "# own.py:net, distilled for folder:images" in card.text
    )
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert (recipe["dataset"], recipe["method"]) == ("folder:images", "kd+own.py:Own")
    command = card.text.split("```bash\n")[1].splitlines()[0]
    if config is DistillConfig:
        assert recipe["student"] == "model.json" and recipe["peers"] == ["peer.json"] * 2
        assert "distill.py --config recipe.yaml" in command and "--teacher TEACHER TEACHER" in command
        assert "--weights WEIGHTS" in command and "--unlabeled UNLABELED" in command
    else:
        assert "train_teacher.py" in command and recipe["student"] == "spec.json"


@pytest.mark.parametrize(("teachers", "title"), [([], "trained"), ([{"model": "vgg8", "sha256": "2e"}], "distilled")])
def test_what_had_no_teacher_is_not_called_distilled(teachers, title, tmp_path):
    card = card_of(tmp_path, run={"teachers": teachers})
    assert f"# resnet8, {title} for cifar10" in card.text
    assert ("knowledge-distillation" in card.data.tags) == bool(teachers)


def test_a_spec_is_called_by_its_name(tmp_path):
    assert "# small, trained for cifar10" in card_of(tmp_path, ("runs/gtn/students/small.json", "cifar10")).text
