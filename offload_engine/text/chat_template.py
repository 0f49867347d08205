"""The prompt format of a conversation: the checkpoint's own Jinja template, or LLaDA2's (REFERENCE §1).

A template is a program from whoever published the checkpoint, so it runs in Jinja's sandbox, with its output and its
time bounded.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from offload_engine.errors import PromptError, TokenizerError

ROLES = ("system", "user", "assistant", "tool", "developer")
"""Roles end up inside a template's markers, so they are not free text."""
TEMPLATE_FILE = "chat_template.jinja"
MAX_SECONDS = 5.0
"""Time a template may take; a usual one takes less than a millisecond."""
MAX_ADDED = 1 << 20
"""Characters a template may write beyond eight times what the messages hold."""

LLADA2_TEMPLATE = """\
{%- set names = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} -%}
{%- if messages[0].role != 'system' -%}
<role>SYSTEM</role>detailed thinking off<|role_end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in names -%}
{{ raise_exception('role is ' ~ message.role ~ ', wanted system, user or assistant') }}
{%- endif -%}
<role>{{ names[message.role] }}</role>{{ message.content }}<|role_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<role>ASSISTANT</role>
{%- endif -%}
"""
"""The format of the field's engines for LLaDA2 (REFERENCE §1)."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """One of `ROLES`; a template may know fewer."""
    content: str


class ChatTemplate:
    """A compiled template. Raises `TokenizerError`, naming `source`, when it doesn't compile."""

    def __init__(self, text: str, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """`source` names the template in errors; `special_tokens` are its variables, such as `eos_token`."""
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._environment = _Sandbox()
        try:
            self._template = self._environment.from_string(text)
        except Exception as error:  # Jinja folds constants while it compiles, so anything can go wrong here as well
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise TokenizerError(f"{source}: the chat template doesn't compile ({_one_line(error)}{line})") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, ready for the assistant's answer.

        Raises `PromptError` when the template itself refuses the messages, `TokenizerError` when it fails.
        """
        limit = MAX_ADDED + 8 * sum(len(message["content"]) for message in messages)
        self._environment.deadline = time.monotonic() + MAX_SECONDS
        variables = {**self.special_tokens, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                self._environment.check_time()
                size += len(piece)
                if size > limit:
                    raise _OutOfBoundsError(f"its output exceeds {limit} characters")
                pieces.append(piece)
        except _RefusedError as error:
            raise PromptError(f"{self.source}: the chat template refuses the messages: {_one_line(error)}") from None
        except Exception as error:  # a template can fail in any way a program can
            raise TokenizerError(
                f"{self.source}: the chat template failed ({type(error).__name__.lstrip('_')}: {_one_line(error)})"
            ) from None
        return "".join(pieces)


def load_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate:
    """The template of the checkpoint in `directory`, whose tokenizer_config.json holds `config`.

    The file chat_template.jinja wins over the config's `chat_template`, as in transformers, and either over the
    built-in format.
    """
    tokens = {name: text for name in _TOKEN_NAMES if (text := token_text(config.get(name))) is not None}
    file = directory / TEMPLATE_FILE
    if file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), str(file), tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file}: not readable as text ({error})") from None
    source = f"{directory / 'tokenizer_config.json'}, chat_template"
    found = config.get("chat_template")
    if isinstance(found, list):
        found = _default_of(found, source)
    if found is None:
        return ChatTemplate(LLADA2_TEMPLATE, "built-in LLaDA2 format", tokens)
    if not isinstance(found, str):
        raise TokenizerError(f"{source}: holds {type(found).__name__}, wanted a string or a list of named templates")
    return ChatTemplate(found, source, tokens)


def token_text(entry: Any) -> str | None:
    """A special token as tokenizer_config.json writes it, a string or {"content": string}; None if it is neither."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _default_of(named: list[Any], source: str) -> Any:
    """The template called `default` of a list of {"name", "template"}, or the only one."""
    templates = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}
    if "default" in templates:
        return templates["default"]
    if len(templates) == 1:
        return next(iter(templates.values()))
    names = ", ".join(sorted(str(name) for name in templates)) or "none"
    raise TokenizerError(f"{source}: no template is named 'default' (found: {names})")


class _RefusedError(Exception):
    """The template called `raise_exception`."""


class _OutOfBoundsError(Exception):
    """The template asked for too much."""


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, by which training templates mark answers; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _WatchLoops(NodeTransformer):
    """Makes every turn of every loop look at the clock."""

    def visit_For(self, loop: nodes.For) -> nodes.For:  # noqa: N802 - Jinja calls it by the node's name
        self.generic_visit(loop)
        check = nodes.EnvironmentAttribute("check_time")
        loop.body.insert(0, nodes.ExprStmt(nodes.Call(check, [], [], None, None)).set_lineno(loop.lineno))
        return loop


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the helpers that chat templates expect, and a deadline."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.deadline = float("inf")
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _WatchLoops().visit(super()._parse(source, name, filename))
        return template

    def check_time(self) -> None:
        """Raise once the deadline has passed."""
        if time.monotonic() > self.deadline:
            raise _OutOfBoundsError(f"it takes more than {MAX_SECONDS:.0f} s")

    def call(self, /, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template comes by here: the place to stop one that never ends."""
        self.check_time()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products and powers, kept from filling the memory."""
        if operator == "**" and not (abs(left) <= 1 << 16 and abs(right) <= 64):
            raise _OutOfBoundsError("its power is too large")
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and len(sequence) * times > MAX_ADDED:
                    raise _OutOfBoundsError("its repetition is too long")
        return super().call_binop(context, operator, left, right)


def _refuse(message: object) -> None:
    raise _RefusedError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"
