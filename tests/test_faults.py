"""The list of `python -m tests.mutate` does not rot, and a planted fault is noticed or not as it should be."""

from collections import Counter

from tests.mutate import ROOT, Fault, plant, read_faults


def test_every_faults_line_still_stands_once():
    faults = [*read_faults("faults"), *read_faults("once_missed")]
    sources = {fault.file: (ROOT / fault.file).read_text() for fault in faults}
    wrong = [fault.place() for fault in faults if sources[fault.file].count(fault.old) != 1 or fault.old == fault.new]
    assert wrong == [] and max(Counter((fault.file, fault.old, fault.new) for fault in faults).values()) == 1
    assert len(read_faults("faults")) >= 100


def test_their_tests_are_there():
    named = {test for part in ("faults", "once_missed") for fault in read_faults(part) for test in fault.tests}
    for test in named:
        file, *function = test.split("[")[0].split("::")
        assert not function or f"def {function[0]}(" in (ROOT / file).read_text(), test
        assert (ROOT / file).is_file(), test


def test_a_fault_is_planted_in_the_copy_alone(tmp_path):
    before = (ROOT / "common.py").read_text()
    assert plant(Fault("common.py", "difflib.get_close_matches(", "difflib.nothing(", ()), ROOT, tmp_path)
    assert "difflib.nothing(" in (tmp_path / "common.py").read_text() and (ROOT / "common.py").read_text() == before
    assert not plant(Fault("common.py", "no such line", "", ()), ROOT, tmp_path)
