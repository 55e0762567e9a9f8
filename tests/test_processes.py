"""What a process settles before it trains."""

import platform
import subprocess
import sys

import pytest

from tests.runs import ROOT

PAGES = """
import resource, sys, torch
from engine.processes import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**18)  # 48 MB, given back at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
@pytest.mark.parametrize(("keep", "pages"), [("keep", range(100)), ("leave", range(20, 10**6))])
def test_freed_memory_is_used_again_without_asking_for_its_pages(keep, pages):
    """Page faults of the fourth of four large tensors; were pages of 2 MB instead of 4 KB, "leave" had 24."""
    command = [sys.executable, "-c", PAGES, keep]
    faults = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert faults in pages
