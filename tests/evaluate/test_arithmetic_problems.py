"""The language of the generated problems: answers are right and explained, the English agrees, the space is wide."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.evaluate.arithmetic import Problem, drill, generate, problem
from offload_engine.evaluate.arithmetic.lexicon import FEMALE, MALE, ROLES, THINGS
from offload_engine.evaluate.arithmetic.numerals import LARGEST_WORD, SPELLED, spell
from offload_engine.evaluate.arithmetic.problems import BARE_SHARE, MOST_WORDS, STEP_SHARES
from offload_engine.evaluate.arithmetic.themes import BARE, THEMES
from tools.arithmetic_problems import main

ROOT = Path(__file__).resolve().parents[2]

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)(?: ([a-z ]+))?\.")
ANSWER = re.compile(rf"({STEP.pattern} )+\\boxed\{{(\d+)\}}")
CONSTANTS = (
    (r"\b[Tt]wice\b", 2),
    (r"\b[Hh]alf\b", 2),
    (r"\b([Aa]|[Oo]ne) third\b", 3),
    (r"\b([Aa]|[Oo]ne) quarter\b", 4),
    (r"\b[Aa] dozen\b", 12),
    (r"\ba week\b|\bdays\b.*\bweeks\b|\bweeks\b.*\bdays\b", 7),
    (r"\ba year\b|\bmonths\b.*\byears\b|\byears\b.*\bmonths\b", 12),
    (r"\bhour and\b", 60),
    (r"\bhours of the day\b", 24),
)
WORD = re.compile(r"\b(" + "|".join(sorted(SPELLED, key=len, reverse=True)) + r")\b", re.IGNORECASE)


def evaluate(left: int, operator: str, right: int) -> int:
    if operator == "/":
        assert left % right == 0, f"{left}/{right} is not exact"
        return left // right
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def numbers_of(question: str) -> set[int]:
    """Every number a reader finds in the question, in digits, in words or as a constant it names."""
    found = {int(digits) for digits in re.findall(r"\d+", question)}
    found |= {SPELLED[word.lower()] for word in WORD.findall(question)}
    return found | {value for pattern, value in CONSTANTS if re.search(pattern, question)}


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    return list(generate(0, 20_000))


def test_every_step_holds_and_is_explained(many: list[Problem]) -> None:
    for made in many:
        assert ANSWER.fullmatch(made.answer), made
        known = numbers_of(made.question)
        result = None
        for left, operator, right, result, _ in STEP.findall(made.answer):
            assert evaluate(int(left), operator, int(right)) == int(result), made
            assert {int(left), int(right)} <= known, made
            known.add(int(result))
        assert made.answer.endswith(f" \\boxed{{{made.gold}}}")
        assert result == made.gold == str(int(made.gold))
        assert len(STEP.findall(made.answer)) == made.steps


def test_numbers_stay_in_their_ranges(many: list[Problem]) -> None:
    for made in many:
        for left, operator, right, result, _ in STEP.findall(made.answer):
            numbers = [int(left), int(right), int(result)]
            if operator in "+-":
                assert all(0 <= number <= 99 for number in numbers), made
            else:
                small = numbers[:2] if operator == "*" else numbers[1:]
                assert all(0 <= number <= 12 for number in small), made


def test_operands_cover_their_ranges(many: list[Problem]) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    products = set()
    for made in many:
        for left, operator, right, _, _ in STEP.findall(made.answer):
            seen[operator, int(left)] += 1
            seen[operator, int(right)] += 1
            if operator == "*":
                products.add((int(left), int(right)))
    assert all(seen[operator, number] >= 40 for operator in "+-" for number in range(1, 99)), "a hole in + or -"
    assert {(left, right) for left in range(2, 13) for right in range(2, 13)} <= products


def test_shares_of_steps_and_kinds(many: list[Problem]) -> None:
    kinds = Counter(made.kind for made in many)
    assert set(kinds) == {theme.kind for theme in (*THEMES, BARE)}
    assert min(kinds.values()) > len(many) // 100
    assert max(kinds.values()) < len(many) // 4
    assert kinds["bare"] == pytest.approx(BARE_SHARE * len(many), rel=0.1)
    steps = Counter(made.steps for made in many if made.kind != "bare")
    assert set(steps) == set(STEP_SHARES)
    for number, share in STEP_SHARES.items():
        assert steps[number] == pytest.approx(share * len(many), rel=0.1)


def test_length(many: list[Problem]) -> None:
    lengths = [len(made.question.split()) for made in many]
    assert max(lengths) <= MOST_WORDS
    assert sum(lengths) / len(lengths) <= 32


@pytest.mark.parametrize(
    "wrong",
    [
        r"(?<![\d$])\b1 (more )?(apples|books|dollars|children|boxes|days|minutes|people|pencils|years)\b",
        r"\b([02-9]|\d\d+) (more )?(apple|book|dollar|child|box|day|minute|person|pencil|year)\b",
        r"\bI (has|gives|gets|buys|does|is|are|needs|earns)\b",
        r"\bdoes (I|we|they)\b|\bdo (he|she)\b",
        r"(?<!does )(?<!did )(?<!could )(?<!can )\b[A-Z][a-z]+ (give|get|buy|earn) (\d|\$)",
        r"\b[Aa] [aeiou](?!ni)|\b[Aa]n [^aeiouh]",
        r"  |\s$|^\s| [.,?]|[.,?]{2}|\w[.?]\w",
        r"\b(\w+) \1\b",
        r"[\ue000-\uf8ff]|\{|\}|_",
        r"(^|[.?] )[a-z]",
    ],
)
def test_no_slip_of_english(many: list[Problem], wrong: str) -> None:
    slips = [made.question for made in many if re.search(wrong, made.question)]
    assert not slips, slips[:3]


def test_questions_end_and_units_agree(many: list[Problem]) -> None:
    for made in many:
        assert made.question.endswith("?") or (made.kind == "bare" and made.question.endswith(".")), made
        assert made.question[0] == made.question[0].upper()
        for *_, result, unit in STEP.findall(made.answer):
            assert bool(unit) == (made.kind != "bare")
            if unit:
                assert unit not in ("apples", "dollars", "boxes", "children") or result != "1", made
                assert unit not in ("apple", "dollar", "box", "child") or result == "1", made


def test_pronouns_refer_to_the_one_person_of_that_gender(many: list[Problem]) -> None:
    """She and he only where one woman or one man has been named; a possessive may follow its owner's name."""
    roles = re.compile(r"\b([Aa]n?|[Tt]he) (" + "|".join(role for role, _ in ROLES) + r")\b")
    for made in many:
        words = re.findall(r"[A-Za-z]+", made.question)
        role = bool(roles.search(made.question))  # of either gender
        for names, pronouns in ((FEMALE, {"she"}), (MALE, {"he", "him"})):
            named: set[str] = set()
            for word in words:
                if word in names:
                    named.add(word)
                elif word.lower() in pronouns:
                    assert len(named) == 1 or (role and not named), made


