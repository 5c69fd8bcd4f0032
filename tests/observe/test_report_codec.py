"""The report and the status of a run that trains a codec."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from megasora import config
from megasora.cli import main
from megasora.errors import MegaSoraError
from megasora.observe import charts, codec_charts, codec_run_data, report, report_codec, run_data
from megasora.observe.codec_run_data import PICTURE_NAME, read_pictures
from megasora.observe.formatting import NBSP
from megasora.observe.report import write_report
from megasora.run_log.run_log import RUN_FILES, STEP_FIGURES, VALIDATION_FIGURES, describe_figures

STEPS = 40
DIT_SECTIONS = ("timestep", "Evaluated prompts", "Padding", "Tokens")


def png(height: int, width: int, shade: int) -> bytes:
    """A grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes([shade]) * width) * height
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def metrics_line(step: int) -> dict:
    line = {"step": step, "loss": 1 / step, "grad_norm": 0.5, "lr": 1e-3, "l1": 0.5 / step, "gradient": 0.3 / step}
    line |= {"ssim": 1 - 0.2 / step, "kl": 4.0 + step, "psnr": 10.0 + step / 4, "perplexity": 8.0 * step}
    line |= {"clips_per_second": 10.0 * (step % 4), "time_step": 0.5, "time_data": 0.1, "time_forward": 0.2}
    return line | {"time_backward": 0.15, "time_optimizer": 0.05, "mfu": None, "peak_memory_gib": 0.5}


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_codec_run(folder: Path, kind: str = "vq") -> Path:
    """STEPS steps, validations and pictures every 20 steps, a finished codec of 4 channels, its evaluation."""
    for name in ("reconstructions", "codec", "eval"):
        (folder / name).mkdir(parents=True)
    settings = ["codec.name=vae", "codec.factors=[2,4,4]", "codec.channels=4", f"vae.kind={kind}", "vae.width=8"]
    settings += ["vae.multipliers=[1,1,2]", "data.clips=clips/<b>bold</b>", f"run.steps={STEPS}", "run.dir=runs/vae"]
    (folder / "config.yaml").write_text(config.to_yaml(config.load(None, settings)), encoding="utf-8")
    info = {"task": "codec", "created": "2026-01-02", "world_size": 2, "parameters": 123_456}
    (folder / "run.json").write_text(json.dumps(info | {"layout": {"data": 2}, "clips_per_step": 8}), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [metrics_line(step) for step in range(1, STEPS + 1)])
    validations = []
    for step in (0, 20, 40):
        (folder / "reconstructions" / f"step-{step:08d}.png").write_bytes(png(6, 8, 100 + step))
        figures = {
            "loss": 1 / (1 + step),
            "psnr": 10.0 + step / 2,
            "ssim": 0.5 + step / 100,
            "flicker": 0.2 - step / 500,
        }
        validations.append({"step": step, **figures, "perplexity": 256.0 + 6.4 * step})
    write_lines(folder / "validation.jsonl", validations)
    codec = {"format": 1, "name": "vae", "mean": [0.5, -0.25, 0, 1], "std": [1, 2, 0.5, 0.75], "step": STEPS}
    codec |= {"encoder_sha256": "ab" * 32, "decoder_sha256": "cd" * 32, "psnr": 30.0}
    (folder / "codec" / "codec.json").write_text(json.dumps(codec), encoding="utf-8")
    clips = [{"clip": "<i>a</i>.mp4", "psnr": 31.5, "ssim": 0.91, "flicker": 0.1}, {"clip": "b.png", "psnr": 33.0}]
    total = {"psnr": 32.25, "ssim": 0.92, "flicker": 0.11, "encode_frames_per_cpu_second": 1234.0}
    evaluation = {"total": total | {"decode_frames_per_cpu_second": 567.0}, "clips": clips, "split": "val"}
    (folder / "eval" / "sheet.png").write_bytes(png(20, 30, 7))
    (folder / "eval" / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = make_codec_run(tmp_path_factory.mktemp("runs") / "vae")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run_dir) -> str:
    return (run_dir / "report.html").read_text(encoding="utf-8").replace(NBSP, " ")


def test_figures_equal_those_computed_by_hand(run_dir):
    figures = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    assert figures == pytest.approx(
        {
            "steps": 40,
            "first_val_loss": 1.0,
            "final_val_loss": 1 / 41,
            "first_psnr": 10.0,
            "final_psnr": 30.0,
            "first_ssim": 0.5,
            "final_ssim": 0.9,
            "first_flicker": 0.2,
            "final_flicker": 0.12,
            "codebook_use": (256 + 6.4 * 40) / 1024,
            "compression": 3 * 2 * 4 * 4 / 4,
            "clips_per_second": 15.0,
            "eval_psnr": 32.25,
            "eval_ssim": 0.92,
            "eval_flicker": 0.11,
        }
    )


