"""Every call of the SDK that is served, once: "ok" for each, at last the list as JSON. With `async`: awaited."""

import asyncio
import json
import os
import pickle
import sys
import urllib.request
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

warnings.simplefilter("ignore")
MODEL = os.environ["MODEL"]
CLOSE = 32 * 128 * np.finfo(np.float32).eps
"""As NATS of tests/support/rounding.py, which this environment does not have."""
done: list[str] = []


def ok(name: str, condition: Any = True) -> None:
    assert condition, name
    done.append(name)
    print("ok", name, flush=True)


def calls(wait: Callable[[Any], Any]) -> None:
    """`wait`: gets the result of a future."""
    with tinker.ServiceClient(user_metadata={"who": "example"}, display_name="example run") as service:
        names = [model.model_name for model in service.get_server_capabilities().supported_models]
        ok("capabilities", MODEL in names)
        training = wait(
            service.create_lora_training_client(base_model=MODEL, rank=8, seed=7, user_metadata={"run": "a"})
        )
        info = training.get_info()
        ok("get_info", info.lora_rank == 8 and info.is_lora)
        tokenizer = training.get_tokenizer()
        ids = tokenizer.encode("hello world, this is a test")
        ok("tokenizer", len(ids) > 3)
        ones = np.ones(len(ids) - 1, np.float32)

        def datum(**inputs: Any) -> types.Datum:
            tokens = types.ModelInput.from_ints(ids[:-1])
            return types.Datum(model_input=tokens, loss_fn_inputs={"target_tokens": ids[1:], **inputs})

        gradients = training.forward_backward([datum(weights=ones)] * 2, "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0))
        first = wait(gradients)
        ok("forward_backward", first.metrics["loss:sum"] > 0 and len(first.loss_fn_outputs) == 2)
        ok("optim_step", wait(step).metrics["grad_norm"] > 0)
        second = wait(training.forward([datum(weights=ones)] * 2, "cross_entropy"))
        ok("forward", second.metrics["loss:sum"] < first.metrics["loss:sum"])
        policy = {"logprobs": np.full(len(ones), -1.2, np.float32), "advantages": 0.5 * ones}
        for loss, config in (
            ("importance_sampling", None),
            ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
            ("cispo", None),
            ("dro", {"beta": 0.05}),
            ("gspo", None),
        ):
            inputs = policy | ({"sequence_ratio_mask": ones} if loss == "gspo" else {})
            result = wait(training.forward_backward([datum(**inputs)], loss, loss_fn_config=config))
            ok(loss, "loss:sum" in result.metrics)

        soft = {"target_tokens": torch.zeros(len(ones), 20, dtype=torch.long), "weights": torch.zeros(len(ones), 20)}
        soft["target_tokens"][:, 0], soft["weights"][:, 0] = torch.tensor(ids[1:]), 1.0
        for layout in (types.TensorData.from_torch, types.TensorData.from_torch_sparse):
            inputs = {name: layout(array) for name, array in soft.items()}
            result = wait(training.forward([datum(**inputs)], "cross_entropy"))
            logprobs = result.loss_fn_outputs[0]["logprobs"]
            ok(f"several targets {len(done)}", list(logprobs.shape) == [len(ones), 20])
            plain = second.loss_fn_outputs[0]["logprobs"].to_numpy()
            ok(f"of the tokens {len(done)}", np.allclose(logprobs.to_torch()[:, 0], plain, atol=CLOSE))

        def square(_: Any, logprobs: Any) -> Any:
            loss = sum((each**2).mean() for each in logprobs)
            return loss, {"custom": float(loss)}

        ok("forward_backward_custom", wait(training.forward_backward_custom([datum(weights=ones)], square)).metrics)
        short = types.Datum(model_input=types.ModelInput.from_ints(ids[:1]), loss_fn_inputs={"target_tokens": ids[1:2]})
        many = wait(training.forward_backward([short] * 1100, "cross_entropy"))
        ok("chunks", len(many.loss_fn_outputs) == 1100)

        sampler = wait(training.save_weights_and_get_sampling_client())
        prompt = types.ModelInput.from_ints(ids)
        params = types.SamplingParams(max_tokens=8, seed=1, stop=["\n"], temperature=0.7)
        samples = wait(sampler.sample(prompt, 3, params, include_prompt_logprobs=True))
        ok("sample", len({sequence.sequence_id for sequence in samples.sequences}) == 3)
        ok("sampled logprobs", all(len(each.logprobs) == len(each.tokens) for each in samples.sequences))
        ok("prompt logprobs", samples.prompt_logprobs[0] is None and len(samples.prompt_logprobs) == len(ids))
        again = wait(sampler.sample(prompt, 3, params))
        greedy_one = types.SamplingParams(max_tokens=1, temperature=0.0)
        ok("seed", [each.tokens for each in again.sequences] == [each.tokens for each in samples.sequences])
        ok("compute_logprobs", wait(sampler.compute_logprobs(prompt))[1:] == samples.prompt_logprobs[1:])
        rich = wait(
            sampler.sample(
                prompt,
                2,
                types.SamplingParams(max_tokens=3, seed=2, stop=[]),
                include_prompt_logprobs=True,
                topk_prompt_logprobs=2,
                topk_sample_logprobs=3,
            )
        )
        likeliest = rich.topk_prompt_logprobs
        ok(
            "topk_prompt_logprobs",
            likeliest[0] is None and [len(each) for each in likeliest[1:]] == [2] * (len(ids) - 1),
        )
        ok("topk_sample_logprobs", all(len(row) == 3 for each in rich.sequences for row in each.topk_logprobs))
        wanted = torch.full((len(ids) - 1, 2), -1)
        wanted[-1, 0] = ids[-1]
        for layout in (types.TensorData.from_torch, partial(types.TensorData.from_torch_sparse, pad_value=-1)):
            scored = wait(sampler.sample(prompt, 1, greedy_one, target_prompt_logprobs=layout(wanted)))
            found = scored.target_prompt_logprobs
            ok(f"target_prompt_logprobs {len(done)}", list(found.shape) == [len(ids) - 1, 2])
            values = [value for value in found.data if value]
            ok(f"of the token itself {len(done)}", np.allclose(values, [samples.prompt_logprobs[-1]]))
        drawn = wait(sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1, seed=3), prompt_alt_tokens_k=4))
        tokens, drawn_logprobs = (drawn.prompt_alt_tokens.tokens, drawn.prompt_alt_tokens.logprobs)
        ok("alternatives", list(tokens.shape) == list(drawn_logprobs.shape) == [len(ids) - 1, 4])
        wanted = tokens.to_torch().to(torch.int64)
        scored = wait(sampler.sample(prompt, 1, greedy_one, target_prompt_logprobs=types.TensorData.from_torch(wanted)))
        of_targets = scored.target_prompt_logprobs.to_torch()
        ok("logprobs of alternatives", torch.allclose(drawn_logprobs.to_torch(), of_targets, atol=CLOSE))
        last = wait(sampler.compute_logprobs(prompt, 2))
        ok("of the last tokens", last[-2:] == samples.prompt_logprobs[-2:] and last[-3] is None)
        greedy = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[2])
        copy = pickle.loads(pickle.dumps(sampler))
        ok("pickled", wait(copy.sample(prompt, 1, greedy)).sequences[0].tokens)
        base = wait(service.create_sampling_client(base_model=MODEL))
        ok("base model", wait(base.sample(prompt, 1, greedy)).sequences[0].tokens)

        state = wait(training.save_state("step-1", ttl_seconds=7200, user_metadata={"k": "v"}))
        named = wait(training.save_weights_for_sampler("sampler-1"))
        external = wait(training.save_weights_external("ext-1"))
        from_path = wait(service.create_sampling_client(model_path=named.path))
        ok("sampler of a path", wait(from_path.sample(prompt, 1, greedy)).sequences[0].tokens)
        frozen = wait(sampler.sample(prompt, 1, greedy)).sequences[0]
        wait(training.forward_backward([datum(weights=ones)] * 8, "cross_entropy"))
        wait(training.optim_step(types.AdamParams(learning_rate=1e-2)))
        ok(
            "samplers keep their weights",
            wait(sampler.sample(prompt, 1, greedy)).sequences[0].logprobs == frozen.logprobs,
        )
        ok("load_state", wait(training.load_state(state.path)).path == state.path)
        ok("load_state_with_optimizer", wait(training.load_state_with_optimizer(state.path)).path == state.path)
        for create in (
            service.create_training_client_from_state,
            service.create_training_client_from_state_with_optimizer,
        ):
            ok(create.__name__, wait(create(state.path)).model_id != training.model_id)

        rest = tinker.RestClient()
        runs = [run.training_run_id for run in wait(rest.list_training_runs(limit=5)).training_runs]
        ok("list_training_runs", training.model_id in runs)
        run = wait(rest.get_training_run(training.model_id))
        ok("get_training_run", run.lora_rank == 8 and run.user_metadata == {"run": "a"})
        kept = {each.checkpoint_id: each for each in wait(rest.list_checkpoints(training.model_id)).checkpoints}
        ok("list_checkpoints", set(kept) == {"weights/step-1", "sampler_weights/sampler-1", "external_weights/ext-1"})
        ok("metadata", kept["weights/step-1"].user_metadata == {"k": "v"})
        ok("list_user_checkpoints", wait(rest.list_user_checkpoints(limit=2)).cursor.total_count >= 3)
        ok("weights_info", wait(rest.get_weights_info_by_tinker_path(state.path)).lora_rank == 8)
        session = training.model_id.partition(":")[0]
        ok("list_sessions", session in wait(rest.list_sessions()).sessions)
        ok("get_session", training.model_id in wait(rest.get_session(session)).training_run_ids)
        asked = types.SessionSearchRequest(display_name="EXAMPLE", user_metadata={"who": "example"})
        ok("search_sessions", session in [each.session_id for each in wait(rest.search_sessions(asked)).sessions])
        wait(rest.publish_checkpoint_from_tinker_path(state.path))
        wait(rest.unpublish_checkpoint_from_tinker_path(state.path))
        wait(rest.set_checkpoint_ttl_from_tinker_path(state.path, 3600))
        copy_of_state = wait(rest.copy_weights(state.path, "default"))
        ok("copy_weights", copy_of_state != state.path and copy_of_state.endswith("/weights/step-1"))
        begun = wait(service.create_training_client_from_state_with_optimizer(copy_of_state))
        ok("training from a copy", wait(begun.forward([datum(weights=ones)], "cross_entropy")).metrics)
        copy_of_sampler = wait(rest.copy_weights(named.path, "default", ttl_seconds=3600))
        copied = wait(service.create_sampling_client(model_path=copy_of_sampler))
        logprobs = [wait(each.sample(prompt, 1, greedy)).sequences[0].logprobs for each in (copied, from_path)]
        ok("sampling from a copy", logprobs[0] == logprobs[1])
        urls = wait(rest.get_external_weights_urls(external.path)).urls
        config = json.loads(urllib.request.urlopen(urls["adapter_config.json"]).read())
        ok("download", config["r"] == 8)
        admin = tinker.AdminClient()
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        usage = wait(admin.get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=1))).data
        kinds = {event.event_info.type for event in usage if event.session_id == session}
        ok("billing", kinds == {"training", "sampling_prefill", "sampling_sample", "checkpoint"})
        ok("storage", wait(admin.get_current_checkpoint_storage_usage()).data[0].checkpoint_count >= 3)
        entries = [entry for entry in wait(admin.get_audit_log()).entries if entry.tinker_path == state.path]
        ok("audit", [entry.event for entry in entries] == ["save_requested"])
        wait(rest.delete_checkpoint_from_tinker_path(named.path))
        ok("delete", len(wait(rest.list_checkpoints(training.model_id)).checkpoints) == 2)


async def _await(future: Any) -> Any:
    return await future


if __name__ == "__main__":
    if "async" in sys.argv:
        calls(lambda future: asyncio.run(_await(future)))
    else:
        calls(lambda future: future.result())
    print(json.dumps(done))
