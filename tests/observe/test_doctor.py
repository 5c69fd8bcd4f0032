"""The doctor reports versions and devices, finds the faults of simulated machines, and fails only on essential ones."""

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
    """A torch that sees these cards: (name, GiB, compute capability)."""
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
    return SimpleNamespace(
        __version__="2.13.0", cuda=cuda, distributed=distributed, device=str, bfloat16="bfloat16", float32="float32"
    )


H100 = ("NVIDIA H100", 79, (9, 0))
V100 = ("Tesla V100", 32, (7, 0))


def test_this_machine_can_train_and_is_described():
    code = "import sys; from megasora.observe.doctor import run_doctor; sys.exit(run_doctor())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines() if "│" in line]
    values = {row[2]: row[3] for row in rows}
    for name in ("torch", "deepspeed", "webdataset", "omegaconf", "av", "transformers"):
        assert values[name] == importlib.metadata.version(name)
    assert values["CPU cores"] == str(len(os.sched_getaffinity(0)))
    assert values["H.264 encoder"] == "libx264"
    assert {"memory", "GPU", "flash2", "varlen", "sdpa", "Triton", "free disk here"} <= set(values)


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


def test_import_error_is_returned_with_its_message():
    assert doctor.import_or_error("json")[1] == ""
    module, reason = doctor.import_or_error("megasora_no_such_module")
    assert module is None and "megasora_no_such_module" in reason


