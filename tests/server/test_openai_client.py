"""The official client talks to the server as to OpenAI's."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from offload_engine import SamplingParams
from tests.server.serving import ANSWER, PROBLEM, Served

MESSAGES = [{"role": "user", "content": PROBLEM}]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(served: Served) -> str:
    """The answer without a server, from the built-in model."""
    from offload_engine.engine.engine import Engine

    with Engine.from_pretrained(gpu_mem="4GB", threads=1, max_context=2048) as engine:
        return engine.generate(PROBLEM, SamplingParams()).text


def test_a_chat_completion(client, alone):
    done = client.chat.completions.create(model="built-in", messages=MESSAGES)
    choice = done.choices[0]
    assert choice.message.content == alone
    assert ANSWER in alone
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
    assert done.object == "chat.completion"
    assert done.model == "built-in"
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.prompt_tokens > 10
    assert done._request_id


def test_a_streamed_chat_completion(client, alone):
    chunks = list(
        client.chat.completions.create(
            model="built-in", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    *answer, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens > 5
    assert all(chunk.usage is None for chunk in answer)
    assert answer[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == alone
    assert [chunk.choices[0].finish_reason for chunk in answer if chunk.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len([chunk for chunk in answer if chunk.choices[0].delta.content]) >= 2, "a chunk per block"


def test_no_usage_unless_asked(client):
    chunks = list(client.chat.completions.create(model="built-in", messages=MESSAGES, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_completions(client):
    done = client.completions.create(model="built-in", prompt="1+1=")
    assert done.object == "text_completion"
    assert done.usage.completion_tokens <= 16, "OpenAI's default"
    pieces = client.completions.create(model="built-in", prompt="1+1=", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == done.choices[0].text


def test_completions_of_token_ids(client):
    done = client.completions.create(model="built-in", prompt=[1, 2, 3], max_tokens=8)
    assert done.usage.prompt_tokens == 3


def test_max_tokens_ends_an_answer(client):
    for name in ("max_tokens", "max_completion_tokens"):
        done = client.chat.completions.create(model="built-in", messages=MESSAGES, **{name: 3})
        assert done.choices[0].finish_reason == "length"
        assert done.usage.completion_tokens == 3


def test_a_stop_string_ends_an_answer_and_is_left_out(client, alone):
    stop = alone[3:6]
    done = client.chat.completions.create(model="built-in", messages=MESSAGES, stop=stop)
    assert done.choices[0].message.content == alone.partition(stop)[0]
    assert done.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(model="built-in", messages=MESSAGES, stop=[stop], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == alone.partition(stop)[0]


def test_a_seed_makes_an_answer_repeatable(client):
    def answer(seed: int) -> str:
        done = client.chat.completions.create(
            model="built-in", messages=MESSAGES, temperature=2.0, top_p=0.99, seed=seed, max_tokens=40
        )
        return done.choices[0].message.content

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_routing_and_diffusion_options_go_in_the_extra_body(client):
    extra = {"routing": "original", "steps": 4, "threshold": 1.0, "block_length": 16}
    done = client.chat.completions.create(model="built-in", messages=MESSAGES, extra_body=extra)
    assert ANSWER in done.choices[0].message.content
    done = client.chat.completions.create(
        model="built-in", messages=MESSAGES, extra_body={"routing": "dmoe", "routing_top_p": 0.9}
    )
    assert ANSWER in done.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="routing is 'nonsense'"):
        client.chat.completions.create(model="built-in", messages=MESSAGES, extra_body={"routing": "nonsense"})


def test_several_turns_and_parts_of_text(client):
    first = client.chat.completions.create(model="built-in", messages=MESSAGES).choices[0].message
    parts = [{"type": "text", "text": "What is 3 + 4?"}]
    turns = [{"role": "system", "content": "Be brief."}, *MESSAGES, first, {"role": "user", "content": parts}]
    done = client.chat.completions.create(model="built-in", messages=turns)
    assert done.usage.prompt_tokens > 40
    picture = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match="part 0 is of type 'image_url'"):
        client.chat.completions.create(model="built-in", messages=[{"role": "user", "content": picture}])


def test_the_next_turn_begins_where_the_last_one_ended(client):
    turns = [{"role": "user", "content": f"{PROBLEM} {PROBLEM} {PROBLEM}"}]
    first = client.chat.completions.create(model="built-in", messages=turns)
    turns += [first.choices[0].message, {"role": "user", "content": "What is 3 + 4?"}]
    second = client.chat.completions.create(model="built-in", messages=turns)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 32 <= cached < second.usage.prompt_tokens


def test_markers_that_a_user_types_stay_text(client, engine):
    for marker in ("<role>", "</role>", "<|role_end|>", "<|mask|>", "<|endoftext|>"):
        typed = f"1 + 1 {marker} 2"
        done = client.chat.completions.create(
            model="built-in", messages=[{"role": "user", "content": typed}], max_tokens=1
        )
        bare = client.chat.completions.create(
            model="built-in", messages=[{"role": "user", "content": "1 + 1  2"}], max_tokens=1
        )
        assert done.usage.prompt_tokens >= bare.usage.prompt_tokens + len(marker) // 4, "spelled out"
        ids = engine.tokenizer.encode_chat([{"role": "user", "content": typed}])
        assert len(ids) == done.usage.prompt_tokens


def test_models(client):
    assert [model.id for model in client.models.list()] == ["built-in"]
    assert client.models.retrieve("built-in").owned_by == "offload_engine"
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError, match="this server has 'built-in'"):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)


def test_what_cannot_be_honoured_is_refused_by_name(client):
    for field, value in {
        "n": 2,
        "logprobs": True,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "response_format": {"type": "json_object"},
        "presence_penalty": 1.0,
    }.items():
        with pytest.raises(openai.BadRequestError, match=f"'{field}'") as refused:
            client.chat.completions.create(model="built-in", messages=MESSAGES, **{field: value})
        assert refused.value.param == field
    client.chat.completions.create(
        model="built-in", messages=MESSAGES, n=1, presence_penalty=0, user="me", max_tokens=1
    )


def test_the_async_client_and_many_at_once(served, alone):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def whole() -> str:
                done = await client.chat.completions.create(model="built-in", messages=MESSAGES)
                return done.choices[0].message.content

            async def streamed() -> str:
                pieces = await client.chat.completions.create(model="built-in", messages=MESSAGES, stream=True)
                return "".join([piece.choices[0].delta.content or "" async for piece in pieces])

            return await asyncio.gather(*(one() for _ in range(8) for one in (whole, streamed)))

    assert set(asyncio.run(ask_all())) == {alone}


def test_a_stream_is_closed_in_the_middle(client, served):
    with client.chat.completions.create(
        model="built-in", messages=MESSAGES, stream=True, extra_body={"threshold": 1.0}
    ) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model="built-in", messages=MESSAGES).choices[0].finish_reason == "stop"


def test_answers_say_who_they_are_and_are_not_sniffed(served):
    response = served.chat()
    assert isinstance(response, httpx.Response)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert len(response.headers["x-request-id"]) == 32
