"""A run is a function of its log: executed again it is the same to the bit, and what was changed is found and named."""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from tests.support import runs
from tests.support.owner import as_owner, decrypted, forge
from tinkerbell.cli.main import run as command_line
from tinkerbell.config import Settings
from tinkerbell.errors import InvalidRequest, NotFound, SchemaOutdated
from tinkerbell.events import codec, kinds
from tinkerbell.events import tables as t
from tinkerbell.events.store import EventStore
from tinkerbell.replay import DatabaseLog, ExecutorChoice, Report, verify


def verified(settings: Settings, run: str = runs.RUN, **options: Any) -> Report:
    with closing(DatabaseLog.open(settings)) as log:
        return verify(log, run, **options)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Settings:
    """Two runs on SQLite, for tests that copy them."""
    directory = tmp_path_factory.mktemp("recorded")
    shutil.copyfile(sqlite_template, directory / "tinkerbell.db")
    settings = runs.run_settings(Settings(data_dir=str(directory), executor="fake"))
    with closing(EventStore.open(settings)) as store:
        runs.record(store, settings)
    return settings


@pytest.fixture
def copied(recorded: Settings, tmp_path: Path) -> Settings:
    """The same, for a test that changes it."""
    shutil.copytree(recorded.data_dir, tmp_path / "copy")
    return msgspec.structs.replace(recorded, data_dir=str(tmp_path / "copy"))


def row(settings: Settings, type_: str, number: int = 2, run: str | None = runs.RUN) -> Any:
    """The row of an event of the run, counted from 0."""
    of_run = t.events.c.adapter == run if run is not None else sa.true()
    query = sa.select(t.events).where(t.events.c.type == type_, of_run).order_by(t.events.c.position)
    with as_owner(settings) as connection:
        return connection.execute(query.offset(number).limit(1)).mappings().one()


# ---- what is as recorded ---------------------------------------------------------------------------------------------


def test_a_live_server_is_verified_and_not_disturbed(store: EventStore, database_settings: Settings) -> None:
    """On SQLite and Postgres, while the scheduler leads and another tenant trains."""
    settings = runs.run_settings(database_settings)
    with runs.serving(store, settings):
        runs.train(store, runs.RUN, "alice").wait()
        other = runs.train(store, runs.OTHER, "bob")
        report = verified(settings, samples=True)
        other.wait()
    assert (report.verdict, report.findings, report.differences, report.tolerance) == ("equal", [], [], None)
    # A load took the step count from 5 back to 3.
    assert [point.step for point in report.points] == [1, 2, 3, 4, 5, 4, 5]
    assert all(point.recorded == point.replayed for point in report.points)
    # 7 forward, 14 forward_backward, 8 optim_step (one failed), load, sample.
    assert report.num_executed == 31 and report.num_skipped == 0
    assert report.num_compared > 100
    epochs = [each.event for each in store.read(types=["lease.granted"])]
    assert len(epochs) == 1, "a replay takes no lease"
    store.check()


def test_nothing_is_written(copied: Settings) -> None:
    def everything() -> list[Any]:
        with as_owner(copied) as connection:
            return [connection.execute(sa.select(table)).all() for table in t.metadata.sorted_tables]

    before = everything()
    files = sorted(str(path) for path in copied.blob_dir.rglob("*"))
    verified(copied)
    assert everything() == before
    assert sorted(str(path) for path in copied.blob_dir.rglob("*")) == files


@pytest.mark.parametrize("run", ["run", runs.OTHER])
def test_by_name_and_by_id(recorded: Settings, run: str) -> None:
    report = verified(recorded, run)
    assert report.verdict == "equal" and report.num_skipped == 1, "the sample"