def test_a_codec_run_has_its_own_sections_and_none_of_a_dit(page):
    anchors = re.findall('<section id="([a-z-]+)">', page)
    assert anchors == [
        "reconstructions", "quality", "loss", "latents", "evaluation", "speed", "optimizer", "config", "reproduce",
    ]  # fmt: skip
    assert not [words for words in DIT_SECTIONS if words in page[: page.index('<section id="config">')]]
    titles = re.findall("<figcaption><h3>([^<]*)</h3>", page)
    assert titles == [
        "PSNR", "SSIM", "Flicker", "Training and validation loss", "Terms of the loss", "Codebook use",
        "Each latent channel", "Throughput", "Time of a step", "Gradient norm", "Learning rate",
    ]  # fmt: skip


def test_pictures_are_embedded_byte_for_byte_and_the_newest_is_shown(run_dir, page):
    slides = re.findall('<figure class="slide"( hidden)?>.*?<strong>Step ([0-9,]+)</strong>.*?base64,([^"]*)"', page)
    assert [(hidden, step) for hidden, step, _ in slides] == [(" hidden", "0"), (" hidden", "20"), ("", "40")]
    files = sorted((run_dir / "reconstructions").iterdir())
    assert [base64.b64decode(data) for *_, data in slides] == [file.read_bytes() for file in files]
    assert "30.00 dB" in page and "SSIM 0.9000" in page  # of the validation of that step
    assert re.search('<input type="range" id="slide" min="0" max="2" value="2"', page)


def test_terms_of_the_loss_are_multiplied_by_their_weights(page):
    legend = re.search("Terms of the loss</h3>.*?</ul>", page, re.DOTALL)[0]
    found = re.findall(r"([\d.e-]+) × ([\w() -]+): ([\d.e-]+)", legend)
    expected = [("l1", 1, 0.5 / 40), ("gradient", 1, 0.3 / 40), ("(1 - ssim)", 0.1, 0.2 / 40), ("kl", 1e-6, 44)]
    assert [name for _, name, _ in found] == [name for name, *_ in expected]
    for (weight, _, value), (_, w, v) in zip(found, expected, strict=True):
        assert (float(weight), float(value)) == (w, pytest.approx(w * v, rel=5e-3))


def bars(page: str) -> list[float]:
    """Heights of the bars of the chart of the latents, in units of the SVG."""
    svg = re.search("Each latent channel</h3>.*?</svg>", page, re.DOTALL)[0]
    corners = re.findall(r'<path d="M [\d.]+ ([\d.]+) *\n?L [\d.]+ [\d.]+ *\n?L [\d.]+ ([\d.]+) [^"]*z', svg)
    return [float(bottom) - float(top) for bottom, top in corners if float(bottom) > float(top)]


def test_latent_statistics_are_drawn_to_scale(page):
    assert np.allclose(np.array(bars(page)) / bars(page)[0], [1, 2, 0.5, 0.75], atol=0.02)


def test_commands_words_and_table_of_the_page(run_dir, page):
    commands = page[page.index('id="reproduce"') :]
    assert (
        f"torchrun --nproc-per-node 2 -m megasora.train_codec {run_dir}/config.yaml run.dir={run_dir}-again" in commands
    )
    assert "clips in <code>clips/&lt;b&gt;bold&lt;/b&gt;</code>" in commands and "<b>bold" not in page
    rows = re.findall('<tr><th scope="row">([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td>', page)
    assert rows == [
        ("2 clips", "32.25", "0.92", "0.11"),
        ("&lt;i&gt;a&lt;/i&gt;.mp4", "31.5", "0.91", "0.1"),
        ("b.png", "33", "-", "-"),
    ]
    assert "split val. Frames per CPU second: 1.23k encoded, 567 decoded." in page
    assert base64.b64encode(png(20, 30, 7)).decode() in page
    assert "fewer numbers: 2 × 4 × 4 pixels to 4 channels" in page and "ab" * 8 in page


