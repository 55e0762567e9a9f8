"""Teachers that know images and classes their own way: what they see of a batch, and which output is which class."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common import UserError
from comparing.records import on_test_images
from data.datasets import load_images
from distill import DistillConfig
from exporters.finetune import load_teachers
from models import ModelInfo, create_model, load_pretrained, save_pretrained
from models.preprocessing import (
    Preprocessed,
    Preprocessing,
    class_order,
    fitted,
    fitted_to,
    published_classes,
    published_preprocessing,
    read_mapping,
)
from objectives.distillation import Distillation
from objectives.teachers import build_teacher, preprocessed
from reports.evaluation import Evaluation
from reports.subject import load_subject
from tests.runs import forked, here, read_json, succeeded

BATCH = ([0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
OWN = ([0.5, 0.45, 0.4], [0.25, 0.2, 0.3])


def teacher(classes: int = 5, size: int = 16, mean=OWN[0], std=OWN[1], names=None, seed: int = 0):
    torch.manual_seed(seed)
    model = create_model("resnet8", classes).eval()
    model.info = ModelInfo("resnet8", "digits", classes, size, list(mean), list(std), class_names=names)
    return model


def test_pixels_are_those_of_the_formula_in_float64():
    pixels = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    (mean, std), (own_mean, own_std) = (
        (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in pair) for pair in (BATCH, OWN)
    )
    batch, expected = (pixels - mean) / std, (pixels - own_mean) / own_std
    for kind, limit in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        before = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        try:
            made = Preprocessed(nn.Identity(), Preprocessing(*OWN, 16), *BATCH)
        finally:
            torch.set_default_dtype(before)
        found = made.prepared(batch.to(kind))
        assert found.dtype == kind and (found - expected).abs().max() < limit * expected.abs().max()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("side", [7, 24])
def test_sizes_are_those_of_pillow(side, interpolation):
    """Pillow's filters on float images; without antialiasing torch's bicubic is another one."""
    image = torch.rand(16, 16)
    made = Preprocessed(nn.Identity(), Preprocessing(*BATCH, side, interpolation), *BATCH)
    found = made.prepared(image.expand(1, 3, 16, 16))[0, 0]
    filters = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
    expected = torch.tensor(
        list(Image.fromarray(image.numpy()).resize((side, side), filters[interpolation]).get_flattened_data())
    )
    if interpolation == "nearest":  # torch rounds another way: it takes the pixel at floor(i 16 / side)
        places = torch.arange(side) * 16 // side
        expected = image[places][:, places].flatten()
    assert found.shape == (side, side) and torch.allclose(found.flatten(), expected, atol=1e-5)


def test_a_teacher_that_knows_the_batch_stays_as_it_is():
    model = teacher()
    assert fitted(model, *OWN, 16) is model
    assert isinstance(fitted(model, *OWN, 8), Preprocessed) and isinstance(
        fitted(model, *OWN, 16, [4, 3, 2, 1, 0]), Preprocessed
    )


def test_logits_are_in_the_order_of_the_images_classes_and_the_rest_untouched():
    model, images, order = teacher(), torch.randn(3, 3, 16, 16), [3, 0, 4]
    logits, maps, embedding = model(images, features=True)
    found = fitted(model, *OWN, 16, order)(images, features=True)
    assert torch.equal(found[0], torch.stack([logits[:, place] for place in order], 1))
    assert all(torch.equal(*pair) for pair in zip(found[1], maps, strict=True)) and torch.equal(found[2], embedding)
    assert torch.equal(fitted(model, *OWN, 16, order)(images), found[0])
    assert fitted(model, *OWN, 8).state_dict().keys() == model.state_dict().keys()  # as --method rco loads it


def test_teachers_of_other_sizes_normalisations_and_orders_are_averaged():
    data = load_images("digits", 8)
    one = teacher(10, 8, data.mean, data.std, list("0123456789"))
    two = teacher(10, 16, *OWN, list("9876543210"), seed=1)
    config = DistillConfig(teacher=["one", "two"])
    both = preprocessed([one, two], data, config)
    assert both[0] is one
    objective = Distillation(create_model("resnet8", 10), both)
    pixels = torch.rand(4, 3, 8, 8)
    (mean, std), (own_mean, own_std) = (
        (torch.tensor(each).view(3, 1, 1) for each in pair) for pair in ((data.mean, data.std), OWN)
    )
    theirs = F.interpolate((pixels - own_mean) / own_std, 16, mode="bilinear")
    expected = (one((pixels - mean) / std) + two(theirs).flip(1)) / 2
    torch.testing.assert_close(
        objective._evaluate_teachers((pixels - mean) / std).logits, expected, atol=1e-4, rtol=1e-4
    )


ABC, MAPPING = ["a", "b", "c"], {"a": 2, "1": "x_y", "c": "B"}


@pytest.mark.parametrize(
    ("names", "count", "wanted", "mapping", "expected"),
    [
        (["C", "b", "a"], 3, ABC, None, [2, 1, 0]),
        (["x", "c", "a", "b", "y"], 5, ABC, None, [2, 3, 1]),
        (["golden_retriever", "tabby"], 2, ["tabby", "golden retriever"], None, [1, 0]),
        (ABC, 3, ABC, {"a": 0}, None),  # names go first
        (None, 3, ABC, None, None),
        (ABC, 3, None, None, None),
        (["x", "y", "z"], 3, ABC, None, None),
        (["b", "x y", "z", "q"], 4, ABC, MAPPING, [2, 1, 0]),
        (None, 4, None, {"0": 3, "1": 0, "2": 2}, [3, 0, 2]),
        (None, 4, ["red_fox", "b", "c"], {"Red fox": 3, "1": 0, "C": 2}, [3, 0, 2]),
        (None, 4, ABC, None, "has 4 classes, the images 3, and names are not known on both sides; --teacher_classes"),
        (["b", "a", "d"], 3, ABC, None, "1 of the 3 classes' names are not the teacher's, as 'c'; --teacher_classes"),
        (["a", "b", "d"], 3, ABC, None, None),  # what they have in common is in place
        (["x", "tench", "crane", "crane"], 4, ["crane, bird", "tench, Tinca tinca"], {"0": 2, "1": 1}, [2, 1]),
        (["tench, Tinca tinca", "hen"], 2, ["hen", "tench"], None, [1, 0]),
        (["a", "b", "c", "c"], 4, ABC, None, "1 of the 3 classes' names are not the teacher's, as 'c'"),
        (["x", "y", "z", "q"], 4, ABC, {"a": 0}, "class 'b' is not there; --teacher t has outputs 0 to 3 and names"),
        (ABC, 3, ["a", "b, x", "B"], None, "2 of the 3 classes' names are not the teacher's, as 'b, x'"),
        (None, 4, ABC, {"a": 4}, "class 'a' cannot be '4'; --teacher t has outputs 0 to 3, without names"),
        (None, 4, ABC, {"a": "x"}, "class 'a' cannot be 'x'"),
        (None, 4, ABC, {"a": True}, "class 'a' cannot be 'True'"),
    ],
)  # fmt: skip
def test_the_order_of_classes(names, count, wanted, mapping, expected):
    if isinstance(expected, str):
        with pytest.raises(UserError) as error:
            class_order(names, count, wanted, 3, mapping, "--teacher t")
        assert expected in str(error.value)
    else:
        classes = len(wanted) if wanted else 3
        assert class_order(names, count, wanted, classes, mapping, "--teacher t") == expected


@pytest.mark.parametrize("content", ["[1, 2]", "{", "\xff"])
def test_a_mapping_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(UserError, match=r"--teacher_classes .*m.json: "):
        read_mapping(str(tmp_path / "m.json"))
    with pytest.raises(UserError, match=r"--teacher_classes .*n.json: there is no such file"):
        read_mapping(str(tmp_path / "n.json"))


def test_published_weights_say_what_they_expect():
    assert published_preprocessing("resnet20") is None
    known = published_preprocessing("torchvision:efficientnet_b3")
    assert (known.image_size, known.interpolation) == (300, "bicubic") and known.mean == [0.485, 0.456, 0.406]
    names = published_classes(create_model("torchvision:mobilenet_v2", 1000, image_size=64))
    assert names[0][0] == "tench" and len(names[0]) == 1000
    pytest.importorskip("timm")
    known = published_preprocessing("timm:test_vit.r160_in1k")
    assert known == Preprocessing([0.5] * 3, [0.5] * 3, 160, "bicubic")
    synsets, words = published_classes(create_model("timm:test_vit.r160_in1k", 10, image_size=32))
    assert (synsets[0], words[0]) == ("n01440764", "tench, Tinca tinca")


def test_a_teacher_by_name_has_its_files_classes_and_its_own_size(tmp_path):
    """A timm checkpoint of twelve classes teaches ten, as a mapping says, at timm's size and normalisation."""
    pytest.importorskip("timm")
    source, data = create_model("timm:test_convnext", 12, image_size=160), load_images("digits", 8)
    torch.save({"state_dict": source.net.state_dict(), "epoch": 3}, tmp_path / "model_best.pth.tar")
    (tmp_path / "classes.json").write_text(json.dumps({str(digit): 11 - digit for digit in range(10)}))
    options = {"teacher_weights": str(tmp_path / "model_best.pth.tar"), "teacher": ["timm:test_convnext"]}
    config = DistillConfig(**options, teacher_classes=str(tmp_path / "classes.json"))
    built = build_teacher("timm:test_convnext", data, config)
    assert (built.info.num_classes, built.info.image_size, built.info.mean) == (12, 160, [0.5] * 3)
    (seen,) = preprocessed([built], data, config)
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (data.mean, data.std))
    large = F.interpolate((pixels - 0.5) / 0.5, 160, mode="bicubic", antialias=True)
    expected = source.eval()(large)[:, [11 - digit for digit in range(10)]]
    torch.testing.assert_close(seen((pixels - mean) / std), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="--teacher timm:test_convnext: has 12 classes, the images 10"):
        preprocessed([built], data, DistillConfig(**options))


