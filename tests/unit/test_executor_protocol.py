"""Messages and frames between server and executor process, and how executors are found."""

import socket
import threading
from importlib.metadata import EntryPoint

import pytest

from tests.support.executor_driver import ints
from tinkerbell import errors
from tinkerbell.executors import protocol, registry
from tinkerbell.executors.port import AdapterReport, AdapterState, Batch, BatchResult, Sample, UnitFailed
from tinkerbell.types import LoraConfig, SamplingParams

STATE = AdapterState(
    lora=LoraConfig(rank=2), step=1, weights=b"\0\1" * 9, adapter_config=b"{}", optimizer=None, digest="00"
)
COMMANDS = [
    protocol.Start(protocol.ExecutorOptions(model="m", threads=2, extra={"a": "b"})),
    protocol.Describe(),
    protocol.Create("ad_1", LoraConfig(), 5),
    protocol.Load("ad_1", STATE, True),
    protocol.Snapshot("ad_1"),
    protocol.Remove("ad_1"),
    protocol.Run(
        Batch(id="1.1", units=[Sample(request=1, adapter=None, prompt=ints([1]), params=SamplingParams(), seed=2)])
    ),
    protocol.Stop(),
]
REPLIES = [
    protocol.Reported(AdapterReport(num_parameters=1, step=0, state_digest="x"), 5),
    protocol.Snapped(STATE, 5),
    protocol.Removed(5),
    protocol.Ran(BatchResult(results=[UnitFailed(request=1, category="user", code="c", message="m")], busy_us=3), 5),
    protocol.Failed(slug="not-found", detail="d", category="user", busy_us=1),
]


def test_messages_survive_the_wire() -> None:
    for command in COMMANDS:
        body = protocol.frame(command)[protocol.HEADER.size :]
        assert protocol.command_decoder.decode(body) == command
    for reply in REPLIES:
        body = protocol.frame(reply)[protocol.HEADER.size :]
        assert protocol.reply_decoder.decode(body) == reply


def test_frames_of_many_megabytes_and_the_end_of_the_stream() -> None:
    ours, theirs = socket.socketpair()
    big = protocol.Load("ad_1", AdapterState(**{**_fields(STATE), "weights": bytes(30_000_000)}), True)

    def write() -> None:
        with theirs:
            theirs.sendall(protocol.frame(big) + protocol.frame(protocol.Describe()) + b"\7\0\0")

    writer = threading.Thread(target=write)
    writer.start()
    with ours:
        first = protocol.read_frame(ours)
        assert first is not None
        assert protocol.command_decoder.decode(first) == big
        second = protocol.read_frame(ours)
        assert second is not None
        assert protocol.command_decoder.decode(second) == protocol.Describe()
        assert protocol.read_frame(ours) is None
    writer.join()


def _fields(state: AdapterState) -> dict[str, object]:
    return {name: getattr(state, name) for name in state.__struct_fields__}


def test_a_senseless_length_is_not_believed() -> None:
    with pytest.raises(errors.ExecutorDied, match="garbled"):
        protocol.frame_length(b"\xff" * 8)


@pytest.mark.parametrize(
    "exc",
    [
        errors.NotFound("no model"),
        errors.InvalidRequest("bad"),
        errors.MissingPackage("pip install it"),
        errors.ServerError("broken"),
        errors.Corrupt("bytes"),
    ],
)
def test_errors_come_back_as_what_they_were(exc: errors.TinkerbellError) -> None:
    back = protocol.failed(exc, 1).exception()
    assert type(back) is type(exc)
    assert back.detail == exc.detail


def test_errors_of_unknown_classes_keep_their_side() -> None:
    """An executor under another interpreter may know classes this process does not."""
    user = protocol.Failed(slug="of-a-plugin", detail="d", category="user", busy_us=0).exception()
    server = protocol.Failed(slug="of-a-plugin", detail="d", category="server", busy_us=0).exception()
    assert type(user) is errors.UserError
    assert type(server) is errors.ServerError


def test_executors_are_found_by_name() -> None:
    assert {"fake", "hf"} <= set(registry.kinds())
    with pytest.raises(errors.InvalidRequest, match="fake"):
        registry.load("no_such_executor")


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="hf", value="a_package_nobody_has.executor:Executor", group=registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(errors.MissingPackage) as caught:
        registry.load("hf")
    assert 'pip install "tinkerbell-server[hf]"' in caught.value.detail
    assert "a_package_nobody_has" in caught.value.detail


def test_a_missing_part_of_ours_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="hf", value="tinkerbell.no_such_module:Executor", group=registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(errors.ServerError, match="not part of this installation"):
        registry.load("hf")