def test_a_run_that_has_just_begun_has_a_page(run_dir, tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    for name in ("config.yaml", "run.json"):
        shutil.copy(run_dir / name, folder)
    write_lines(folder / "metrics.jsonl", [{"step": 1, "loss": None}])
    text = write_report(folder).read_text(encoding="utf-8")
    anchors = re.findall('<section id="([a-z-]+)">', text)
    assert anchors == ["speed", "optimizer", "config", "reproduce", "notes"]
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert {key for key, value in figures.items() if value is not None} == {"steps", "compression"}


def test_continuous_latents_have_no_codebook(tmp_path):
    text = write_report(make_codec_run(tmp_path / "kl", "kl")).read_text(encoding="utf-8")
    assert "Codebook use" not in text and "Each latent channel" in text
    assert json.loads((tmp_path / "kl" / "report.json").read_text())["codebook_use"] is None


def test_only_some_of_many_pictures_are_embedded_and_the_newest_first(tmp_path, monkeypatch):
    for step in range(100):
        (tmp_path / f"step-{step:08d}.png").write_bytes(png(6, 8, step))
    (tmp_path / "step-00000100.png").write_bytes(b"no picture")
    (tmp_path / "other.png").write_bytes(png(6, 8, 0))
    notes: list[str] = []
    steps = [picture.step for picture in read_pictures(tmp_path, notes)]
    assert len(steps) == codec_run_data.MAX_PICTURES - 1 and steps[0] == 0 and steps[-1] > 90
    assert np.diff(steps).max() <= 1 + 100 / (codec_run_data.MAX_PICTURES - 1) and len(notes) == 2
    monkeypatch.setattr(codec_run_data, "MAX_EMBEDDED", 2 * len(png(6, 8, 0)) + 10)
    assert [picture.step for picture in read_pictures(tmp_path, [])] == steps[-2:]
    assert not PICTURE_NAME.fullmatch("step-1.png") and not read_pictures(tmp_path / "none", [])


# ---- hostile contents

HOSTILE = [None, 10**400, 1e308, -1, "<b>", [], ["x"], [10**400], {"a": 1}, "9" * 5000]


@pytest.fixture
def quick_report(monkeypatch):
    """A report without reading config.yaml again, and without drawing."""
    settings = ["codec.name=vae", "vae.kind=vq", "codec.channels=4", "codec.factors=[2,4,4]", "vae.multipliers=[1,1,2]"]
    loaded = config.load(None, settings)
    monkeypatch.setattr(run_data, "load_run_config", lambda _: loaded)
    drawn = []
    monkeypatch.setattr("megasora.observe.charts.render_svg", lambda title, draw, label: drawn.append(draw) or "<svg >")
    return drawn


@pytest.mark.parametrize(
    "file", ["codec/codec.json", "eval/eval.json", "validation.jsonl", "metrics.jsonl", "run.json"]
)
def test_a_hostile_value_is_left_out_or_one_error(file, run_dir, tmp_path, quick_report):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    lines = (folder / file).read_text(encoding="utf-8").splitlines()[:3]
    values = json.loads(lines[0])
    others = [{**values, key: value} for key in values for value in HOSTILE]
    if file.startswith("eval"):
        others += [{**values, "total": {**values["total"], key: value}} for key in values["total"] for value in HOSTILE]
        others += [{**values, "clips": [{"clip": value, "psnr": value}, value]} for value in HOSTILE]
    for other in others:
        (folder / file).write_text("\n".join([json.dumps(other), *lines[1:]]), encoding="utf-8")
        text = write_report(folder).read_text(encoding="utf-8")
        assert "<b>" not in text.replace('<b style="left', "")
    for text in ("[", "[]", "5", "[" * 100_000, "\xff"):
        (folder / file).write_text(text, encoding="latin-1")
        try:
            write_report(folder)
            assert file == "validation.jsonl"
        except MegaSoraError as error:
            assert str(folder) in str(error) and len(str(error)) < 500


def test_numbers_that_cannot_be_drawn_are_left_out(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    keys = ("loss", "psnr", "ssim", "flicker", "perplexity")
    write_lines(folder / "validation.jsonl", [{"step": 0} | dict.fromkeys(keys, 1e308), {"step": 1, "psnr": 20.0}])
    write_report(folder)
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (figures["first_psnr"], figures["final_psnr"], figures["first_ssim"]) == (None, 20.0, None)


def test_a_fifo_in_place_of_a_picture_is_left_out(run_dir, tmp_path):
    folder = shutil.copytree(run_dir / "reconstructions", tmp_path / "reconstructions")
    (folder / "step-00000040.png").unlink()
    os.mkfifo(folder / "step-00000040.png")
    notes: list[str] = []
    assert [picture.step for picture in read_pictures(folder, notes)] == [
        0,
        20,
    ] and "1\N{NO-BREAK SPACE}picture" in notes[0]


# ---- status and the lines of a run


def test_status_shows_psnr_and_clips_in_place_of_tokens(run_dir, capsys):
    assert main(["status", str(run_dir)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("PSNR │ 20.00 dB", "clips/s │ 0.0", "perplexity │ 320.0", "40 of 40 (100%)"):
        assert words in shown
    assert "tokens/s" not in shown


def test_lines_of_a_run_show_the_figures_that_its_task_has():
    step = {"loss": 0.25, "psnr": 28.125, "clips_per_second": 5.25, "kl": 3.0}
    assert describe_figures(step, STEP_FIGURES, "  ") == "loss 0.2500  psnr 28.12 dB  5.2 clips/s"
    assert describe_figures({"loss": None, "tokens_per_second": 1234.5}, STEP_FIGURES, "  ") == "loss -  1,234 tokens/s"
    validation = {"loss": 0.5, "psnr": None, "ssim": 0.9}
    assert describe_figures(validation, VALIDATION_FIGURES, ", ") == "loss 0.5000, psnr - dB, ssim 0.9000"


def test_a_fresh_run_moves_what_a_codec_run_has_written():
    assert {"reconstructions", "codec", "eval"} <= set(RUN_FILES)


def test_every_kind_of_run_has_a_page():
    assert report.PAGES["codec"] is report_codec.codec_page and len(report.PAGES) == 2


def test_every_term_of_the_loss_has_a_colour_of_the_page():
    assert set(codec_charts.TERM_COLORS.values()) <= set(charts.CSS_COLORS)