@pytest.mark.parametrize(("names", "mapping"), [("edcba", None), ("vwxyz", dict(zip("abcde", "zyxwv", strict=True)))])
def test_a_student_is_compared_with_a_teacher_of_another_size_and_order_of_classes(names, mapping):
    """KL(teacher || student) written out."""
    student, other = teacher(seed=1, names=list("abcde")), teacher(5, 24, *BATCH, list(names))
    evaluation = Evaluation(student, fitted_to(other, student, "--teacher", mapping), torch.device("cpu"))
    images = torch.randn(6, 3, 16, 16)
    evaluation.run([(images, torch.zeros(6, dtype=torch.long))])
    (mean, std), (own_mean, own_std) = ((torch.tensor(each).view(3, 1, 1) for each in pair) for pair in (OWN, BATCH))
    with torch.no_grad():
        p = other(F.interpolate((images * std + mean - own_mean) / own_std, 24, mode="bilinear")).flip(1).log_softmax(1)
        q = student(images).log_softmax(1)
    assert evaluation.results()["kl"] == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)


def test_a_student_learns_from_teachers_of_two_sizes(tmp_path):
    for name, size in (("one", 16), ("two", 8)):
        model = teacher(10, size, *(BATCH if name == "one" else OWN))
        save_pretrained(model, model.info, tmp_path / name)
    learn = ["--student", "resnet8", "--image_size", "8", "--epochs", "1", "--train_fraction", "0.1"]
    learn += ["--teacher", tmp_path / "one", tmp_path / "two", "--output_dir", tmp_path / "s"]
    done = succeeded(forked("distill.py", *learn))
    assert "teacher resnet8: images of 16x16 (bilinear)\n" in done.stdout
    assert "teacher resnet8: images of 8x8 (bilinear), normalised its own way\n" in done.stdout
    info = read_json(tmp_path / "s/model.json")
    assert (info["image_size"], info["mean"]) == (8, BATCH[0])


