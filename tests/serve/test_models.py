"""Several models on one server: loaded on demand, within a budget, and never unloaded while they are in use."""

import asyncio
import threading

import httpx
import pytest

from conftest import CONTEXT, ScriptedLoop, running
from herd.serve.chat import ServedModel
from herd.serve.errors import ApiError
from herd.serve.models import ModelPool, ModelSlot
from herd.serve.problems import Overloaded


class ClosingLoop(ScriptedLoop):
    closed = False

    def close(self, drain_seconds=0.0):
        self.closed = True


def make_pool(tokenizer, n=3, limit=20, answer=("hello",), **more):
    """Return a pool of ``n`` models of 10 bytes each."""

    def opener(name):
        return lambda: ServedModel(name, ClosingLoop(*answer), tokenizer, CONTEXT)

    slots = [ModelSlot(f"m{number}", opener(f"m{number}"), 10, CONTEXT) for number in range(n)]
    return ModelPool(slots, limit, **more)


def loaded(pool):
    return [slot.name for slot in pool.slots if slot.served is not None]


def test_the_least_recently_used_model_is_unloaded(tokenizer):
    async def use():
        pool = make_pool(tokenizer)
        for name in ("m0", "m1", "m0"):
            await pool.acquire(pool.find(name))
            pool.release(pool.find(name))
        loop = pool.find("m1").served.loop
        await pool.acquire(pool.find("m2"))
        assert (loaded(pool), loop.closed) == (["m0", "m2"], True)
        assert [slot.n_loads for slot in pool.slots] == [1, 1, 1]

    asyncio.run(use())


def test_a_model_in_use_is_waited_for_and_then_the_client_is_told(tokenizer):
    async def use():
        pool = make_pool(tokenizer, wait_seconds=0.2)
        for name in ("m0", "m1"):
            await pool.acquire(pool.find(name))
        with pytest.raises(Overloaded, match="no memory for m2 while m0, m1 are in use"):
            await pool.acquire(pool.find("m2"))
        assert pool.find("m2").users == 0
        asyncio.get_running_loop().call_later(0.05, pool.release, pool.find("m0"))
        await pool.acquire(pool.find("m2"))
        assert loaded(pool) == ["m1", "m2"]

    asyncio.run(use())


def test_many_requests_for_two_models_in_the_memory_of_one(tokenizer):
    async def use():
        pool = make_pool(tokenizer, n=2, limit=10)
        in_use = {"m0": 0, "m1": 0}

        async def request(name):
            slot = pool.find(name)
            served = await pool.acquire(slot)
            assert served.name == name
            in_use[name] += 1
            assert len(loaded(pool)) == 1
            assert min(in_use.values()) == 0, "both models are in use in the memory of one"
            await asyncio.sleep(0.001)
            in_use[name] -= 1
            pool.release(slot)

        await asyncio.gather(*(request(f"m{number % 2}") for number in range(40)))

    asyncio.run(use())


def test_a_model_that_cannot_be_opened_fails_its_request_only(tokenizer):
    async def use():
        pool = make_pool(tokenizer)
        good, pool.slots[0].open = (
            pool.slots[0].open,
            lambda: (_ for _ in ()).throw(OSError("the disk is gone")),
        )
        with pytest.raises(OSError, match="the disk is gone"):
            await pool.acquire(pool.slots[0])
        assert pool.slots[0].users == 0
        pool.slots[0].open = good
        assert (await pool.acquire(pool.slots[0])).name == "m0"

    asyncio.run(use())


def test_names_and_the_first_model_as_the_default(tokenizer):
    pool = make_pool(tokenizer)
    assert pool.find(None).name == "m0"
    assert pool.find("m2").name == "m2"
    with pytest.raises(ApiError, match="this server has: m0, m1, m2"):
        pool.find("m3")


def test_over_http_each_request_gets_its_model_and_all_are_released(tokenizer):
    pool = make_pool(tokenizer, answer=("one ", 0.02, "two"))
    names = [f"m{number % 3}" for number in range(18)]
    bodies: dict[int, tuple] = {}
    with running(pool) as url, httpx.Client(base_url=url, timeout=60) as client:

        def ask(number):
            body = {"model": names[number], "messages": [{"role": "user", "content": "six"}]}
            response = client.post("/v1/chat/completions", json=body | {"stream": number % 2 == 1})
            bodies[number] = (
                response.status_code,
                f'"model":"{names[number]}"' in response.text,
                response.text,
            )

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        listed = client.get("/v1/models").json()["data"]
    assert [bodies[number][:2] for number in range(len(names))] == [(200, True)] * len(names)
    assert [model["id"] for model in listed] == ["m0", "m1", "m2"]
    assert sum(model["loaded"] for model in listed) <= 2
    assert [slot.users for slot in pool.slots] == [0, 0, 0]


def test_an_adapter_is_named_like_a_model_in_every_api(tokenizer):
    loop = ClosingLoop("hello")
    served = ServedModel("base", loop, tokenizer, CONTEXT, adapters=frozenset({"support"}))
    dialog = {"messages": [{"role": "user", "content": "six"}], "max_tokens": 4}
    with running(served) as url, httpx.Client(base_url=url, timeout=60) as client:
        for path, body in (
            ("/v1/chat/completions", dialog),
            ("/v1/messages", dialog),
            ("/v1/completions", {"prompt": "six"}),
            ("/v1/responses", {"input": "six"}),
            ("/api/chat", {"messages": dialog["messages"], "stream": False}),
        ):
            for name, adapter in (("support", "support"), ("base", "")):
                assert client.post(path, json=body | {"model": name}).status_code == 200
                assert loop.requests[-1].adapter == adapter
        listed = client.get("/v1/models").json()["data"]
        assert [(model["id"], model["parent"]) for model in listed] == [("base", None), ("support", "base")]
        assert client.get("/v1/models/support").json()["parent"] == "base"
