"""Fast tests first: what compiles kernels or starts the real scripts comes after everything else."""

SLOW = [
    "test_kernels_compile",
    "test_triton",
    "test_benchmarks",
    "test_readme",
    "test_scripts",
    "test_bad_input",
    "test_two_processes",
    "test_resume",
]


def pytest_collection_modifyitems(items) -> None:
    def place(item) -> int:
        stem = item.path.stem
        return SLOW.index(stem) + 1 if stem in SLOW else 0

    items.sort(key=place)
