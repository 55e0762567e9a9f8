"""Batches: each image once, the same whatever the number of processes, augmented as they should be."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from common import UserError
from data.augment import Augmentation, Normalise, augment, cut_out, erase, erased_boxes
from data.loader import DeviceLoader, evaluation_batches
from data.splits import Split

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def split(count: int = 50, size: int = 8) -> Split:
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=source, dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    return Split(images, torch.arange(count))  # the label tells which image it is


def loader(rank=0, world=1, batch_size=12, count=50, seed=3, **options) -> DeviceLoader:
    augmentation = Augmentation(8, **{"padding": 2} | options)
    normalise = Normalise(MEAN, STD, torch.device("cpu"))
    return DeviceLoader(split(count), batch_size, normalise, augmentation, seed, rank, world)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_once_an_epoch_over_all_processes(world):
    ranks = [loader(rank, world) for rank in range(world)]
    for epoch in range(2):
        labels = torch.cat([batch.labels for each in ranks for batch in each.epoch(epoch)])
        assert sorted(labels.tolist()) == list(range(50))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batch_that_one_process_would_have(world):
    whole = list(loader(count=56).epoch(1))
    parts = [list(loader(rank, world, count=56).epoch(1)) for rank in range(world)]
    for number, batch in enumerate(whole):
        for rank in range(world):
            assert torch.equal(parts[rank][number].labels, batch.labels[rank::world])
            assert torch.equal(parts[rank][number].images, batch.images[rank::world])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_scales_make_the_mean_of_means_the_mean_over_the_batch(world):
    values = torch.randn(56, dtype=torch.float64)
    parts = [list(loader(rank, world, count=56).epoch(0)) for rank in range(world)]
    for number, batch in enumerate(loader(count=56).epoch(0)):
        means = [parts[rank][number].loss_scale * values[parts[rank][number].labels].mean() for rank in range(world)]
        assert sum(means).item() / world == pytest.approx(values[batch.labels].mean().item())


def test_a_rest_too_small_for_every_process_joins_the_batch_before():
    assert [len(batch.labels) for batch in loader(batch_size=12).epoch(0)] == [12, 12, 12, 12, 2]
    sizes = [len(batch.labels) for batch in loader(0, 2, batch_size=12).epoch(0)]
    assert sizes == [6, 6, 6, 7]
    assert len(loader(batch_size=49)) == 1


def test_an_epoch_can_be_entered_in_the_middle():
    whole, tail = list(loader().epoch(4)), list(loader().epoch(4, start=3))
    assert len(tail) == 2
    for a, b in zip(whole[3:], tail, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        return torch.cat([batch.labels for batch in loader(seed=seed).epoch(epoch)]).tolist()

    assert order(3, 0) == order(3, 0)
    assert len({tuple(order(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4


def test_an_endless_stream_is_its_epochs_in_a_row():
    each = loader()
    stream = [each.one(number).labels.tolist() for number in range(2 * len(each))]
    assert stream == [batch.labels.tolist() for epoch in range(2) for batch in each.epoch(epoch)]


def test_augmentation_against_one_image_at_a_time():
    images = split(20).images
    source = torch.Generator().manual_seed(1)
    offsets = torch.randint(0, 7, (20, 2), generator=source)
    flips = torch.rand(20, generator=source) < 0.5
    found = augment(images, offsets, flips, 3)
    for image, (row, column), flip, result in zip(images.numpy(), offsets.tolist(), flips.tolist(), found, strict=True):
        padded = np.pad(image, ((0, 0), (3, 3), (3, 3)))
        crop = padded[:, row : row + 8, column : column + 8]
        assert np.array_equal(crop[:, :, ::-1] if flip else crop, result.numpy())


def test_crops_and_flips_are_uniform():
    _, offsets, flips, holes = loader(count=8000, batch_size=100).plan(0)
    for axis in range(2):
        counts = torch.bincount(offsets[:, axis], minlength=5)
        assert len(counts) == 5 and ((counts - 1600).abs() < 5 * (8000 * 0.2 * 0.8) ** 0.5).all()
        counts = torch.bincount(holes[:, axis], minlength=8)
        assert len(counts) == 8 and ((counts - 1000).abs() < 5 * (8000 / 8 * 7 / 8) ** 0.5).all()
    assert abs(flips.sum() - 4000) < 5 * 2000**0.5
    assert not loader(flip=False).plan(0).flips.any() and not loader(padding=0).plan(0).offsets.any()


def test_normalisation_against_float64():
    images = split(4).images
    expected = (images.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(
        3, 1, 1
    )
    found = Normalise(MEAN, STD, torch.device("cpu"))(images)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_cutouts_against_one_image_at_a_time():
    images = torch.rand(20, 3, 8, 8) + 1
    centres = torch.randint(0, 8, (20, 2), generator=torch.Generator().manual_seed(0))
    found = cut_out(images, centres, 5)
    for image, (row, column), result in zip(images, centres.tolist(), found, strict=True):
        expected = image.clone()
        expected[:, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = 0
        assert torch.equal(result, expected)
    assert (next(loader(cutout=3).epoch(0)).images == 0).any(dim=1).sum(dim=(1, 2)).min() >= 4


def test_erased_boxes_are_distributed_as_torchvisions():
    """Shares of the image and ratios of the sides of those that fit, which torchvision draws until they do."""
    top, left, bottom, right = erased_boxes(4000, 256, 0.7, torch.Generator().manual_seed(0)).double().T
    height, width = bottom - top, right - left
    erased = height > 0
    assert abs(erased.double().mean() - 0.7) < 5 * (0.7 * 0.3 / 4000) ** 0.5
    assert min(top.min(), left.min()) >= 0 and max(bottom.max(), right.max()) <= 256
    torch.manual_seed(0)
    image = torch.zeros(1, 256, 256)
    fits = erased & (height < 256) & (width < 256)
    area, ratio = (height * width / 256**2)[fits], (height / width)[fits].log()
    expected = []
    transform = v2.RandomErasing(p=1.0)
    while len(expected) < 2000:
        drawn = transform.make_params([image])
        expected.append((drawn["h"] * drawn["w"] / 256**2, math.log(drawn["h"] / drawn["w"])))
    for ours, theirs in zip((area, ratio), zip(*expected, strict=True), strict=True):
        assert ks_2samp(ours.numpy(), theirs).pvalue > 0.001


def test_a_box_is_erased_and_nothing_else():
    images = torch.rand(3, 3, 8, 10) + 1
    found = erase(images, torch.tensor([[0, 0, 0, 0], [2, 3, 5, 4], [0, 1, 8, 10]]))
    expected = images.clone()
    expected[1, :, 2:5, 3:4] = 0
    expected[2, :, :, 1:] = 0
    assert torch.equal(found, expected)


def test_a_policy_varies_each_image_anew_in_each_epoch_and_alike_in_all_processes():
    before = torch.random.get_rng_state()
    whole = [list(loader(policy="trivialaugment", padding=0, flip=False).epoch(epoch)) for epoch in (0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    seen = []
    for epoch in whole:
        images, labels = torch.cat([batch.images for batch in epoch]), torch.cat([batch.labels for batch in epoch])
        seen.append(images[labels.argsort()])
    plain = Normalise(MEAN, STD, torch.device("cpu"))(split().images)
    same = [(a == b).flatten(1).all(1).double().mean() for a, b in (seen, (seen[0], plain))]
    assert max(same) < 0.4  # some operations, and the least strength of others, change nothing
    half = next(loader(1, 2, policy="trivialaugment", padding=0, flip=False).epoch(0))
    assert torch.equal(half.images, whole[0][0].images[1::2])
    assert loader(policy="trivialaugment").augmentation.views is None


def test_a_part_of_a_set_shares_its_pixels():
    whole = split(30)
    part = whole.take(torch.arange(5, 30)).take(torch.arange(0, 25, 3))
    assert part.pixels is whole.pixels and part.labels.tolist() == list(range(5, 30, 3))
    assert torch.equal(part.images, whole.images[5::3])
    normalise = Normalise(MEAN, STD, torch.device("cpu"))
    met = DeviceLoader(part, 3, normalise, Augmentation(8, flip=False), 0)
    for batch in met.epoch(0):
        assert torch.equal(batch.images, normalise(whole.images[batch.labels]))
    for images, labels in evaluation_batches(part, normalise, 4, 0, 1):
        assert torch.equal(images, normalise(whole.images[labels]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_meets_every_image_once_in_batches_of_similar_size(world):
    normalise = Normalise(MEAN, STD, torch.device("cpu"))
    parts = [list(evaluation_batches(split(), normalise, 8, rank, world)) for rank in range(world)]
    labels = torch.cat([labels for part in parts for _, labels in part])
    assert sorted(labels.tolist()) == list(range(50))
    sizes = [len(labels) for part in parts for _, labels in part]
    assert max(sizes) <= 8 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("batch_size", "world"), [(51, 1), (2, 2)])
def test_batch_sizes_that_cannot_be_are_refused(batch_size, world):
    with pytest.raises(UserError, match=f"--batch_size {batch_size}"):
        loader(0, world, batch_size=batch_size)