@pytest.mark.parametrize("since", ["step:1", "5", "step:5"])
def test_from_a_saved_state(recorded: Settings, since: str) -> None:
    whole, part = verified(recorded), verified(recorded, since=since)
    assert part.verdict == "equal"
    assert part.points == whole.points[len(whole.points) - len(part.points) :]
    if since == "step:5":
        # The load stands after the first step 5, so the last saved state is behind it.
        assert part.begun_at_step >= 3 and part.num_executed < whole.num_executed


def test_a_server_that_was_restarted_with_other_settings(settings: Settings) -> None:
    """Every part is executed in the environment it was recorded in, with what had been accumulated before."""
    first = runs.run_settings(settings)
    second = msgspec.structs.replace(first, executor_options={"rounding_ppm": "1"})
    with closing(EventStore.open(first)) as store:
        with runs.serving(store, first):
            asker = runs.train(store, runs.RUN, "alice", steps=2, load=False)
            asker.train(runs.data(7))
            asker.wait()
        with runs.serving(store, second):
            asker.train(runs.data(8))
            asker.step()
            asker.wait()
    report = verified(first)
    assert report.verdict == "equal" and report.points[-1].step == 3
    assert report.num_compared > 30 and not report.differences


def test_a_run_with_dead_executors_and_a_new_leader_in_it(settings: Settings) -> None:
    """Batches that were lost are planned again, and what was executed twice counts once."""
    slow = msgspec.structs.replace(runs.run_settings(settings), executor_options={"latency_us": "15000"})
    with closing(EventStore.open(slow)) as store:
        asker = runs.train(store, runs.RUN, "alice", steps=4)
        for kills in (2, 0):
            with runs.serving(store, slow) as service:
                for _ in range(kills):
                    before = len(store.read(types=["optim_step.completed"]))
                    runs.eventually(lambda n=before: len(store.read(types=["optim_step.completed"])) > n)
                    pid = service.executor_pid
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
                    runs.eventually(lambda old=pid: service.executor_pid not in (old, None))
                if kills == 0:
                    asker.wait()
        lost = store.read(types=["batch.lost"])
    assert lost, "else this shows nothing"
    report = verified(slow, choice=ExecutorChoice(options={}))
    assert (report.verdict, report.findings) == ("equal", [])
    assert [point.step for point in report.points] == [1, 2, 3, 4]


# ---- what is not -----------------------------------------------------------------------------------------------------


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_changed_byte_of_a_body_is_named(copied: Settings) -> None:
    at = row(copied, "forward_backward.requested")
    with as_owner(copied) as connection:
        changed = t.events.update().where(t.events.c.position == at["position"])
        connection.execute(changed.values(body=flipped(at["body"], 20)))
    report = verified(copied)
    assert report.verdict == "diverged" and report.num_executed == 0
    assert [(each.what, each.position) for each in report.findings] == [("body", at["position"])]


def other_token(body: kinds.ForwardBackwardBody) -> kinds.ForwardBackwardBody:
    first = body.data[0]
    tokens = first.tokens[:-4] + runs.ints(99)
    return kinds.ForwardBackwardBody(data=[msgspec.structs.replace(first, tokens=tokens), *body.data[1:]])


def test_a_forged_body_comes_to_something_else(copied: Settings) -> None:
    """Whoever changes a body and all hashes after it cannot change what the gradients came to."""
    at = row(copied, "forward_backward.requested")
    body = codec.decode_body(at["type"], at["body_codec"], decrypted(copied, at["body"]))
    assert isinstance(body, kinds.ForwardBackwardBody)
    stored, codec_name, length = codec.encode_body(other_token(body))
    digest = hashlib.sha256(stored).digest()
    forge(copied, at["position"], body=stored, body_codec=codec_name, body_hash=digest, body_len=length)
    report = verified(copied)
    assert {each.what for each in report.findings} >= {"loss", "logprobs"}
    assert {each.seq for each in report.findings} == {at["seq"]}
    assert verified(copied, runs.OTHER).verdict == "equal", "and nobody else's run is touched"


