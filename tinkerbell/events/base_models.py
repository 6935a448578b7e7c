"""Which base model an adapter belongs to: its weights mean nothing beside another one's, even where shapes fit."""

from typing import Protocol

import msgspec

from tinkerbell.errors import OtherBaseModel
from tinkerbell.types import ModelInfo

DIGITS = 16
"""Of a hash in a message."""


class Environment(Protocol):
    """What an executor said of itself, as it came from the executor or from the log."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def facts(self) -> dict[str, str]: ...


class BaseModel(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a base model."""

    name: str
    hash: str = ""
    """As in ModelInfo; empty: an older release, or an executor that does not say."""
    vocab_size: int | None = None
    weights: tuple[str, str] | None = None
    """(dtype, hash of the weights in memory), which older releases recorded of their environment."""

    def __str__(self) -> str:
        exact = self.hash.split("-")[-2] if self.hash.count("-") == 2 else self.hash
        known = exact or (self.weights[1] if self.weights else "")
        return f"{self.name} (hash {known[:DIGITS]})" if known else f"{self.name} (of unknown hash)"


def base_model_of(environment: Environment) -> BaseModel:
    """The model that an executor holds."""
    model, weights_hash = environment.model, environment.facts.get("weights_hash")
    return BaseModel(
        name=model.name,
        hash=model.hash,
        vocab_size=model.vocab_size,
        weights=None if weights_hash is None else (environment.facts.get("dtype", ""), weights_hash),
    )


def is_same(one: BaseModel, other: BaseModel) -> bool:
    """Whether an adapter of the one belongs to the other: by their hashes, and where one has none by what is known of
    both."""
    if one.hash and other.hash:
        return _same_hash(one.hash, other.hash)
    if one.weights and other.weights and one.weights[0] == other.weights[0]:
        return one.weights[1] == other.weights[1]
    sizes = {one.vocab_size, other.vocab_size} - {None}
    return one.name == other.name and len(sizes) <= 1


def require_same(what: str, trained_on: BaseModel, served: BaseModel) -> None:
    """Raise OtherBaseModel, which says what to serve, unless the two are one."""
    if not is_same(trained_on, served):
        raise OtherBaseModel(
            f"{what} belongs to the base model {trained_on}, and what is served is {served}: serve the first to use it",
            trained_on=trained_on.hash,
            served=served.hash,
        )


def _same_hash(one: str, other: str) -> bool:
    """`<dtype>-<exact>-<rounded>`: the same file loaded with another dtype agrees in what both can hold."""
    if one == other:
        return True
    ours, theirs = one.split("-"), other.split("-")
    return len(ours) == len(theirs) == 3 and ours[0] != theirs[0] and ours[2] == theirs[2]
