"""Three hundred samples at once, on a server that takes fewer."""

import json
import os

import tinker
from tinker import types

service = tinker.ServiceClient()
sampler = service.create_sampling_client(base_model=os.environ["MODEL"])
params = types.SamplingParams(max_tokens=2, temperature=1.0, stop=[])
futures = [sampler.sample(types.ModelInput.from_ints([1 + i % 100, 20, 30]), 1, params) for i in range(300)]
print(json.dumps([len(future.result().sequences[0].tokens) for future in futures]))
