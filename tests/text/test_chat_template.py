"""Which chat template is used, what it can call, and what it can't do."""

import datetime
import time
from pathlib import Path

import pytest

from offload_engine.errors import PromptError, TokenizerError
from offload_engine.text import chat_template
from offload_engine.text.chat_template import ChatTemplate, load_chat_template

ASK = [{"role": "user", "content": "Q"}]
GOLDEN = Path(__file__).parents[2] / "../shared/golden/llada2_tiny"


def render(text: str, messages=ASK, **tokens: str) -> str:
    return ChatTemplate(text, "here", tokens).render(messages)


def test_without_a_template_the_format_is_llada2s(tmp_path):
    template = load_chat_template(tmp_path, {})
    assert template.render(ASK) == (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Q<|role_end|><role>ASSISTANT</role>"
    )
    conversation = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " Q\n"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    assert template.render(conversation) == (
        "<role>SYSTEM</role>S<|role_end|><role>HUMAN</role> Q\n<|role_end|>"
        "<role>ASSISTANT</role>A<|role_end|><role>HUMAN</role>R<|role_end|><role>ASSISTANT</role>"
    )
    assert template.render(conversation[:3], add_generation_prompt=False).endswith("A<|role_end|>")
    with pytest.raises(PromptError, match="role is robot, wanted system, user or assistant"):
        template.render([{"role": "robot", "content": "beep"}])


def test_the_checkpoints_own_template_wins_and_its_file_over_its_config(tmp_path):
    assert load_chat_template(tmp_path, {"chat_template": "config"}).render(ASK) == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert load_chat_template(tmp_path, {"chat_template": named}).render(ASK) == "plain"
    assert load_chat_template(tmp_path, {"chat_template": named[:1]}).render(ASK) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(tmp_path, {"chat_template": "config"}).render(ASK) == "file"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (7, "holds int, wanted a string or a list of named templates"),
        (
            [{"name": "b", "template": ""}, {"name": "a", "template": ""}],
            r"no template is named 'default' \(found: a, b",
        ),
        ([], r"no template is named 'default' \(found: none"),
        ("{% for", r"tokenizer_config\.json, chat_template: the chat template doesn't compile"),
    ],
)
def test_a_config_without_a_usable_template_is_refused(tmp_path, entry, complaint):
    with pytest.raises(TokenizerError, match=complaint):
        load_chat_template(tmp_path, {"chat_template": entry})


def test_a_template_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: not readable as text"):
        load_chat_template(tmp_path, {})


def test_the_golden_checkpoints_template():
    if not GOLDEN.is_dir():
        pytest.skip("needs ../shared/golden, which this checkout doesn't have")
    import json

    config = json.loads((GOLDEN / "tokenizer_config.json").read_text())
    rendered = load_chat_template(GOLDEN, config).render(ASK)
    assert rendered == "<role>HUMAN</role>Q<|role_end|><role>ASSISTANT</role>"


def test_what_templates_expect_to_find():
    assert render("{{ bos_token }}|{{ eos_token }}", bos_token="<s>", eos_token="</s>") == "<s>|</s>"
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}") == "13"
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Q"
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"  # trim_blocks and lstrip_blocks


def test_special_tokens_come_from_the_config_in_both_spellings(tmp_path):
    config = {"chat_template": "{{ eos_token }}{{ pad_token }}", "eos_token": "</s>", "pad_token": {"content": "<p>"}}
    assert load_chat_template(tmp_path, config).render(ASK) == "</s><p>"


def test_a_template_may_refuse_the_messages():
    with pytest.raises(PromptError, match=r"^here: the chat template refuses the messages: roles must alternate$"):
        render("{{ raise_exception('roles\nmust   alternate') }}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{{ messages[0].__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception.__globals__.items }}", "SecurityError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}", "its output exceeds"),
        ("{{ 'x' * 10**12 }}", "its repetition is too long"),
        ("{{ 9**99999999 }}", "its power is too large"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_one_clear_line(text, complaint):
    with pytest.raises(TokenizerError, match=r"^here: the chat template failed") as error:
        render(text)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["{% for %}", "{{ 1", "{% nosuchtag %}", "{{ x|nosuchfilter }}", "{% if 1 %}" * 200, "{% for i in j %}" * 9]
)
def test_a_template_that_does_not_compile_is_one_clear_line(text):
    with pytest.raises(TokenizerError, match=r"^here: the chat template doesn't compile") as error:
        ChatTemplate(text, "here")
    assert "\n" not in str(error.value)


def test_deep_nesting_is_refused_not_a_crash():
    with pytest.raises(TokenizerError, match="doesn't compile"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "here")
    with pytest.raises(TokenizerError, match="doesn't compile"):
        ChatTemplate("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "here")


@pytest.mark.parametrize(
    "body",
    [
        "{% for a in many %}{% for b in many %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% for b in many %}{% endfor %}{% endmacro %}{% for a in many %}{{ m(a) }}{% endfor %}",
    ],
)
def test_a_template_that_never_ends_is_stopped(monkeypatch, body):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(TokenizerError, match="it takes more than"):
        render("{% set many = range(100000) | list %}" + body)
    assert time.monotonic() - start < 3


def test_long_messages_are_no_oversized_output():
    long = "x" * (chat_template.MAX_ADDED * 2)
    assert render("{{ messages[0].content }}", [{"role": "user", "content": long}]) == long
