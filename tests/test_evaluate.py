"""evaluate.py: its numbers against independent formulas, in one process and two; what it writes and what it refuses."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from sklearn.metrics import confusion_matrix, log_loss, recall_score, top_k_accuracy_score

from data.augment import Normalise
from data.datasets import load_images
from engine.command_line import parse
from evaluate import LISTINGS, EvaluateConfig
from models import ModelInfo, create_model, load_pretrained, save_pretrained
from reports import latency
from reports.measures import Classification, reduce_to_two
from reports.subject import ImageOptions, run_options
from reports.transfer import TransferOptions, linear_probe
from tests.runs import forked, forked_two, here, read_json, succeeded
from tests.test_bad_input import contents, refused

PARTS, UNSEEN = 5, [3, 8]  # batches of digits' 360 test images; of two processes one has more
KEYS = {"top1", "top5", "top1_interval", "nll", "ece", "per_class", "latency_ms", "images_per_second", "evaluated"}
ALIKE = {"kl", "kl_reverse", "agreement", "cka", "cka_maps"}


def make(folder: Path, name: str, seed: int, mean: float = 0.3, classes: int = 10, **config) -> Path:
    """A run folder, of a network that was not trained but for a least-squares classifier."""
    torch.manual_seed(seed)
    network, data = create_model(name, classes).eval(), load_images("digits", 16)
    with torch.no_grad():
        images = Normalise([mean] * 3, [0.4] * 3, torch.device("cpu"))(data.test.images[::3])
        embedding = network(images, features=True)[2]
        wanted = torch.eye(classes)[data.test.labels[::3] % classes]
        network.fc.weight.copy_(8 * torch.linalg.lstsq(embedding, wanted - 1 / classes).solution.T)
        network.fc.bias.zero_()
    info = ModelInfo(name, "digits", classes, 16, [mean] * 3, [0.4] * 3)
    save_pretrained(network, info, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"dataset": "digits", "lr": 0.1, **config}))
    (folder / "summary.json").write_text('{"top1": 1}')
    (folder / "plots").mkdir()
    (folder / "plots/accuracy.png").write_bytes(b"the run's")
    return folder


@dataclass
class Pair:
    student: Path
    teacher: Path
    before: dict[str, bytes]
    results: dict
    screen: str


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("evaluate")
    student = make(folder / "student", "resnet8", 0, exclude_classes=UNSEEN)
    teacher = make(folder / "teacher", "resnet14", 1, mean=0.35)
    before = contents(student)
    done = succeeded(forked("evaluate.py", student, *arguments(teacher)))
    return Pair(student, teacher, before, read_json(student / "evaluation.json"), done.stdout)


def arguments(teacher: Path) -> list:
    transfer = ["--transfer", "digits", "--transfer_epochs", 2, "--transfer_batch_size", 128]
    return ["--teacher", teacher, "--predictions", "--batch_size", 80, *transfer]


def outputs(folder: Path) -> tuple:
    """(labels, logits, features) in float64, an array a stage and the embedding, of the test images."""
    network, data = load_pretrained(folder), load_images("digits", 16)
    normalise = Normalise(network.info.mean, network.info.std, torch.device("cpu"))
    with torch.no_grad():
        logits, maps, embedding = network.double()(normalise(data.test.images).double(), features=True)
    return data.test.labels.numpy(), logits.numpy(), [each.flatten(1).numpy() for each in (*maps, embedding)]


def test_accuracy_likelihood_and_calibration(pair):
    labels, logits, _ = outputs(pair.student)
    found, p = pair.results, softmax(logits, axis=1)
    assert found.keys() == KEYS | ALIKE | {"transfer", "top1_seen", "top1_unseen"}
    right = p.argmax(1) == labels
    assert found["top1"] == pytest.approx(100 * right.mean())
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, p, k=5))
    assert found["nll"] == pytest.approx(log_loss(labels, p), rel=1e-5)
    assert found["per_class"] == pytest.approx(100 * recall_score(labels, p.argmax(1), average=None))
    low, high = found["top1_interval"]
    assert low < found["top1"] < high
    edges, ece = np.linspace(0, 1, 16), 0.0
    for below, above in pairwise(edges):
        inside = (p.max(1) > below) & (p.max(1) <= above)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - p.max(1)[inside].mean())
    assert found["ece"] == pytest.approx(ece, abs=1e-5)
    unseen = np.isin(labels, UNSEEN)
    assert found["top1_unseen"] == pytest.approx(100 * right[unseen].mean())
    assert found["top1_seen"] == pytest.approx(100 * right[~unseen].mean())
    assert 0 < right[unseen].mean() != right[~unseen].mean()


def u_centred(features: np.ndarray) -> np.ndarray:
    """The Gram matrix without its diagonal, centred as Székely and Rizzo (2014), definition 2."""
    k, n = features @ features.T, len(features)
    np.fill_diagonal(k, 0)
    sums = k.sum(0)
    k = k - sums[:, None] / (n - 2) - sums / (n - 2) + k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(k, 0)
    return k


def test_a_student_is_compared_with_its_teacher_who_normalises_otherwise(pair):
    (_, logits, ours), (_, reference, theirs) = outputs(pair.student), outputs(pair.teacher)
    p, q, found = softmax(reference, axis=1), softmax(logits, axis=1), pair.results
    assert found["kl"] == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-5)
    assert found["kl_reverse"] == pytest.approx(entropy(q, p, axis=1).mean(), rel=1e-5)
    assert found["agreement"] == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).mean())
    parts = [slice(number, None, PARTS) for number in range(PARTS)]

    def hsic(one, other):
        return sum((u_centred(one[part]) * u_centred(other[part])).sum() for part in parts)

    def cka(one, other):
        return hsic(one, other) / (hsic(one, one) * hsic(other, other)) ** 0.5

    assert found["cka"] == pytest.approx(cka(ours[-1], theirs[-1]), rel=1e-4)
    expected = [[cka(one, other) for other in theirs[:-1]] for one in ours[:-1]]
    assert found["cka_maps"] == [pytest.approx(row, rel=1e-4) for row in expected]
    assert found["cka_maps"][0][1] != pytest.approx(found["cka_maps"][1][0], rel=1e-2)  # rows are the student's


def test_what_is_written_and_shown(pair):
    new = {path for path in contents(pair.student) if path not in pair.before}
    plots = [f"plots/evaluation_{name}.png" for name in ("cka", "confusion", "reliability")]
    assert new == {f"{pair.student}/{name}" for name in ("evaluation.json", "evaluation.parquet", *plots)}
    assert {path: pair.before[path] for path in pair.before} == {p: contents(pair.student)[p] for p in pair.before}
    labels, logits, _ = outputs(pair.student)
    rows = pq.read_table(pair.student / "evaluation.parquet")
    assert rows["label"].to_pylist() == labels.tolist() and rows["prediction"].to_pylist() == logits.argmax(1).tolist()
    assert np.array(rows["logits"].to_pylist()) == pytest.approx(logits, abs=1e-3)
    assert pair.results["evaluated"]["class_names"] == list("0123456789")
    header, row = pair.screen.splitlines()[:2]
    assert header.split()[:2] == ["run", "top-1"] and f"{pair.results['top1']:.2f}" in row and str(pair.student) in row
    assert f"{pair.results['transfer']['top1']:.2f}" in row and "evaluation.json" in pair.screen.splitlines()[-1]
    measured, size = pair.results["latency_ms"], 360 // PARTS
    assert measured.keys() == {"1", str(size)} and measured["1"]["p50"] < measured[str(size)]["p50"]
    assert pair.results["images_per_second"] == pytest.approx(1000 * size / measured[str(size)]["p50"])


def test_two_processes_give_the_numbers_of_one(pair, tmp_path):
    given = [pair.student, *arguments(pair.teacher), "--output", tmp_path / "two.json"]
    done = succeeded(forked_two("evaluate.py", *given))
    assert done.stdout.count("top-1 %") == 1
    theirs, measured = read_json(tmp_path / "two.json"), {"latency_ms", "images_per_second"}
    for name in pair.results.keys() - measured - {"cka_maps"}:
        expected = pair.results[name]
        assert theirs[name] == (expected if isinstance(expected, dict) else pytest.approx(expected, rel=1e-9)), name
    assert theirs["cka_maps"] == [pytest.approx(row, rel=1e-9) for row in pair.results["cka_maps"]]
    one, two = pq.read_table(pair.student / "evaluation.parquet"), pq.read_table(tmp_path / "two.parquet")
    assert one.equals(two) and (tmp_path / "plots/two_confusion.png").is_file()


def test_the_same_network_by_its_name_and_weights_and_as_two_classes(pair, tmp_path):
    """Class 1 is 0 or 7: the network's two-class probability is the sum of its own."""
    file = tmp_path / "weights.safetensors"
    file.write_bytes((pair.student / "model.safetensors").read_bytes())
    named = ["--model", "resnet8", "--weights", file, "--dataset", "digits", "--image_size", 16, "--latency", "false"]
    binary = [pair.student, "--binary", 0, 7, "--predictions", "--latency", "false", "--output", tmp_path / "b.json"]
    for given in (named, binary):
        succeeded(forked("evaluate.py", *given))
    assert read_json(tmp_path / "evaluation.json").keys() == KEYS - {"latency_ms", "images_per_second"}
    labels, logits, _ = outputs(pair.student)
    two = np.stack([softmax(logits, axis=1)[:, side].sum(1) for side in ([1, 2, 3, 4, 5, 6, 8, 9], [0, 7])], 1)
    rows, found = pq.read_table(tmp_path / "b.parquet"), read_json(tmp_path / "b.json")
    assert rows["label"].to_pylist() == np.isin(labels, [0, 7]).astype(int).tolist()
    assert log_softmax(np.array(rows["logits"].to_pylist()), axis=1) == pytest.approx(np.log(two), abs=1e-3)
    assert len(found["per_class"]) == 2 and found["top5"] == 100 and "top1_seen" not in found


