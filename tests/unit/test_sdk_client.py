"""The clients against scripted answers: what is sent, in which order, how often, and what comes back."""

import asyncio
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.waiting import AT_ONCE_S
from tinkerbell.sdk import (
    Adapter,
    AsyncAdapter,
    AsyncClient,
    Client,
    InvalidRequest,
    NotFound,
    RequestFailed,
    RetryPolicy,
    TooManyRequests,
    Unreachable,
    supervised,
)

SERVER = "http://server"
QUICK = RetryPolicy(give_up_after_s=2.0, first_delay_s=0.001, longest_delay_s=0.002)
DATUM = supervised([5, 6, 7])
STEP = {"type": "optim_step", "step": 1, "grad_norm": 0.5, "state_digest": "d"}


def future(id: int = 1, state: str = "pending", **members: Any) -> dict[str, Any]:
    return {
        "id": id,
        "kind": "optim_step",
        "state": state,
        "adapter_id": "ad_x",
        "seq": 1,
        "created_at": "2026-01-01T00:00:00Z",
        **members,
    }


def problem(slug: str, status: int, **extra: Any) -> dict[str, Any]:
    return {
        "type": f"urn:tinkerbell:problem:{slug}",
        "title": "T",
        "status": status,
        "detail": "why",
        **extra,
    }


class Script:
    """Answers in turn; an exception is raised instead. Keeps what was asked."""

    def __init__(self, *answers: httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else answer(request)

    def client(self, retry: RetryPolicy = QUICK) -> Client:
        return Client(SERVER, "tb-k_1-s", retry=retry, transport_=httpx.MockTransport(self))


def test_a_post_keeps_its_idempotency_key_over_lost_answers_and_restarts() -> None:
    script = Script(
        httpx.ReadError("the answer was lost"),
        httpx.Response(503, json=problem("unavailable", 503)),
        httpx.ConnectError("refused"),
        httpx.Response(202, json=future()),
        httpx.Response(202, json=future(2)),
    )
    with script.client() as client:
        adapter = Adapter(client, "ad_x")
        assert adapter.optim_step(learning_rate=0.5).id == 1
        assert adapter.optim_step(learning_rate=0.5).id == 2
    keys = [request.headers["Idempotency-Key"] for request in script.requests]
    assert len(set(keys[:4])) == 1
    assert keys[4] != keys[3]
    assert len({request.content for request in script.requests}) == 1
    assert json.loads(script.requests[0].content) == {"adam": {
        "learning_rate": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip_norm": 0.0,
    }}  # fmt: skip
    assert script.requests[0].headers["Authorization"] == "Bearer tb-k_1-s"


def test_remove_is_idempotent_too() -> None:
    script = Script(httpx.ReadError("lost"), httpx.Response(202, json=future()))
    with script.client() as client:
        Adapter(client, "ad_x").remove()
    assert script.requests[0].method == "DELETE"
    assert len({request.headers["Idempotency-Key"] for request in script.requests}) == 1


def test_a_full_queue_is_waited_for_as_long_as_it_asks() -> None:
    full = httpx.Response(429, headers={"Retry-After": "0.2"}, json=problem("too-many-requests", 429))
    script = Script(full, httpx.Response(202, json=future()))
    started = time.monotonic()
    with script.client() as client:
        client.sample([1])
    assert time.monotonic() - started >= 0.2


def test_a_queue_that_stays_full_is_the_callers_error() -> None:
    content = problem("too-many-requests", 429, place=3)
    full = httpx.Response(429, headers={"Retry-After": "60"}, json=content)
    with Script(full).client() as client, pytest.raises(TooManyRequests) as caught:
        client.sample([1])
    assert caught.value.extra["place"] == 3


def test_a_server_that_is_not_there_is_named() -> None:
    script = Script(*[httpx.ConnectError("refused")] * 50)
    impatient = RetryPolicy(give_up_after_s=0.01, first_delay_s=0.004)
    with (
        script.client(impatient) as client,
        pytest.raises(Unreachable, match="GET /v1/models at http://server"),
    ):
        client.models()
    assert len(script.requests) > 1


def test_what_is_wrong_with_a_request_is_not_tried_again() -> None:
    script = Script(httpx.Response(404, json=problem("not-found", 404)))
    with script.client() as client, pytest.raises(NotFound):
        client.adapter("ad_nobody")
    assert len(script.requests) == 1


def test_a_result_is_polled_for_until_it_is_there_and_then_remembered() -> None:
    script = Script(
        httpx.Response(202, json=future()),
        httpx.Response(200, json=future()),
        httpx.ReadTimeout("slow"),
        httpx.Response(200, json=future(state="completed", result=STEP, cost_us=12)),
    )
    with script.client() as client:
        step = Adapter(client, "ad_x").optim_step()
        assert step.result().grad_norm == 0.5
        assert step.result().step == 1
        assert step.done()
        assert step.state.cost_us == 12
    assert len(script.requests) == 4
    assert float(script.requests[1].url.params["wait_s"]) > 1


def test_a_timeout_leaves_the_future_pending() -> None:
    script = Script(httpx.Response(202, json=future()), httpx.Response(200, json=future()))
    with script.client() as client:
        step = Adapter(client, "ad_x").optim_step()
        with pytest.raises(TimeoutError, match="future 1"):
            step.result(timeout=0)
        script.answers.append(httpx.Response(200, json=future(state="completed", result=STEP)))
        assert step.result(timeout=1).step == 1


def test_a_timeout_holds_while_the_server_is_away() -> None:
    """The retry policy would wait two minutes."""
    patient = RetryPolicy(give_up_after_s=120.0, first_delay_s=0.05)
    script = Script(httpx.Response(202, json=future()), *(httpx.ConnectError("refused") for _ in range(100)))
    with script.client(patient) as client:
        step = Adapter(client, "ad_x").optim_step()
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="future 1"):
            step.result(timeout=0.3)
        assert time.monotonic() - began < AT_ONCE_S

    async def run() -> None:
        transport = httpx.MockTransport(script)
        async with AsyncClient(SERVER, retry=patient, transport_=transport) as client:
            pending = await client.future(1)
            with pytest.raises(TimeoutError, match="future 1"):
                await pending.result(timeout=0.3)

    script.answers.insert(0, httpx.Response(200, json=future()))
    asyncio.run(run())


