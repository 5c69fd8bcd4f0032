"""`megasora web`: the form, the clips that it makes, and the page in a headless browser."""

import asyncio
import dataclasses
import json
import os
import socket
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import Browser, find_browser

from megasora.data.clip_writer import write_image, write_video
from megasora.errors import MegaSoraError
from megasora.web.form import USES, Form
from megasora.web.gallery import clip_details, clip_view, gallery
from megasora.web.server import OFFLINE, free_port, serve, served
from megasora.web.studio import Stopped, Studio

EXTEND, PREPEND, LOOP, EDIT = USES
EMPTY = Form("a red circle", None, None, None, None, EXTEND, 0.6, None, 5, 12.0, 0, None, None)


def form(**changes):
    return dataclasses.replace(EMPTY, **changes)


@pytest.fixture(scope="module")
def studio(trained, tmp_path_factory):
    return Studio.open(trained, tmp_path_factory.mktemp("made"))


@pytest.fixture
def no_other_machine(monkeypatch):
    """Fails on a connection of this process that is not to itself; the names that were looked up."""
    connect, refused = socket.socket.connect, []

    def connect_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            refused.append(address)
            raise OSError(f"a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    yield
    assert refused == []


# ---------------------------------------------------------------- the form


def test_each_use_of_a_video_is_a_kind_of_request():
    requests = {use: form(video="in.mp4", use=use, frames=7).request() for use in USES}
    assert [requests[use].kind for use in (EXTEND, PREPEND, LOOP, EDIT)] == ["extend", "prepend", "loop", "edit"]
    assert str(requests[EXTEND].extend) == str(requests[PREPEND].prepend) == "7"
    assert requests[LOOP].frames == 7 and requests[EDIT].edit == 0.6
    assert all(request.fps is None for request in requests.values())  # that of the video


def test_images_and_empty_fields():
    request = form(image="a.png", last_image="b.png", size=" 32x48 ", negative_prompt="").request()
    assert (request.kind, request.size, request.negative_prompt, request.seed) == ("image", "32x48", None, 0)
    assert form(size="").request().size is None


def test_settings_are_those_of_the_run_unless_the_form_has_them(studio):
    own = studio.session.settings
    assert form().settings(own) == own
    assert form(guidance_scale=1.5, num_inference_steps=3).settings(own) == dataclasses.replace(
        own, guidance_scale=1.5, num_inference_steps=3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "Prompt is empty; describe"),
        ({"size": "big"}, "Size=big is not HEIGHTxWIDTH"),
        ({"size": "33x34"}, "Size 33x34: an H.264 video has an even height"),
        ({"size": "90000x16"}, "Size 90000x16 is larger than"),
        ({"frames": 0}, "Frames 0 must be at least 1"),
        ({"fps": 0.0}, "Frames per second 0.0 must be"),
        ({"seed": -1}, "Seed -1 must be from 0"),
        ({"num_inference_steps": 0}, "Steps=0 must be at least 1"),
        ({"guidance_scale": -1.0}, "Guidance=-1.0 must be at least 0"),
        ({"video": "in.mp4", "use": "else"}, "Video: choose what to do with it"),
        ({"video": "in.mp4", "frames": None}, "Frames: say how many frames are new"),
        ({"video": "/uploads/in.mp4"}, "Video in.mp4"),
        ({"image": "/uploads/a.png"}, "First frame a.png"),
    ],
)
def test_an_error_names_the_field_of_the_page_and_leaves_no_file(studio, changes, message):
    before = sorted(studio.out.iterdir())
    wrong = form(**changes)
    with pytest.raises((MegaSoraError, OSError)) as caught:
        studio.make(wrong, is_expanded=False)
    assert wrong.message(caught.value).startswith(message) and "--" not in wrong.message(caught.value)
    assert "/uploads" not in wrong.message(caught.value)
    assert sorted(studio.out.iterdir()) == before


# ---------------------------------------------------------------- clips


def test_a_clip_has_the_files_of_the_command_and_is_the_newest_of_the_gallery(studio):
    done = []
    clip = studio.make(form(size="16x24", seed=4), is_expanded=False, progress=done.append)
    number = clip.file.stem
    assert {path.name for path in studio.out.glob(f"*{number}*")} == {
        f"{number}{s}" for s in (".mp4", ".sheet.png", ".json")
    }
    assert (clip.values["size"], clip.values["frames"], clip.values["seed"], clip.values["kind"]) == (
        "16x24",
        5,
        4,
        "text",
    )
    assert done == sorted(done) and done[-1] == 1
    assert studio.made()[0] == clip
    following = studio.make(form(frames=1, size="16x16"), is_expanded=False)
    assert following.file.name == f"{int(number) + 1:04d}.png" and studio.made()[:2] == [following, clip]


def test_a_given_video_is_extended(studio, tmp_path):
    frames = np.full((5, 16, 16, 3), 128, np.uint8)
    write_video(frames, 8.0, tmp_path / "in.mp4", "{}")
    clip = studio.make(form(video=str(tmp_path / "in.mp4"), frames=3), is_expanded=False)
    assert (clip.values["kind"], clip.values["frames"], clip.values["fps"]) == ("extend", 8, 8.0)