def test_forged_outputs_are_named(copied: Settings) -> None:
    at = row(copied, "forward.completed", 0)
    body = codec.decode_body(at["type"], at["body_codec"], decrypted(copied, at["body"]))
    assert isinstance(body, kinds.OutputsBody) and body.outputs
    first = body.outputs[0]
    assert first.entropy is not None
    outputs = [msgspec.structs.replace(first, entropy=flipped(first.entropy, 0)), *body.outputs[1:]]
    stored, codec_name, length = codec.encode_body(kinds.OutputsBody(body.logprobs, outputs))
    digest = hashlib.sha256(stored).digest()
    forge(copied, at["position"], body=stored, body_codec=codec_name, body_hash=digest, body_len=length)
    (found,) = verified(copied).findings
    assert (found.what, found.position) == ("outputs", at["position"])


@pytest.mark.parametrize("forged", ["prompt_logprobs", "prompt_scores", "sequences"])
def test_forged_distributions_of_a_sample_are_named(copied: Settings, forged: str) -> None:
    """Of the prompt and of a sampled token; tokens and their own logprobs stay as they were."""
    at = row(copied, "sample.completed", 0)
    body = codec.decode_body(at["type"], at["body_codec"], decrypted(copied, at["body"]))
    assert isinstance(body, kinds.SamplesBody) and body.prompt_scores is not None
    first, scores = body.sequences[0], body.prompt_scores
    assert body.prompt_logprobs and first.top_logprobs and scores.target_logprobs
    others = {
        "prompt_logprobs": flipped(body.prompt_logprobs, 0),
        "prompt_scores": msgspec.structs.replace(scores, target_logprobs=flipped(scores.target_logprobs, 8)),
        "sequences": [
            msgspec.structs.replace(first, top_logprobs=flipped(first.top_logprobs, 0)),
            *body.sequences[1:],
        ],
    }
    stored, codec_name, length = codec.encode_body(msgspec.structs.replace(body, **{forged: others[forged]}))
    digest = hashlib.sha256(stored).digest()
    forge(copied, at["position"], body=stored, body_codec=codec_name, body_hash=digest, body_len=length)
    (found,) = verified(copied, samples=True).findings
    assert (found.what, found.position) == ("sample", at["position"])


@pytest.mark.postgres
def test_the_same_on_postgres(postgres_url: str, settings: Settings) -> None:
    on_postgres = msgspec.structs.replace(runs.run_settings(settings), database_url=postgres_url)
    with closing(EventStore.open(on_postgres)) as store, runs.serving(store, on_postgres):
        runs.train(store, runs.RUN, "alice", steps=2, load=False).wait()
    assert verified(on_postgres).verdict == "equal"
    at = row(on_postgres, "optim_step.completed", 1)
    event = msgspec.json.decode(at["data"])
    forge(on_postgres, at["position"], data=at["data"].replace(event["weights_digest"], "ab" * 32))
    assert [(each.what, each.position) for each in verified(on_postgres).findings] == [("weights", at["position"])]
    asked = row(on_postgres, "forward_backward.requested")
    with as_owner(on_postgres) as connection:
        changed = t.events.update().where(t.events.c.position == asked["position"])
        connection.execute(changed.values(body=flipped(asked["body"], 20)))
    assert [(each.what, each.position) for each in verified(on_postgres).findings] == [("body", asked["position"])]


def test_a_changed_row_breaks_the_chain(copied: Settings) -> None:
    at = row(copied, "optim_step.requested")
    with as_owner(copied) as connection:
        changed = t.events.update().where(t.events.c.position == at["position"])
        connection.execute(changed.values(data=at["data"].replace("0.05", "0.06")))
    report = verified(copied)
    assert [(each.what, each.position) for each in report.findings] == [("chain", at["position"])]