def test_an_answered_future_needs_no_time_to_give_its_result() -> None:
    def done() -> httpx.Response:
        return httpx.Response(200, json=future(state="completed", result=STEP))

    script = Script(httpx.Response(202, json=future()), done())
    with script.client() as client:
        assert client.gather(Adapter(client, "ad_x").optim_step(), timeout=0)[0].step == 1

    async def run() -> Any:
        async with AsyncClient(SERVER, retry=QUICK, transport_=httpx.MockTransport(script)) as client:
            (result,) = await client.gather(await client.future(1), timeout=0)
            return result

    script.answers += [httpx.Response(200, json=future()), done()]
    assert asyncio.run(run()).step == 1


def test_a_failed_request_says_why() -> None:
    failed = future(state="failed", error={"category": "user", "code": "no-gradients", "message": "none"})
    script = Script(httpx.Response(202, json=future()), httpx.Response(200, json=failed))
    with script.client() as client, pytest.raises(RequestFailed) as caught:
        Adapter(client, "ad_x").optim_step().result()
    assert (caught.value.code, caught.value.category, caught.value.future_id) == ("no-gradients", "user", 1)


def test_threads_that_share_an_adapter_are_accepted_one_at_a_time() -> None:
    busy = threading.Lock()

    def accept(request: httpx.Request) -> httpx.Response:
        assert busy.acquire(blocking=False), "two requests of one adapter were under way at once"
        time.sleep(0.005)
        busy.release()
        return httpx.Response(202, json=future())

    script = Script(*[accept] * 16)
    with script.client() as client:
        adapter = Adapter(client, "ad_x")
        threads = [threading.Thread(target=adapter.optim_step) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(script.requests) == 16


def test_calls_of_many_tasks_are_accepted_in_the_order_they_were_made() -> None:
    seen: list[float] = []

    async def accept(request: httpx.Request) -> httpx.Response:
        rate = json.loads(request.content)["adam"]["learning_rate"]
        await asyncio.sleep(0.02 if rate == 0 else 0)
        seen.append(rate)
        return httpx.Response(202, json=future(state="completed", result=STEP))

    async def run() -> None:
        async with AsyncClient("http://server", retry=QUICK, transport_=httpx.MockTransport(accept)) as client:
            adapter = AsyncAdapter(client, "ad_x")
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(adapter.optim_step(learning_rate=n / 10)) for n in range(8)]
            results = await client.gather(*(task.result() for task in tasks))
            assert [result.step for result in results] == [1] * 8

    asyncio.run(run())
    assert seen == [n / 10 for n in range(8)]


