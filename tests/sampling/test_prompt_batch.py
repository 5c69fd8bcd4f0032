"""Batches of prompts and films: lines that are checked first, packs, what is done already, what fails, shots."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from megasora.cli import main
from megasora.data.clip_writer import write_image, write_video
from megasora.errors import MegaSoraError
from megasora.sampling import session as session_module
from megasora.sampling.latents import ClipCoder
from megasora.sampling.prompt_batch import Part, part_of_command, read_lines
from megasora.sampling.sampler import Sampler
from megasora.testing.video_files import gradient

SMALL = ["--size", "16x24", "--frames", "5"]
ROWS = [
    {"prompt": "a red circle moves right"},
    {"prompt": "a blue square", "frames": 1},
    {"prompt": "a green circle", "video": "in.mp4", "extend": "0.4s"},
    {"prompt": "a green circle", "video": "in.mp4", "edit": 0.5, "seed": 9},
    {"prompt": "a red circle moves left", "size": "8x8"},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_video(gradient(7, 16, 24), 8, tmp_path / "in.mp4")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def batch(run: Path, folder: Path, *options: object, rows: str = "rows.jsonl") -> int:
    return main(["sample", str(run), "--prompts", str(folder / rows), "--out", str(folder / "out"), *map(str, options)])


def results(folder: Path, name: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.fixture
def packs(monkeypatch) -> list[int]:
    """The number of clips of each call of the sampler."""
    calls: list[int] = []
    sample = Sampler.sample

    def counted(self, timelines, *rest):
        calls.append(len(timelines))
        return sample(self, timelines, *rest)

    monkeypatch.setattr(Sampler, "sample", counted)
    return calls


# ---------------------------------------------------------------- batches


def test_a_batch_makes_a_file_of_each_line_and_a_line_of_each_file(trained, folder, packs, capsys):
    assert batch(trained, folder, *SMALL) == 0
    assert packs == [4, 1]  # the edit has fewer solver steps
    assert {r["row"]: r["file"] for r in results(folder)} == {
        0: "000000.mp4", 1: "000001.png", 2: "000002.mp4", 3: "000003.mp4", 4: "000004.mp4"
    }  # fmt: skip
    assert capsys.readouterr().out == f"{folder / 'out'}  5 clips sampled\n"
    kinds = [json.loads((folder / "out" / f"00000{i}.json").read_text())["kind"] for i in range(5)]
    assert kinds == ["text", "text", "extend", "edit", "text"]
    extended = decoded(folder / "out" / "000002.mp4")
    assert len(extended) == 10 and np.abs(extended[:7].astype(int) - decoded(folder / "in.mp4")).mean() < 6
    assert decoded(folder / "out" / "000004.mp4").shape == (5, 8, 8, 3)


def test_a_line_gives_the_file_of_its_own_command(trained, folder):
    assert batch(trained, folder, *SMALL, "--seed", 3) == 0
    for row, options in ((0, ["--seed", 3, *SMALL]), (4, ["--seed", 7, "--size", "8x8", "--frames", 5])):
        out = folder / "alone.mp4"
        line = ["sample", str(trained), "--prompt", ROWS[row]["prompt"], "--out", str(out), *map(str, options)]
        assert main(line) == 0
        alone, together = decoded(out).astype(int), decoded(folder / "out" / f"{row:06d}.mp4")
        assert np.abs(alone - together).mean() < 0.5  # one pack or another: rounding only


def test_lines_that_are_done_are_not_sampled_again(trained, folder, packs, capsys):
    write_rows(folder / "rows.jsonl", ROWS[:3])
    assert batch(trained, folder, *SMALL) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.mp4")}
    (folder / "out" / "000001.json").unlink()
    packs.clear()
    assert batch(trained, folder, *SMALL) == 0 and packs == [1]
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.mp4")} == before
    assert len(results(folder)) == 3 and "1 clips sampled, 2 were there" in capsys.readouterr().out
    packs.clear()
    assert batch(trained, folder, *SMALL, "--guidance-scale", "1") == 0 and packs == [3]
    packs.clear()
    write_video(gradient(7, 16, 24)[::-1], 8, folder / "in.mp4")
    assert batch(trained, folder, *SMALL, "--guidance-scale", "1") == 0 and packs == [1]


BAD_LINES = {  # second line -> words
    '{"prompt": "x"': ["line 2: it is not JSON"],
    '["x"]': ["line 2: it is not a JSON object"],
    '{"prompt": " "}': ["line 2: --prompt is empty"],
    '{"promt": "x"}': ["line 2: unknown key 'promt'"],
    '{"prompt": "x", "frames": 0}': ["line 2: --frames 0"],
    '{"prompt": "x", "video": "none.mp4", "extend": 3}': ["line 2: --video", "none.mp4 does not exist"],
    '{"prompt": "x", "image": "text.png"}': ["line 2: --image", "text.png is a text file"],
    '{"prompt": "x", "size": "7x8"}': ["line 2: --size 7x8", "even"],
    '{"prompt": "%s"}' % ("very " * 65): ["line 2: --prompt: caption of 65 words"],
    '{"prompt": "a\\u0000b"}': ["line 2: --prompt has the control character"],
    '{"prompt": "x", "seed": -1}': ["line 2: --seed -1"],
    '{"prompt": "x", "frames": 9999999999}': ["line 2: 9999999999 frames", "MiB free"],
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_sampled(line, trained, folder, capsys):
    (folder / "text.png").write_text("no image")
    (folder / "rows.jsonl").write_text(f'{{"prompt": "x"}}\n{line}\n\n{{"prompt": "y"}}\n')
    assert batch(trained, folder, *SMALL) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{folder / 'rows.jsonl'} {BAD_LINES[line][0]}" in error
    assert all(word in error for word in BAD_LINES[line]), error
    assert not (folder / "out").exists()


def test_several_bad_lines_are_counted(trained, folder, capsys):
    (folder / "rows.jsonl").write_text('{"prompt": "x"}\n{}\n[]\n3\n')
    assert batch(trained, folder) == 2
    assert "line 3: it is not a JSON object" in (error := capsys.readouterr().err) and "1 more of 4 lines" in error


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("rows.csv", b"x", "must end in .jsonl"),
        ("rows.jsonl", b"", "has no lines"),
        ("rows.jsonl", b"\n\n", "has no lines"),
        ("rows.txt", b"caf\xe9", "line 1: it is not UTF-8"),
        ("none.jsonl", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_an_error(name, data, words, tmp_path):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(MegaSoraError, match=words):
        read_lines(tmp_path / name, "--prompts")


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes('\ufeffa red circle\r\n\n  a {blue} "square" \n'.encode())
    lines = read_lines(tmp_path / "prompts.txt", "--prompts")
    assert [(line.number, line.values["prompt"]) for line in lines] == [(1, "a red circle"), (3, 'a {blue} "square"')]


def test_a_line_that_fails_is_recorded_and_the_others_are_made(trained, folder, capsys):
    whole = (folder / "in.mp4").read_bytes()
    (folder / "damaged.mp4").write_bytes(whole[:-250] + bytes(250))  # its header and first frame are whole
    rows = [ROWS[0], {"prompt": "x", "video": "damaged.mp4", "extend": 3}, ROWS[4]]
    write_rows(folder / "rows.jsonl", rows)
    assert batch(trained, folder, *SMALL) == 2
    lines = {line["row"]: line for line in results(folder)}
    assert lines[0]["file"] == "000000.mp4" and lines[2]["file"] == "000002.mp4"
    assert "damaged.mp4" in lines[1]["error"] and "file" not in lines[1]
    error = capsys.readouterr().err
    assert "1 of 3 clips failed" in error and "line 2: " in error and error.count("\n") == 1
    assert not list((folder / "out").glob("000001*")) and not list((folder / "out").glob(".0*"))


def test_clips_that_fail_together_are_tried_alone(trained, folder, monkeypatch, capsys):
    decode = ClipCoder.decode

    def fails_for_small(self, patches_LP, grid, size):
        if size == (8, 8):
            raise MegaSoraError("out of memory")
        return decode(self, patches_LP, grid, size)

    monkeypatch.setattr(ClipCoder, "decode", fails_for_small)
    write_rows(folder / "rows.jsonl", [ROWS[0], ROWS[4], ROWS[1]])
    assert batch(trained, folder, *SMALL) == 2
    lines = {line["row"]: line for line in results(folder)}
    assert "out of memory" in lines[1]["error"] and lines[0]["file"] and lines[2]["file"]
    monkeypatch.setattr(ClipCoder, "decode", decode)
    sampled = []
    monkeypatch.setattr(session_module.WorkFolder, "put", lambda *arguments: sampled.append(arguments))
    assert batch(trained, folder, *SMALL) == 0 and not sampled  # its latents were kept
    assert {line["row"] for line in results(folder) if "file" in line} == {0, 1, 2}


def test_a_clip_that_does_not_fit_into_memory_does_not_end_the_batch(trained, folder, monkeypatch):
    decode = ClipCoder.decode

    def out_of_memory_for_small(self, patches_LP, grid, size):
        if size == (8, 8):
            raise MemoryError
        return decode(self, patches_LP, grid, size)

    monkeypatch.setattr(ClipCoder, "decode", out_of_memory_for_small)
    write_rows(folder / "rows.jsonl", [ROWS[0], ROWS[4]])
    assert batch(trained, folder, *SMALL) == 2
    lines = {line["row"]: line for line in results(folder)}
    assert lines[0]["file"] and "too little memory" in lines[1]["error"] and "of 8x8" in lines[1]["error"]


def test_parts_share_the_lines_and_have_their_own_results(trained, folder, packs):
    write_rows(folder / "rows.jsonl", [ROWS[0], ROWS[4], ROWS[1]])
    for part in ("1/2", "2/2"):
        assert batch(trained, folder, *SMALL, "--part", part) == 0
    assert [line["row"] for line in results(folder, "results-1-of-2.jsonl")] == [0, 2]
    assert [line["row"] for line in results(folder, "results-2-of-2.jsonl")] == [1]


def test_the_part_of_a_slurm_array_is_that_of_its_task(monkeypatch):
    for key, value in {"ID": 7, "MIN": 4, "STEP": 1, "COUNT": 8}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", str(value))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # data ranks are of the session
    assert part_of_command(None) == Part(3, 8) and part_of_command("2/3") == Part(1, 3)


@pytest.mark.parametrize("option", [["--image", "x.png"], ["--loop"], ["--edit", "0.5"]])
def test_flags_of_one_clip_are_refused(option, trained, folder, capsys):
    assert batch(trained, folder, *option) == 2
    assert f"{option[0]} is of one clip; put it into the lines of --prompts" in capsys.readouterr().err


# ---------------------------------------------------------------- films

SHOTS = [
    {"prompt": "a red circle moves right", "frames": 5},
    {"prompt": "a red circle moves left", "seconds": 0.25},
    {"prompt": "a blue square", "frames": 4, "cut": True},
]


def film(run: Path, folder: Path, shots: list[dict], *options: str) -> int:
    write_rows(folder / "story.jsonl", shots)
    out = ["--script", str(folder / "story.jsonl"), "--out", str(folder / "film.mp4")]
    return main(["sample", str(run), *out, "--size", "16x24", "--fps", "8", *options])


@pytest.fixture
def contexts(monkeypatch) -> list[tuple[str, np.ndarray | None]]:
    """Of each timeline that is sampled its prompt and the given frames."""
    seen = []
    sample = Sampler.sample

    def recorded(self, timelines, *rest):
        stores = sample(self, timelines, *rest)
        for timeline, store in zip(timelines, stores, strict=True):
            given = timeline.given[0].frames_FHWC if timeline.given else None
            seen.append((timeline.prompt, given, np.array(store.frames_FHWC)))
        return stores

    monkeypatch.setattr(Sampler, "sample", recorded)
    return seen


def test_a_shot_is_given_the_last_frames_of_the_one_before_unless_it_is_a_cut(trained, folder, contexts):
    assert film(trained, folder, SHOTS) == 0
    (_, none, first), (_, context, second), (_, cut, third) = contexts
    assert none is None and cut is None
    assert np.array_equal(context, first[-len(context) :]) and np.array_equal(second[: len(context)], context)
    expected = np.concatenate([first, second[len(context) :], third])
    frames = decoded(folder / "film.mp4")
    assert frames.shape == (5 + 2 + 4, 16, 24, 3) and np.abs(frames - expected.astype(int)).mean() < 6
    sidecar = json.loads((folder / "film.json").read_text())
    assert [shot["first_frame"] for shot in sidecar["shots"]] == [0, 5, 7] and sidecar["frames"] == 11
    assert [seam["frame"] for seam in sidecar["measured"]["seams"]] == [5, 7]
    assert [shot["seed"] for shot in sidecar["shots"]] == [0, 1, 2]


def test_a_changed_shot_leaves_those_before_it_as_they_were(trained, folder, monkeypatch):
    puts = []
    put = session_module.WorkFolder.put
    monkeypatch.setattr(
        session_module.WorkFolder, "put", lambda self, *rest: (puts.append(self.part), put(self, *rest))[1]
    )
    assert film(trained, folder, SHOTS, "--keep-latents") == 0
    whole = (folder / "film.mp4").read_bytes()
    assert puts == ["shot-0000-", "shot-0001-", "shot-0002-"]
    for shots, again in (
        (SHOTS, []),
        ([SHOTS[0], SHOTS[1] | {"prompt": "x"}, SHOTS[2]], ["shot-0001-"]),  # the last one begins anew
        ([SHOTS[0] | {"seed": 5}, SHOTS[1], SHOTS[2]], ["shot-0000-", "shot-0001-"]),
    ):
        puts.clear()
        assert film(trained, folder, shots, "--keep-latents") == 0 and puts == again
    assert film(trained, folder, SHOTS) == 0 and (folder / "film.mp4").read_bytes() == whole
    assert not (folder / ".film.mp4.work").exists()


@pytest.mark.parametrize(
    ("shot", "words"),
    [
        ({"prompt": ""}, "line 2: --prompt is empty"),
        ({"prompt": "x", "video": "in.mp4"}, "line 2: unknown key 'video'"),
        ({"prompt": "x", "frames": 3, "seconds": 1}, "line 2: frames and seconds exclude each other"),
        ({"prompt": "x", "seconds": -1}, "line 2: seconds -1s is not a length"),
        ({"prompt": "x", "seconds": "long"}, 'line 2: seconds "long" is not a number'),
        ({"prompt": "x", "cut": "yes"}, "line 2: cut yes is not true or false"),
        ({"prompt": "very " * 65}, "line 2: --prompt: caption of 65 words"),
        ({"prompt": "x", "frames": 9999999999}, "line 2: 9999999999 frames"),
    ],
)
def test_a_bad_shot_is_named_by_its_line(shot, words, trained, folder, capsys):
    assert film(trained, folder, [SHOTS[0], shot]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{folder / 'story.jsonl'} {words}" in error
    assert not (folder / "film.mp4").exists() and not (folder / ".film.mp4.work").exists()


def test_an_image_of_a_script_is_refused(trained, folder, capsys):
    write_image(gradient(1, 16, 24)[0], folder / "a.png")
    assert film(trained, folder, SHOTS, "--image", str(folder / "a.png")) == 2
    assert "--image is of one clip; put it into the lines of --script" in capsys.readouterr().err
