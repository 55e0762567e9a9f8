"""The model card says what was measured, where, and how to do it again."""

from huggingface_hub import ModelCard

from exporters.card import write_card
from models import ModelInfo

FILE = {"top1": 60.0, "bytes": 9, "images": 360, "latency_ms": {size: {"p50": 1.0} for size in ("1", "32")}}
EXPORT = {"dataset": "cifar10", "sha256": "1f", "parameters": 7, "threads": 1, "with_preprocessing": False}
EXPORT |= {"measured_on": "AMD EPYC", "device": "NVIDIA H100", "files": {"model.onnx": FILE}}


def card_of(path, info=None, options=None, **export) -> ModelCard:
    info = info or ModelInfo("resnet8", "cifar10", 10, 32, [0.5] * 3, [0.25] * 3)
    write_card(path / "README.md", info, EXPORT | export, {}, options or {}, None)
    return ModelCard.load(path / "README.md")


def test_accuracies_are_those_on_the_images_that_were_measured(tmp_path):
    card = card_of(tmp_path, dataset="stl10")
    (found,) = card.data.eval_results
    assert found.dataset_name == found.dataset_type == "stl10" and "360 test images of stl10" in card.text
    assert "images like those of cifar10, on which it was trained" in card.text


def test_latencies_are_those_of_the_processor(tmp_path):
    assert "median on AMD EPYC, 1 thread" in (card := card_of(tmp_path).text) and "H100" not in card