def test_a_set_of_two_classes():
    whole, two = (load_images("digits", 8, options=ImageOptions(binary=each)) for each in ([], [1, 9]))
    assert two.num_classes == 2
    for ours, theirs in ((two.train, whole.train), (two.test, whole.test)):
        assert ours.labels.tolist() == [int(label in (1, 9)) for label in theirs.labels.tolist()]
        assert torch.equal(ours.images, theirs.images)


def test_a_confusion_matrix_is_sklearns_and_parts_add_up():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4), torch.randint(4, (50,))
    whole, parts = Classification(4, torch.device("cpu")), [Classification(4, torch.device("cpu")) for _ in range(2)]
    whole.update(logits, labels)
    for part, rows in zip(parts, (slice(0, 13), slice(13, None)), strict=True):
        part.update(logits[rows], labels[rows])
    assert whole.confusion().tolist() == confusion_matrix(labels, logits.argmax(1)).tolist()
    other = torch.cat([each.flatten() for each in parts[1].sums.values()])
    parts[0].add_up(lambda sums: sums + other)
    assert parts[0].results()["per_class"] == whole.results()["per_class"]
    assert Classification(2000, torch.device("cpu")).confusion() is None


def test_a_class_without_images_has_no_accuracy():
    measure = Classification(3, torch.device("cpu"))
    measure.update(torch.eye(3)[[0, 1]], torch.tensor([0, 0]))
    assert measure.results()["per_class"] == [50.0, None, None] and measure.top1_of([1, 2]) is None


