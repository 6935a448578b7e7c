"""The course of a run: one point for each optimizer step, with the losses behind its gradient."""

from collections.abc import Iterable, Iterator
from typing import Any

from tinkerbell.events import kinds
from tinkerbell.events.codec import read_event
from tinkerbell.events.rows import RunPoint


def fold_run(rows: Iterable[tuple[Any, ...]]) -> Iterator[RunPoint]:
    """Points from an adapter's completed forward_backward, optim_step and load events in order. A step whose event
    cannot be read has none.

    Each row: type, schema_version, data and created_us of the result; type, schema_version and data of its request.
    """
    loss_sum, num_tokens = 0.0, 0
    for type_, version, data, at_us, asked_type, asked_version, asked_data in rows:
        event = read_event(type_, version, data)
        match event:
            case kinds.ForwardBackwardCompleted():
                loss_sum += event.loss
                num_tokens += event.num_tokens
            case kinds.OptimStepCompleted():
                asked = read_event(asked_type, asked_version, asked_data)
                if isinstance(asked, kinds.OptimStepRequested):
                    yield RunPoint(
                        step=event.step,
                        at_us=at_us,
                        learning_rate=asked.adam.learning_rate,
                        grad_norm=event.grad_norm,
                        loss_sum=loss_sum,
                        num_tokens=num_tokens,
                        state_digest=event.state_digest,
                    )
                loss_sum, num_tokens = 0.0, 0
            case _:
                # A load clears the accumulated gradient.
                loss_sum, num_tokens = 0.0, 0