def test_async_retries_and_long_polls_as_the_sync_client_does() -> None:
    script = Script(
        httpx.ReadError("lost"),
        httpx.Response(202, json=future()),
        httpx.Response(200, json=future()),
        httpx.Response(200, json=future(state="completed", result=STEP)),
    )

    async def run() -> None:
        async with AsyncClient("http://server", retry=QUICK, transport_=httpx.MockTransport(script)) as client:
            step = await (await AsyncAdapter(client, "ad_x").optim_step())
            assert step.grad_norm == 0.5

    asyncio.run(run())
    assert script.requests[0].headers["Idempotency-Key"] == script.requests[1].headers["Idempotency-Key"]


def test_async_timeout_raises_and_leaves_the_future_pending() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            await asyncio.sleep(30)
        return httpx.Response(202, json=future())

    async def run() -> None:
        async with AsyncClient("http://server", retry=QUICK, transport_=httpx.MockTransport(answer)) as client:
            sample = await client.sample([1])
            with pytest.raises(TimeoutError):
                await sample.result(timeout=0.01)
            assert sample.state.state == "pending"

    asyncio.run(run())


def test_lists_are_read_to_their_end() -> None:
    def page(start: int, count: int) -> list[dict[str, Any]]:
        adapter = {
            "name": None, "base_model": "m", "lora": {}, "seed": 0, "state": "ready", "num_parameters": 1, "step": 0,
            "next_seq": 1, "last_loss": None, "created_at": "2026-01-01T00:00:00Z", "parent_checkpoint": None,
        }  # fmt: skip
        return [{"id": f"ad_{n}", **adapter} for n in range(start, start + count)]

    script = Script(httpx.Response(200, json=page(0, 1000)), httpx.Response(200, json=page(1000, 1)))
    with script.client() as client:
        assert [adapter.id for adapter in client.adapters()] == [f"ad_{n}" for n in range(1001)]
    assert [request.url.params.get("after") for request in script.requests] == [None, "ad_999"]


def event(position: int) -> str:
    data = {
        "position": position, "at": "2026-01-01T00:00:00Z", "type": "optim_step.completed", "adapter_id": "ad_x",
        "seq": None, "causation": 1, "data": {"step": position}, "hash": "h",
    }  # fmt: skip
    return f": ping\r\n\r\nid: {position}\r\nevent: optim_step.completed\r\ndata: {json.dumps(data)}\r\n\r\n"


def torn(*texts: str) -> httpx.Response:
    class Stream(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Any:
            for text in texts:
                yield text.encode()
            raise httpx.ReadError("torn")

        async def __aiter__(self) -> Any:
            for text in texts:
                yield text.encode()
            raise httpx.ReadError("torn")

    return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=Stream())


def event_script() -> Script:
    return Script(
        torn(event(4), event(6), event(9)[:40]),
        httpx.Response(503, json=problem("unavailable", 503)),
        httpx.Response(200, text=event(9)),
        httpx.Response(200, text=event(12)),
    )


def test_events_go_on_where_the_stream_broke() -> None:
    script = event_script()
    with script.client() as client:
        events = client.events(after=3)
        assert [next(events).position for _ in range(4)] == [4, 6, 9, 12]
        events.close()
    assert [request.headers["Last-Event-ID"] for request in script.requests] == ["3", "6", "6", "9"]