def test_two_classes_out_of_many_keep_large_logits():
    logits = torch.tensor([[1000.0, 999.0, 1000.0]], dtype=torch.float64)
    assert reduce_to_two(logits, [1]).softmax(1)[0, 1] == pytest.approx(1 / (1 + 2 * np.e))


def test_a_linear_probe_learns_what_is_linear_and_nothing_else():
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    split, other = torch.eye(4)[labels] + 0.1 * torch.randn(400, 4), torch.randn(400, 4)
    options = TransferOptions(transfer_epochs=8, transfer_batch_size=32)
    rows = slice(0, 300), slice(300, None)
    found = [linear_probe(*((x[part], labels[part]) for part in rows), 4, options) for x in (split, split, other)]
    assert found[0] == found[1] == {"top1": 100.0, "top1_train": 100.0} and found[2]["top1"] < 50


def test_latency_leaves_the_warm_up_out():
    times = [1e6] * latency.WARM_UP + [float(each) for each in range(101)]
    assert latency.describe(times) == {"p50": 50, "p90": 90, "p99": 99}
    assert latency.describe([7.0]) == {"p50": 7, "p90": 7, "p99": 7}


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ("a b --teacher t", ["a", "b"]),
        ("--teacher t a --latency false b --predictions c", ["a", "b", "c"]),
        ("--teacher=t a --binary 1 2 --split val b", ["a", "b"]),
        ("--runs a b --teacher t", ["a", "b"]),
        ("--latency a true --teacher t", ["a", "true"]),
    ],
)
def test_words_without_a_flag_are_runs(words, runs):
    config = parse(EvaluateConfig, "", LISTINGS, words.split())
    assert (config.runs, config.teacher) == (runs, "t")


