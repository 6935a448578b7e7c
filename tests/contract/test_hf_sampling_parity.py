"""Sampling on the real 135M model against Hugging Face and PEFT: greedy tokens, logprobs, stops, company."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.executor_driver import Driver, InChildProcess, datum, nameless, random_data, read_floats, read_ints
from tests.support.peft_reference import quietly
from tests.support.real_model import real_model_directory
from tests.support.rounding import assert_missed_like
from tinkerbell.executors.port import ForwardBackwardDone, SampleDone, UnitFailed
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import AdamParams, LoraConfig

pytestmark = pytest.mark.model

ADAPTERS = {
    "qv": LoraConfig(rank=8, alpha=16, targets=("q_proj", "v_proj")),
    "all": LoraConfig(rank=16, alpha=32, targets=("all-linear",)),
    "odd": LoraConfig(rank=5, alpha=7, targets=("o_proj", "mlp")),
}
TEXTS = {
    "qv": "The capital of France is",
    "all": "Once upon a time, in a village by the sea, there lived",
    "odd": "def fibonacci(n):\n    ",
    None: "Water boils at",
}
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """In a child process, so that its settings (threads, deterministic kernels) stay out of the reference."""
    child = InChildProcess("hf", ExecutorOptions(model=str(real_model_directory()), threads=2))
    try:
        driver = Driver(child)
        for seed, (name, lora) in enumerate(ADAPTERS.items()):
            child.create(name, lora, seed)
            for step in range(3):
                data = random_data(10 * seed + step, (24,), vocab_size=2000)
                adam = AdamParams(learning_rate=2e-3)
                driver.done(driver.forward_backward(name, data), driver.optim_step(name, adam))
        yield driver
    finally:
        child.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(real_model_directory()))


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> dict[str | None, list[int]]:
    return {name: tokenizer(text)["input_ids"] for name, text in TEXTS.items()}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For the reference: its threads would spin against those of the executor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(one_thread: None, driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base model in fp32 with every adapter loaded by PEFT from the executor's own files."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(real_model_directory()), dtype=torch.float32)
    for name in ADAPTERS:
        directory: Path = tmp_path_factory.mktemp(name)
        state = driver.executor.snapshot(name)
        (directory / "adapter_model.safetensors").write_bytes(state.weights)
        (directory / "adapter_config.json").write_bytes(state.adapter_config)
        if isinstance(model, PeftModel):
            quietly(model.load_adapter, str(directory), name)
        else:
            model = quietly(PeftModel.from_pretrained, model, str(directory), name)
    return model.eval()


@pytest.fixture(scope="module")
def exact_reference(reference: Any) -> Any:
    """The same in fp64: what both fp32 computations approximate."""
    return copy.deepcopy(reference).double()


def switch(model: Any, name: str | None) -> Any:
    """The model with one adapter, or the base model."""
    if name is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name)
    return model


@torch.no_grad()
def forward_logprobs(model: Any, name: str | None, tokens: list[int]) -> list[float]:
    """Of tokens 1.. by one full forward pass without a cache, in the model's dtype to the end."""
    ids = torch.tensor([tokens])
    logits = switch(model, name)(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()


@torch.no_grad()
def generate(model: Any, name: str | None, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = switch(model, name).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
        temperature=None, top_p=None, top_k=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def greedy(driver: Driver, prompts: dict[str | None, list[int]]) -> dict[str | None, SampleDone]:
    """All adapters and the base model in one batch, prompts of unequal length."""
    units = [
        driver.sample(name, prompt, temperature=0.0, max_tokens=MAX_TOKENS, prompt_logprobs=True)
        for name, prompt in prompts.items()
    ]
    answers = driver.done(*units)
    return {name: a for name, a in zip(prompts, answers, strict=True) if isinstance(a, SampleDone)}


def test_greedy_tokens_are_those_of_generate(
    reference: Any, greedy: dict[str | None, SampleDone], prompts: dict[str | None, list[int]]
) -> None:
    found = {name: read_ints(answer.sequences[0].tokens) for name, answer in greedy.items()}
    assert found == {name: generate(reference, name, prompt) for name, prompt in prompts.items()}
    base = generate(reference, None, prompts["all"])
    assert found["all"] != base, "the adapter must make a difference"


def test_logprobs_are_those_of_a_full_forward(
    reference: Any,
    exact_reference: Any,
    greedy: dict[str | None, SampleDone],
    prompts: dict[str | None, list[int]],
) -> None:
    """Prompt and sample, each adapter. That nothing but rounding differs is shown in fp64 in
    test_sampling_reference.py."""
    for name, answer in greedy.items():
        assert answer.prompt_logprobs is not None
        found = read_floats(answer.prompt_logprobs) + read_floats(answer.sequences[0].logprobs)
        tokens = prompts[name] + read_ints(answer.sequences[0].tokens)
        rounded, exact = (forward_logprobs(model, name, tokens) for model in (reference, exact_reference))
        assert_missed_like(found, rounded, exact, f"adapter {name}")


def test_prompt_logprobs_are_the_trainers(
    driver: Driver, greedy: dict[str | None, SampleDone], prompts: dict[str | None, list[int]]
) -> None:
    for name in ADAPTERS:
        (forward,) = driver.done(driver.forward_backward(name, [datum(prompts[name])], backward=False))
        assert isinstance(forward, ForwardBackwardDone)
        prompt_logprobs = greedy[name].prompt_logprobs
        assert prompt_logprobs is not None
        # A forward of the same rows: even the bits are the same.
        assert prompt_logprobs == forward.logprobs[0]


def test_bits_alone_and_in_company(driver: Driver, prompts: dict[str | None, list[int]]) -> None:
    """Four adapters, several requests and samples each, ended at different times; each again by itself."""
    units = []
    for number, (name, prompt) in enumerate([*prompts.items(), *prompts.items()]):
        params = {"temperature": 0.8 + 0.1 * number, "top_p": 0.95 if number % 2 else 1.0}
        count = 3 if number == 5 else 1
        units.append(driver.sample(name, prompt, seed=number, max_tokens=3 + 2 * number, num_samples=count, **params))
    together = driver.done(*units)
    for unit, answer in zip(units, together, strict=True):
        (alone,) = driver.done(unit)
        assert nameless(alone) == nameless(answer)


def test_stop_texts(driver: Driver, tokenizer: Any, prompts: dict[str | None, list[int]]) -> None:
    """The sample ends with the token that completes the text, which stays in it."""
    prompt = prompts["all"]
    (free,) = driver.done(driver.sample("all", prompt, temperature=0.0, max_tokens=MAX_TOKENS))
    assert isinstance(free, SampleDone)
    tokens = read_ints(free.sequences[0].tokens)
    text = tokenizer.decode(tokens)
    stop = text[len(text) // 2 : len(text) // 2 + 6]
    first = next(n for n in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
    (stopped,) = driver.done(
        driver.sample("all", prompt, temperature=0.0, max_tokens=MAX_TOKENS, stop=("never said", stop))
    )
    assert isinstance(stopped, SampleDone)
    assert read_ints(stopped.sequences[0].tokens) == tokens[:first]
    assert stopped.sequences[0].stop_reason == "stop"
    assert free.sequences[0].logprobs.startswith(stopped.sequences[0].logprobs)


def test_a_chat_ends_at_the_models_end_token(driver: Driver, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text)["input_ids"]
    (done,) = driver.done(driver.sample(None, prompt, temperature=0.0, max_tokens=40, stop_tokens=None))
    assert isinstance(done, SampleDone)
    tokens = read_ints(done.sequences[0].tokens)
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens.count(tokens[-1]) == 1
    assert tokens[-1] in driver.info.eos_tokens
    assert done.sequences[0].stop_reason == "stop"


def test_frequencies_of_first_tokens_are_the_models(
    driver: Driver, exact_reference: Any, prompts: dict[str | None, list[int]]
) -> None:
    """128 samples of one token at temperature 1, against the probability of each likely token."""
    prompt, count = prompts["qv"], 128
    (done,) = driver.done(driver.sample("qv", prompt, seed=1, max_tokens=1, num_samples=count))
    assert isinstance(done, SampleDone)
    tokens = [read_ints(sequence.tokens)[0] for sequence in done.sequences]
    with torch.no_grad():
        logits = switch(exact_reference, "qv")(input_ids=torch.tensor([prompt])).logits[0, -1]
    probabilities = torch.softmax(logits, -1)
    for token in torch.topk(probabilities, 5).indices.tolist():
        p = float(probabilities[token])
        spread = 4.5 * np.sqrt(p * (1 - p) / count)
        assert abs(tokens.count(token) / count - p) < spread


def test_a_bad_prompt_fails_alone(driver: Driver, prompts: dict[str | None, list[int]]) -> None:
    bad, good = driver.run(
        driver.sample("qv", [driver.info.vocab_size]), driver.sample("qv", prompts["qv"], max_tokens=2)
    )
    assert isinstance(bad, UnitFailed)
    assert isinstance(good, SampleDone)
