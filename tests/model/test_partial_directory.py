"""A directory written aside: what is removed to make way for it, and what never is."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_engine.errors import OffloadError, UsageError
from offload_engine.model.partial_directory import MARKER, partial_directory


def write(out: Path, source: Path | None = None) -> None:
    with partial_directory(out, source) as folder:
        assert not out.exists()
        assert [path.name for path in folder.iterdir()] == [MARKER]
        (folder / "new").write_text("whole")


def test_it_gets_its_name_at_the_end(tmp_path: Path) -> None:
    write(tmp_path / "far" / "out")
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "far" / "out").iterdir()] == ["new"]


@pytest.mark.parametrize(("error", "raised"), [(OSError(28, "full"), OffloadError), (KeyboardInterrupt(), None)])
def test_what_fails_leaves_nothing(tmp_path: Path, error: BaseException, raised: type[BaseException] | None) -> None:
    with pytest.raises(raised or type(error)), partial_directory(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [[], [MARKER, "half"]])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).touch()
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_what_somebody_else_put_there_is_kept(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis").write_text("years")
    with pytest.raises(UsageError, match=r"--out .*out\.partial .*there already and not left by .*; rename or remove"):
        write(tmp_path / "out")
    assert (partial / "thesis").read_text() == "years"
    (tmp_path / "file.partial").touch()
    (tmp_path / "link.partial").symlink_to(partial)
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="there already"):
            write(tmp_path / name)
        assert (tmp_path / f"{name}.partial").exists()


@pytest.mark.parametrize("inside", [".", "deep/down"])
def test_a_source_is_never_removed(tmp_path: Path, inside: str) -> None:
    source = tmp_path / "out.partial" / inside
    source.mkdir(parents=True)
    (tmp_path / "out.partial" / MARKER).touch()
    with pytest.raises(UsageError, match=r"out\.partial first, but .* is read; choose another --out"):
        write(tmp_path / "out", source)
    assert source.is_dir()
