"""A device profile: what each block of a pool takes there, and how well sums of blocks predict whole members."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from common import UserError, read_json
from exporters.onnx import OPSET
from searching.blocks import WEIGHTS
from searching.members import Members, blocks

LEAST_SPEARMAN, MOST_ERROR = 0.95, 0.10
LEAST_MS, MOST_MS = 1e-9, 1e9  # what a time can be at all


@dataclass
class Profile:
    """Latencies of one image, with one thread, on a device.

    A member takes the sum of its blocks, and `overhead` = (a, b): a + b times the number of its blocks that compute
    something, by least squares of relative errors over the first half of the members that were measured whole. b is
    mostly below 0: a block by itself pays for being called, and for the layout of its input and output.

    Attributes:
        content: what searching/device.py wrote.
        members: of the pool that it is of.
        overhead: milliseconds.
        spearman, median_error, worst_error: on the other half, Spearman's of 3 members at least; errors are relative.
        repeats: the median and the largest difference between a file's best two passes, relative.
    """

    content: dict
    members: Members

    def __post_init__(self):
        ms, whole = self.content["ms"], self.content["members"]
        self.overhead = np.zeros(2)
        numbers = [self.members.number(choice) for choice in whole.values()]
        measured = np.array([ms[name] for name in whole])
        sums, counts = self._sums()
        half = len(numbers) // 2
        found = np.stack([np.ones(len(numbers)), counts[numbers]], axis=1) / measured[:, None]
        missing = 1 - sums[numbers] / measured
        self.overhead = np.linalg.lstsq(found[:half], missing[:half], rcond=None)[0]
        predicted, measured = self.latency()[numbers][half:], measured[half:]
        errors = np.abs(predicted / measured - 1)
        self.median_error, self.worst_error = (float(each) for each in (np.median(errors), errors.max()))
        unlike = half > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
        self.spearman = float(spearmanr(predicted, measured).statistic) if unlike else 0.0
        passes = np.sort([self.content["passes"][name] for name in ms])
        differences = passes[:, 1] / passes[:, 0] - 1
        self.repeats = float(np.median(differences)), float(differences.max())

    @property
    def trusted(self) -> bool:
        """Whether it predicts members that it was not fitted on."""
        return self.spearman >= LEAST_SPEARMAN and self.median_error <= MOST_ERROR

    def latency(self) -> np.ndarray:
        """float64 [members]: milliseconds."""
        sums, counts = self._sums()
        return sums + self.overhead[0] + self.overhead[1] * counts

    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Milliseconds of the blocks, and how many there are, [members] each."""
        times = {name: time for name, time in self.content["ms"].items() if name not in self.content["members"]}
        return self.members.by_block(times), self.members.by_block(dict.fromkeys(times, 1.0))

    def summary(self) -> dict:
        """For search.json."""
        names = ("device", "onnxruntime", "opset", "threads")
        return {name: self.content[name] for name in names} | {
            "overhead_ms": self.overhead.tolist(),
            "held_out_members": len(self.content["members"]) // 2,
            "spearman": self.spearman,
            "median_error": self.median_error,
            "worst_error": self.worst_error,
            "repeats": self.repeats,
            "trusted": self.trusted,
        }

    def lines(self) -> list[str]:
        """What the user should know of it."""
        content = self.content
        lines = [
            f"latencies: one image, one thread of {content['device']}, ONNX Runtime {content['onnxruntime']}, opset "
            f"{content['opset']}; a file's best two passes differ by {self.repeats[0]:.1%} (median), at most "
            f"{self.repeats[1]:.1%}",
            f"on {len(content['members']) // 2} members measured whole: Spearman {self.spearman:.3f}, error "
            f"{self.median_error:.1%} (median), at most {self.worst_error:.1%}",
        ]
        if not self.trusted:
            lines.append(
                f"warning: this profile is not to be trusted here: Spearman should be at least {LEAST_SPEARMAN}, the "
                f"median error at most {MOST_ERROR:.0%}. Measure again on a quieter machine, or give budgets in params "
                "and macs"
            )
        return lines


def read_profile(path: Path, members: Members, num_classes: int, image_size: int) -> Profile:
    """The profile in a file of `profile_device.py`.

    Raises:
        UserError: no such file, or one that is no profile of these members, classes, images and opset.
    """
    content = read_json(path, "--profile")
    expected = {"opset": OPSET, "threads": 1, "image_size": image_size, "num_classes": num_classes}
    expected["pool"] = asdict(members.pool)
    if {"passes", "pool"} <= content.keys() and content.get("weights") != WEIGHTS:
        raise UserError(
            f"--profile {path}: is of files whose weights were all alike, which run faster than a student's; measure "
            "again: --write_blocks writes what to measure"
        )
    if not content.keys() >= {*expected, "device", "onnxruntime", "ms", "passes"}:
        raise UserError(f"--profile {path}: is no file of profile_device.py")
    if not (isinstance(content["device"], str) and isinstance(content["onnxruntime"], str)):
        raise UserError(f"--profile {path}: does not name its device and version of onnxruntime; measure again there")
    for name, value in expected.items():
        if content[name] != value:
            found = "another pool" if name == "pool" else f"{name} {content[name]}"
            wanted = "the teacher's" if name == "pool" else value
            raise UserError(f"--profile {path}: is of {found}, not {wanted}: --write_blocks writes what to measure")
    with torch.device("meta"):
        names = {name for name, *_ in blocks(members.pool, num_classes, image_size)}
    _check_times(path, content, members, names)
    return Profile(content, members)


def _check_times(path: Path, content: dict, members: Members, names: set[str]) -> None:
    """Raise UserError for a profile that lacks one of these blocks, which would then cost nothing, or has others."""
    try:
        whole = content["members"]
        for choice in whole.values():
            members.number(choice)
        numbers = [number for name in content["ms"] for number in (content["ms"][name], *content["passes"][name])]
        fine = len(whole) > 1 and content["ms"].keys() == names | {*whole}
        fine &= all(type(number) in (int, float) and LEAST_MS < number < MOST_MS for number in numbers)
        fine &= all(len(each) == len(content["passes"]["stem"]) > 1 for each in content["passes"].values())
        fine &= all(content["ms"][name] == min(content["passes"][name]) for name in content["ms"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        fine = False
    if not fine:
        raise UserError(f"--profile {path}: its times are not those of this pool's blocks and of whole members")