def test_async_events_go_on_where_the_stream_broke() -> None:
    script = event_script()

    async def run() -> list[int]:
        async with AsyncClient("http://server", retry=QUICK, transport_=httpx.MockTransport(script)) as client:
            events = client.events(after=3)
            positions = [(await anext(events)).position for _ in range(4)]
            await events.aclose()
            return positions

    assert asyncio.run(run()) == [4, 6, 9, 12]
    assert [request.headers["Last-Event-ID"] for request in script.requests] == ["3", "6", "6", "9"]


def test_events_from_now_on_are_not_lost_with_the_connection() -> None:
    """It breaks before the first event: the server has said where the stream began."""
    script = Script(torn("id: 41\r\n: after 41\r\n\r\n"), httpx.Response(200, text=event(42)))
    with script.client() as client:
        events = client.events()
        assert next(events).position == 42
        events.close()
    assert [request.headers.get("Last-Event-ID") for request in script.requests] == [None, "41"]


def tar_of(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("SLASH", "/").replace("DOTS", "..").replace("DOT", "."))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_a_checkpoint_becomes_a_directory(tmp_path: Path) -> None:
    content = tar_of(ck_1SLASHadapter_configDOTjson=b"{}", ck_1SLASHadapter_modelDOTsafetensors=b"w")
    script = Script(httpx.ReadError("torn"), httpx.Response(200, content=content))
    with script.client() as client:
        found = client.download_checkpoint("ck_1", tmp_path / "mine")
    assert found == tmp_path / "mine"
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"w",
    }


@pytest.mark.parametrize("name", ["DOTSSLASHevil", "SLASHetcSLASHevil", "aSLASHbSLASHevil", "aSLASHDOTS"])
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    script = Script(httpx.Response(200, content=tar_of(**{name: b"x"})))
    with script.client() as client, pytest.raises(Exception, match="unexpected name"):
        client.download_checkpoint("ck_1", tmp_path / "inner" / "mine")
    assert not list(tmp_path.iterdir())


def test_settings_are_checked_before_anything_is_sent() -> None:
    script = Script()
    with script.client() as client:
        adapter = Adapter(client, "ad_x")
        with pytest.raises(InvalidRequest, match="learning_rate"):
            adapter.optim_step(learning_rate=-1)
        with pytest.raises(InvalidRequest, match="learning_rat"):
            adapter.optim_step(learning_rat=1)  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest, match="max_tokens"):
            adapter.sample([1], max_tokens=0)
        with pytest.raises(InvalidRequest, match="rank"):
            client.add_lora(rank=0)
        with pytest.raises(InvalidRequest, match="rank, alpha"):
            client.add_lora(rank=4, alpha=8, checkpoint="ck_1")
        bad = supervised([1, 2])
        bad.loss_inputs["weights"][0] = float("nan")
        with pytest.raises(InvalidRequest, match=r"datum 1.*weights.*not finite"):
            adapter.forward_backward([DATUM, bad])
    assert script.requests == []


def test_one_stop_text_is_not_taken_apart_into_letters() -> None:
    script = Script(httpx.Response(202, json=future()))
    with script.client() as client:
        client.sample([1, 2], stop="end", temperature=0)
    assert json.loads(script.requests[0].content)["params"]["stop"] == ["end"]


def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKERBELL_URL", "localhost:8080")
    with pytest.raises(InvalidRequest, match="localhost:8080"):
        Client()


def test_the_environment_names_server_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKERBELL_URL", "http://elsewhere:1")
    monkeypatch.setenv("TINKERBELL_API_KEY", "tb-k_2-s")
    script = Script(httpx.Response(200, json=[]))
    with Client(transport_=httpx.MockTransport(script)) as client:
        client.models()
    assert script.requests[0].url.host == "elsewhere"
    assert script.requests[0].headers["Authorization"] == "Bearer tb-k_2-s"


def test_importing_the_client_imports_no_server_and_no_tensors() -> None:
    code = """
import sys
import tinkerbell.sdk
found = {module.partition(".")[0] for module in sys.modules}
sys.exit(" ".join(found & {"torch", "numpy", "litestar", "sqlalchemy", "transformers"}) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
