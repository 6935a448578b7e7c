"""Every call that changes something, or reads what one changed; what came of each as JSON, without ids."""

import json
import os
import re
import warnings
from typing import Any

import tinker
import torch
from tinker import types

warnings.simplefilter("ignore")
MODEL = os.environ["MODEL"]
found: dict[str, Any] = {}
IDS = re.compile(r"se_[a-z2-7]{20}")
ids = [5, 6, 7, 8, 9, 10]
prompt = types.ModelInput.from_ints(ids)
params = types.SamplingParams(max_tokens=4, seed=1, temperature=1.0)


def plain(value: Any) -> Any:
    return IDS.sub("se", value) if isinstance(value, str) else value


def note(name: str, value: Any) -> None:
    found[name] = plain(value)
    print(name, flush=True)


def datum(**inputs: Any) -> types.Datum:
    arrays = {"target_tokens": torch.tensor(ids[1:]), **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=arrays)


def drawn(sampler: Any) -> Any:
    return [[list(each.tokens), list(each.logprobs)] for each in sampler.sample(prompt, 2, params).result().sequences]


def square(_: Any, logprobs: Any) -> Any:
    loss = sum((each**2).mean() for each in logprobs)
    return loss, {"custom": float(loss)}


with tinker.ServiceClient(user_metadata={"who": "example"}, display_name="lossy") as service:
    training = service.create_lora_training_client(base_model=MODEL, rank=4, seed=5).result()
    note("rank", training.get_info().lora_rank)
    ones = torch.ones(5)

    def step(name: str) -> None:
        gradients = training.forward_backward([datum(weights=ones)] * 3, "cross_entropy")
        taken = training.optim_step(types.AdamParams(learning_rate=0.05))
        note(name, [gradients.result().metrics["loss:sum"], taken.result().metrics["grad_norm"]])

    step("first step")
    note("forward", training.forward([datum(weights=ones)], "cross_entropy").result().metrics["loss:sum"])
    short = types.Datum(model_input=types.ModelInput.from_ints([5]), loss_fn_inputs={"target_tokens": [6]})
    note("chunks", training.forward_backward([short] * 1100, "cross_entropy").result().metrics["loss:sum"])
    note("custom", training.forward_backward_custom([datum(weights=ones)], square).result().metrics["custom"])
    sampler = training.save_weights_and_get_sampling_client()
    note("sampler", drawn(sampler))
    note("scores", sampler.compute_logprobs(prompt).result()[1:])
    step("second step")
    note("sampler keeps its weights", drawn(sampler))
    again = training.save_weights_and_get_sampling_client()
    note("second sampler", drawn(again))
    state = training.save_state("state").result().path
    named = training.save_weights_for_sampler("sampler").result().path
    external = training.save_weights_external("external").result().path
    note("paths", [plain(path) for path in (state, named, external)])
    note("of a path", drawn(service.create_sampling_client(model_path=named)))
    note("of the base model", drawn(service.create_sampling_client(base_model=MODEL)))
    step("third step")
    overwritten = training.save_state("state", overwrite=True).result().path
    note("overwritten", overwritten == state)
    training.load_state_with_optimizer(state).result()
    step("step after load_state")
    for create in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
    ):
        begun = create(state)
        gradients = begun.forward_backward([datum(weights=ones)], "cross_entropy")
        begun.optim_step(types.AdamParams(learning_rate=0.05)).result()
        note(create.__name__, gradients.result().metrics["loss:sum"])

    rest = service.create_rest_client()
    rest.publish_checkpoint_from_tinker_path(state).result()
    rest.unpublish_checkpoint_from_tinker_path(state).result()
    rest.set_checkpoint_ttl_from_tinker_path(state, 3600).result()
    note("weights_info", rest.get_weights_info_by_tinker_path(state).result().lora_rank)
    copy = rest.copy_weights(state, "default").result()
    begun = service.create_training_client_from_state(copy)
    note("of a copy", begun.forward([datum(weights=ones)], "cross_entropy").result().metrics["loss:sum"])
    rest.delete_checkpoint_from_tinker_path(named).result()
    kept = rest.list_checkpoints(training.model_id).result().checkpoints
    note("kept", sorted(each.checkpoint_id for each in kept))
    searched = types.SessionSearchRequest(session_id=training.model_id.partition(":")[0])
    note("searched", len(rest.search_sessions(searched).result().sessions))
print(json.dumps(found))