@pytest.mark.parametrize(
    ("shape", "example"),
    [
        (
            r"\w+ has \d+ (\w+)\. .*\b\w+s (another )?\d+ (more|\1)\b.*\bgives \d+ .*to \w+.*"
            r"How many \1 does \w+ have (now|left)\?",
            "Maria has 14 apples. She buys 9 more apples and then gives 5 apples to Tom. "
            "How many apples does Maria have now?",
        ),
        (
            r"(An?|Each|Every|One) (\w+) (holds|contains|has) \d+ (\w+)\. How many \4 are in \d+ \w+\?",
            "A box holds 12 pencils. How many pencils are in 7 boxes?",
        ),
        (
            r"(\w+) has \w+ times as many (\w+) as (\w+)\. (\3|She|He) has \d+ \2\. "
            r"How many \2 do they have (together|in total|altogether|in all)\?",
            "Tom has three times as many books as Ana. Ana has 8 books. How many books do they have together?",
        ),
        (
            r"(An?|Each|One) \w+ costs (\w+ dollars|\$\d+)\. "
            r"\w+ buys \w+ \w+(\. \w+| and) pays with (\w+ dollars|\$\d+)\. "
            r"How much change does \w+ (get|receive)( back)?\?",
            "A pen costs 7 dollars. Ben buys 4 pens and pays with 50 dollars. How much change does he get?",
        ),
    ],
)
def test_the_examples_are_of_the_language(many: list[Problem], shape: str, example: str) -> None:
    assert re.fullmatch(shape, example)
    assert sum(bool(re.fullmatch(shape, made.question)) for made in many) >= 2


@pytest.mark.parametrize(
    ("form", "least"),
    [
        (r"^If ", 0.04),
        (r"^How .* if .*\?$", 0.04),
        (r"\. If ", 0.01),
        (r"\$\d", 0.03),
        (r"\b(twice|half|dozen)\b", 0.03),
        (r"\btimes as (many|much|old)\b", 0.02),
        (r"\b(fewer|less)\b", 0.02),
        (r"\b(equally|same number|equal)\b", 0.06),
        (r"\bhow many more\b|\bHow many more\b", 0.03),
        (r"\b(two|three|seven|eleven)\b", 0.05),
        (r"\b(twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)-(one|five|nine)\b", 0.001),
        (r"\b(are|were|is|was) (sold|shared|taken|removed|used|eaten|given|put|divided|split|packed)\b", 0.02),
        (r"\bI\b", 0.01),
        (r"\b(minutes|hours|days|weeks|months|years)\b", 0.1),
        (r"\b(bought|had|gave|was|were|cost)\b", 0.2),
    ],
)
def test_forms_are_not_rare(many: list[Problem], form: str, least: float) -> None:
    assert sum(bool(re.search(form, made.question)) for made in many) >= least * len(many)


