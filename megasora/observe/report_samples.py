"""The samples on the report page: evaluated prompts with what the detector recognized, and other samples."""

from __future__ import annotations

import base64
from pathlib import Path

from megasora.observe.formatting import NBSP, format_duration, pluralize
from megasora.observe.page_elements import escape, section
from megasora.observe.run_data import ATTRIBUTES, MEDIA_TYPES, RunData, Sample

MAX_EVALUATED, MAX_OTHERS = 64, 16  # samples shown
MAX_EMBEDDED = 10 << 20  # bytes of videos and images; base64 makes four thirds of it
PIXELATED = 256  # px; pictures up to this side are enlarged without interpolation


def samples_sections(run: RunData) -> str:
    """HTML of both kinds of samples. Adds to `run.notes` what is not on the page."""
    evaluated, others = run.evaluated_samples[:MAX_EVALUATED], run.other_samples[:MAX_OTHERS]
    if len(evaluated) < len(run.evaluated_samples):
        run.notes.append(f"{len(run.evaluated_samples)} prompts were evaluated; {MAX_EVALUATED} of them are shown.")
    if len(others) < len(run.other_samples):
        run.notes.append(f"{len(run.other_samples)} samples have a sidecar; the first {MAX_OTHERS} are shown.")
    embedded = choose_embedded([*evaluated, *others], run.notes)
    page = ""
    if evaluated:
        tables = "".join(confusion_table(run.evaluated_samples, attribute) for attribute in ATTRIBUTES)
        controls = (
            '<div class="controls"><label><input type="checkbox" id="misses"> only videos with a miss</label>'
            '<button type="button" id="pause" hidden>pause</button></div>'
        )
        body = f'<div class="tables">{tables}</div>{controls}{sample_grid(evaluated, embedded, "samples")}'
        page += section("samples", "Evaluated prompts", body, escape(describe_evaluation(run)))
    if others:
        title = "More samples" if evaluated else "Samples"
        page += section("more-samples", title, sample_grid(others, embedded, "samples large"))
    return page


def choose_embedded(samples: list[Sample], notes: list[str]) -> set[Path]:
    """The files to embed: those that exist, up to MAX_EMBEDDED bytes in total. Adds the others to `notes`."""
    embedded, remaining = set(), MAX_EMBEDDED
    for sample in samples:
        size = sample.file.stat().st_size if sample.file.is_file() else None
        if size is None:
            notes.append(f"samples/{sample.file.name} is named by evaluation.json and does not exist.")
        elif size > remaining:
            notes.append(
                f"{sample.file.name} ({size / 2**20:.1f} MiB) was left out: "
                f"the page embeds {MAX_EMBEDDED >> 20} MiB of samples."
            )
        else:
            embedded.add(sample.file)
            remaining -= size
    return embedded


def describe_evaluation(run: RunData) -> str:
    """How the evaluated samples were made, and how to read the tables."""
    e, details = run.evaluation, [pluralize(len(run.evaluated_samples), "prompt")]
    if e.get("size"):
        details.append(f"{e['size']}{NBSP}px")
    if e.get("frames"):
        details.append(pluralize(int(e["frames"]), "frame"))
    if e.get("num_inference_steps"):
        details.append(f"{pluralize(int(e['num_inference_steps']), 'step')} of {e.get('solver', 'the sampler')}")
    if e.get("guidance_scale") is not None:
        details.append(f"guidance {e['guidance_scale']:g}")
    if e.get("step") is not None:
        details.append(f"weights of training step {e['step']:,}")
    if e.get("seconds"):
        details.append(f"sampled in {format_duration(float(e['seconds']))}")
    held_out = sum(sample.held_out for sample in run.evaluated_samples)
    return (
        f"A detector recognizes what each video shows: {', '.join(details)}. "
        + (f"{pluralize(held_out, 'prompt')} held out: training never saw the combination. " if held_out else "")
        + "In the tables, rows are expected words and columns are detected words."
    )


def sample_grid(samples: list[Sample], embedded: set[Path], css_class: str) -> str:
    figures = "".join(sample_figure(sample, sample.file in embedded) for sample in samples)
    return f'<div class="{css_class}">{figures}</div>'


def sample_figure(sample: Sample, embed: bool) -> str:
    """One sample: picture, prompt, details, and a mark per attribute."""
    caption, marks = escape(sample.prompt), attribute_marks(sample)
    if sample.details:
        caption += f"<p>{escape(sample.details)}</p>"
    if marks:
        caption += f'<ul class="marks">{marks}</ul>'
    css_class = "sample perfect" if sample.detected == sample.expected else "sample"
    return (
        f'<figure class="{css_class}"><div class="picture">{picture(sample, embed)}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def picture(sample: Sample, embed: bool) -> str:
    """The video or image, embedded, or a note that it is not on the page."""
    style = f' style="aspect-ratio:{sample.size[1]}/{sample.size[0]}"' if sample.size else ""
    if sample.size is None or max(sample.size) <= PIXELATED:
        style += ' class="pixels"'
    if embed:
        text = base64.b64encode(sample.file.read_bytes()).decode("ascii")
        source = f'src="data:{MEDIA_TYPES[sample.file.suffix]};base64,{text}"'
        if sample.file.suffix == ".mp4":
            tag = f"<video{style} autoplay loop muted playsinline {source}></video>"
        else:
            tag = f'<img{style} alt="{escape(sample.prompt)}" {source}>'
    else:
        tag = f'<div class="absent">{escape(sample.file.name)} is not on this page</div>'
    if sample.held_out:
        tag += '<span class="held" title="training never saw this combination">held out</span>'
    return tag


def attribute_marks(sample: Sample) -> str:
    """List items: ✓ or ✗ for each expected attribute."""
    marks = ""
    for attribute in ("color", "shape", "direction"):
        expected, detected = sample.expected.get(attribute), sample.detected.get(attribute)
        if expected is None:
            continue
        tip = escape(f"{attribute_title(attribute)}: expected {expected}, detected {detected or 'nothing'}")
        if detected == expected:
            marks += f'<li class="right" title="{tip}">✓{NBSP}{escape(expected)}</li>'
        else:
            words = f"<s>{escape(expected)}</s>{NBSP}{escape(detected or '?')}"
            marks += f'<li class="wrong" title="{tip}">✗{NBSP}{words}</li>'
    return marks


def confusion_table(samples: list[Sample], attribute: str) -> str:
    """Table of expected words (rows) and detected words (columns), in videos; "" if only one word is expected."""
    pairs = [(s.expected[attribute], s.detected[attribute]) for s in samples if attribute in s.expected]
    rows = list(dict.fromkeys(expected for expected, _ in pairs))
    if len(rows) < 2:
        return ""
    columns = [*rows, *sorted({detected for _, detected in pairs if detected} - set(rows))]
    if any(not detected for _, detected in pairs):
        columns.append(None)
    head = "".join(f'<th scope="col">{escape(word or "none")}</th>' for word in columns)
    body = ""
    for expected in rows:
        counts = [pairs.count((expected, detected)) for detected in columns]
        body += f'<tr><th scope="row">{escape(expected)}</th>'
        for detected, count in zip(columns, counts, strict=True):
            css_class, share = "hit" if detected == expected else "miss", 100 * count / sum(counts)
            body += f'<td class="{css_class}" style="--share:{share:.0f}%">{count or "·"}</td>'
        body += "</tr>"
    caption = f"<caption>{escape(attribute_title(attribute).capitalize())}</caption>"
    table = f"{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="card"><table class="confusion">{table}</table></div>'


def attribute_title(attribute: str) -> str:
    return {"color": "colour"}.get(attribute, attribute)
