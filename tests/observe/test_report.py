"""The report of a run: its figures are those of the logs; its page has no external links and escapes all text."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megasora import config
from megasora.errors import MegaSoraError
from megasora.observe import report, report_dit, report_samples, run_data
from megasora.observe.curves import decimate, smooth
from megasora.observe.figures import compute_figures
from megasora.observe.formatting import NBSP
from megasora.observe.page_elements import Page
from megasora.observe.report import write_report

HTML_INJECTION = '<script>alert("red")</script> & a "circle"'
WORDS = {"color": "red", "direction": "left", "shape": "circle", "background": "plain"}
VOID_ELEMENTS = {"meta", "img", "input", "br"}


def write_lines(path: Path, records: list[dict], incomplete: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + incomplete, encoding="utf-8")


def metrics_line(step: int, **changes) -> dict:
    """Step `step` of a synthetic run: 100 * step tokens per second, 2 s per step."""
    phases = {"time_data": 0.1, "time_forward": 0.6, "time_backward": 1.1, "time_optimizer": 0.15}
    line = {"step": step, "loss": 2.0 / step, "grad_norm": 0.5, "lr": 1e-4, "padding_fraction": 0.0, "mfu": None}
    line |= {"tokens_per_second": 100.0 * step, "time_step": 2.0, "peak_memory_gib": step / 2}
    return line | phases | changes


def validation_line(step: int, loss: float) -> dict:
    bins = [{"low": 0.0, "high": 0.5, "loss": loss - 0.125}, {"low": 0.5, "high": 1.0, "loss": loss + 0.125}]
    return {"step": step, "loss": loss, "bins": bins}


def write_clip(path: Path, height: int = 32, width: int = 48) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for shade in (40, 120, 200):
            pixels = np.full((height, width, 3), shade, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def make_run(folder: Path) -> Path:
    """Four steps, one repeated (a resume), an incomplete last line, two validations, four evaluated prompts."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    settings = config.load(None, ["run.steps=4", "run.dir=runs/<b>bold</b>", "optim.lr=0.5"])
    (folder / "config.yaml").write_text(config.to_yaml(settings), encoding="utf-8")
    lines = [metrics_line(1), metrics_line(2), metrics_line(3, loss=99.0, tokens_per_second=1e9)]
    lines += [metrics_line(3, padding_fraction=0.25), metrics_line(4, padding_fraction=0.5)]
    write_lines(folder / "metrics.jsonl", lines, incomplete='{"step": 5, "lo')
    write_lines(folder / "validation.jsonl", [validation_line(0, 1.75), validation_line(4, 0.5)])
    run = {"created": "2026-01-02", "machine": "here", "world_size": 2, "parameters": 1_234_567}
    run["layout"] = {"pipeline": 1, "data": 1, "context": 1, "tensor": 2}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")

    detections = [{}, {"direction": "right"}, {"direction": None, "color": "blue"}, {"shape": "square"}]
    prompts = []
    for index, wrong in enumerate(detections):
        expected = WORDS if index < 3 else WORDS | {"color": "blue"}
        prompt = HTML_INJECTION if index == 0 else f"prompt {index}"
        entry = {"prompt": prompt, "expected": expected, "detected": expected | wrong, "held_out": index > 1}
        prompts.append(entry | {"file": f"{index:03d}.mp4"})
        write_clip(samples / f"{index:03d}.mp4")
    accuracies = {"color": 0.75, "direction": 0.5, "shape": 0.75, "background": 1.0}
    evaluation = {"step": 4, "seconds": 75.0, "size": "32x48", "frames": 3, "prompts": prompts}
    evaluation |= {"guidance_scale": 4.0, "solver": "heun", "num_inference_steps": 30}
    evaluation |= {f"{attribute}_accuracy": value for attribute, value in accuracies.items()}
    (samples / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")

    write_clip(folder / "by_hand.mp4")
    sidecar = {"prompt": "a <i>green</i> square", "seed": 7, "size": "32x48", "frames": 3}
    (folder / "by_hand.json").write_text(json.dumps(sidecar), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run_dir) -> str:
    return (run_dir / "report.html").read_text(encoding="utf-8")


def copy_run(run_dir: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((run_dir / name).read_bytes())
    return folder


class Elements(HTMLParser):
    """All elements of a page with their attributes; fails if a tag is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_figures_equal_those_computed_by_hand(run_dir):
    figures = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    # tokens of the steps: 200, 400, 600, 800; with padding 0, 0, 1/4, 1/2, of the packs: 200, 400, 800, 1600
    assert figures == pytest.approx(
        {
            "steps": 4,
            "first_val_loss": 1.75,
            "final_val_loss": 0.5,
            "padding_fraction": (0.25 * 800 + 0.5 * 1600) / 3000,
            "tokens_per_second": 250.0,
            "color_accuracy": 0.75,
            "direction_accuracy": 0.5,
            "shape_accuracy": 0.75,
            "background_accuracy": 1.0,
            "held_out_color_accuracy": 0.5,
            "held_out_direction_accuracy": 0.5,
            "held_out_shape_accuracy": 0.5,
            "held_out_background_accuracy": 1.0,
        }
    )


def test_page_refers_to_nothing_outside_itself(page):
    without_media = re.sub(r"base64,[\w+/=]+", "", page)
    assert not re.search(r"https?:|//\w|url\((?!#)|@import", without_media)
    references = [
        value
        for _, attributes in Elements(page).elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "poster", "action", "data")
    ]
    assert references and all(value.startswith(("data:", "#")) for value in references)


def test_videos_play_and_are_embedded_byte_for_byte(run_dir, page):
    videos = [attributes for tag, attributes in Elements(page).elements if tag == "video"]
    assert len(videos) == 5
    assert all({"autoplay", "loop", "muted", "playsinline"} <= set(video) for video in videos)
    assert all(video["class"] == "pixels" for video in videos)
    embedded = [base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,")) for video in videos]
    files = [*sorted((run_dir / "samples").glob("*.mp4")), run_dir / "by_hand.mp4"]
    assert embedded == [file.read_bytes() for file in files]


def test_words_from_captions_and_settings_are_escaped(page):
    assert sum(tag == "script" for tag, _ in Elements(page).elements) == 1  # the page's script
    assert "&lt;script&gt;alert(&quot;red&quot;)&lt;/script&gt; &amp; a &quot;circle&quot;" in page
    assert "a &lt;i&gt;green&lt;/i&gt; square" in page
    assert "runs/&lt;b&gt;bold&lt;/b&gt;" in page and "<b>bold" not in page


def test_page_marks_hits_misses_and_held_out_prompts(page):
    assert page.count('<li class="right"') == 4 * 3 - 4
    assert page.count('<li class="wrong"') == 4
    assert page.count('class="held"') == 2
    assert "direction: expected left, detected nothing" in page
    assert page.count('class="sample perfect"') == 2  # one prompt of four, and the sample made by hand


def test_confusion_table_counts_detected_words(run_dir):
    samples = run_data.read_run_data(run_dir).evaluated_samples
    table = report_samples.confusion_table(samples, "color")
    assert re.findall(r'scope="col">(\w+)', table) == ["red", "blue"]
    assert re.findall(r'<td class="(\w+)"[^>]*>(.)', table) == [
        ("hit", "2"),
        ("miss", "1"),
        ("miss", "·"),
        ("hit", "1"),
    ]
    assert report_samples.confusion_table(samples, "shape") == ""  # only one shape is expected


def test_changed_settings_are_listed_with_their_defaults(page):
    changed = re.findall(r'<tr><th scope="row">([\w.]+)</th><td>([^<]*)</td><td>([^<]*)</td>', page)
    assert ("optim.lr", "0.5", "0.0001") in changed
    assert [key for key, *_ in changed] == ["run.dir", "run.steps", "optim.lr"]


def test_head_says_where_the_run_was_made(page):
    head = page[page.index("<header>") : page.index("</header>")].replace(NBSP, " ")
    items = re.findall("<li>([^<]*)</li>", head)
    assert items[1:] == ["2026-01-02", "here", "2 processes", "tensor 2", "2.0 GiB at most in the first process"]


def test_page_names_the_folders_of_a_mixture_with_their_weights(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    saved = tmp_path / "run" / "config.yaml"
    for settings, expected in (
        (["data.shards=a & b"], "the shards in <code>a &amp; b</code>, made"),
        (
            ["data.mixture=[a,b/c]", "data.mixture_weights=[3,0.5]"],
            "<code>a</code> (weight 3), <code>b/c</code> (weight 0.5), m",
        ),
        (["data.mixture=[a]", "data.mixture_weights=[3]"], "the shards in <code>a</code>, made"),
    ):
        saved.write_text(config.to_yaml(config.load(None, settings)), encoding="utf-8")
        assert expected in report_dit.describe_data(run_data.read_run_data(tmp_path / "run"))


def test_notes_say_what_was_skipped_or_repeated(page):
    notes = page[page.index('id="notes"') :].replace(NBSP, " ")
    assert "metrics.jsonl: skipped 1 line that cannot be read, the first is line 6" in notes
    assert "metrics.jsonl: 1 line repeated after a resume" in notes


def test_charts_take_their_colors_from_the_page_and_are_the_same_each_time(run_dir, page):
    assert page.count("<svg ") == 7  # two losses, throughput, times, gradient norm, lr, padding
    assert not re.search(r"#f[de][0-9a-f]{4}", page)  # no placeholder is left
    used = set(re.findall(r"var\(--([a-z]+)\)", page)) - {"share", "of"}
    assert used <= set(re.findall(r"--([a-z]+):", page))
    again = write_report(run_dir).read_text(encoding="utf-8")
    assert again == page
    assert not list(run_dir.glob(".*.part"))


def test_run_of_one_step_has_a_page(run_dir, tmp_path):
    folder = copy_run(run_dir, tmp_path / "one_step", "config.yaml")
    write_lines(folder / "metrics.jsonl", [metrics_line(1, loss=float("nan"), grad_norm=None)])
    text = write_report(folder).read_text(encoding="utf-8").replace(NBSP, " ")
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert figures["steps"] == 1 and figures["padding_fraction"] == 0.0
    assert figures["color_accuracy"] is None and figures["final_val_loss"] is None
    assert "<video" not in text
    assert "The loss is not finite at 1 step, first at 1." in text


def test_sample_beyond_the_size_limit_is_left_out_and_named(run_dir, tmp_path, monkeypatch):
    names = ("config.yaml", "metrics.jsonl", "by_hand.mp4", "by_hand.json")
    folder = copy_run(run_dir, tmp_path / "run", *names)
    monkeypatch.setattr(report_samples, "MAX_EMBEDDED", 100)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<video" not in text
    assert "by_hand.mp4 is not on this page" in text and "by_hand.mp4 (0.0 MiB) was left out" in text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", None, "no file .*metrics.jsonl.*train first"),
        ("metrics.jsonl", '{"step": 1, "lo', "metrics.jsonl holds no step"),
        ("config.yaml", None, "no configuration file .*config.yaml"),
        ("run.json", "{", "run.json is not JSON.*remove"),
        ("samples/evaluation.json", "[]", "evaluation.json holds a list"),
        ("samples/evaluation.json", '{"prompts": [{"prompt": "a"}]}', r"prompts\[0\].*evaluate again"),
        (
            "samples/evaluation.json",
            '{"prompts": [{"prompt": "a", "expected": {}, "detected": {}, "file": "../../secret.mp4"}]}',
            "secret.mp4 must name a .mp4 or .png file in its folder",
        ),
    ],
)
def test_missing_and_invalid_inputs_are_errors_that_name_the_file(run_dir, tmp_path, name, text, message):
    folder = copy_run(run_dir, tmp_path / "run", "config.yaml", "metrics.jsonl")
    (folder / "samples").mkdir()
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(MegaSoraError, match=message):
        write_report(folder)
    assert not list(folder.glob("*report*"))


def test_missing_run_folder_is_an_error(tmp_path):
    with pytest.raises(MegaSoraError, match="no run folder .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_decimated_curves_keep_a_spike():
    steps, values = np.arange(100_000), np.zeros(100_000)
    values[54_321] = 9.0
    x, y = decimate(steps, values)
    assert len(x) <= 1200 and np.all(np.diff(x) > 0)
    assert x[y.argmax()] == 54_321 and y.max() == 9.0


def test_running_mean_skips_nan():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    assert smooth(values, 3) == pytest.approx([1.0, 2.0, 4.0, 4.0])


# ---- hostile contents of a run folder

HOSTILE_VALUES = [None, 10**400, "x", [], {"a": {"b": []}}, "<b>", "9" * 5000]
HOSTILE_TEXTS = [
    "",
    "[",
    "[]",
    "5",
    "nul",
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 5000,
    "NaN",
    "\xff",
]


def mutations(value):
    """Copies of a JSON value in each of which one part, at any depth, is another value."""
    yield from HOSTILE_VALUES
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        for other in mutations(part):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = other
            yield copy


@pytest.fixture
def quick_config(monkeypatch):
    monkeypatch.setattr(run_data, "load_run_config", lambda _: config.Config())


def outcome(folder: Path) -> str:
    """`page` or the error of the report; any other exception fails the test."""
    try:
        run = run_data.read_run_data(folder)
        figures = compute_figures(run)
        json.dumps(figures, allow_nan=False)
        tiles = [*report_dit.training_tiles(run, figures), *report_dit.accuracy_tiles(run, figures)]
        page = Page(figures, [tiles], [], "megasora.train", report_dit.describe_data(run))
        parts = (report.run_info_items(run), report.figure_tiles(page.tiles), report.reproduce_section(run, page))
        assert "<b>" not in "".join(parts).replace('<b style="left', "")
        report_samples.describe_evaluation(run)
        for attribute in run_data.ATTRIBUTES:
            report_samples.confusion_table(run.evaluated_samples, attribute)
        return "page"
    except MegaSoraError as error:
        assert str(folder) in str(error) and len(str(error)) < 500
        return "error"


@pytest.mark.parametrize("file", ["run.json", "samples/evaluation.json"])
def test_a_hostile_value_in_a_file_is_left_out_or_one_error(file, run_dir, tmp_path, quick_config):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    value = json.loads((folder / file).read_text())
    if "prompts" in value:
        value["prompts"] = value["prompts"][:1]
    outcomes = []
    for other in mutations(value):
        (folder / file).write_text(json.dumps(other))
        outcomes.append(outcome(folder))
    assert outcomes.count("page") > 50 and "error" in outcomes
    for text in HOSTILE_TEXTS:
        (folder / file).write_text(text, encoding="latin-1")
        assert outcome(folder) == "error"


@pytest.mark.parametrize("file", ["metrics.jsonl", "validation.jsonl"])
def test_a_hostile_line_is_skipped_or_its_values_are(file, run_dir, tmp_path, quick_config):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    lines = (folder / file).read_text().splitlines()
    first = json.loads(lines[0])
    for other in mutations(first):
        (folder / file).write_text("\n".join([json.dumps(other), *lines[1:]]) + "\n")
        assert outcome(folder) == "page"
    (folder / file).write_text("\n".join([*HOSTILE_TEXTS, "x" * (3 << 20), *lines]) + "\n", encoding="latin-1")
    assert outcome(folder) == "page"
