"""The client against a real server process with the fake executor: every verb, and a server that is killed."""

import asyncio
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.rounding import CLOSE
from tests.support.server import fake_server
from tests.support.waiting import PATIENCE_S
from tinkerbell import wire
from tinkerbell.cli.keys import create_key
from tinkerbell.config import Settings
from tinkerbell.demo.byte_tokenizer import ByteTokenizer
from tinkerbell.sdk import (
    AsyncClient,
    Client,
    InvalidRequest,
    NotFound,
    RequestFailed,
    RetryPolicy,
    TinkerbellError,
    TooManyRequests,
    Unauthorized,
    from_text,
    policy,
    supervised,
)
from tinkerbell.sdk.settings import Sampling

DATA = [supervised([1, 2, 3, 4]), supervised([5, 6, 7], prompt_length=2)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fake_server(tmp_path_factory.mktemp("sdk") / "data") as server:
        yield server.url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def test_outputs_of_a_forward(client: Client) -> None:
    adapter = client.add_lora(rank=4, alpha=8, targets=["q_proj", "v_proj"], seed=3)
    adapter.forward_backward(DATA)
    adapter.optim_step(learning_rate=0.05)
    asked = adapter.forward(DATA, entropy=True, logsumexp=True, top_k=3, logits=True)
    result, bare = asked.result(), adapter.forward(DATA).result()
    assert bare.outputs is None and result.logprobs == bare.logprobs
    assert result.outputs is not None
    for datum, logprobs, outputs in zip(DATA, result.logprobs, result.outputs, strict=True):
        assert outputs.entropy and outputs.logsumexp and outputs.top_tokens and outputs.top_logprobs and outputs.logits
        rows = outputs.logits.rows().tolist()
        assert (len(rows), len(rows[0])) == outputs.logits.shape == (len(datum.tokens), 256)
        for t, row in enumerate(rows):
            lse = outputs.logsumexp[t]
            assert row[datum.targets[t]] - lse == pytest.approx(logprobs[t], abs=CLOSE)
            assert outputs.entropy[t] == pytest.approx(sum(math.exp(z - lse) * (lse - z) for z in row), abs=CLOSE)
            assert outputs.top_tokens[t] == sorted(range(256), key=lambda v: (-row[v], v))[:3]
            assert outputs.top_logprobs[t] == pytest.approx([row[v] - lse for v in outputs.top_tokens[t]], abs=CLOSE)
    assert client.future(asked.id).result() == result


def test_several_targets_of_a_token(client: Client) -> None:
    adapter = client.add_lora(rank=4, alpha=8, targets=["q_proj"], seed=3)
    weights = [0.75, 0.25, 1.0, 0.0, 0.5, 0.5]
    data = [wire.DatumBody(tokens=[1, 2, 3], targets=[2, 9, 3, 8, 4, 4], loss_inputs={"weights": weights})]
    outputs = adapter.forward(data, num_targets=2, logits=True, logsumexp=True).result()
    result = adapter.forward_backward(data, num_targets=2).result()
    assert (result.num_tokens, result.num_targets) == (3, 2) and result.logprobs == outputs.logprobs
    (found,) = outputs.outputs or []
    assert found.logits is not None and found.logsumexp is not None
    rows = found.logits.rows()
    for i, (target, logprob) in enumerate(zip(data[0].targets, result.logprobs[0], strict=True)):
        assert rows[i // 2, target] - found.logsumexp[i // 2] == pytest.approx(logprob, abs=CLOSE)
    assert result.loss == pytest.approx(-sum(w * p for w, p in zip(weights, result.logprobs[0], strict=True)))
    assert adapter.optim_step().result().step == 1
    with pytest.raises(InvalidRequest, match="3 tokens and 6 targets; it must have as many times 3"):
        adapter.forward_backward(data, num_targets=3)


def test_distributions_of_a_sample(client: Client) -> None:
    """What is answered of prompt and samples is what a forward says of the same tokens."""
    adapter = client.add_lora(rank=4, alpha=8, targets=["q_proj", "v_proj"], seed=3)
    adapter.forward_backward(DATA)
    adapter.optim_step(learning_rate=0.05)
    settings: Sampling = {"max_tokens": 4, "num_samples": 2, "seed": 1, "stop_tokens": []}
    targets = np.array([[7, 8], [9, -1], [-1, 3]])
    asked = adapter.sample(
        [1, 2, 3], **settings, top_logprobs=3, prompt_top_logprobs=2, prompt_draws=4,
        prompt_targets=targets,
    )  # fmt: skip
    result, bare = asked.result(), adapter.sample([1, 2, 3], **settings).result()
    assert client.future(asked.id).result() == result
    assert (bare.prompt_top_tokens, bare.prompt_target_logprobs, bare.sequences[0].top_tokens) == (None, None, None)
    for sequence, alone in zip(result.sequences, bare.sequences, strict=True):
        assert (sequence.tokens, sequence.logprobs) == (alone.tokens, alone.logprobs)
        forward = adapter.forward([supervised([1, 2, 3, *sequence.tokens])], top_k=3, logits=True, logsumexp=True)
        (outputs,) = forward.result().outputs or []
        assert outputs.top_tokens and outputs.top_logprobs and outputs.logits and outputs.logsumexp
        assert (sequence.top_tokens, sequence.top_logprobs) == (outputs.top_tokens[2:], outputs.top_logprobs[2:])
        assert result.prompt_top_tokens == [row[:2] for row in outputs.top_tokens[:2]]
        assert result.prompt_top_logprobs == [row[:2] for row in outputs.top_logprobs[:2]]
        logits, lse = outputs.logits.rows(), outputs.logsumexp
        (first, second, third) = result.prompt_target_logprobs or []
        assert first == [None, None]
        assert second == [pytest.approx(logits[0, 9] - lse[0], abs=CLOSE), None]
        assert third == [None, pytest.approx(logits[1, 3] - lse[1], abs=CLOSE)]
        drawn = zip(result.prompt_drawn_tokens or [], result.prompt_drawn_logprobs or [], strict=True)
        for n, (tokens, logprobs) in enumerate(drawn):
            assert logprobs == pytest.approx([logits[n, token] - lse[n] for token in tokens], abs=CLOSE)
        assert n == 1 and len(tokens) == 4
    base = client.sample([1], max_tokens=1, prompt_targets=[[5]]).result()
    assert base.prompt_target_logprobs == [[None]]
    with pytest.raises(InvalidRequest, match="has 1 rows for 2 prompt tokens"):
        adapter.sample([1, 2], max_tokens=1, prompt_targets=[[5]])


def test_large_outputs_come_back_from_a_blob_and_too_large_ones_are_refused(client: Client) -> None:
    """16 MiB are 16384 tokens of this model's logits."""
    adapter = client.add_lora(rank=4, alpha=8, targets=["q_proj"])
    long = supervised([1 + n % 200 for n in range(1001)])
    (outputs,) = adapter.forward([long], logits=True).result().outputs or []
    assert outputs.logits is not None and outputs.logits.shape == (1000, 256)
    rows = outputs.logits.rows()
    assert [rows[0, v] for v in range(256)] == [rows[200, v] for v in range(256)]
    with pytest.raises(TinkerbellError, match=r"would have 17408000 bytes; those of a request may have 16777216"):
        adapter.forward([long] * 17, logits=True)
    with pytest.raises(InvalidRequest, match="top_k"):
        adapter.forward([long], top_k=65)


def test_train_sample_save_load_remove(client: Client, tmp_path: Path) -> None:
    adapter = client.add_lora(rank=4, alpha=8, targets=["q_proj", "v_proj"], seed=3, name="mine")
    losses = []
    for step in range(1, 6):
        gradients = adapter.forward_backward(DATA)
        update = adapter.optim_step(learning_rate=0.05)
        losses.append(gradients.result().loss)
        assert update.result().step == step
    assert losses[-1] < losses[0]
    assert [len(logprobs) for logprobs in gradients.result().logprobs] == [3, 2]

    saved = adapter.save("five").result()
    before = adapter.forward(DATA).result()
    sampled = adapter.sample([1, 2], max_tokens=5, num_samples=2, seed=1, stop_tokens=[], prompt_logprobs=True).result()
    assert [len(sequence.tokens) for sequence in sampled.sequences] == [5, 5]
    assert sampled.step == 5
    assert sampled.prompt_logprobs is not None
    assert len(sampled.prompt_logprobs) == 1

    adapter.forward_backward(DATA)
    adapter.optim_step(learning_rate=0.5)
    assert adapter.load(saved).result().step == 5
    assert adapter.forward(DATA).result() == before

    copy = client.add_lora(checkpoint=saved)
    assert copy.forward(DATA).result() == before
    (listed,) = adapter.checkpoints()
    assert (listed.id, listed.name, listed.step) == (saved.checkpoint_id, "five", 5)
    files = {file.name for file in client.download_checkpoint(listed, tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    files = {file.name for file in client.download_checkpoint(listed, tmp_path / "full", with_optimizer=True).iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"}

    assert adapter.info().name == "mine"
    assert [point.step for point in adapter.run().points][:5] == [1, 2, 3, 4, 5]
    adapter.remove().result()
    with pytest.raises(NotFound):
        adapter.optim_step()


def test_reward_raises_what_is_rewarded(client: Client) -> None:
    adapter = client.add_lora(rank=8, seed=0)
    prompt, wanted = [1], 7
    start = adapter.forward([supervised([1, wanted])]).result().logprobs[0][0]
    for step in range(10):
        samples = adapter.sample(prompt, max_tokens=1, num_samples=64, stop_tokens=[], seed=step).result().sequences
        batch = [
            policy(prompt, sample.tokens, sample.logprobs, 1.0 if sample.tokens == [wanted] else -0.02)
            for sample in samples
        ]
        adapter.forward_backward(batch, loss="importance_sampling")
        adapter.forward_backward([supervised([1, wanted])])
        adapter.optim_step(learning_rate=0.05)
    assert adapter.forward([supervised([1, wanted])]).result().logprobs[0][0] > start + 0.5


def test_a_failure_is_the_future_s_and_the_adapter_lives_on(client: Client) -> None:
    adapter = client.add_lora(rank=2)
    step = adapter.optim_step()
    gradients = adapter.forward_backward(DATA)
    with pytest.raises(RequestFailed) as caught:
        step.result()
    assert (caught.value.code, caught.value.category) == ("no-gradients", "user")
    assert gradients.result().num_tokens == 5
    again = client.future(step.id)
    with pytest.raises(RequestFailed):
        again.result()


def test_what_is_wrong_is_told_by_its_class(client: Client) -> None:
    adapter = client.add_lora(rank=2)
    with pytest.raises(InvalidRequest, match="no_such_loss"):
        adapter.forward_backward(DATA, loss="no_such_loss")
    with pytest.raises(NotFound):
        client.adapter("ad_" + "a" * 20)
    with pytest.raises(NotFound):
        client.future(10**9)
    with pytest.raises(NotFound, match="no tokenizer"):
        client.tokenizer()


def test_lists_and_bills(client: Client) -> None:
    adapter = client.add_lora(rank=2, wait=False)
    client.gather(adapter.forward_backward(DATA), adapter.sample([1], max_tokens=2), client.sample([1], max_tokens=2))
    assert adapter.id in {each.id for each in client.adapters()}
    assert adapter.id in {run.adapter.id for run in client.runs()}
    kinds = {row.kind: row.num_requests for row in client.usage() if row.adapter_id == adapter.id}
    assert kinds == {"add_lora": 1, "forward_backward": 1, "sample": 1}
    assert client.queue().position > 0
    assert client.limits().quotas["adapters"].limit > 0
    assert client.models()[0].name == "fake"


def test_events_from_the_first_on(client: Client) -> None:
    adapter = client.add_lora(rank=2)
    gradients = adapter.forward_backward(DATA)
    gradients.result()
    events = client.events(after=0)
    mine = [next(event for event in events if event.adapter_id == adapter.id) for _ in range(4)]
    events.close()
    assert [event.type for event in mine] == [
        "add_lora.requested", "add_lora.completed", "forward_backward.requested", "forward_backward.completed",
    ]  # fmt: skip
    assert mine[3].causation == gradients.id


def test_async_pipelines_many_adapters(url: str) -> None:
    async def run(client: AsyncClient, seed: int) -> list[int]:
        adapter = await client.add_lora(rank=2, seed=seed)
        updates = []
        for _ in range(5):
            await adapter.forward_backward(DATA)
            updates.append(await adapter.optim_step(learning_rate=0.01))
        return [update.step for update in await client.gather(*updates)]

    async def main() -> list[list[int]]:
        async with AsyncClient(url) as client:
            return list(await asyncio.gather(*(run(client, seed) for seed in range(6))))

    assert asyncio.run(main()) == [[1, 2, 3, 4, 5]] * 6


def test_a_full_queue_is_ridden_out(tmp_path: Path) -> None:
    options = {"TINKERBELL_LIMITS_MAX_PENDING_REQUESTS": "4"}
    with fake_server(tmp_path / "data", latency_us=20_000, environment=options) as server:
        with Client(server.url, retry=RetryPolicy(give_up_after_s=0.0)) as impatient:
            adapter = impatient.add_lora(rank=2)
            with pytest.raises(TooManyRequests):
                for _ in range(40):
                    adapter.forward_backward(DATA)
        with Client(server.url) as patient:
            futures = [patient.adapter(adapter.id).forward_backward(DATA) for _ in range(8)]
            assert len({future.id for future in futures}) == 8
            patient.gather(*futures, timeout=PATIENCE_S)


def test_a_loop_rides_over_a_killed_server_and_nothing_is_done_twice(tmp_path: Path) -> None:
    """SIGKILL in the middle of a training loop, twice; the script knows nothing of it."""
    steps: list[int] = []
    positions: list[int] = []
    port = _free_port()

    def script() -> None:
        retry = RetryPolicy(give_up_after_s=60.0, longest_delay_s=0.2)
        with Client(f"http://127.0.0.1:{port}", retry=retry) as client:
            adapter = client.add_lora(rank=2, seed=1)
            adapters.append(adapter.id)
            for _ in range(30):
                gradients = adapter.forward_backward(DATA)
                update = adapter.optim_step(learning_rate=0.01)
                positions.extend((gradients.id, update.id))
                steps.append(update.result().step)

    def watch() -> None:
        with Client(f"http://127.0.0.1:{port}", retry=RetryPolicy(give_up_after_s=60.0, longest_delay_s=0.2)) as client:
            for event in client.events(after=0):
                if event.type != "checkpoint.written":
                    seen.append(event.position)
                if event.type == "optim_step.completed" and event.data["step"] == 30:
                    return

    adapters: list[str] = []
    seen: list[int] = []
    threads = [threading.Thread(target=target, daemon=True) for target in (script, watch)]
    for kill_at in (8, 16, None):
        server = fake_server(tmp_path / "data", "--port", str(port), latency_us=5_000)
        with server:
            for thread in threads:
                if not thread.is_alive() and kill_at == 8:
                    thread.start()
            if kill_at is None:
                for thread in threads:
                    thread.join(60)
                assert not any(thread.is_alive() for thread in threads)
                with Client(server.url) as client:
                    run = client.adapter(adapters[0]).run()
            else:
                while len(steps) < kill_at:
                    assert threads[0].is_alive()
                    threads[0].join(0.01)
                server.kill()
    assert steps == list(range(1, 31))
    assert len(set(positions)) == 60
    assert (run.num_requests, run.num_failed, len(run.points)) == (61, 0, 30)
    assert seen == sorted(set(seen))
    assert len(seen) == 2 * 61, "every request and every result, once"


def test_keys_open_their_own_tenant_only(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path / "data"))
    keys = [create_key(settings, tenant) for tenant in ("one", "other")]
    with fake_server(tmp_path / "data") as server:
        mine, theirs = (Client(server.url, key) for key in keys)
        with mine, theirs, Client(server.url) as nobody:
            adapter = mine.add_lora(rank=2)
            assert theirs.adapters() == []
            with pytest.raises(NotFound):
                theirs.adapter(adapter.id)
            with pytest.raises(Unauthorized):
                nobody.adapters()


def test_text_prompts_need_a_tokenizer(client: Client) -> None:
    with pytest.raises(NotFound, match="token ids"):
        client.sample("Hello")


def test_bodies_are_what_the_server_takes(client: Client) -> None:
    """Helpers and server agree on names and lengths: a datum of every helper is accepted as it is."""
    adapter = client.add_lora(rank=2)
    text = from_text(ByteTokenizer(), "ab", "c")
    on_policy = policy([1, 2], [3], [-1.0], 0.5)
    of_a_sequence = policy([1, 2], [3], [-1.0], 0.5, sequence_ratio=True)
    futures = [
        adapter.forward([text]),
        adapter.forward([on_policy], loss="importance_sampling"),
        adapter.forward([on_policy], loss="ppo", config={"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        adapter.forward([on_policy], loss="cispo"),
        adapter.forward([on_policy], loss="dro", config={"beta": 0.1}),
        adapter.forward([of_a_sequence], loss="gspo"),
    ]
    assert [result.num_tokens for result in client.gather(*futures)] == [3, 2, 2, 2, 2, 2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
