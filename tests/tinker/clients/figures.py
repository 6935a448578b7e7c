"""Numbers to compare: logprobs, ratios on fresh samples, and one step along a DPO gradient, with both states saved.

Adam with betas of 0 and eps of 1 moves a weight by lr g / (|g| + 1), from which g can be had.
"""

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

OUT = Path(os.environ["OUT"])
service = tinker.ServiceClient()
training = service.create_lora_training_client(
    base_model=os.environ["MODEL"], rank=4, seed=5, train_unembed=False
).result()
rest = tinker.RestClient()
text = "The lazy dog sleeps while the quick brown fox jumps over it."
ids = training.get_tokenizer().encode(text)


def datum(ids: list[int], **inputs: Any) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": ids[1:], **inputs}
    )


def download(name: str) -> None:
    path = training.save_weights_external(name).result().path
    (OUT / name).mkdir()
    for file, url in rest.get_external_weights_urls(path).result().urls.items():
        (OUT / name / file).write_bytes(urllib.request.urlopen(url).read())


# Away from the base model, so that A and B both have gradients.
warm = datum(ids, weights=np.ones(len(ids) - 1, np.float32))
for _ in range(2):
    training.forward_backward([warm], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=3e-3)).result()
download("before")
forward = training.forward([warm], "cross_entropy").result()

sampler = training.save_weights_and_get_sampling_client().result()
sampled = sampler.sample(
    types.ModelInput.from_ints(ids[:5]), 4, types.SamplingParams(max_tokens=12, temperature=1.0)
).result()
data = []
for sequence in sampled.sequences:
    whole = ids[:5] + list(sequence.tokens)
    given = np.zeros(len(whole) - 1, np.float32)
    given[4:] = sequence.logprobs
    mask = np.zeros(len(whole) - 1, np.float32)
    mask[4:] = 1.0
    data.append((whole, given, mask))
scored = training.forward([datum(whole, weights=mask) for whole, _, mask in data], "cross_entropy").result()
ratios = [
    np.exp(output["logprobs"].to_numpy()[4:] - given[4:]).tolist()
    for output, (_, given, _) in zip(scored.loss_fn_outputs, data, strict=True)
]

chosen, rejected = ids, ids[:6] + ids[6:][::-1]
reference = [-30.0, -60.0]


def dpo(_: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    gain = (logprobs[0].sum() - reference[0]) - (logprobs[1].sum() - reference[1])
    loss = -torch.nn.functional.logsigmoid(0.1 * gain)
    return loss, {"dpo": float(loss)}


training.forward_backward_custom([datum(chosen), datum(rejected)], dpo).result()
step = types.AdamParams(learning_rate=10.0, beta1=0.0, beta2=0.0, eps=1.0)
norm = training.optim_step(step).result().metrics["grad_norm"]
download("after")
print(json.dumps({
    "ids": ids, "logprobs": forward.loss_fn_outputs[0]["logprobs"].to_numpy().tolist(), "ratios": ratios,
    "chosen": chosen, "rejected": rejected, "reference": reference,
    "learning_rate": step.learning_rate, "grad_norm": norm,
}))  # fmt: skip
