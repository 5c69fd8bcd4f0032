"""Work folders: latents that survive, requests that do not match, locks, space."""

from __future__ import annotations

import json
from collections import namedtuple

import numpy as np
import pytest
import torch

from megasora.errors import MegaSoraError
from megasora.sampling import work_folder
from megasora.sampling.frame_store import frames_in_file
from megasora.sampling.timeline import Timeline
from megasora.sampling.work_folder import SavedLatents, WorkFolder, check_space

LATENTS = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.mp4"


def entries(out) -> list[str]:
    folder = out.with_name(".out.mp4.work")
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_latents_are_there_for_the_same_request_and_gone_for_another(out):
    with WorkFolder.open(out, {"seed": 0}) as work:
        assert work.get(0, 0) is None
        work.put(0, 0, LATENTS)
        work.put(3, 1, -LATENTS)
    with WorkFolder.open(out, {"seed": 0}) as work:
        assert torch.equal(work.get(0, 0), LATENTS) and torch.equal(work.get(3, 1), -LATENTS)
        assert work.get(3, 0) is None and work.get(0, 1) is None
    with WorkFolder.open(out, {"seed": 1}) as work:
        assert work.get(0, 0) is None
    assert entries(out) == []


def test_an_error_keeps_the_latents_and_nothing_else(out, monkeypatch):
    monkeypatch.setattr(work_folder, "LARGE", 0)
    timeline = Timeline("x", 4, 6, 5, 8.0)
    with pytest.raises(ValueError, match="stop"), WorkFolder.open(out, {}) as work:
        work.put(0, 0, LATENTS)
        store = work.store(timeline)
        given = work.allocate((5, 4, 6, 3))
        assert isinstance(store.frames_FHWC, np.memmap) and isinstance(given, np.memmap)
        assert store.frames_FHWC.shape == given.shape == (5, 4, 6, 3) and len(entries(out)) == 5
        raise ValueError("stop")
    assert entries(out) == ["request.json", "window-00000-pass-0.safetensors"]
    with pytest.raises(ValueError, match="stop"), WorkFolder.open(out, {"other": 1}):
        raise ValueError("stop")
    assert entries(out) == []


def test_only_the_shots_that_differ_are_discarded(out):
    with WorkFolder.open(out, {}, {"shot-0000-": "a", "shot-0001-": "b"}) as work:
        for part in ("shot-0000-", "shot-0001-"):
            work.of_part(part).put(0, 0, LATENTS)
    with WorkFolder.open(out, {}, {"shot-0000-": "a", "shot-0001-": "c", "shot-0002-": "d"}) as work:
        assert work.of_part("shot-0000-").get(0, 0) is not None and work.of_part("shot-0001-").get(0, 0) is None
        assert work.of_part("shot-0002-").get(0, 0) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"request": 3}'])
def test_a_damaged_request_is_another_request(text, out):
    with WorkFolder.open(out, {}) as work:
        work.put(0, 0, LATENTS)
    (out.with_name(".out.mp4.work") / "request.json").write_text(text)
    with WorkFolder.open(out, {}) as work:
        assert work.get(0, 0) is None


def test_damaged_latents_are_an_error_that_names_the_file(out):
    with WorkFolder.open(out, {}) as work:
        work.put(0, 0, LATENTS)
        path = work.path_of(0, 0)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(MegaSoraError, match="window-00000-pass-0.safetensors is damaged .* remove it"):
            work.get(0, 0)


def test_one_command_at_a_time_has_a_work_folder(out):
    with WorkFolder.open(out, {}) as work:
        with pytest.raises(MegaSoraError, match="out.mp4 is being written by process"), WorkFolder.open(out, {}):
            pass
        work.put(0, 0, LATENTS)  # the folder is still there


def test_latents_of_several_clips_are_in_their_own_folders_and_written_by_one_process(tmp_path):
    with WorkFolder.open(tmp_path / "a.mp4", {}) as a, WorkFolder.open(tmp_path / "b.mp4", {}) as b:
        SavedLatents([a, b]).put(1, 0, 0, LATENTS)
        SavedLatents([a, b], is_writer=False).put(0, 0, 0, LATENTS)
        assert a.get(0, 0) is None and torch.equal(SavedLatents([a, b], is_writer=False).get(1, 0, 0), LATENTS)


def test_more_frames_than_the_disk_has_space_for_are_refused(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(work_folder.shutil, "disk_usage", lambda _: Usage(0, 0, 3 << 30))
    check_space(tmp_path / "not" / "yet", 2 << 30, "frames")
    with pytest.raises(MegaSoraError, match=r"9 frames need 3,072.0 MiB beside 64.0 MiB to spare, .* has 3,\d+.0 MiB"):
        check_space(tmp_path, 3 << 30, "9 frames")


def test_the_space_of_a_file_of_frames_is_taken_when_it_is_made(tmp_path):
    frames = frames_in_file(tmp_path / "frames.npy", (64, 16, 16, 3))
    assert frames.shape == (64, 16, 16, 3) and not frames.any()
    assert (tmp_path / "frames.npy").stat().st_blocks * 512 >= frames.nbytes


def test_the_request_is_readable(out):
    with WorkFolder.open(out, {"prompt": "赤"}) as work:
        assert json.loads((work.folder / "request.json").read_text())["request"] == {"prompt": "赤"}