def test_a_removed_event_breaks_the_chain(copied: Settings) -> None:
    at = row(copied, "forward.completed")
    with as_owner(copied) as connection:
        connection.execute(t.events.delete().where(t.events.c.position == at["position"]))
    report = verified(copied)
    assert report.findings[0].what == "chain" and "version" in str(report.findings[0].found)


def plan_of(settings: Settings, position: int) -> Any:
    """The batch.planned that ran the request."""
    with as_owner(settings) as connection:
        query = sa.select(t.events).where(t.events.c.type == "batch.planned")
        for found in connection.execute(query).mappings():
            if f"[{position}," in found["data"]:
                return found
    raise AssertionError("no plan")


@pytest.mark.parametrize("rehashed", [False, True])
def test_a_changed_plan_is_named(copied: Settings, rehashed: bool) -> None:
    at = row(copied, "forward_backward.requested")
    plan = plan_of(copied, at["position"])
    data = plan["data"].replace(f"[{at['position']},0,2]", f"[{at['position']},0,1]")
    assert data != plan["data"]
    if rehashed:
        forge(copied, plan["position"], data=data)
    else:
        with as_owner(copied) as connection:
            connection.execute(t.events.update().where(t.events.c.position == plan["position"]).values(data=data))
    report = verified(copied)
    assert report.verdict == "diverged"
    whats = [each.what for each in report.findings]
    assert whats == ["plan"] if rehashed else set(whats) == {"chain", "plan"}
    plan_finding = next(each for each in report.findings if each.what == "plan")
    assert plan_finding.seq == at["seq"] and "(0, 1)" in str(plan_finding.recorded)


@pytest.mark.parametrize(
    ("type_", "field", "what"),
    [
        ("optim_step.completed", "gradient_digest", "gradient"),
        ("optim_step.completed", "weights_digest", "weights"),
        ("optim_step.completed", "state_digest", "state"),
        ("optim_step.completed", "grad_norm", "grad_norm"),
        ("forward_backward.completed", "logprobs_digest", "logprobs"),
        ("forward_backward.completed", "loss", "loss"),
        ("forward.completed", "logprobs_digest", "logprobs"),
        ("load.completed", "state_digest", "state"),
        ("save.completed", "state_digest", "checkpoint"),
        ("checkpoint.written", "state_digest", "checkpoint"),
        ("add_lora.completed", "state_digest", "state"),
    ],
)
def test_a_forged_result_is_named(copied: Settings, type_: str, field: str, what: str) -> None:
    at = row(copied, type_, 0)
    event = msgspec.json.decode(at["data"])
    forged = 0.125 if isinstance(event[field], float) else "ab" * 32
    forge(copied, at["position"], data=codec.canonical_json({**event, field: forged}))
    report = verified(copied)
    assert report.verdict == "diverged"
    first = report.findings[0]
    assert (first.what, first.position) == (what, at["position"])
    assert first.recorded == forged and first.found not in (forged, None)


def test_keep_going_names_all(copied: Settings) -> None:
    for number in (0, 3):
        at = row(copied, "optim_step.completed", number)
        event = msgspec.json.decode(at["data"])
        forge(copied, at["position"], data=at["data"].replace(event["gradient_digest"], "ab" * 32))
    assert len(verified(copied).findings) == 1
    report = verified(copied, keep_going=True)
    assert [each.what for each in report.findings] == ["gradient", "gradient"]
    assert len(report.points) == 7


def test_a_failure_that_does_not_happen_again_is_named(copied: Settings) -> None:
    at = row(copied, "optim_step.failed", 0)
    forge(copied, at["position"], data=at["data"].replace("no-gradients", "non-finite"))
    report = verified(copied)
    assert [(each.what, each.recorded, each.found) for each in report.findings] == [
        ("outcome", "failed: non-finite", "failed: no-gradients")
    ]


