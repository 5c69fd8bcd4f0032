"""Signed sidecars: a key made once, valid records, and every change noticed."""

import json
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from megasora.cli import main
from megasora.data.clip_writer import write_image, write_video
from megasora.sampling import provenance
from megasora.sampling.provenance import read_comment, read_sidecar, signed_record
from megasora.sampling.provenance_key import installation_key, key_path, public_key_of
from megasora.sampling.watermark import apply_watermark

COMMENT = json.dumps(
    {"ai_generated": True, "by": "MegaSora", "run": "demo", "step": 7, "prompt": "a red circle", "seed": 3}
)


@pytest.fixture(autouse=True)
def config_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def make_sample(folder, name="out.mp4", given=()):
    """A file with a comment, and its sidecar."""
    out, frames = folder / name, np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    if out.suffix == ".mp4":
        write_video(frames, 12, out, COMMENT)
    else:
        write_image(frames[0], out, COMMENT)
    record = {**json.loads(COMMENT), "kind": "text", "given": list(given)}
    out.with_suffix(".json").write_text(json.dumps(signed_record(record, out), indent=1))
    return out


def make_key_in(folder):
    os.environ["XDG_CONFIG_HOME"] = folder
    return public_key_of(installation_key())


def test_processes_that_make_the_key_at_once_get_the_same_one(config_folder):
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        keys = list(pool.map(make_key_in, [str(config_folder)] * 8))
    assert len(set(keys)) == 1 and public_key_of(installation_key()) == keys[0]
    assert stat.S_IMODE(key_path().stat().st_mode) == 0o600
    assert [path.name for path in key_path().parent.iterdir()] == ["signing_key.pem"]


