"""Fast tests first: what compiles kernels or starts the real scripts comes after everything else.

Under pytest-xdist every worker, and whatever it starts, keeps to one core: processes that each want all cores
slow each other down.
"""

import os

import pytest

# The longest first, so that two workers end at about the same time.
SLOW = [
    "test_triton",
    "test_kernels_compile",
    "test_distill_methods",
    "test_benchmarks",
    "test_scripts",
    "test_two_processes",
    "test_bad_input",
    "test_resume",
    "test_readme",
    "test_peers",
]


WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items) -> None:
    def place(item) -> int:
        stem = item.path.stem
        return SLOW.index(stem) + 1 if stem in SLOW else 0

    items.sort(key=place)


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    """Accelerate keeps the first one's precision for the whole process."""
    yield
    from accelerate.state import AcceleratorState  # not before the threads are settled above: it imports torch

    AcceleratorState._reset_state(reset_partial_state=True)
