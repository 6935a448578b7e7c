"""Twelve steps of training, the logprob of each step printed as it is known; then the samples of the result."""

import json
import os

import numpy as np
import tinker
from tinker import types

service = tinker.ServiceClient()
training = service.create_lora_training_client(base_model=os.environ["MODEL"], rank=8, seed=3).result()
losses = []
for step in range(12):
    ids = [(17 * step + 5 * i) % 1000 + 10 for i in range(24)]
    tokens = types.ModelInput.from_ints(ids[:-1])
    inputs = {"target_tokens": ids[1:], "weights": np.ones(23, np.float32)}
    gradients = training.forward_backward([types.Datum(model_input=tokens, loss_fn_inputs=inputs)], "cross_entropy")
    update = training.optim_step(types.AdamParams(learning_rate=1e-3))
    logprobs = gradients.result().loss_fn_outputs[0]["logprobs"].to_numpy()
    update.result()
    losses.append(logprobs.tobytes().hex())
    print("step", step, flush=True)
print(json.dumps(losses))
