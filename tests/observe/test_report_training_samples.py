"""Samples during training on the report page: a sheet of each step behind a slider."""

import io
import json
import re

import pytest
from PIL import Image

from megasora import config
from megasora.observe import report_training_samples
from megasora.observe.formatting import NBSP
from megasora.observe.report import write_report

STEPS = (2, 3, 4)


def png(width: int, shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, 8), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


def make_run(folder):
    """Four steps, validated after the last."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(config.load(None, ["run.steps=4"])), encoding="utf-8")
    lines = [{"step": step, "loss": 1.0} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "validation.jsonl").write_text(json.dumps({"step": 4, "loss": 0.5}) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run")
    for step in STEPS:
        folder = run / "train_samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "sheet.png").write_bytes(png(10 * step, step))
        (folder / "samples.json").write_text(json.dumps({"step": step}))
    (run / "train_samples" / ".step-00000005.part").mkdir()
    return run


def slides(run):
    """[(attributes, caption, width of the picture)] of the page."""
    page = write_report(run).read_text(encoding="utf-8")
    figures = re.findall(r'<figure class="slide"( hidden)?><figcaption>(.*?)</figcaption><img[^>]*width="(\d+)"', page)
    return [(hidden, re.sub("<[^>]+>", " ", caption).split(), int(width)) for hidden, caption, width in figures]


def test_the_newest_sheet_is_shown_and_the_others_are_behind_the_slider(run):
    shown = slides(run)
    assert [(hidden, width) for hidden, _, width in shown] == [(" hidden", 20), (" hidden", 30), ("", 40)]
    assert shown[-1][1] == ["Step", "4", "validation", "loss", "0.5000"] and shown[0][1] == ["Step", "2"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="slide" min="0" max="2" value="2"' in page and "Samples during training" in page


def test_a_run_without_samples_during_training_has_no_such_section(tmp_path):
    run = make_run(tmp_path / "run")
    assert not slides(run)
    assert "Samples during training" not in (run / "report.html").read_text(encoding="utf-8")


def test_many_sheets_are_thinned_and_what_cannot_be_shown_is_noted(run, monkeypatch):
    monkeypatch.setattr(report_training_samples, "MAX_SHEETS", 2)
    (run / "train_samples" / "step-00000002" / "sheet.png").write_bytes(b"no picture")
    assert [width for _, _, width in slides(run)] == [40]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "train_samples/ has samples of 3 steps; those of 2 are shown." in page
    assert f"train_samples/: 1{NBSP}sheet left out" in page
