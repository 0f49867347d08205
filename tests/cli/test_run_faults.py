"""What `dmoe-run` says, and exits with, when a disk fails or memory goes away, for either layout of a checkpoint."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from offload_engine import disk_file
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.engine import assembly, planning
from offload_engine.experts.storage.conversion import convert
from offload_engine.experts.storage.packed_header import PACKED_FILE, read_packed_header
from tests.cli.command_line import ROOT, SHORT, complaint, dmoe_run, write_speaking_checkpoint

FEW_SLOTS = [*SHORT, "--expert-mem", "100KB"]
ONE_EXPERT = r"expert \d+ of layer \d: "


@pytest.fixture(scope="module", params=["published", "packed"])
def model(request, tmp_path_factory):
    directory = write_speaking_checkpoint(tmp_path_factory.mktemp("faults") / "source")
    if request.param == "packed":
        return convert(directory, directory.parent / "packed", "int8", identity="one").directory
    return directory


def experts_of(model: Path) -> Path:
    packed = model / PACKED_FILE
    return packed if packed.exists() else model / "model.safetensors"


def reads(monkeypatch, fault, of):
    """Every fifth read of experts, or of what stays resident, is `fault`'s."""
    real, calls = os.preadv, iter(range(10**9))

    def read(*given):
        of_weights = threading.current_thread().name.startswith("tensor-reader")
        return fault(real, *given) if of_weights == (of == "weights") and next(calls) % 5 == 4 else real(*given)

    monkeypatch.setattr(disk_file.os, "preadv", read)


def eio(_real, *_given):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def nothing(_real, *_given):
    return 0


def enomem(_real, *_given):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


ONE_TENSOR = r"tensor '[a-z_.0-9]+': .*model\.safetensors"
CUT_OFF = r"gave 0 bytes at offset \d+, wanted \d+$"


@pytest.mark.parametrize(
    ("of", "fault", "code", "said"),
    [
        ("experts", eio, 1, rf"{ONE_EXPERT}.*can't be read \(Input/output error\)$"),
        ("experts", nothing, 1, rf"{ONE_EXPERT}.*{CUT_OFF}"),
        ("experts", enomem, 4, rf"{ONE_EXPERT}.*the system refused memory to read it .*free memory"),
        ("weights", eio, 3, rf"{ONE_TENSOR} can't be read \(Input/output error\)$"),
        ("weights", nothing, 3, rf"{ONE_TENSOR} {CUT_OFF}"),
        (
            "weights",
            enomem,
            4,
            r"memory ran out while the model was loaded \(.*Cannot allocate memory\)",
        ),
    ],
)
def test_a_disk_that_fails_is_one_line_that_names_what_was_read(model, monkeypatch, of, fault, code, said):
    reads(monkeypatch, fault, of)
    done = dmoe_run("--model", model, *FEW_SLOTS, "-p", "How many?")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(f"^error: {said}", lines[0]), lines[0]
    assert "Traceback" not in done.stderr
    assert done.exit_code == code


