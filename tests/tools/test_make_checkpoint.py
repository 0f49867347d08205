from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from offload_engine.errors import OffloadError, UsageError
from offload_engine.model.config import ModelConfig
from offload_engine.model.partial_directory import MARKER
from tests.mini_config import mini
from tests.page_cache import cached_bytes, evictable
from tests.tools.pocket_checkpoint import POCKET, POCKET_BYTES, read, write
from tools import make_checkpoint as tool
from tools.checkpoint_maker.presets import PRESETS, config_of
from tools.checkpoint_maker.tensors import blanks
from tools.checkpoint_maker.weights import Weights
from tools.sharded_writer import Blank

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "llada2_tiny"


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(tool.main, [str(argument) for argument in arguments])


def test_the_command_writes_what_the_readers_expect(tmp_path: Path) -> None:
    out = tmp_path / "made" / "nano"
    command = [
        sys.executable,
        "tools/make_checkpoint.py",
        "--preset",
        "llada2-nano",
        "--layers",
        "2",
        "--no-measure",
        "--out",
        str(out),
    ]
    done = subprocess.run([*command, "--shard-size", "10MB"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(out) in done.stdout
    assert "s left" in done.stderr
    tensors = read(out)
    config = ModelConfig.from_file(out / "config.json")
    assert config.num_hidden_layers == 2
    expected = {blank.name: blank for blank in blanks(config, torch.bfloat16)}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (blank.shape, blank.dtype) for name, blank in expected.items()
    }
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        *(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["nano"]


def test_tensors_are_those_of_a_published_checkpoint() -> None:
    if not GOLDEN.exists():
        pytest.skip("no golden checkpoint beside this checkout")
    published = {}
    for path in GOLDEN.glob("model-*.safetensors"):
        with safe_open(path, "pt") as opened:
            published |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    config = ModelConfig.from_file(GOLDEN / "config.json")
    assert {blank.name: blank.shape for blank in blanks(config, torch.float32)} == published


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float16, "F16"), (torch.float32, "F32"), (torch.bfloat16, "BF16")]
)
def test_weights_are_stored_as_asked(tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    config = {**POCKET, "torch_dtype": str(dtype).removeprefix("torch.")}
    write(tmp_path / "made", config)
    with safe_open(tmp_path / "made" / "model-00001-of-00001.safetensors", "pt") as opened:
        assert opened.get_slice("lm_head.weight").get_dtype() == stored
    assert json.loads((tmp_path / "made" / "config.json").read_text()) == config


def test_a_seed_says_everything_but_the_layout(tmp_path: Path) -> None:
    assert write(tmp_path / "one", seed=7) == POCKET_BYTES
    write(tmp_path / "same", seed=7)
    write(tmp_path / "split", seed=7, shard=100_000)
    write(tmp_path / "other", seed=8)
    write(tmp_path / "shorter", {**POCKET, "num_hidden_layers": 2}, seed=7)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
    one, split, other, shorter = (read(tmp_path / name) for name in ("one", "split", "other", "shorter"))
    assert one.keys() == split.keys() == other.keys()
    assert all(torch.equal(one[name], split[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)
    assert shorter.keys() < one.keys()
    assert all(torch.equal(one[name], shorter[name]) for name in shorter)
    experts = [tensor for name, tensor in one.items() if name.endswith("up_proj.weight") and ".experts." in name]
    assert len({bytes(tensor.view(torch.uint8).numpy()) for tensor in experts}) == len(experts) == 512


def test_shards_keep_to_their_limit(tmp_path: Path) -> None:
    limit = 20_000
    write(tmp_path / "made", shard=limit)
    sizes = []
    for path in sorted((tmp_path / "made").glob("model-*.safetensors")):
        with safe_open(path, "pt") as opened:
            tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        assert sizes[-1] <= limit or len(tensors) == 1
    assert sum(sizes) == POCKET_BYTES
    assert len(sizes) < 1.1 * POCKET_BYTES / limit


@pytest.mark.parametrize(
    ("preset", "least", "most"),
    [
        ("llada2-nano", 40e6, 60e6),
        ("llada2-micro", 450e6, 550e6),
        ("llada2-2gb", 1.9e9, 2.2e9),
        ("llada2-mini", 32.4e9, 32.6e9),
        ("llada2-flash", 203e9, 208e9),
    ],
)
def test_presets_are_as_large_as_their_names_say(preset: str, least: float, most: float) -> None:
    tensors = list(blanks(ModelConfig.from_dict(config_of(PRESETS[preset], torch.bfloat16)), torch.bfloat16))
    total = sum(blank.nbytes for blank in tensors)
    experts = sum(blank.nbytes for blank in tensors if ".mlp.experts." in blank.name)
    assert least <= total <= most
    assert total - experts < 0.25 * total


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    result = cli("--preset", "llada2-nano", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"error: --out {tmp_path}: exists already; choose another folder, or remove this one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=49_000_000))
    monkeypatch.setattr(Weights, "draw", lambda *_: pytest.fail("drew weights for a disk that can't hold them"))
    result = cli("--preset", "llada2-nano", "--out", tmp_path / "made")
    assert result.exit_code == 1
    assert "needs 49.9 MB of disk, but 49.0 MB are free" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_to_be_needed_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names a number; with so much free it must go through, and no more be written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=0))
    with pytest.raises(OffloadError, match="needs 1") as refusal:
        write(tmp_path / "made")
    needed = float(str(refusal.value).split("needs ")[1].split(" MB")[0]) * 1e6
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=int(needed)))
    write(tmp_path / "made")
    assert sum(path.stat().st_size for path in (tmp_path / "made").iterdir()) <= needed