def test_a_teacher_is_seen_later_as_its_student_saw_it(tmp_path):
    """By evaluate.py, compare.py's records and export.py's fine-tuning: its size, interpolation, order of classes."""
    torch.manual_seed(0)
    model = create_model("resnet8", 12)
    model.info = ModelInfo("resnet8", "digits", 12, 16, *map(list, BATCH))
    save_pretrained(model, model.info, tmp_path / "t")
    (tmp_path / "classes.json").write_text(json.dumps({str(digit): 11 - digit for digit in range(10)}))
    learn = ["--student", "resnet8", "--image_size", "8", "--epochs", "1", "--train_fraction", "0.1"]
    learn += ["--teacher", tmp_path / "t", "--teacher_classes", tmp_path / "classes.json"]
    learn += ["--teacher_interpolation", "bicubic", "--output_dir", tmp_path / "s"]
    succeeded(forked("distill.py", *learn))
    succeeded(here("evaluate.py", tmp_path / "s", "--teacher", tmp_path / "t", "--latency", "false"))
    subject = load_subject(str(tmp_path / "s"))
    (later,) = load_teachers(subject, [str(tmp_path / "t")], [], "--finetune_epochs 1")
    pixels = load_images("digits", 8).test.images.float() / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in BATCH)
    images = (pixels - mean) / std
    with torch.no_grad():
        large = F.interpolate(images, 16, mode="bicubic", antialias=True)
        p = load_pretrained(tmp_path / "t")(large)[:, [11 - digit for digit in range(10)]]
        q = load_pretrained(tmp_path / "s")(images).log_softmax(1)
        torch.testing.assert_close(later(images), p, atol=1e-4, rtol=1e-4)
    p = p.log_softmax(1)
    kl = pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-3)
    assert read_json(tmp_path / "s/evaluation.json")["kl"] == kl
    assert on_test_images(tmp_path / "s", [tmp_path / "t"])["kl"] == kl