@pytest.mark.parametrize("of", ["experts", "weights"])
def test_half_reads_change_no_answer(model, monkeypatch, of):
    wanted = dmoe_run("--model", model, *SHORT, "-p", "How many?")
    reads(monkeypatch, lambda real, *given: real(*given) // 2, of)
    done = dmoe_run("--model", model, *FEW_SLOTS, "-p", "How many?")
    assert wanted.exit_code == done.exit_code == 0
    assert done.stdout_bytes == wanted.stdout_bytes


def test_a_wrong_checksum_is_one_line(model, tmp_path):
    if experts_of(model).name != PACKED_FILE:
        pytest.skip("published checkpoints have no checksums")
    damaged = shutil.copytree(model, tmp_path / "damaged")
    slabs = read_packed_header(damaged / PACKED_FILE).slabs.values()
    with (damaged / PACKED_FILE).open("r+b") as file:
        for slab in slabs:
            file.seek(slab.offset + 9)
            file.write(b"\x55\xaa")
    done = dmoe_run("--model", damaged, *FEW_SLOTS, "-p", "How many?")
    assert "has checksum 0x" in complaint(done)
    assert "convert the checkpoint again" in complaint(done)
    assert complaint(done).startswith("expert ")
    assert done.exit_code == 1


def test_a_file_cut_in_half_before_the_run_is_refused_by_name(model, tmp_path):
    cut = shutil.copytree(model, tmp_path / "cut")
    os.truncate(experts_of(cut), experts_of(cut).stat().st_size // 2)
    done = dmoe_run("--model", cut, *FEW_SLOTS, "-p", "How many?")
    assert str(experts_of(cut)) in complaint(done)
    assert done.exit_code == 3


def test_a_budget_below_the_dense_weights_is_refused_before_loading(model, monkeypatch):
    monkeypatch.setattr(assembly, "load_resident", None)
    done = dmoe_run("--model", model, "--gpu-mem", "1MB", "-p", "a")
    assert "the smallest budget for a context of" in complaint(done)
    assert "short by" in done.stderr
    assert done.exit_code == 4


def test_memory_that_goes_after_the_plan_was_made(model, monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda: 10**10)
    monkeypatch.setattr(assembly, "available_memory", lambda: 10**5)
    done = dmoe_run("--model", model, *SHORT, "-p", "a")
    assert complaint(done).startswith("100 KB of memory are left")
    assert done.exit_code == 4


def test_memory_that_goes_while_answering(model, monkeypatch):
    def refused(*_arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")

    monkeypatch.setattr(PrefixCache, "span", refused)
    done = dmoe_run("--model", model, *SHORT, "-p", "a")
    assert "error: memory ran out while an answer was computed (64 bytes refused)" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.exit_code == 4


LIMITED = """
import resource, sys
import psutil, torch
from offload_engine.engine import engine
from offload_engine.cli.commands import run
torch.set_num_threads(1)
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run.main(sys.argv[2:], prog_name="dmoe-run")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space can't be limited here")
@pytest.mark.parametrize("room", [1, 12, 24, 36])
def test_an_address_space_that_is_too_small_is_one_line_or_no_hindrance(model, room):
    arguments = [str(room * 2**20), "--model", str(model), *FEW_SLOTS, "-p", "How many?"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], cwd=ROOT, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    errors = done.stderr.decode()
    assert "Traceback" not in errors
    assert done.returncode in (0, 4), errors
    assert (done.returncode == 4) == (sum(line.startswith("error: ") for line in errors.splitlines()) == 1)
    if room == 1:
        assert done.returncode == 4


SLOW = """
import os, sys, time
from offload_engine.cli.commands import run
from offload_engine import disk_file
real = os.preadv
def slow(*given):
    time.sleep(2)
    return real(*given)
class Slow:
    preadv = staticmethod(slow)
    def __getattr__(self, name): return getattr(os, name)
disk_file.os = Slow()
run.main(sys.argv[1:], prog_name="dmoe-run")
"""


def test_ctrl_c_gets_through_to_a_run_on_a_disk_that_takes_seconds(model):
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, "--model", str(model), *FEW_SLOTS, "-p", "How many?"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stderr is not None
    lines = []
    while not lines or b"plan" not in lines[-1]:
        lines.append(child.stderr.readline())
        assert lines[-1], b"".join(lines)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    _out, errors = child.communicate(timeout=60)
    assert time.monotonic() - began < 10, "the reads that were under way, and no others"
    assert child.returncode == 130
    assert errors.splitlines()[-1] == b"interrupted"
    assert b"Traceback" not in errors


def test_torch_is_what_says_that_there_is_no_memory():
    """The words that `memory.refusal` goes by are those of the torch that is installed."""
    with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory"):
        torch.empty(2**55, dtype=torch.uint8)
