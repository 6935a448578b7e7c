"""What an executor runs in: as an event, how two of them differ, and how far numbers may then be apart."""

import hashlib

import msgspec

from tinkerbell.events.kinds import EnvironmentRecorded
from tinkerbell.executors.port import Environment
from tinkerbell.executors.protocol import ExecutorOptions

_encoder = msgspec.json.Encoder(order="deterministic")


def environment_event(environment: Environment, options: ExecutorOptions) -> EnvironmentRecorded:
    """The fact that an executor came up with these options; `digest` is the sha256 (hex) of the environment's canonical
    JSON. The options are no part of it: it says what they came to."""
    return EnvironmentRecorded(
        digest=hashlib.sha256(_encoder.encode(environment)).hexdigest(),
        executor=environment.executor,
        exact=environment.exact,
        model=environment.model,
        facts=environment.facts,
        source=options.model,
        options=options.extra,
    )


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A fact of the environment that is not the same here."""

    fact: str
    recorded: str | None
    found: str | None


def differences(recorded: EnvironmentRecorded, found: EnvironmentRecorded | Environment) -> list[Difference]:
    """Facts that decide bits and differ. Where the model lies on a machine does not: `weights_hash` names it."""
    before, now = _facts(recorded), _facts(found)
    return [
        Difference(fact=name, recorded=before.get(name), found=now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _facts(environment: EnvironmentRecorded | Environment) -> dict[str, str]:
    of_model = {"vocab_size": str(environment.model.vocab_size), "exact": str(environment.exact).lower()}
    return {"executor": environment.executor, **of_model, **environment.facts}


class Tolerance(msgspec.Struct, frozen=True, kw_only=True):
    """How far numbers may be apart where bits are not promised. Rounding grows with every step that is taken."""

    rtol: float
    """Of a loss, relative, per step taken; of logprobs the same, in nats, as the mean over a request."""
    norm_rtol: float
    """Of a gradient's norm, relative, per step taken."""

    def loss(self, step: int) -> float:
        return self.rtol * (1 + step)

    def norm(self, step: int) -> float:
        return self.norm_rtol * (1 + step)


def tolerance_of(dtype: str | None, rtol: float | None = None) -> Tolerance:
    """The bounds for a base model's dtype, or `rtol` for all of them.

    fp32: 1e-4 per step, a thousand times what another split or thread count did to the losses of three steps of a 135M
    model; bf16 and fp16 have 8 and 11 bits: 2e-2; fp64: 1e-9. Norms get ten times as much.
    """
    if rtol is None:
        rtol = {"float64": 1e-9, "bfloat16": 2e-2, "float16": 2e-2}.get(dtype or "", 1e-4)
    return Tolerance(rtol=rtol, norm_rtol=10 * rtol)


def relative(recorded: float, found: float) -> float:
    """|difference| by the larger magnitude; 0 for equal numbers."""
    if recorded == found:
        return 0.0
    return abs(recorded - found) / max(abs(recorded), abs(found))