@pytest.mark.parametrize("extra, remarked", [(0, False), (1, True)])
def test_more_threads_than_cores_are_remarked(monkeypatch, extra, remarked):
    monkeypatch.setenv("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)) + extra))
    assert bool(by_name(doctor.devices(fake_torch([])))["OMP_NUM_THREADS"].remedy) == remarked


def test_equal_cards_are_counted_and_old_ones_get_float32_as_remedy():
    cards = [finding for finding in doctor.devices(fake_torch([H100, H100, V100])) if finding.name == "GPU"]
    assert [card.value for card in cards] == ["2 x NVIDIA H100, 79 GiB", "1 x Tesla V100, 32 GiB"]
    assert cards[0].remedy == "" and "run.dtype=float32" in cards[1].remedy


@pytest.mark.parametrize("driver", ["/usr/bin/nvidia-smi", None])
def test_a_driver_without_a_matching_torch_differs_from_no_gpu(monkeypatch, driver):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    gpu = by_name(doctor.devices(fake_torch([])))["GPU"]
    assert gpu.value == ("not usable" if driver else "none")
    assert ("install the torch build" in gpu.remedy) == bool(driver)


BACKENDS = ("flash4", "flash3", "cudnn", "flash2", "varlen", "sdpa", "math")


def fake_choice(obstacles: dict[str, str], notice: str = "") -> SimpleNamespace:
    """Attention backends with these obstacles; cudnn has no fixed order of sums."""

    def obstacle(name, device, dtype, head_dim, deterministic=True):
        return "no fixed order" if name == "cudnn" and deterministic else obstacles.get(name)

    def candidates(*queries):
        return tuple(name for name in BACKENDS if obstacle(name, *queries) is None)

    return SimpleNamespace(BACKENDS=BACKENDS, obstacle=obstacle, candidates=candidates, notice=lambda *_: notice)


@pytest.mark.parametrize(
    ("obstacles", "auto", "in_any_order"),
    [
        ({}, "flash4", "flash4"),
        ({"flash4": "a", "flash3": "b"}, "flash2", "cudnn"),
        ({"flash4": "a", "flash3": "b", "flash2": "c", "cudnn": "d"}, "varlen", "varlen"),
        ({name: "a" for name in BACKENDS[:5]}, "sdpa", "sdpa"),
    ],
)
def test_each_attention_backend_is_usable_or_has_an_obstacle_and_the_choice_of_auto_is_named(
    monkeypatch, obstacles, auto, in_any_order
):
    monkeypatch.setattr(doctor, "import_or_error", lambda name: (fake_choice(obstacles, "install more"), ""))
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    findings = by_name(doctor.attention_backends(fake_torch([H100])))
    for name in BACKENDS:
        usable = "usable with model.deterministic=false" if name == "cudnn" else "usable"
        taken = ", taken by auto" if name == auto else ", taken by auto then" if name == in_any_order else ""
        expected = f"not usable: {obstacles[name]}" if name in obstacles else usable + taken
        assert (findings[name].value, findings[name].remedy) == (expected, "install more" if name == auto else "")
        assert not findings[name].missing


def test_the_backend_named_is_the_one_that_auto_takes_on_this_machine():
    torch = pytest.importorskip("torch")
    from megasora.kernels.attention_choice import resolve_attention_backend

    gpu = torch.cuda.is_available()
    q = torch.zeros(
        1, 1, doctor.HEAD_DIM, dtype=torch.bfloat16 if gpu else torch.float32, device="cuda" if gpu else "cpu"
    )
    (auto,) = [f.name for f in doctor.attention_backends(torch) if f.value == "usable, taken by auto"]
    assert auto == resolve_attention_backend("auto", q)


def test_an_installed_flash_attention_that_does_not_import_gets_a_remedy(monkeypatch):
    obstacles = {"flash3": "not installed", "flash2": "ImportError: undefined symbol: _ZN3c104"}
    monkeypatch.setattr(doctor, "import_or_error", lambda name: (fake_choice(obstacles), ""))
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.8.3")
    finding = by_name(doctor.attention_backends(fake_torch([H100])))["flash2"]
    assert finding.value.startswith("not usable") and "undefined symbol" in finding.value
    assert "pip install" in finding.remedy


def test_triton_interprets_without_a_gpu_and_needs_a_compiler_with_one(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "interpreter" in doctor.triton(fake_torch([]))[0].value
    finding = doctor.triton(fake_torch([H100]))[0]
    assert finding.value == "cannot compile" and "apt-get install gcc" in finding.remedy


def test_communication_is_nccl_on_gpus_and_gloo_without():
    assert [(f.name, f.value) for f in doctor.communication(fake_torch([H100]))] == [("NCCL", "2.28.9")]
    assert [f.name for f in doctor.communication(fake_torch([]))] == ["gloo"]
    assert doctor.communication(fake_torch([H100], nccl=False))[0].missing
    assert doctor.communication(fake_torch([], gloo=False))[0].missing


def test_missing_h264_encoder_is_essential(monkeypatch):
    def raise_unknown(name, mode):
        raise ValueError(f"no codec {name}")

    codec = SimpleNamespace(codec=SimpleNamespace(Codec=raise_unknown))
    monkeypatch.setattr(doctor, "import_or_error", lambda name: (codec, ""))
    (finding,) = doctor.video()
    assert finding.missing and "libx264" in finding.remedy


@pytest.mark.parametrize("gib, remarked", [(1, True), (100, False)])
def test_little_disk_and_little_shared_memory_are_remarked(monkeypatch, tmp_path, gib, remarked):
    usage = SimpleNamespace(free=gib << 30, total=(gib << 30) // 2)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    findings = by_name(doctor.storage(tmp_path, tmp_path))
    assert findings["free disk here"].value == f"{gib:.1f} GiB"
    assert bool(findings["free disk here"].remedy) == remarked
    assert bool(findings[str(tmp_path)].remedy) == remarked


@pytest.mark.parametrize(
    "soft, hard, remedy", [(256, 1024, "ulimit -n 1024"), (1024, -1, "ulimit -n 65536"), (-1, -1, ""), (9999, 9999, "")]
)
def test_a_low_open_file_limit_is_remarked_with_the_highest_allowed_one(monkeypatch, soft, hard, remedy):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (soft, hard))
    reported = by_name(doctor.storage())["open files"].remedy
    assert reported.endswith(remedy) and bool(reported) == bool(remedy)
