"""A server that serves another base model than before, as clients of both protocols see it."""

import msgspec
import pytest

from tests.support.api_driver import MODEL, ApiDriver, problem, record_environment
from tests.support.tinker_driver import OWNER, Tinker


def test_every_way_to_a_checkpoint_is_refused_and_says_what_to_serve(tinker: Tinker, api: ApiDriver) -> None:
    record_environment(api.store, msgspec.structs.replace(MODEL, hash="a" * 64))
    model = tinker.model()
    path = tinker.saved(model, 1)
    sampler_path = tinker.saved(model, 2, "for-sampling", "save_weights_for_sampler")
    checkpoint = api.store.queries.checkpoints(OWNER)[0].id
    session = tinker.session()
    copied = tinker.ok("copy_weights", source_path=path, session_id=session, model_seq_id=5)["tinker_path"]
    sampler = tinker.ok(
        "create_sampling_session", session_id=session, sampling_session_seq_id=0, model_path=sampler_path
    )["sampling_session_id"]

    record_environment(api.store, msgspec.structs.replace(MODEL, hash="b" * 64))
    head = api.store.head()
    asked = {
        "load": ("load_weights", {"model_id": model, "seq_id": 9, "path": path}),
        "new": ("load_weights", {"session_id": session, "model_seq_id": 3, "path": path}),
        "copied": ("load_weights", {"session_id": session, "model_seq_id": 4, "path": copied}),
        "sampler": (
            "create_sampling_session",
            {"session_id": session, "sampling_session_seq_id": 1, "model_path": sampler_path},
        ),
        "sample": (
            "asample",
            {
                "sampling_session_id": sampler,
                "seq_id": 0,
                "num_samples": 1,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
                "sampling_params": {"max_tokens": 2},
            },
        ),
    }
    for what, (route, body) in asked.items():
        found = tinker.post(route, **body)
        assert found.status_code == 400, (what, found.text)
        detail = found.json()["detail"]
        assert f"tiny (hash {'a' * 16})" in detail and f"tiny (hash {'b' * 16})" in detail
    fresh = tinker.model(session, 8)
    for route, body in (
        ("/v1/adapters", {"checkpoint": checkpoint}),
        (f"/v1/adapters/{fresh}/load", {"checkpoint": checkpoint}),
        (f"/v1/adapters/{model}/load", {"checkpoint": checkpoint}),
    ):
        problem(api.post(route, OWNER, body), 409, "other-base-model")
    # What was refused left nothing, and what needs no model goes on.
    assert api.store.head() == head + 2
    assert api.get(f"/v1/checkpoints/{checkpoint}/download", OWNER).status_code == 200
    assert api.call("DELETE", f"/v1/adapters/{model}", OWNER).status_code == 202


@pytest.mark.parametrize("kept", [True, False], ids=["the same again", "an older release recorded it"])
def test_the_same_model_under_another_name_is_served(tinker: Tinker, api: ApiDriver, kept: bool) -> None:
    record_environment(api.store, msgspec.structs.replace(MODEL, hash="a" * 64 if kept else ""))
    model = tinker.model()
    tinker.saved(model, 1)
    record_environment(api.store, msgspec.structs.replace(MODEL, hash="a" * 64))
    (saved,) = api.store.queries.checkpoints(OWNER)
    api.submit("/v1/adapters", OWNER, {"checkpoint": saved.id})
