from __future__ import annotations

import io

import pytest
from rich.console import Console

from offload_engine import Engine, EngineStats, SamplingParams, StepEvent
from offload_engine.cli.live import LiveWatch, occupancy_bar, render
from offload_engine.cli.terminal import visible
from offload_engine.cli.watch import Board, Frame, PlainWatch, Token, plain_line
from offload_engine.experts.scheduling.cache import Occupancy
from tests.cli.command_line import MASK, SHORT, dmoe_run

PARAMS = SamplingParams(max_new_tokens=48, block_length=16, steps=4)


@pytest.fixture(scope="module")
def engine(speaking):
    with Engine.from_pretrained(speaking, gpu_mem="4GB", max_context=512, expert_mem="100KB") as engine:
        yield engine


def frame(tokens, **changes) -> Frame:
    values = {
        "block": 1,
        "step": 3,
        "answer": "so far ",
        "tokens": tokens,
        "stats": EngineStats(hits=3, misses=1, bytes_moved=2_000_000, denoise_steps=7),
        "occupancy": Occupancy(free=10, loading=2, resident=20, probation=5, pinned=0),
        "tokens_per_second": 12.34,
    }
    return Frame(**(values | changes))


def drawn(shown: Frame, width: int = 100) -> str:
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="standard", width=width, height=50).print(
        render(shown, 0.9, width)
    )
    return screen.getvalue()


def test_not_a_terminal_gets_one_plain_line_per_step(speaking):
    done = dmoe_run("--model", speaking, *SHORT, "--watch", "-p", "How many?")
    lines = [line for line in done.stderr.splitlines() if line.startswith("block ")]
    steps = [(int(line.split()[1]), int(line.split()[3].rstrip(":"))) for line in lines]
    assert steps == sorted(set(steps))
    assert {block for block, _step in steps} == {0, 1, 2, 3} or {block for block, _ in steps} == {0, 1, 2}
    assert all("decided (+" in line and "hit rate" in line and " resident " in line for line in lines)
    assert "\x1b" not in done.stderr
    quiet = dmoe_run("--model", speaking, *SHORT, "-p", "How many?")
    assert done.stdout_bytes == quiet.stdout_bytes


def test_masks_turn_into_words_until_none_is_left(engine):
    board, frames = Board(engine, token_ids=False), []
    for event in engine.stream("How many?", PARAMS):
        shown = board.take(event)
        if shown is None:
            assert frames[-1].undecided == 0
        else:
            assert shown.accepted == len(event.accepted)
            assert shown.undecided == event.block_token_ids.count(MASK)
            frames.append(shown)
    assert len(frames) > 3
    assert frames[-1].stats.misses > 0
    assert frames[-1].tokens_per_second > 0


def test_occupancy_is_the_caches_own(engine):
    board = Board(engine, token_ids=False)
    for event in engine.stream("How many?", PARAMS):
        shown = board.take(event)
        if shown is not None:
            assert sum(shown.occupancy[:3]) == engine.plan.slots < engine.plan.all_experts
    assert engine.occupancy().resident > 0


def test_a_plain_line_stays_one_line():
    line = plain_line(frame([Token("a\nb\t"), Token(" ░░", open=True), Token("new", confidence=0.5)]))
    assert line.startswith("block 1 step 3: 2/3 decided (+1), 12.3 tokens/s, hit rate 75.0 %")
    assert "20 resident 2 loading 10 free" in line
    assert line.endswith("|a⏎b  ░░new")
    assert "\n" not in line


def test_the_live_view_colours_new_tokens_by_confidence():
    shown = drawn(
        frame([Token("old"), Token("sure", confidence=0.95), Token("may", confidence=0.7), Token("no", confidence=0.1)])
    )
    assert "\x1b[1;32msure" in shown
    assert "\x1b[1;33mmay" in shown
    assert "\x1b[1;31mno" in shown
    assert "\x1b[1;32mold" not in shown
    for fact in ("block 1, step 3, 0 of 4 masked", "so far", "75.0 %", "2.00 MB", "12.3", "expert cache"):
        assert fact in shown


def test_the_two_panels_stand_side_by_side_where_there_is_room():
    wide, narrow = drawn(frame([Token("x")]), 100).splitlines(), drawn(frame([Token("x")]), 50).splitlines()
    assert "expert cache" in wide[0]
    assert "expert cache" not in narrow[0]
    assert any("expert cache" in line for line in narrow)


def test_nothing_a_model_says_is_markup_or_control():
    shown = drawn(frame([Token("[red]x[/red]:smile:")], answer="[bold]\x1b[2J\x9b1m[/bold]"))
    assert "[red]x[/red]:smile:" in shown
    assert "[bold]␛[2J\ufffd1m[/bold]" in shown


def test_the_live_view_cleans_up_after_itself(engine):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=50)
    with LiveWatch(Board(engine, token_ids=False), 0.95, console) as viewer:
        for event in engine.stream("How many?", PARAMS):
            viewer.show(event)
        assert "░░" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize(("free", "loading", "resident", "probation"), [(0, 0, 7, 9), (5, 1, 1, 1), (0, 0, 0, 0)])
def test_the_bar_has_the_same_width_whatever_it_shows(free, loading, resident, probation):
    bar = occupancy_bar(Occupancy(free, loading, resident, probation, 0), 28).plain
    assert len(bar) == (28 if free + loading + resident else 0)


def test_the_bar_shares_itself_fairly():
    assert occupancy_bar(Occupancy(free=25, loading=25, resident=50, probation=25, pinned=0), 8).plain == "██▓▓▒▒░░"


def test_visible_keeps_text_and_shows_controls():
    plain = "Ünï ∑ 漢字 🙂 \n\t"
    assert visible(plain) == plain
    assert visible("\x1b]0;x\x07\r\x7f\x9b\u202e") == "␛]0;x␇␍␡\ufffd\ufffd"
    controls = "".join(chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)))
    assert not [letter for letter in visible(controls) if letter not in "\n\t" and not letter.isprintable()]


def test_a_finished_block_adds_no_line(capsys, engine):
    watch = PlainWatch(Board(engine, token_ids=True))
    watch.show(StepEvent(kind="block", block=0, step=4, block_token_ids=(1, 2)))
    assert capsys.readouterr().err == ""
    watch.show(StepEvent(kind="step", block=1, step=1, block_token_ids=(3, MASK), accepted=((0, 3, 0.8),)))
    assert capsys.readouterr().err.rstrip("\n").endswith("| 3 ░░")
