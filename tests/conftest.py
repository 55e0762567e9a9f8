"""Fast tests first: what starts the real scripts comes after everything else."""

STARTS_SCRIPTS = [
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
        return STARTS_SCRIPTS.index(stem) + 1 if stem in STARTS_SCRIPTS else 0

    items.sort(key=place)