def test_a_given_image_sets_the_size(studio, tmp_path):
    write_image(np.full((16, 24, 3), 128, np.uint8), tmp_path / "a.png", "{}")
    clip = studio.make(form(image=str(tmp_path / "a.png")), is_expanded=False)
    assert (clip.values["kind"], clip.values["size"]) == ("image", "16x24")


def test_a_short_prompt_is_expanded_if_asked_and_both_texts_are_shown(studio):
    clip = studio.make(form(prompt="red right"), is_expanded=True)
    assert clip.values["prompt"] == "red right"
    assert clip.values["caption"].startswith("a red ") and clip.values["caption"].endswith(" moves right")
    assert "red right" in clip_details(clip) and clip.values["caption"] in clip_details(clip)
    assert studio.make(form(prompt="red right"), is_expanded=False).values["caption"] == "red right"


def test_stop_ends_the_clip_and_leaves_nothing(studio):
    before = sorted(studio.out.iterdir())
    with pytest.raises(Stopped):
        studio.make(form(), is_expanded=False, progress=lambda fraction: studio.stop.set())
    assert sorted(studio.out.iterdir()) == before
    assert studio.make(form(), is_expanded=False).file.exists()  # the next one is not stopped


def test_text_of_a_prompt_is_no_markup(studio):
    clip = studio.make(form(prompt='<b>red</b> "&'), is_expanded=False)
    page = gallery([clip]) + clip_details(clip) + clip_view(clip)
    assert "<b>" not in page and "&lt;b&gt;red&lt;/b&gt; &quot;&amp;" in page


def test_damaged_and_foreign_files_are_no_clips(studio):
    before = studio.made()
    (studio.out / "9000.json").write_text("{")
    (studio.out / "9001.json").write_text("{}")  # without a video
    (studio.out / "notes.json").write_text("{}")
    assert studio.made() == before
    assert studio.next_file(".mp4").name == "9002.mp4"  # an existing number is not used again
    for name in ("9000.json", "9001.json", "notes.json"):
        (studio.out / name).unlink()


# ---------------------------------------------------------------- the server


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(MegaSoraError, match=f"--port {port} cannot be opened on 127.0.0.1 .*choose another one"):
            free_port(port)
    with pytest.raises(MegaSoraError, match="--port 70000 must be from 0"):
        free_port(70000)
    assert free_port(0) > 0


def test_without_gradio_the_command_to_install_it_is_named(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MegaSoraError, match=r"megasora web needs gradio .*pip install megasora\[web\]"):
        serve(trained, None, 0, "ema")


@pytest.fixture
def address(studio, monkeypatch, no_other_machine):
    pytest.importorskip("gradio", reason="pip install megasora[web]")
    for name in (*OFFLINE, "GRADIO_TEMP_DIR", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored afterwards
    with served(studio, 0) as address:
        yield address


def test_only_this_machine_is_served_and_the_page_may_load_nothing_from_others(address):
    import httpx

    assert urlsplit(address).hostname == "127.0.0.1"
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    answer = httpx.get(address, trust_env=False)
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore:::gradio")
@pytest.mark.skipif(find_browser() is None, reason="apt-get install chromium-headless-shell")
def test_the_page_samples_a_prompt_shows_the_clip_and_says_what_is_wrong(address, studio):
    asyncio.run(visit(address, studio))


async def visit(address, studio):
    async with Browser.started() as browser:
        await browser.open(address)
        await browser.until("document.querySelector('#prompt textarea') && document.querySelector('#gallery')")
        clips = len(studio.made())
        await browser.type("#prompt textarea", "a blue square <i>moves</i> up")
        await browser.type("#seed input", "7")
        await browser.click("#make")
        await browser.until("document.querySelector('#clip video')?.readyState == 4")
        await browser.until(
            f"document.querySelectorAll('#gallery .tile video, #gallery .tile img').length == {clips + 1}"
        )
        playing = "new Promise(done => setTimeout(() => done(document.querySelector('#clip video').currentTime), 300))"
        assert await browser.evaluate(playing) > 0
        made = studio.made()[0]
        assert (made.values["prompt"], made.values["seed"]) == ("a blue square <i>moves</i> up", 7)
        assert made.values["prompt"] in await browser.evaluate("document.querySelector('#details').innerText")

        await browser.click("#again")  # the clip becomes the given video
        await browser.until("document.querySelector('#video video')?.readyState >= 2")
        await browser.click("#make")
        await browser.until("document.querySelector('#details')?.innerText.includes('extend')")
        assert json.loads(studio.made()[0].file.with_suffix(".json").read_text())["kind"] == "extend"

        await browser.type("#size input, #size textarea", "33x33")
        await browser.click("#make")
        await browser.until("document.querySelector('#message .error')")
        message = await browser.evaluate("document.querySelector('#message').innerText")
        assert message.endswith("Size is 33x33; leave Size out, or give a file of that size")

        here = urlsplit(address).netloc
        elsewhere = [
            url for url in browser.requested if urlsplit(url).netloc != here and not url.startswith(("data:", "blob:"))
        ]
        assert elsewhere == [] and browser.logged == []