def test_a_few_problems_hold_a_number_that_does_not_matter(many: list[Problem]) -> None:
    idle = 0
    for made in many:
        used = {int(number) for step in STEP.findall(made.answer) for number in (step[0], step[2])}
        idle += bool({int(digits) for digits in re.findall(r"\d+", made.question)} - used)
    assert 0.02 < idle / len(many) < 0.08


def test_variety(many: list[Problem]) -> None:
    """The words are many, and no wording (numbers and names aside) dominates."""
    assert len(set(FEMALE + MALE)) >= 60
    assert len({thing.one for thing in THINGS}) >= 80
    names = re.compile(r"\b(" + "|".join(FEMALE + MALE) + r")\b")
    wordings = Counter(re.sub(r"\d+", "#", names.sub("N", made.question)) for made in many if made.kind != "bare")
    assert len(wordings) > 0.6 * len(many)
    assert wordings.most_common(1)[0][1] < 0.002 * len(many)


def test_seeds_are_disjoint(many: list[Problem]) -> None:
    known = {made.question for made in many}
    assert len(known) > 0.99 * len(many)
    for seed in (1, 2, 3):
        overlap = sum(made.question in known for made in generate(seed, 2_000))
        assert overlap < 0.02 * 2_000


@given(st.integers(-(10**9), 10**9), st.integers(0, 10**6))
def test_a_problem_depends_on_seed_and_index_alone(seed: int, index: int) -> None:
    random.seed(index)
    first = problem(seed, index)
    random.seed(seed)
    assert problem(seed, index) == first


def test_generate_is_the_sequence_of_problems() -> None:
    assert list(generate(7, 25)) == [problem(7, index) for index in range(25)]
    assert list(generate(7, 0)) == []


def test_same_problems_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from offload_engine.evaluate.arithmetic import generate; "
        "[print(p.question, p.answer) for p in generate(11, 200)]"
    )
    here = "".join(f"{made.question} {made.answer}\n" for made in generate(11, 200))
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert hashlib.sha256(there.stdout.encode()).digest() == hashlib.sha256(here.encode()).digest()


# --- number words and drills ---------------------------------------------------------------------------------------


@given(st.integers(0, LARGEST_WORD))
def test_number_words(number: int) -> None:
    assert SPELLED[spell(number)] == number


@pytest.mark.parametrize(
    ("number", "word"), [(0, "zero"), (12, "twelve"), (20, "twenty"), (25, "twenty-five"), (99, "ninety-nine")]
)
def test_spelling(number: int, word: str) -> None:
    assert spell(number) == word


@pytest.mark.parametrize("number", [-1, 100])
def test_no_word_beyond_the_range(number: int) -> None:
    with pytest.raises(ValueError, match="0 to 99"):
        spell(number)


@given(st.integers(0, 2**32))
def test_drill_spans_are_the_results(seed: int) -> None:
    text, spans = drill(random.Random(seed))
    equations = text.split(" ")
    assert len(spans) == len(equations) >= 6
    for written, (start, end) in zip(equations, spans, strict=True):
        left, operator, right, result, _ = STEP.fullmatch(written).groups()  # type: ignore[union-attr]
        assert (text[start - 1], text[start:end], text[end]) == ("=", result, ".")
        assert evaluate(int(left), operator, int(right)) == int(result)
        largest = 99 if operator in "+-" else 144
        assert all(0 <= number <= largest for number in (int(left), int(right), int(result)))
    assert drill(random.Random(seed)) == (text, spans)


def test_drills_cover_the_tables() -> None:
    rng = random.Random(0)
    met = {step[:3] for _ in range(3_000) for step in STEP.findall(drill(rng)[0])}
    assert {(str(a), "*", str(b)) for a in range(1, 13) for b in range(1, 13)} <= met
    assert {(str(a * b), "/", str(b)) for a in range(13) for b in range(1, 13)} <= met
    sums = [step for step in met if step[1] == "+"]
    assert len(sums) > 3_000  # of the 5050 pairs with a total of at most 99


# --- the command ---------------------------------------------------------------------------------------------------


def test_command_prints_json_lines() -> None:
    result = CliRunner().invoke(main, ["--n", "3", "--seed", "5"])
    assert result.exit_code == 0
    rows = [json.loads(line) for line in result.output.splitlines()]
    expected = [{"question": p.question, "answer": p.answer, "gold": p.gold} for p in generate(5, 3)]
    assert rows == expected


def test_command_refuses_a_negative_count() -> None:
    result = CliRunner().invoke(main, ["--n", "-1"])
    assert result.exit_code == 2
    assert "--n" in result.output


@pytest.mark.parametrize("how", [["tools/arithmetic_problems.py"], ["-m", "tools.arithmetic_problems"]])
def test_command_runs_as_script_and_as_module(how: list[str]) -> None:
    ran = subprocess.run([sys.executable, *how, "--n", "1"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["gold"] == problem(0, 0).gold