def test_a_changed_or_missing_blob_is_named(copied: Settings) -> None:
    saved = row(copied, "save.completed", 0)
    with as_owner(copied) as connection:
        query = sa.select(t.event_blobs.c.blob_hash)
        digest = connection.execute(query.where(t.event_blobs.c.position == saved["position"])).scalars().first().hex()
    path = copied.blob_dir / digest[:2] / digest[2:4] / digest
    path.write_bytes(flipped(path.read_bytes(), 10))
    for what in ("other bytes", "missing"):
        report = verified(copied)
        assert saved["position"] in [each.position for each in report.findings if each.what == "body"], what
        assert what in str(report.findings[0].found)
        path.unlink(missing_ok=True)


def test_another_environment_is_named_and_compared_within_bounds(recorded: Settings) -> None:
    other = ExecutorChoice(options={"vocab_size": "300"})
    report = verified(recorded, choice=other)
    assert [(each.fact, each.recorded, each.found) for each in report.differences] == [("vocab_size", "256", "300")]
    assert report.verdict == "diverged", "another vocabulary is another model"
    assert report.tolerance is not None and report.findings[0].what == "loss"
    wide = verified(recorded, choice=other, rtol=1.0, samples=True)
    assert wide.verdict == "within tolerance" and not wide.findings
    assert 0 < wide.deviations.loss < 1


# ---- what cannot be executed -----------------------------------------------------------------------------------------


@pytest.fixture
def errors(recorded: Settings) -> Iterator[Callable[..., None]]:
    def expect(error: type[Exception], match: str, run: str = runs.RUN, **options: Any) -> None:
        with pytest.raises(error, match=match):
            verified(recorded, run, **options)

    yield expect


def test_what_is_not_there(errors: Callable[..., None], tmp_path: Path) -> None:
    errors(NotFound, "no run ad_nobody", "ad_nobody")
    errors(NotFound, "has not come to step:99; it is answered up to seq", since="step:99")
    errors(InvalidRequest, "neither SEQ", since="step:")
    errors(Exception, "nosuch", choice=ExecutorChoice(executor="nosuch"))
    with pytest.raises(NotFound, match="no log"):
        DatabaseLog.open(Settings(data_dir=str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists(), "looking makes nothing"


def test_an_old_schema_is_refused(copied: Settings) -> None:
    with as_owner(copied) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'old'")
    with pytest.raises(SchemaOutdated):
        DatabaseLog.open(copied)


def test_a_checkpoint_that_is_gone_cannot_be_loaded(copied: Settings) -> None:
    """Found before anything is executed; the command says 1, since the log is not what it was."""
    saved = row(copied, "save.completed", 0)
    with as_owner(copied) as connection:
        connection.execute(t.event_blobs.delete().where(t.event_blobs.c.position == saved["position"]))
    assert verified(copied).findings[0].what == "chain"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["verify", runs.RUN], 0),
        (["verify", runs.RUN, "--executor-option", "vocab_size=300"], 1),
        (["verify", "ad_nobody"], 2),
        (["verify", runs.RUN, "--executor", "nosuch"], 2),
        (["verify", runs.RUN, "--plot", "losses.gif"], 2),
        (["state", runs.RUN, "--at", "step:1000", "--out", "nowhere"], 2),
    ],
)
def test_exit_statuses(
    recorded: Settings, arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(["replay", *arguments, "--data-dir", recorded.data_dir]) == status
    said = capsys.readouterr()
    assert ("cannot be executed" in said.err) == (status == 2)
    assert ("first divergence" in said.out) == (status == 1)


def test_a_body_that_is_no_body_is_named(copied: Settings) -> None:
    """Forged so that every hash holds, but no release ever wrote it."""
    at = row(copied, "forward_backward.requested")
    stored = b"\x00nothing"
    digest = hashlib.sha256(stored).digest()
    forge(copied, at["position"], body=stored, body_hash=digest)
    report = verified(copied)
    assert [(each.what, each.position) for each in report.findings] == [("body", at["position"])]
    assert "cannot be read" in str(report.findings[0].found)
