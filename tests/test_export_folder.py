"""Where exports are made: what a killed one leaves is removed, what a living one or somebody else has there is not."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from exporters.folder import replace_folder, workplace


def export(target: Path, ready, moment: str) -> None:
    with workplace(target) as folder:
        (folder / "model.onnx").write_text("half")
        if moment == "while it takes its place":
            os.rename(target, folder.parent / "old")
        ready.set()
        signal.pause()


@pytest.mark.parametrize("moment", ["before it is proven", "while it takes its place"])
def test_what_a_killed_export_leaves_is_removed_and_what_a_living_one_has_is_not(tmp_path, moment):
    target = tmp_path / "shipped"
    target.mkdir()
    (target / "export.json").write_text("{}")
    for other in (".shipped-personal", ".shipped-notes_12", ".other-abcdefgh"):  # of the first two one is as ours are
        (tmp_path / other).mkdir()
        (tmp_path / other / "notes.txt").touch()
    others = {each.name for each in tmp_path.iterdir()}
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=export, args=(target, ready, moment))
    process.start()
    assert ready.wait(60)
    with workplace(target):
        half = list(tmp_path.glob(".shipped-*/export/model.onnx"))
    assert len(half) == 1 and half[0].is_file()
    process.kill()
    process.join()
    with workplace(target) as folder:
        assert not half[0].exists() and (target / "export.json").read_text() == "{}"
        (folder / "export.json").write_text("[]")
        replace_folder(folder, target)
    assert {each.name for each in tmp_path.iterdir()} == others and (target / "export.json").read_text() == "[]"
