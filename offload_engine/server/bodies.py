"""What clients send: OpenAI's request bodies, checked field by field.

Nothing that is asked for is quietly left out: a field that would change the answer and can't be honoured is refused
unless it has the value that changes nothing, and so is a field nobody knows. Fields that only label a request are taken
and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from offload_engine.config import brief
from offload_engine.core import SamplingParams
from offload_engine.server.failures import RefusedError, invalid_body
from offload_engine.text import Message

COMPLETION_TOKENS = 16
"""What /v1/completions generates unless told otherwise, as OpenAI does."""
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
"""Stop strings of a request, and characters of one: each is looked for after every step."""

Parsed = TypeVar("Parsed", bound=BaseModel)


def _joined(content: Any) -> Any:
    """A message's content, whose parts of type text are its lines."""
    if not isinstance(content, list):
        return content
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"part {place} is of type {_short(kind)}; this server takes parts of type text")
    return "\n".join(part["text"] for part in content)


def _stops(found: Any) -> Any:
    """One stop string, or several."""
    texts = [found] if isinstance(found, str) else found
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("wanted a string or a list of strings")
    if len(texts) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in texts):
        raise ValueError(f"wanted at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(texts)


def _one_prompt(found: Any) -> Any:
    """Text or token ids, alone or as the only item of a list."""
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str | list):
        found = found[0]
    ids = isinstance(found, list) and len(found) > 0 and all(type(one) is int for one in found)
    if not isinstance(found, str) and not ids:
        raise ValueError("wanted one prompt: a string, or a list of token ids")
    return found


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) <= 40 else type(value).__name__


class _Strict(BaseModel):
    """Refuses, as `RefusedError`, what is neither a field, nor ignored, nor neutral with the value it has."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Fields that can't be honoured, and the values, null apart, under which they change nothing."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that change nothing whatever they hold."""

    @model_validator(mode="after")
    def _no_others(self) -> Self:
        for name, found in (self.model_extra or {}).items():
            if name in self.ignored:
                continue
            if name not in self.neutral:
                raise RefusedError(400, f"unknown field {_short(name)}", param=name[:40], code="unknown_parameter")
            harmless = self.neutral[name]
            if found is not None and not any(type(found) is type(one) and found == one for one in harmless):
                wanted = " or ".join([*map(repr, harmless), "nothing"])
                raise RefusedError(
                    400,
                    f"{name!r} is {brief(found)}, which this server can't honour; wanted {wanted}",
                    param=name,
                    code="unsupported_parameter",
                )
        return self


class ChatMessage(_Strict):
    """One turn. A message that a client was answered with may be sent back as it came."""

    neutral = {"refusal": (), "annotations": ([],), "audio": (), "function_call": (), "tool_calls": ([],)}
    ignored = frozenset({"name"})

    role: str
    content: Annotated[str, BeforeValidator(_joined)]


class StreamOptions(_Strict):
    """What a stream holds beside the answer."""

    neutral = {"include_obfuscation": (False,)}

    include_usage: bool | None = None


class Body(_Strict):
    """What both kinds of completion have in common. A field that is null counts as absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[Any, AfterValidator(_stops)] = ()

    routing: Annotated[str, Field(min_length=1, max_length=40)] | None = None
    """Routing policy of this request; absent: the server's."""
    routing_top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """dMoE's p: the share of a block's votes that its coreset passes."""
    steps: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Denoising steps a block may take."""
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Confidence above which a position is unmasked at once."""
    block_length: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Tokens denoised together."""

    @property
    def longest(self) -> int | None:
        """Tokens the answer may have; None: as many as the engine gives unasked."""
        return self.max_tokens

    @property
    def sampling(self) -> SamplingParams:
        """As the engine has it."""
        names = ("temperature", "top_p", "top_k", "seed", "steps", "threshold", "block_length")
        values = {name: getattr(self, name) for name in names} | {"max_new_tokens": self.longest}
        return SamplingParams(**{name: one for name, one in values.items() if one is not None}, stop=self.stop)


_COMMON_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "logit_bias": ({},),
}


class ChatBody(Body):
    """POST /v1/chat/completions, and /v1/denoise."""

    neutral = {
        **_COMMON_NEUTRAL,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "web_search_options": (),
    }
    ignored = frozenset(
        {
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def longest(self) -> int | None:
        """See `Body`; the newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def job(self) -> Job:
        """What the engine is asked."""
        turns = [Message(role=one.role, content=one.content) for one in self.messages]
        return Job(turns, self.sampling, raw=False, routing=self.routing, top_p=self.routing_top_p)


class CompletionBody(Body):
    """POST /v1/completions: the prompt is continued as it stands."""

    neutral = {**_COMMON_NEUTRAL, "best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",)}
    ignored = frozenset({"user"})

    prompt: Annotated[Any, AfterValidator(_one_prompt)]

    @property
    def longest(self) -> int | None:
        """See `Body`."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def job(self) -> Job:
        """What the engine is asked."""
        return Job(self.prompt, self.sampling, raw=True, routing=self.routing, top_p=self.routing_top_p)


@dataclass(frozen=True, slots=True)
class Job:
    """One request as the engine has it."""

    prompt: str | list[Message] | list[int]
    params: SamplingParams
    raw: bool
    routing: str | None
    top_p: float | None
    """Of the routing, not of the sampler."""

    @property
    def size(self) -> int:
        """Bytes of all text in the prompt, in UTF-8."""
        turns = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        texts = (turn["content"] if isinstance(turn, dict) else turn for turn in turns)
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if isinstance(text, str))


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """The body as `kind`; raises `RefusedError` that says what is wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error) from None


def check_model(asked: str | None, served: str) -> None:
    """Raises `RefusedError` for a model that isn't the one served; none at all means that one."""
    if asked is not None and asked != served:
        raise RefusedError(
            404,
            f"the model {_short(asked)} does not exist here; this server has {served!r}",
            param="model",
            code="model_not_found",
        )
