"""Which saved evaluations a study takes for its own, and what several at a time may take of memory."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload_engine.engine.assembly import choose_policy
from offload_engine.errors import UsageError
from offload_engine.evaluate.records import RUN
from offload_engine.evaluate.tasks import ARITHMETIC
from offload_engine.routing import described
from tests.tools.analysis_data import FACTS
from tools.analysis import evaluations, measurements, report, runs
from tools.analysis.study import Study


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(evaluations, "model_facts", lambda _study: {"base": FACTS, "distilled": FACTS})
    return Study(model=None, base=None, out=tmp_path, n=3)


def put(study: Study, run: runs.Run, **engine: Any) -> Path:
    """The beginning of an evaluation made with `study`'s settings, but these options of the engine."""
    settings = {
        **study.task(ARITHMETIC).settings,
        "fingerprint": study.fingerprints[run.role],
        "sampling": study.sampling().model_dump(),
        "engine": (config := evaluations.engine_config(study, run).model_copy(update=engine)).model_dump(
            exclude={"model"}
        ),
        "routing": described(choose_policy(config, study.model_configs[run.role])[0]),
    }
    directory = evaluations.folder(study, ARITHMETIC, run)
    directory.mkdir(parents=True)
    (directory / RUN).write_text(json.dumps({"format": 1, "settings": settings, "about": {}}))
    return directory


@pytest.mark.parametrize(
    "engine", [{"gpu_mem": 10**9}, {"host_mem": None}, {"expert_mem": 10**6}, {"reader_threads": 7}, {}]
)
def test_how_much_memory_a_run_had_does_not_matter(study: Study, engine: dict[str, Any]) -> None:
    put(study, runs.original(), **engine)
    assert evaluations.differences(study, ARITHMETIC, runs.original()) == {}


def test_what_answers_depend_on_does(study: Study) -> None:
    put(study, runs.dmoe(0.6), min_experts=24)
    assert evaluations.differences(study, ARITHMETIC, runs.dmoe(0.6)) == {"routing.min_experts": (24, 23)}
    put(study, runs.original())
    more = replace(study, n=4)
    assert evaluations.differences(more, ARITHMETIC, runs.original())["n"] == (3, 4)


def test_only_what_a_routing_comes_to_counts(study: Study) -> None:
    """An option written out that the checkpoint says too, and one the routing doesn't read, change no answer."""
    put(study, runs.dmoe(0.6), min_experts=23, des_k=7)
    assert evaluations.differences(study, ARITHMETIC, runs.dmoe(0.6)) == {}


def test_behind_a_small_cache_its_size_does(study: Study) -> None:
    tight, *_ = runs.options(study.effort)
    put(study, tight, expert_mem=5, gpu_mem=10**9)
    assert evaluations.differences(study, ARITHMETIC, tight) == {"engine.expert_mem": (5, FACTS["tight_bytes"])}


def test_other_settings_are_named_before_anything_is_evaluated(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "carry_out", lambda *_: pytest.fail("an evaluation was begun"))
    put(study, runs.dmoe(0.6), top_p=0.9)
    with pytest.raises(UsageError, match=r"routing\.top_p 0\.9 there, 0\.6 now.*choose another --out"):
        evaluations.carry_out_all(study, [runs.original(), runs.dmoe(0.6)], jobs=1)


def test_the_report_says_so_and_advises_no_command_that_is_refused(study: Study) -> None:
    put(study, runs.original(), dtype="bfloat16")
    text = report.as_markdown(report.build(study))
    fig3b = text.split("## Experts over denoising steps")[1]
    assert "original on tiny-arithmetic: engine.dtype 'bfloat16' there, 'auto' now" in fig3b
    assert "choose another --out" in fig3b
    assert "To make it" not in fig3b


def test_a_run_taken_up_again_keeps_the_settings_of_its_beginning(study: Study) -> None:
    """Its budget may be another now, and the folder must not be refused for that."""
    run = runs.original()
    put(study, run, gpu_mem=123456, reader_threads=7)
    assert evaluations._recorded(study, ARITHMETIC, run)["gpu_mem"] == 123456
    assert evaluations._recorded(study, ARITHMETIC, run)["reader_threads"] == 7
    assert evaluations._recorded(study, ARITHMETIC, runs.dmoe(0.6))["gpu_mem"] == "auto"


def test_a_study_goes_to_other_processes_whatever_was_asked_of_it(study: Study) -> None:
    put(study, runs.original())
    assert evaluations.differences(study, ARITHMETIC, runs.original()) == {}
    again: Study = pickle.loads(pickle.dumps(study))
    assert again.fingerprints == study.fingerprints


def test_a_budget_of_auto_is_divided_and_a_named_one_is_not(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "available_memory", lambda: 16 * 10**9)
    whole, third = (evaluations.memory_share(study, jobs) for jobs in (1, 3))
    assert whole is not None
    assert third == whole // 3
    assert evaluations.engine_config(study, runs.original(), gpu_mem=third).gpu_mem == third
    assert evaluations.memory_share(replace(study, engine={"gpu_mem": 10**9}), 3) is None


def test_a_measurement_depends_on_its_prompts(tmp_path: Path) -> None:
    def lines(count: int) -> list[str]:
        return [json.dumps({"question": f"{one} + 1?", "answer": f"#### {one + 1}"}) for one in range(count)]

    settings = []
    for place, (count, n) in enumerate(((5, 4), (5, 3), (4, 4), (5, 4))):
        file = tmp_path / f"{place}.jsonl"
        file.write_text("\n".join(lines(count)[::-1]) + "\n")
        study = Study(model=None, base=None, out=tmp_path, tasks=("gsm8k",), n=n, data={"gsm8k": file})
        settings.append(measurements.settings_of(study, "speed"))
    assert settings[0] == settings[3]
    assert settings[0] != settings[1]
    assert settings[0] != settings[2]
