"""Twenty samples on a slow server: the first is waited for, the rest are given up once they were sent."""

import json
import os
import time

import tinker
from tinker import types

service = tinker.ServiceClient()
sampler = service.create_sampling_client(base_model=os.environ["MODEL"]).result()
params = types.SamplingParams(max_tokens=2, temperature=1.0, stop=[])
prompt = types.ModelInput.from_ints([10, 20, 30])
first, *rest = (sampler.sample(prompt, 1, params) for _ in range(20))
time.sleep(2.0)
given_up = [future.future().cancel() for future in rest]
print(json.dumps([len(first.result().sequences[0].tokens), sum(given_up)]))
