"""One screen says what is usable, and of what is missing what it would give."""

import torch

from reprolib.workflow import doctor
from reprolib.workflow.doctor import Finding


def found(thing):
    [finding] = [finding for finding in doctor.findings() if finding.thing == thing]
    return finding


def test_screen_is_a_screen():
    lines = doctor.screen(doctor.findings()).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 140


def test_lines_of_a_screen():
    text = doctor.screen([Finding("disk", "1 GB", "6 GB are needed"), Finding("a", "b")])
    assert text == "disk  1 GB\n      → 6 GB are needed\na     b"


def test_data_are_there_or_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("REPROLIB_DATA", str(tmp_path))
    assert found("CIFAR-10") == ("CIFAR-10", "none", "make data gets it")
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert found("CIFAR-10") == ("CIFAR-10", f"in {tmp_path / 'cifar-10-batches-py'}", "")


def test_little_memory_names_the_cores_that_fit(monkeypatch):
    monkeypatch.setattr(doctor.os, "sysconf", {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 4000}.get)
    assert doctor._memory(2).missing == ""
    assert doctor._memory(8).missing == "8 networks side by side take about 12 GB: make reproduce CORES=2"


def test_gpu_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert found("GPU").found == "A GPU" and "compute capability 7.5" in found("GPU").missing


def test_a_processor_without_an_instruction_set_of_ours(monkeypatch):
    monkeypatch.setattr(doctor.cpu, "instruction_sets", lambda pairs=False: ())
    assert found("sparse networks").found == "Numba's code"