MISTAKES = {
    "nothing": ([], ("RUN...",)),
    "no run": (["missing"], ("missing", "no trained model")),
    "both": (["RUN", "--model", "resnet8"], ("RUN...", "--model")),
    "no weights": (["--model", "resnet8"], ("--model", "--weights")),
    "no place": (["--model", "resnet18", "--pretrained", "--dataset", "digits"], ("--model resnet18", "--output")),
    "teacher": (["RUN", "--teacher", "missing"], ("--teacher missing",)),
    "other classes": (["RUN", "--teacher", "TWO"], ("--teacher", "2 classes", "10")),
    "other data": (["TWO"], ("digits", "10 classes", "2")),
    "no validation": (["RUN", "--split", "val"], ("--split val", "--val_fraction")),
    "split": (["RUN", "--split", "tst"], ("--split tst",)),
    "small batches": (["RUN", "--teacher", "RUN", "--batch_size", "4"], ("--batch_size 4", "8")),
    "class": (["TWO", "--binary", "10"], ("--binary 10", "0 to 9")),
    "class of many": (["RUN", "--binary", "10"], ("--binary 10", "0 to 9")),
    "all classes": (["RUN", "--binary", *"0123456789"], ("--binary", "all")),
    "run's file": (["RUN", "--output", "RUN/summary.json"], ("--output", "no evaluation")),
    "kind of file": (["RUN", "--output", "RUN/x.txt"], ("--output", ".json")),
    "two in one": (["RUN", "TWO", "--output", "x.json"], ("--output x.json", "2")),
    "transfer": (["RUN", "--transfer", "stl1O"], ("--transfer: ", "stl1O", "did you mean stl10")),
    "its place": (
        ["RUN", "--transfer", "digits", "--transfer_data_dir", "x", "--latency", "false"],
        ("--transfer_data_dir x: only",),
    ),
    "epochs": (["RUN", "--transfer_epochs", "0"], ("--transfer_epochs 0",)),
    "option": (["RUN", "--teachers", "x"], ("--teachers", "--teacher")),
    "config": (["BAD"], ("config.yaml", "val_fraction", "many")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mistakes")
    made = {"RUN": make(folder / "run", "resnet8", 0), "TWO": make(folder / "two", "resnet8", 0, classes=2)}
    return made | {"BAD": make(folder / "bad", "resnet8", 0, val_fraction="many")}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_line_and_change_nothing(case, folders):
    given, words = MISTAKES[case]
    before = [contents(folder) for folder in folders.values()]
    for name, folder in folders.items():
        given = [str(folder) if each == name else each.replace(f"{name}/", f"{folder}/") for each in given]
    refused("evaluate.py", *given, words=words)
    assert [contents(folder) for folder in folders.values()] == before


def test_weights_that_are_not_finite_are_named(tmp_path):
    run = make(tmp_path / "run", "resnet8", 0)
    network = load_pretrained(run)
    torch.nn.init.constant_(network.fc.bias, torch.nan)
    save_pretrained(network, network.info, run)
    refused("evaluate.py", run, words=("resnet8", "not finite"))


def test_the_options_of_a_run_are_read_as_what_they_are(tmp_path):
    assert run_options(tmp_path) == ImageOptions()
    written = {"exclude_classes": [1], "augment": "resized_crop", "train_fraction": 1, "image_size": None, "lr": "x"}
    (tmp_path / "config.yaml").write_text(json.dumps(written))
    assert run_options(tmp_path) == ImageOptions(exclude_classes=[1], augment="resized_crop", train_fraction=1)


def test_help():
    done = succeeded(here("evaluate.py", "--help"))
    for words in ("RUN...", "--teacher", "--transfer_epochs", "evaluation:", "transfer:", "python evaluate.py"):
        assert words in done.stdout
