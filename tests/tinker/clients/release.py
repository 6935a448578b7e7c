"""What a training script of any release that is served does; the losses as JSON."""

import json
import os

import tinker
from tinker import types

service = tinker.ServiceClient()
training = service.create_lora_training_client(base_model=os.environ["MODEL"], rank=4, seed=5)
ids = [5, 6, 7, 8, 9, 10]
datum = types.Datum(
    model_input=types.ModelInput.from_ints(ids[:-1]),
    loss_fn_inputs={
        "target_tokens": types.TensorData(data=ids[1:], dtype="int64", shape=[5]),
        "weights": types.TensorData(data=[1.0] * 5, dtype="float32", shape=[5]),
    },
)
losses = []
for _ in range(3):
    gradients = training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=0.05)).result()
    losses.append(gradients.result().metrics["loss:sum"])
path = training.save_state("state").result().path
again = service.create_training_client_from_state_with_optimizer(path)
losses.append(again.forward([datum], "cross_entropy").result().metrics["loss:sum"])
sampler = training.save_weights_and_get_sampling_client()
params = types.SamplingParams(max_tokens=4, seed=1, temperature=1.0)
sequences = sampler.sample(types.ModelInput.from_ints(ids), 2, params).result().sequences
assert all(len(each.tokens) == len(each.logprobs) for each in sequences)
assert len(sampler.compute_logprobs(types.ModelInput.from_ints(ids)).result()) == len(ids)
print(
    json.dumps({"release": tinker.__version__, "losses": losses, "tokens": [list(each.tokens) for each in sequences]})
)