@pytest.mark.parametrize(("failure", "raised"), [(OSError(28, "disk full"), OffloadError), (KeyboardInterrupt(), None)])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, raised: type[BaseException] | None
) -> None:
    draw = Weights.draw

    def failing(weights: Weights, blank: Blank) -> Iterator[Tensor]:
        if blank.name == "model.norm.weight":
            raise failure
        return draw(weights, blank)

    monkeypatch.setattr(Weights, "draw", failing)
    with pytest.raises(raised or type(failure)):
        write(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / MARKER).touch()
    (tmp_path / "made.partial" / "model-00001-of-00009.safetensors").write_text("half")
    write(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert not (tmp_path / "made" / "model-00001-of-00009.safetensors").exists()


def make_tokenizer(folder: Path, words: int) -> Path:
    folder.mkdir()
    vocab = {"<eos>": 0, "<mask>": 1} | {f"word{number}": number for number in range(2, words)}
    Tokenizer(WordLevel(vocab, unk_token="<eos>")).save(str(folder / "tokenizer.json"))
    named = {"eos_token": {"content": "<eos>"}, "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def test_a_tokenizer_comes_along_with_its_ids(tmp_path: Path) -> None:
    source = make_tokenizer(tmp_path / "source", words=512)
    write(tmp_path / "made", tok=source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()
    config = ModelConfig.from_file(tmp_path / "made" / "config.json")
    assert (config.eos_token_id, config.mask_token_id, config.pad_token_id) == (0, 1, 508)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has ids up to 512, but the preset's vocabulary has 512"):
        write(tmp_path / "made", tok=make_tokenizer(tmp_path / "large", words=513))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"--tokenizer .*empty: wanted tokenizer.json and tokenizer_config.json"):
        write(tmp_path / "made", tok=tmp_path / "empty")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--similarity", "1", "--similarity is 1; wanted a number from 0.1 to 0.95"),
        ("--similarity", "0", "--similarity is 0; wanted"),
        ("--bias-spread", "-0.1", "--bias-spread is -0.1; wanted a number from 0 to 1"),
        ("--bias-spread", "nan", "--bias-spread is nan; wanted"),
        ("--topic", "1", "--topic is 1; wanted a number from 0 to 0.95"),
        ("--blocks", "0", "0 is not in the range 1<=x<=100"),
        ("--gpu-mem", "lots", "--gpu-mem is 'lots'"),
        ("--preset", "llada3", "'llada3' is not one of"),
    ],
)
def test_an_option_out_of_range_is_refused_before_writing(
    tmp_path: Path, option: str, value: str, complaint: str
) -> None:
    result = cli("--preset", "llada2-nano", "--out", tmp_path / "made", option, value)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_leaves_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.sharded_writer.SETTLE_BYTES", 100_000)
    write(tmp_path / "made")
    file = tmp_path / "made" / "model-00001-of-00001.safetensors"
    left = cached_bytes(file)
    if not evictable(file):
        pytest.skip("this file system keeps its pages")
    assert left == 0


def test_mini_has_the_published_architecture() -> None:
    made = ModelConfig.from_dict(config_of(PRESETS["llada2-mini"], torch.bfloat16))
    special = {"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892}
    assert made == mini(**special)


@pytest.mark.parametrize("size", ["0", "lots", "-1GB"])
def test_a_shard_size_is_checked(tmp_path: Path, size: str) -> None:
    result = cli("--preset", "llada2-nano", "--out", tmp_path / "made", "--shard-size", size)
    assert result.exit_code == 2
    assert f"--shard-size is '{size}'" in result.stderr
