"""The doctor says what is there, finds what is wrong on machines made up here, and fails only on what is essential."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megasora.observe import doctor


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def fake_torch(cards: list[tuple[str, int, tuple[int, int]]], nccl: bool = True, gloo: bool = True) -> SimpleNamespace:
    """A torch that sees the given (name, GiB, compute capability) cards."""
    properties = [SimpleNamespace(name=n, total_memory=g << 30, major=c[0], minor=c[1]) for n, g, c in cards]
    cuda = SimpleNamespace(
        is_available=lambda: bool(cards),
        device_count=lambda: len(cards),
        get_device_properties=lambda index: properties[index],
        nccl=SimpleNamespace(version=lambda: (2, 28, 9)),
    )
    distributed = SimpleNamespace(
        is_available=lambda: True, is_nccl_available=lambda: nccl, is_gloo_available=lambda: gloo
    )
    return SimpleNamespace(__version__="2.13.0", cuda=cuda, distributed=distributed)


H100 = ("NVIDIA H100", 79, (9, 0))
V100 = ("Tesla V100", 32, (7, 0))


def test_this_machine_can_train_and_is_described():
    code = "import sys; from megasora.observe.doctor import run_doctor; sys.exit(run_doctor())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines() if "│" in line]
    found = {row[2]: row[3] for row in rows}
    for name in ("torch", "deepspeed", "webdataset", "omegaconf", "av", "transformers"):
        assert found[name] == importlib.metadata.version(name)
    assert found["CPU cores"] == str(len(os.sched_getaffinity(0)))
    assert found["H.264 encoder"] == "libx264"
    assert {"memory", "GPU", "flash-attn", "torch varlen", "torch SDPA", "Triton", "free disk here"} <= set(found)


def test_missing_essential_package_is_named_with_its_remedy_and_fails(monkeypatch, capsys):
    version_of = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "webdataset" else version_of(name))
    assert doctor.run_doctor() == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "│ webdataset" in line]
    assert "missing" in line and "pip install webdataset" in line
    assert "webdataset missing" in lines[-1]


def test_missing_optional_package_is_named_and_does_not_fail(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in doctor.OPTIONAL else "1.0")
    findings = by_name(doctor.versions())
    assert "pip install transformers" in findings["transformers"].remedy
    assert not any(finding.missing for finding in findings.values())


def test_torch_that_does_not_import_fails_with_its_error(monkeypatch, capsys):
    real = doctor.import_or_error
    broken = (None, "OSError: libcudart.so.13: cannot open shared object file [Errno 2]")
    monkeypatch.setattr(doctor, "import_or_error", lambda name: broken if name == "torch" else real(name))
    assert doctor.run_doctor() == 1
    assert "libcudart.so.13: cannot open shared object file [Errno 2]" in capsys.readouterr().out


def test_import_error_keeps_the_reason():
    assert doctor.import_or_error("json")[1] == ""
    module, reason = doctor.import_or_error("megasora_no_such_module")
    assert module is None and "megasora_no_such_module" in reason


@pytest.mark.parametrize("extra, crowded", [(0, False), (1, True)])
def test_more_threads_than_cores_are_remarked(monkeypatch, extra, crowded):
    monkeypatch.setenv("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)) + extra))
    assert bool(by_name(doctor.devices(fake_torch([])))["OMP_NUM_THREADS"].remedy) == crowded


def test_equal_cards_are_counted_and_old_ones_are_sent_to_float32():
    cards = [finding for finding in doctor.devices(fake_torch([H100, H100, V100])) if finding.name == "GPU"]
    assert [card.found for card in cards] == ["2 x NVIDIA H100, 79 GiB", "1 x Tesla V100, 32 GiB"]
    assert cards[0].remedy == "" and "run.dtype=float32" in cards[1].remedy


@pytest.mark.parametrize("driver", ["/usr/bin/nvidia-smi", None])
def test_driver_without_a_torch_for_it_is_told_from_no_gpu(monkeypatch, driver):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    gpu = by_name(doctor.devices(fake_torch([])))["GPU"]
    assert gpu.found == ("not usable" if driver else "none")
    assert ("install the torch build" in gpu.remedy) == bool(driver)


@pytest.mark.parametrize("cards", [[], [H100]])
def test_absent_flash_attention_is_told_and_is_no_defect(monkeypatch, cards):
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    finding = by_name(doctor.attention(fake_torch(cards)))["flash-attn"]
    assert finding.found.startswith("not installed") and ("needs a GPU" in finding.found) == (not cards)
    assert not finding.remedy and not finding.missing


def test_flash_attention_that_does_not_import_is_not_called_found(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.8.3")
    monkeypatch.setattr(doctor, "import_or_error", lambda name: (None, "ImportError: undefined symbol: _ZN3c104"))
    finding = by_name(doctor.attention(fake_torch([H100])))["flash-attn"]
    assert finding.found == "2.8.3, does not import" and "undefined symbol" in finding.remedy


def test_triton_interprets_without_a_gpu_and_needs_a_compiler_with_one(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "interpreter" in doctor.triton(fake_torch([]))[0].found
    finding = doctor.triton(fake_torch([H100]))[0]
    assert finding.found == "cannot compile" and "apt-get install gcc" in finding.remedy


def test_communication_is_nccl_on_gpus_and_gloo_without():
    assert [(f.name, f.found) for f in doctor.communication(fake_torch([H100]))] == [("NCCL", "2.28.9")]
    assert [f.name for f in doctor.communication(fake_torch([]))] == ["gloo"]
    assert doctor.communication(fake_torch([H100], nccl=False))[0].missing
    assert doctor.communication(fake_torch([], gloo=False))[0].missing


def test_missing_h264_encoder_is_essential(monkeypatch):
    def refuse(name, mode):
        raise ValueError(f"no codec {name}")

    codec = SimpleNamespace(codec=SimpleNamespace(Codec=refuse))
    monkeypatch.setattr(doctor, "import_or_error", lambda name: (codec, ""))
    (finding,) = doctor.video()
    assert finding.missing and "libx264" in finding.remedy


@pytest.mark.parametrize("gib, remarked", [(1, True), (100, False)])
def test_little_disk_and_little_shared_memory_are_remarked(monkeypatch, tmp_path, gib, remarked):
    usage = SimpleNamespace(free=gib << 30, total=(gib << 30) // 2)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    findings = by_name(doctor.storage(tmp_path, tmp_path))
    assert findings["free disk here"].found == f"{gib:.1f} GiB"
    assert bool(findings["free disk here"].remedy) == remarked
    assert bool(findings[str(tmp_path)].remedy) == remarked


@pytest.mark.parametrize(
    "soft, hard, remedy", [(256, 1024, "ulimit -n 1024"), (1024, -1, "ulimit -n 65536"), (-1, -1, ""), (9999, 9999, "")]
)
def test_open_file_limit_is_remarked_with_what_can_be_had(monkeypatch, soft, hard, remedy):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (soft, hard))
    found = by_name(doctor.storage())["open files"].remedy
    assert found.endswith(remedy) and bool(found) == bool(remedy)