@pytest.mark.parametrize("name", ["out.mp4", "out.png"])
def test_a_sample_says_where_it_is_from(name, tmp_path, capsys):
    out = make_sample(tmp_path, name)
    assert read_comment(out) == json.loads(COMMENT)
    state = read_sidecar(out)
    assert (state.problem, state.is_own, state.record["prompt"]) == ("", True, "a red circle")
    assert main(["provenance", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "run demo, step 7: a red circle" in printed and "signed by the key" in printed and "of this install" in printed
    )


def test_the_manifest_has_the_terms_of_c2pa(tmp_path):
    given = [
        {"as": "video", "file": "/some/in.mp4", "sha256": "ab" * 32},
        {"as": "mask", "file": "m.png", "sha256": "cd"},
    ]
    manifest = read_sidecar(make_sample(tmp_path, given=given)).record["manifest"]
    (action,) = manifest["assertions"][0]["data"]["actions"]
    assert action["action"] == "c2pa.edited" and action["digitalSourceType"] == provenance.WITH_GENERATED
    assert [(i["title"], i["relationship"]) for i in manifest["ingredients"]] == [
        ("in.mp4", "parentOf"), ("m.png", "componentOf")
    ]  # fmt: skip
    plain = read_sidecar(make_sample(tmp_path, "other.png")).record["manifest"]
    assert plain["assertions"][0]["data"]["actions"][0]["digitalSourceType"] == provenance.GENERATED
    assert plain["format"] == "image/png" and plain["claim_generator"].startswith("MegaSora/")


def test_a_change_of_any_byte_of_the_file_is_noticed(tmp_path):
    out = make_sample(tmp_path)
    data = bytearray(out.read_bytes())
    for i in np.linspace(0, len(data) - 1, 40).astype(int):
        changed = bytearray(data)
        changed[i] ^= 1
        out.write_bytes(changed)
        assert "SHA-256" in read_sidecar(out).problem
    out.write_bytes(data)
    assert read_sidecar(out).problem == ""


def leaves(value, path=()):
    """Paths of all plain values of a JSON document."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, child in items for leaf in leaves(child, (*path, key))]
    return [path]


def test_a_change_of_any_value_of_the_sidecar_is_noticed(tmp_path, capsys):
    out = make_sample(tmp_path, given=[{"as": "image", "file": "a.png", "sha256": "00"}])
    sidecar = out.with_suffix(".json")
    text = sidecar.read_text()
    for *path, last in leaves(json.loads(text)):
        document = json.loads(text)
        place = document
        for key in path:
            place = place[key]
        place[last] = "00" if place[last] != "00" else "01"
        sidecar.write_text(json.dumps(document))
        assert read_sidecar(out).problem, (*path, last)
    assert main(["provenance", str(out)]) == 2
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_an_added_or_removed_value_is_noticed(tmp_path):
    out = make_sample(tmp_path)
    sidecar = out.with_suffix(".json")
    document = json.loads(sidecar.read_text())
    for changed in ({**document, "more": 1}, {k: v for k, v in document.items() if k != "prompt"}):
        sidecar.write_text(json.dumps(changed))
        assert "was changed" in read_sidecar(out).problem


def test_a_sample_of_another_installation_is_valid_but_not_own(tmp_path, monkeypatch, capsys):
    out = make_sample(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    state = read_sidecar(out)
    assert state.problem == "" and state.signed_by and not state.is_own
    assert main(["provenance", str(out)]) == 0 and "of another installation" in capsys.readouterr().out
    assert not (tmp_path / "another").exists()  # reading makes no key


def test_without_a_place_for_the_key_there_is_a_warning_and_no_signature(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    out = make_sample(tmp_path)
    assert "out.mp4 has no signature" in capsys.readouterr().err
    state = read_sidecar(out)
    assert (state.problem, state.signed_by) == ("", "")
    assert main(["provenance", str(out)]) == 0 and "without a signature" in capsys.readouterr().out


def test_a_sidecar_of_another_file_and_a_damaged_one_do_not_fit(tmp_path):
    out, other = make_sample(tmp_path), make_sample(tmp_path, "other.png")
    other.with_suffix(".json").write_bytes(out.with_suffix(".json").read_bytes())
    assert "SHA-256" in read_sidecar(other).problem
    for text in ("", "{", "[]", "3", '{"manifest": {}}', '{"manifest": {"assertions": [1]}}', "\0" * 100):
        out.with_suffix(".json").write_text(text)
        assert "is no sidecar of a sample" in read_sidecar(out).problem


def test_files_that_say_nothing(tmp_path, capsys):
    plain = tmp_path / "plain.mp4"
    write_video(np.zeros((2, 16, 16, 3), np.uint8), 12, plain)
    empty, text, jpeg = tmp_path / "empty.mp4", tmp_path / "notes.txt", tmp_path / "picture.jpg"
    empty.write_bytes(b"")
    text.write_text("no video")
    jpeg.write_bytes(b"\xff\xd8\xff\xe0 not really")
    for file in (plain, empty, text, jpeg):
        assert main(["provenance", str(file)]) == 1, file
        assert "none of MegaSora" in capsys.readouterr().out
    assert main(["provenance", str(tmp_path / "nowhere.mp4")]) == 2
    assert "nowhere.mp4 is not a file" in capsys.readouterr().err
    stripped = make_sample(tmp_path)
    stripped.with_suffix(".json").unlink()
    assert main(["provenance", str(stripped)]) == 0 and "sidecar:    none" in capsys.readouterr().out


def test_a_key_file_that_is_none_is_an_error_with_a_remedy(tmp_path, capsys):
    out = make_sample(tmp_path)
    key_path().write_text("no key")
    assert main(["provenance", str(out)]) == 2
    assert "is no private key" in capsys.readouterr().err


def test_a_damaged_key_leaves_a_sample_without_a_signature(tmp_path, capsys):
    key_path().parent.mkdir(parents=True)
    key_path().write_text("no key")
    out = make_sample(tmp_path)
    assert "signature" not in json.loads(out.with_suffix(".json").read_text())
    assert "out.mp4 has no signature" in (printed := capsys.readouterr().err) and "move it away" in printed


def test_a_user_without_a_home_folder_gets_a_sample_without_a_signature(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it returns without $HOME and a passwd entry
    out = make_sample(tmp_path)
    assert "set XDG_CONFIG_HOME" in capsys.readouterr().err
    state = read_sidecar(out)
    assert (state.problem, state.signed_by) == ("", "")


def test_a_key_of_json_that_occurs_twice_is_noticed(tmp_path):
    out = make_sample(tmp_path)
    sidecar = out.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace("{", '{"prompt": "a cat", ', 1))
    assert json.loads(sidecar.read_text())["prompt"] == "a red circle"  # json takes the last one
    assert "is no sidecar of a sample" in read_sidecar(out).problem


def test_the_command_finds_a_watermark_without_metadata_and_sidecar(tmp_path, capsys):
    smooth = np.repeat(np.linspace(60, 180, 96).astype(np.uint8)[None, :, None], 72, axis=0).repeat(3, axis=2)
    for name, frame, code in (("plain.png", smooth, 1), ("marked.png", apply_watermark(smooth), 0)):
        write_image(frame, tmp_path / name)
        assert main(["provenance", str(tmp_path / name)]) == code
        printed = capsys.readouterr().out
        assert "none of MegaSora" in printed and "sidecar:    none" in printed
        assert ("watermark:  found, confidence 99" in printed) == (code == 0), printed
    write_video(np.stack([apply_watermark(smooth)] * 5), 12, tmp_path / "marked.mp4", crf="23")
    assert main(["provenance", str(tmp_path / "marked.mp4")]) == 0
    assert "watermark:  found" in capsys.readouterr().out


def test_json_of_another_program_beside_a_clip_is_no_sidecar(tmp_path):
    out = make_sample(tmp_path)
    out.with_suffix(".json").write_text('{"caption": "a red circle"}')
    assert read_sidecar(out) is None
    out.with_suffix(".json").write_text('{"caption": "a red circle", "signature": {}}')
    assert read_sidecar(out).problem
