"""A trained model behind the server gives the answers of `herd chat`, token for token."""

import httpx
import pytest

from conftest import running
from herd.cli.chat_model import load_chat_model
from herd.engine import Sampling
from herd.engine.chat_session import ChatSession, End
from herd.engine.engine import Engine
from herd.engine.loop import EngineLoop
from herd.serve.chat import ServedModel
from herd.text import Content

QUESTIONS = ["What is the capital of France?", "Write a haiku about snow.", "Count from one to twelve."]
N_TOKENS = 40


@pytest.mark.soak
def test_answers_equal_those_of_herd_chat(real_data):
    model = load_chat_model(next(real_data("smollm2").glob("*.gguf")))
    expected = []
    for question in QUESTIONS:
        engine = Engine(model.model, model.tokenizer, max_batch=1, max_context=1024)
        session = ChatSession(
            engine, sampling=Sampling(**model.sampling_defaults | {"max_tokens": N_TOKENS, "temperature": 0})
        )
        events = list(session.ask(question))
        assert isinstance(events[-1], End)
        expected.append(("".join(e.text for e in events if isinstance(e, Content)), events[-1].n_tokens))
    engine = Engine(model.model, model.tokenizer, max_context=1024)
    with EngineLoop(engine) as loop:
        served = ServedModel("smollm2", loop, model.tokenizer, 1024, sampling=model.sampling_defaults)
        with running(served) as url, httpx.Client(base_url=url, timeout=300) as http:
            for question, (text, n_tokens) in zip(QUESTIONS, expected, strict=True):
                body = {
                    "messages": [{"role": "user", "content": question}],
                    "max_tokens": N_TOKENS,
                    "temperature": 0,
                }
                answer = http.post("/v1/chat/completions", json=body).json()
                assert answer["choices"][0]["message"]["content"] == text
                stopped = answer["choices"][0]["finish_reason"] == "stop"
                assert answer["usage"]["completion_tokens"] == n_tokens + stopped
                ids = http.post("/tokenize", json={"messages": body["messages"]}).json()["tokens"]
                continued = http.post(
                    "/v1/completions", json={"prompt": ids, "max_tokens": N_TOKENS, "temperature": 0}
                ).json()
                assert continued["choices"][0]["text"] == text
