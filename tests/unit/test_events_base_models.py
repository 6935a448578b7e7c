"""When two base models are one."""

import pytest

from tinkerbell.errors import OtherBaseModel
from tinkerbell.events.base_models import BaseModel, is_same, require_same

NAMED = BaseModel(name="m", hash="h1", vocab_size=10)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (BaseModel(name="elsewhere", hash="h1"), True),
        (BaseModel(name="m", hash="h2", vocab_size=10), False),
        (BaseModel(name="m", vocab_size=10), True),
        (BaseModel(name="m", vocab_size=11), False),
        (BaseModel(name="n", vocab_size=10), False),
    ],
)
def test_by_hash_and_else_by_what_is_known(other: BaseModel, same: bool) -> None:
    assert is_same(NAMED, other) is is_same(other, NAMED) is same


def test_weights_in_memory_decide_for_older_releases() -> None:
    old = BaseModel(name="m", weights=("float32", "w1"))
    assert is_same(old, BaseModel(name="n", hash="h", weights=("float32", "w1")))
    assert not is_same(old, BaseModel(name="m", hash="h", weights=("float32", "w2")))
    # In another dtype they were hashed over other bytes, which says nothing.
    assert is_same(old, BaseModel(name="m", hash="h", weights=("bfloat16", "w2")))


def test_another_dtype_of_one_file_is_the_same_model() -> None:
    single, half = (BaseModel(name="m", hash=text) for text in ("float32-aaaa-cccc", "bfloat16-bbbb-cccc"))
    assert is_same(single, half)
    # In one dtype the whole value counts.
    assert not is_same(single, BaseModel(name="m", hash="float32-bbbb-cccc"))
    assert not is_same(single, BaseModel(name="m", hash="bfloat16-bbbb-dddd"))


def test_the_refusal_names_both() -> None:
    with pytest.raises(
        OtherBaseModel, match=r"adapter ad_x belongs to the base model m \(hash h1\).*served is n \(hash"
    ):
        require_same("adapter ad_x", NAMED, BaseModel(name="n", hash="float32-abcd-cccc"))
