"""`megasora sample`: every kind of prompt, batches, films, what is kept after a stop, and bad input."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megasora.cli import main
from megasora.data.clip_writer import write_video
from megasora.errors import MegaSoraError
from megasora.sampling.latents import ClipCoder
from megasora.sampling.watermark import apply_watermark
from megasora.sampling.work_folder import WorkFolder
from megasora.testing.video_files import gradient

SIZE = (16, 24)
FPS = 8
PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Videos and images of 16x24 pixels, and files that no command can use."""
    folder = tmp_path_factory.mktemp("media")
    ramp = gradient(7, *SIZE)
    write_video(ramp, FPS, folder / "a.mp4")
    write_video(ramp[::-1], FPS, folder / "b.mp4")
    write_video(gradient(5, 16, 16), FPS, folder / "square.mp4")
    write_video(ramp, 12, folder / "fast.mp4")
    for name, image in (("first", ramp[0]), ("last", ramp[-1]), ("square", gradient(1, 16, 16)[0])):
        Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(gradient(1, 15, 24)[0]).save(folder / "odd.png")
    mask = np.zeros((*SIZE, 3), np.uint8)
    mask[:, 12:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    write_video(np.stack([mask] * 5), FPS, folder / "mask5.mp4")
    (folder / "empty.mp4").touch()
    (folder / "corrupt.mp4").write_bytes((folder / "a.mp4").read_bytes()[:400])
    (folder / "text.mp4").write_text("my diary\n" * 50)
    (folder / "folder.mp4").mkdir()
    with av.open(str(folder / "audio.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return folder


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def sample(run: Path, out: Path, *options: object) -> int:
    return main(["sample", str(run), "--out", str(out), *map(str, options)])


KINDS = {  # name -> (options, frames of the result, whose of these are of the source: (first, end, source, first, end))
    "text": ([], 9, []),
    "no whole latents": (["--frames", "6", "--size", "18x26"], 6, []),
    "image": (["--image", "{m}/first.png", "--frames", "5"], 5, []),
    "last image": (["--last-image", "{m}/last.png", "--frames", "5"], 5, []),
    "both images": (["--image", "{m}/first.png", "--last-image", "{m}/last.png", "--frames", "6"], 6, []),
    "keyframes": (["--keyframes", "{m}/first.png:0", "{m}/last.png:6", "sample.guidance_scale=2"], 7, []),
    "extend": (["--video", "{m}/a.mp4", "--extend", "3"], 10, [(0, 7, "a", 0, 7)]),
    "extend by seconds": (["--video", "{m}/a.mp4", "--extend", "0.4s"], 10, [(0, 7, "a", 0, 7)]),
    "prepend": (["--video", "{m}/a.mp4", "--prepend", "2"], 9, [(2, 9, "a", 0, 7)]),
    "loop": (["--video", "{m}/a.mp4", "--loop", "--frames", "3"], 10, [(0, 7, "a", 0, 7)]),
    "connect": (["--connect", "{m}/a.mp4", "{m}/b.mp4", "--frames", "2"], 16, [(0, 7, "a", 0, 7), (9, 16, "b", 0, 7)]),
    "edit": (["--video", "{m}/a.mp4", "--edit", "0.5"], 7, []),
    "edit with a mask": (["--video", "{m}/a.mp4", "--edit", "1", "--mask", "{m}/mask.png"], 7, []),
}
LOSS = 6  # grey levels: of two encodings as H.264


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prompt_gives_its_frames_and_keeps_those_of_videos(kind, trained, media, tmp_path, capsys):
    options, frames, kept = KINDS[kind]
    out = tmp_path / "out.mp4"
    assert sample(trained, out, "--prompt", PROMPT, *(o.replace("{m}", str(media)) for o in options)) == 0
    assert capsys.readouterr().err == ""
    assert names(tmp_path) == ["out.json", "out.mp4", "out.sheet.png"]
    result, sidecar = decoded(out), json.loads((tmp_path / "out.json").read_text())
    assert len(result) == frames == sidecar["frames"]
    for first, end, name, start, stop in kept:
        source = decoded(media / f"{name}.mp4")[start:stop].astype(int)
        assert np.abs(result[first:end] - source).mean() < LOSS
    if kept:
        assert sidecar["fps"] == FPS
        seams = sidecar["measured"]["seams"]
        boundaries = sorted({edge for first, end, *_ in kept for edge in (first, end)} - {0, frames})
        assert [seam["frame"] for seam in seams] == boundaries + ([0] if kind == "loop" else [])
        assert all(seam["step"] > 0 for seam in seams)
    if kind == "edit with a mask":
        assert np.abs(result[:, :, :10].astype(int) - decoded(media / "a.mp4")[:, :, :10]).mean() < LOSS
        assert np.abs(result[:, :, 14:].astype(int) - decoded(media / "a.mp4")[:, :, 14:]).mean() > 2 * LOSS
    if kind == "image":
        assert sidecar["measured"]["psnr_of_given_frames"]["0"] > 20
        assert sidecar["given"][0]["as"] == "image" and len(sidecar["given"][0]["sha256"]) == 64


def test_sampled_frames_have_the_watermark_and_those_of_videos_do_not(trained, media, tmp_path):
    first, mask = media / "first.png", media / "mask.png"
    kinds = {
        "image.png": ["--size", "16x24"],
        "masked.png": ["--video", first, "--edit", "1", "--mask", mask],
        "longer.mp4": ["--video", media / "a.mp4", "--extend", "3"],
    }
    files = {}
    for name, line in kinds.items():
        for mark in ("true", "false"):
            out = tmp_path / f"{mark}-{name}"
            assert sample(trained, out, "--prompt", PROMPT, *line, f"sample.watermark={mark}") == 0
            files[name, mark] = decoded(out) if out.suffix == ".mp4" else np.array(Image.open(out))
    with_mark, without = files["image.png", "true"], files["image.png", "false"]
    assert np.array_equal(with_mark, apply_watermark(without)) and not np.array_equal(with_mark, without)
    with_mark, without = files["masked.png", "true"], files["masked.png", "false"]
    assert np.array_equal(with_mark[:, 12:], apply_watermark(without)[:, 12:])
    assert np.array_equal(with_mark[:, :12], without[:, :12])
    assert np.array_equal(without[:, :12], np.array(Image.open(first))[:, :12])
    difference = np.abs(files["longer.mp4", "true"].astype(int) - files["longer.mp4", "false"])
    assert difference[:7].mean() < 0.5 and difference[7:].mean() > 1


# ---------------------------------------------------------------- bad input

V, I = "--video {m}/a.mp4", "--image {m}/first.png"
BAD = {  # options, with {m} for the folder of media and {t} for the one to write to -> words of the message
    # files
    "--video {m}/empty.mp4 --extend 3": ["--video", "empty.mp4 has 0 bytes"],
    "--video {m}/corrupt.mp4 --extend 3": ["--video", "corrupt.mp4"],
    "--video {m}/text.mp4 --extend 3": ["--video", "text.mp4 is a text file named .mp4"],
    "--video {m}/audio.mp4 --extend 3": ["--video", "audio.mp4", "no video stream"],
    "--video {m}/folder.mp4 --extend 3": ["--video", "folder.mp4 is not a file"],
    "--video {m}/none.mp4 --extend 3": ["--video", "none.mp4 does not exist"],
    "--video {m}/first.png --extend 3": ["--video", "first.png has one frame", "--image"],
    "--connect {m}/a.mp4 {m}/empty.mp4": ["--connect", "empty.mp4 has 0 bytes"],
    "--image {m}/none.png": ["--image", "none.png does not exist"],
    "--image {m}/a.mp4": ["--image", "a.mp4 is not an image file"],
    "--last-image {m}/text.mp4": ["--last-image", "not an image file"],
    "--keyframes {m}/first.png:0 {m}/none.png:4": ["--keyframes", "none.png does not exist"],
    V + " --edit 0.5 --mask {m}/text.mp4": ["--mask", "text.mp4 is a text file"],
    # sizes and rates that do not fit
    I + " --size 32x32": ["--image", "16x24", "--size is 32x32", "leave --size out"],
    V + " --extend 3 --size 32x32": ["--video", "16x24", "--size is 32x32"],
    V + " --extend 3 --fps 12": ["--fps 12", "8 fps", "leave --fps out"],
    V + " --edit 0.5 --mask {m}/square.png": ["--mask", "16x16 pixels", "16x24", "same size"],
    V + " --edit 0.5 --mask {m}/mask5.mp4": ["--mask", "5 frames", "7"],
    "--connect {m}/a.mp4 {m}/square.mp4": ["--connect", "16x24", "16x16"],
    "--connect {m}/a.mp4 {m}/fast.mp4": ["--connect", "8 fps", "12"],
    I + " --last-image {m}/square.png": ["--last-image", "16x16", "16x24"],
    "--image {m}/odd.png": ["--size 15x24", "even"],
    "--size 15x24": ["--size 15x24", "even"],
    "--size 0x24": ["--size=0x24", "HEIGHTxWIDTH"],
    "--size large": ["--size=large", "HEIGHTxWIDTH"],
    "--size 99999x99998": ["--size 99999x99998", "ingest.max_height"],
    # numbers out of bounds
    "--frames 0": ["--frames 0", "at least 1"],
    "--frames -3": ["--frames -3"],
    "--frames 1000000000": ["1000000000 frames", "MiB free", "--frames"],
    "--frames 99999999999": ["--frames 99999999999", "at most"],
    "--fps 0": ["--fps 0"],
    "--fps nan": ["--fps nan"],
    "--fps inf": ["--fps inf"],
    "--seed -1": ["--seed -1"],
    "--seed 9223372036854775808": ["--seed 9223372036854775808", "2^63"],
    "--guidance-scale -1": ["--guidance-scale -1", "sample.guidance_scale"],
    "--guidance-scale inf": ["--guidance-scale inf"],
    "--num-inference-steps 0": ["--num-inference-steps 0"],
    V + " --edit 0": ["--edit 0 ", "above 0"],
    V + " --edit 1.01": ["--edit 1.01", "at most 1"],
    V + " --edit nan": ["--edit nan"],
    V + " --edit -0.5": ["--edit -0.5"],
    V + " --extend 0": ["--extend 0", "length"],
    V + " --extend 1.5": ["--extend 1.5", "length"],
    V + " --extend 2m": ["--extend 2m", "length", "2s"],
    V + " --prepend=-2s": ["--prepend -2s", "length"],
    V + " --extend 999999999": ["999999999 frames", "MiB free"],
    "--keyframes {m}/first.png:9 --frames 9": ["--keyframes", "no frame 9", "0 to 8"],
    "--keyframes {m}/first.png:-1": ["--keyframes", "no frame -1"],
    "--keyframes {m}/first.png:2 {m}/last.png:2": ["--keyframes", "frame 2 more than once"],
    "--keyframes {m}/first.png": ["--keyframes", "FILE:FRAME"],
    "--keyframes {m}/first.png:999999999": ["1000000000 frames", "MiB free"],
    I + " --last-image {m}/last.png --frames 1": ["--frames 1", "--last-image", "at least 2"],
    # combinations
    V: ["--video needs one of --extend"],
    V + " --extend 3 --edit 0.5": ["--video needs one of", "not 2"],
    "--extend 3": ["--extend needs the --video"],
    "--loop": ["--loop needs the --video"],
    "--mask {m}/mask.png": ["--mask needs --edit"],
    V + " --extend 3 --mask {m}/mask.png": ["--mask needs --edit"],
    V + " --extend 3 --frames 5": ["--frames 5", "--extend"],
    V + " --edit 0.5 --frames 5": ["--frames 5", "--edit"],
    V + " --extend 3 " + I: ["--image", "--video", "exclude"],
    "--connect {m}/a.mp4 {m}/b.mp4 --keyframes {m}/first.png:0": ["--connect", "--keyframes", "exclude"],
    # outputs
    "--out {t}/out.gif": ["out.gif", ".mp4", ".png"],
    "--out {t}/no/out.mp4": ["there is no folder", "make it first"],
    "--out {t}/folder.mp4": ["folder.mp4 is a folder"],
    "--out {t}/out.png --frames 5": ["--frames 5", "an image is .png"],
    "--frames 1": ["--frames 1", "an image is .png"],
    "--out {m}/a.mp4 --video {m}/a.mp4 --extend 3": ["--out", "a.mp4", "given as --video"],
    # settings
    "model.width=64": ["model.width=64", "sample.*"],
    "sample.guidance=4": ["sample.guidance", "sample.guidance_scale"],
    "sample.solver=rk4": ["sample.solver=rk4"],
    "--part 3/2 --prompts {t}/p.jsonl": ["give one of"],
}  # fmt: skip
BAD_TEXTS = {
    "empty": (" ", ["--prompt is empty"]),
    "too many words": ("very " * 65, ["--prompt", "65 words", "text.max_tokens=64"]),
    "100 KB": ("word " * 20_000, ["--prompt has 100000 bytes"]),
    "NUL": ("red\0circle", ["--prompt", "\\x00", "position 3"]),
    "escape": ("red \x1b[31m circle", ["--prompt", "\\x1b"]),
    "not UTF-8": ("caf\udce9", ["--prompt is not UTF-8"]),
}


def check_error(run: Path, folder: Path, capsys, options: list[str], words: list[str]) -> None:
    """One line on stderr with these words, exit code 2, and no change in `folder`."""
    before = names(folder)
    capsys.readouterr()
    defaults = [] if "--out" in options else ["--out", str(folder / "out.mp4")]
    assert main(["sample", str(run), *defaults, *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("megasora: error: ") and shown.err.count("\n") == 1, shown.err
    assert not [word for word in words if word not in shown.err], shown.err
    assert shown.out == "" and names(folder) == before


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_that_names_the_flag(line, trained, media, tmp_path, capsys):
    (tmp_path / "folder.mp4").mkdir()
    options = [word.replace("{m}", str(media)).replace("{t}", str(tmp_path)) for word in line.split()]
    check_error(trained, tmp_path, capsys, ["--prompt", PROMPT, *options], BAD[line])


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_prompt_that_cannot_be_read_is_one_line(name, trained, tmp_path, capsys):
    text, words = BAD_TEXTS[name]
    check_error(trained, tmp_path, capsys, [f"--prompt={text}"], words)
    if name != "empty":
        words = [word.replace("--prompt", "--negative-prompt") for word in words]
        check_error(trained, tmp_path, capsys, ["--prompt", PROMPT, f"--negative-prompt={text}"], words)


@pytest.mark.parametrize("prompt", ["赤い丸が右へ動く", "دائرة 🔴➡️ حمراء", "a\tred\ncircle"])
def test_a_prompt_of_any_language_is_sampled(prompt, trained, tmp_path):
    assert sample(trained, tmp_path / "out.png", "--prompt", prompt, "--size", "8x8") == 0
    assert json.loads((tmp_path / "out.json").read_text())["prompt"] == prompt


# ---------------------------------------------------------------- what is kept after a stop


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """The number of each window that is sampled, and not read from the work folder."""
    windows: list[int] = []
    put = WorkFolder.put

    def counted(self, window, *rest):
        windows.append(window)
        put(self, window, *rest)

    monkeypatch.setattr(WorkFolder, "put", counted)
    return windows


LONG = ["--prompt", PROMPT, "--size", "16x24", "--frames", "12", "sample.window_frames=5", "sample.context_frames=1"]
WINDOWS = 3  # of 5 frames, of which the later ones have 4 new


@pytest.fixture
def failing_decode(monkeypatch):
    """failing_decode(n): the n-th window fails when it is decoded; 0: none does."""

    def fail(number: int) -> None:
        calls = iter(range(1, 10**6))

        def decode(self, *arguments):
            if next(calls) == number:
                raise MegaSoraError("out of memory")
            return original(self, *arguments)

        monkeypatch.setattr(ClipCoder, "decode", decode)

    original = ClipCoder.decode
    return fail


def test_after_a_failed_decode_the_same_command_samples_only_what_is_missing(
    trained, tmp_path, sampled, failing_decode, capsys
):
    assert sample(trained, tmp_path / "whole.mp4", *LONG) == 0 and len(sampled) == WINDOWS
    out = tmp_path / "out.mp4"
    failing_decode(2)
    assert sample(trained, out, *LONG) == 2 and "out of memory" in capsys.readouterr().err
    assert not out.exists() and [p.suffix for p in sorted((tmp_path / ".out.mp4.work").iterdir())] == [
        ".json", *[".safetensors"] * 2
    ]  # fmt: skip
    sampled.clear()
    failing_decode(0)
    assert sample(trained, out, *LONG) == 0 and len(sampled) == WINDOWS - 2
    assert out.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not (tmp_path / ".out.mp4.work").exists()


def test_another_request_discards_what_an_earlier_one_has_left(trained, tmp_path, sampled, failing_decode, media):
    out = tmp_path / "out.mp4"
    for other in (["--weights", "raw"], ["sample.refine=0.4"]):
        failing_decode(2)
        assert sample(trained, out, *LONG) == 2
        sampled.clear()
        failing_decode(0)
        assert sample(trained, out, *LONG, *other) == 0 and len(sampled) == WINDOWS, other


def test_another_given_file_of_the_same_name_is_another_request(trained, tmp_path, sampled, failing_decode, media):
    shutil.copy(media / "a.mp4", tmp_path / "in.mp4")
    options = ["--prompt", PROMPT, "--video", tmp_path / "in.mp4", "--extend", "3"]
    for same in (True, False):
        failing_decode(1)
        assert sample(trained, tmp_path / "out.mp4", *options) == 2
        sampled.clear()
        failing_decode(0)
        if not same:
            shutil.copy(media / "b.mp4", tmp_path / "in.mp4")
        assert sample(trained, tmp_path / "out.mp4", *options) == 0 and len(sampled) == (0 if same else 1)


def test_latents_that_are_kept_are_used_again(trained, tmp_path, sampled):
    for calls in (WINDOWS, 0):
        sampled.clear()
        assert sample(trained, tmp_path / "out.mp4", *LONG, "--keep-latents") == 0 and len(sampled) == calls
    assert names(tmp_path / ".out.mp4.work") == [
        "request.json", *[f"window-{i:05d}-pass-0.safetensors" for i in range(WINDOWS)]
    ]  # fmt: skip
    assert sample(trained, tmp_path / "out.mp4", *LONG) == 0 and not (tmp_path / ".out.mp4.work").exists()


def test_a_killed_command_goes_on_after_its_last_window(trained, tmp_path, sampled):
    out = tmp_path / "out.mp4"
    code = (
        "import os, sys, megasora.sampling.work_folder as w; put = w.WorkFolder.put\n"
        "def then_die(self, window, *rest):\n    put(self, window, *rest)\n    window == 1 and os._exit(9)\n"
        "w.WorkFolder.put = then_die\nfrom megasora.cli import main\nmain(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", code, "sample", str(trained), "--out", str(out), *LONG]
    assert subprocess.run(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode == 9
    assert "lock" in names(tmp_path / ".out.mp4.work")  # of the killed process
    assert sample(trained, out, *LONG) == 0 and len(sampled) == WINDOWS - 2
    assert names(tmp_path) == ["out.json", "out.mp4", "out.sheet.png"]


@pytest.mark.parametrize("limit", [100, 6000])  # bytes of a file: the latents do not fit, or only the video does not
def test_on_a_full_disk_what_was_done_stays(limit, trained, tmp_path, sampled, capsys):
    out = tmp_path / "out.mp4"
    options = [*LONG, "--size", "32x48"]
    assert sample(trained, out, *options) == 0
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    sampled.clear()
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert sample(trained, out, *options, "--seed", "1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File too large" in error and str(tmp_path) in error
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.rglob("*.part"))
    done = len(sampled)
    sampled.clear()
    assert sample(trained, out, *options, "--seed", "1") == 0 and (out.read_bytes() != before["out.mp4"])
    assert len(sampled) == (WINDOWS if limit == 100 else 0) and done == (0 if limit == 100 else WINDOWS)


def test_two_commands_do_not_write_the_same_file(trained, tmp_path, capsys):
    with WorkFolder.open(tmp_path / "out.mp4", {}):
        assert sample(trained, tmp_path / "out.mp4", *LONG) == 2
    assert "out.mp4 is being written by process" in capsys.readouterr().err


# ---------------------------------------------------------------- many processes


@pytest.mark.slow
def test_processes_that_share_packs_write_the_files_of_one_process_and_data_ranks_divide_them(
    trained, media, tmp_path, launch
):
    rows = [{"prompt": PROMPT, "frames": 12}, {"prompt": "x", "video": str(media / "a.mp4"), "extend": 3}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [trained, "--prompts", tmp_path / "rows.jsonl", "--size", "16x24"]
    settings = ["sample.window_frames=5", "sample.context_frames=1"]
    assert main([str(word) for word in ["sample", *command, "--out", tmp_path / "one", *settings]]) == 0
    for folder, layout in (("tensor", ["parallel.tensor=2"]), ("data", [])):
        code, output = launch("megasora.sample", *command, "--out", tmp_path / folder, *settings, *layout, processes=2)
        assert code == 0, output
        for i, frames in enumerate((12, 10)):
            alone, shared = (decoded(tmp_path / name / f"{i:06d}.mp4").astype(int) for name in ("one", folder))
            assert len(shared) == frames and np.abs(shared - alone).mean() < 0.1
    results = {path.name: path.read_text().count("\n") for path in tmp_path.rglob("results*")}
    assert results == {"results.jsonl": 2, "results-1-of-2.jsonl": 1, "results-2-of-2.jsonl": 1}


@pytest.mark.slow
def test_an_error_of_several_processes_is_printed_once(trained, tmp_path, launch):
    options = [trained, "--prompt", PROMPT, "--out", tmp_path / "out.mp4"]
    for more, words in ((["--frames", "0"], "--frames 0 must be"), ([], "one clip is sampled by one group")):
        code, output = launch("megasora.sample", *options, *more, processes=2)
        assert code == 1 and output.count("megasora: error: ") == 1 and words in output  # torchrun's code
    assert main([str(word) for word in ["sample", *options, "parallel.tensor=2"]]) == 2
