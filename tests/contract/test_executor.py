"""What every executor promises in `tinkerbell/executors/port.py`, held against each of them."""

import math
import random
from collections.abc import Iterator
from itertools import permutations

import msgspec
import pytest

from tests.support.executor_driver import (
    ADAM,
    Driver,
    InChildProcess,
    datum,
    floats,
    ints,
    nameless,
    random_data,
    read_floats,
    read_ints,
)
from tests.support.rounding import CLOSE
from tinkerbell.errors import NotFound, TinkerbellError, UserError
from tinkerbell.executors import registry
from tinkerbell.executors.port import ForwardBackwardDone, OptimStepDone, SampleDone, UnitFailed, UnitResult
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import BUILTIN_LOSSES, AdamParams, Datum, DatumOutputs, LoraConfig, LossSpec, OutputSpec

OTHERS = [
    LoraConfig(rank=3, alpha=5.0, targets=("mlp",)),
    LoraConfig(rank=8, alpha=16.0, targets=("all-linear",)),
    LoraConfig(rank=1, alpha=1.0, targets=("o_proj", "unembed")),
]


@pytest.fixture(scope="module", params=["fake", "fake in a child process", "hf"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    options = ExecutorOptions(threads=1, extra={"max_length": "512"})
    if request.param == "hf":
        from tests.support.tiny_model import write_tiny_model

        directory = write_tiny_model(tmp_path_factory.mktemp("model"))
        yield Driver(registry.load("hf")(ExecutorOptions(model=str(directory), threads=1)))
    elif request.param == "fake":
        yield Driver(registry.load("fake")(options))
    else:
        child = InChildProcess("fake", options)
        yield Driver(child)
        child.close()


# ---------------------------------------------------------------------------------------------- describe


def test_the_environment_never_changes(driver: Driver) -> None:
    before = driver.executor.describe()
    driver.trained()
    assert driver.executor.describe() == before
    assert before.exact
    assert before.model.vocab_size >= 256
    assert before.facts


# ------------------------------------------------------------------------------------- create, remove


def test_a_fresh_adapter_is_the_base_model(driver: Driver) -> None:
    name = driver.adapter(seed=3)
    of_adapter, of_base = driver.done(
        driver.sample(name, [1, 2, 3], prompt_logprobs=True), driver.sample(None, [1, 2, 3], prompt_logprobs=True)
    )
    assert nameless(of_adapter) == nameless(of_base)


def test_the_seed_makes_the_adapter(driver: Driver) -> None:
    name = driver.name()
    first = driver.executor.create(name, OTHERS[0], 1)
    other = driver.executor.create(name, OTHERS[0], 2)
    again = driver.executor.create(name, OTHERS[0], 1)
    assert first == again
    assert first.state_digest != other.state_digest
    assert first.step == 0
    assert first.num_parameters > 0


def test_create_replaces_all_of_an_adapter(driver: Driver) -> None:
    name = driver.trained()
    driver.done(driver.forward_backward(name, random_data(1, (5,))))
    fresh = driver.executor.create(name, OTHERS[0], 1)
    assert driver.digest(name) == fresh.state_digest
    assert driver.refused(driver.optim_step(name)).code == "no-gradients"


def test_unknown_targets_are_refused(driver: Driver) -> None:
    with pytest.raises(UserError, match="no_such_layer"):
        driver.executor.create(driver.name(), LoraConfig(targets=("q_proj", "no_such_layer")), 0)


def test_a_removed_adapter_is_unknown(driver: Driver) -> None:
    name, other = driver.trained(), driver.trained(seed=1)
    before = driver.digest(other)
    driver.executor.remove(name)
    driver.executor.remove(name)
    with pytest.raises(NotFound):
        driver.executor.snapshot(name)
    assert driver.digest(other) == before


def test_units_of_unknown_adapters_fail_alone(driver: Driver) -> None:
    good = driver.adapter()
    for unit in (
        driver.forward_backward("ad_nobody", random_data(1, (4,))),
        driver.optim_step("ad_nobody"),
        driver.sample("ad_nobody", [1, 2]),
    ):
        assert driver.refused(unit, driver.forward_backward(good, random_data(1, (4,)))).code == "not-found"


# --------------------------------------------------------------------------------- alone == among others


def test_bits_do_not_depend_on_company(driver: Driver) -> None:
    """Results and states of three adapters are bitwise those of each trained by itself, in every order."""
    seeds = (0, 1, 2)
    data = {seed: [random_data(seed, (5 + seed, 17)), random_data(10 + seed, (33, 2, 9 + seed))] for seed in seeds}
    adam = {seed: AdamParams(learning_rate=0.01 * (seed + 1), weight_decay=0.1 * seed) for seed in seeds}
    prompt = [5, 6, 7]
    alone: dict[int, tuple[list[UnitResult], str]] = {}
    for seed in seeds:
        name = driver.adapter(seed, OTHERS[seed])
        answers = []
        for part in data[seed]:
            answers += driver.done(driver.forward_backward(name, part))
            answers += driver.done(driver.optim_step(name, adam[seed]))
        answers += driver.done(driver.sample(name, prompt, seed=seed, max_tokens=8, prompt_logprobs=True))
        alone[seed] = (list(map(nameless, answers)), driver.digest(name))
    for order in permutations(seeds):
        names = {seed: driver.adapter(seed, OTHERS[seed]) for seed in order}
        found: dict[int, list[UnitResult]] = {seed: [] for seed in seeds}
        for part in range(2):
            units = [driver.forward_backward(names[seed], data[seed][part]) for seed in order]
            steps = [driver.optim_step(names[seed], adam[seed]) for seed in order]
            answers = driver.done(*units, *steps)
            for seed, done, stepped in zip(order, answers[:3], answers[3:], strict=True):
                found[seed] += [nameless(done), nameless(stepped)]
        samples = [driver.sample(names[seed], prompt, seed=seed, max_tokens=8, prompt_logprobs=True) for seed in order]
        for seed, answer in zip(order, driver.done(*samples), strict=True):
            found[seed].append(nameless(answer))
        for seed in seeds:
            assert found[seed] == alone[seed][0], f"adapter {seed} in order {order}"
            assert driver.digest(names[seed]) == alone[seed][1]


def test_one_batch_equals_many(driver: Driver) -> None:
    """Several steps of one adapter in one batch are the same steps in batches of their own."""
    data = [random_data(seed, (6, 11)) for seed in range(3)]
    one, many, company = driver.adapter(), driver.adapter(), driver.adapter(1, OTHERS[1])
    units = []
    for part in data:
        units += [driver.forward_backward(one, part), driver.optim_step(one)]
    units.insert(3, driver.forward_backward(company, random_data(9, (21,))))
    together = driver.done(*units)
    del together[3]
    separate = []
    for part in data:
        separate += driver.done(driver.forward_backward(many, part)) + driver.done(driver.optim_step(many))
    assert list(map(nameless, together)) == list(map(nameless, separate))
    assert driver.digest(one) == driver.digest(many)


def test_a_failing_unit_leaves_the_others_bits(driver: Driver) -> None:
    good, again, bad = driver.adapter(), driver.adapter(), driver.trained(1, OTHERS[1])
    data = random_data(4, (8, 3))
    (alone,) = driver.done(driver.forward_backward(good, data))
    nan = [datum([1, 2, 3], weights=[math.nan, 1.0])]
    failed, company = driver.run(driver.forward_backward(bad, nan), driver.forward_backward(again, data))
    assert isinstance(failed, UnitFailed)
    assert nameless(company) == nameless(alone)
    driver.done(driver.optim_step(good), driver.optim_step(again))
    assert driver.digest(good) == driver.digest(again)


# ------------------------------------------------------------------------------------ forward_backward


def test_logprobs_are_those_of_a_distribution(driver: Driver) -> None:
    """Over all targets after one token, probabilities sum to one; the loss is their weighted sum."""
    name = driver.trained()
    vocab = driver.info.vocab_size
    data = [Datum(ints([7]), ints([target]), {"weights": floats([0.5])}) for target in range(vocab)]
    (done,) = driver.done(driver.forward_backward(name, data, backward=False))
    assert isinstance(done, ForwardBackwardDone)
    logprobs = [read_floats(raw)[0] for raw in done.logprobs]
    assert len(logprobs) == vocab
    assert sum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=CLOSE)
    assert done.loss == pytest.approx(-0.5 * sum(logprobs), rel=CLOSE)


def test_answers_have_one_logprob_for_each_token(driver: Driver) -> None:
    lengths = (1, 9, 4)
    (done,) = driver.done(driver.forward_backward(driver.adapter(), random_data(2, lengths)))
    assert isinstance(done, ForwardBackwardDone)
    assert [len(raw) // 4 for raw in done.logprobs] == list(lengths)
    assert done.loss == pytest.approx(-sum(sum(read_floats(raw)) for raw in done.logprobs), rel=CLOSE)
    assert done.metrics["num_tokens"] == sum(lengths)


def trained_on(driver: Driver, name: str, *requests: Datum) -> tuple[list[list[float]], float, float]:
    """(logprobs, summed loss, norm of the summed gradient)"""
    answers = driver.done(*(driver.forward_backward(name, [each]) for each in requests), driver.optim_step(name))
    done = [answer for answer in answers if isinstance(answer, ForwardBackwardDone)]
    assert isinstance(answers[-1], OptimStepDone)
    logprobs = [read_floats(each.logprobs[0]) for each in done]
    return logprobs, sum(each.loss for each in done), answers[-1].grad_norm


def test_several_targets_of_a_token_are_as_many_requests_of_one(driver: Driver) -> None:
    tokens = [3, 1, 4]
    columns = [[1, 4, 1], [7, 7, 7], [1, 0, 1]]
    weights = [[0.5, -1.0, 2.0], [0.25, 0.0, 1.0], [0.5, 3.0, 0.0]]
    ones = [Datum(ints(tokens), ints(y), {"weights": floats(w)}) for y, w in zip(columns, weights, strict=True)]
    by_row = [[each for row in zip(*table, strict=True) for each in row] for table in (columns, weights)]
    together = Datum(ints(tokens), ints(by_row[0]), {"weights": floats(by_row[1])})
    expected, loss, norm = trained_on(driver, driver.trained(), *ones)
    (found,), loss_together, norm_together = trained_on(driver, driver.trained(), together)
    assert found == pytest.approx([each for row in zip(*expected, strict=True) for each in row], abs=CLOSE)
    assert loss_together == pytest.approx(loss, rel=CLOSE)
    assert norm_together == pytest.approx(norm, rel=CLOSE)


def test_what_several_targets_cannot_be(driver: Driver) -> None:
    name, two = driver.adapter(), Datum(ints([3, 1]), ints([1, 2, 3, 4]), {})
    driver.refused(driver.forward_backward(name, [two, datum([1, 2, 3])]))
    driver.refused(driver.forward_backward(name, [Datum(ints([3, 1]), ints([1, 2, 3]), {})]))
    driver.refused(driver.forward_backward(name, [Datum(ints([3, 1]), b"", {})]))
    driver.refused(driver.forward_backward(name, [Datum(ints([3, 1]), two.targets, {"weights": floats([1.0, 1.0])})]))
    inputs = dict.fromkeys(("logprobs", "advantages"), floats([0.0] * 4))
    driver.refused(driver.forward_backward(name, [Datum(ints([3, 1]), two.targets, inputs)], LossSpec(name="ppo")))


def outputs_of(driver: Driver, name: str, data: list[Datum], spec: OutputSpec) -> tuple[UnitResult, list[DatumOutputs]]:
    unit = msgspec.structs.replace(driver.forward_backward(name, data, backward=False), outputs=spec)
    (answer,) = driver.done(unit)
    assert isinstance(answer, ForwardBackwardDone) and answer.outputs is not None
    return answer, answer.outputs


def test_outputs_agree_with_one_another_and_with_the_logprobs(driver: Driver) -> None:
    name, data = driver.trained(), random_data(5, (6, 1))
    vocab_size = driver.info.vocab_size
    spec = OutputSpec(entropy=True, logsumexp=True, top_k=4, logits=True)
    answer, outputs = outputs_of(driver, name, data, spec)
    assert isinstance(answer, ForwardBackwardDone)
    assert sum(len(part) for each in outputs for part in msgspec.structs.astuple(each)) == spec.num_bytes(7, vocab_size)
    for each, given, logprobs in zip(outputs, data, answer.logprobs, strict=True):
        assert each.entropy and each.logsumexp and each.top_tokens and each.top_logprobs and each.logits
        logits = read_floats(each.logits)
        for t, target in enumerate(read_ints(given.targets)):
            row, lse = logits[t * vocab_size : (t + 1) * vocab_size], read_floats(each.logsumexp)[t]
            assert math.log(math.fsum(map(math.exp, row))) == pytest.approx(lse, abs=CLOSE)
            assert row[target] - lse == pytest.approx(read_floats(logprobs)[t], abs=CLOSE)
            entropy = math.fsum(math.exp(z - lse) * (lse - z) for z in row)
            assert read_floats(each.entropy)[t] == pytest.approx(entropy, abs=CLOSE)
            likeliest = sorted(range(vocab_size), key=lambda v: (-row[v], v))[:4]
            assert list(read_ints(each.top_tokens)[4 * t : 4 * t + 4]) == likeliest
            for v, logprob in zip(likeliest, read_floats(each.top_logprobs)[4 * t : 4 * t + 4], strict=True):
                assert logprob == pytest.approx(row[v] - lse, abs=CLOSE)


def test_only_what_was_asked_for_is_answered(driver: Driver) -> None:
    name, data = driver.adapter(), random_data(5, (6,))
    (answer,) = driver.done(driver.forward_backward(name, data, backward=False))
    assert isinstance(answer, ForwardBackwardDone) and answer.outputs is None
    asked, (outputs,) = outputs_of(driver, name, data, OutputSpec(entropy=True))
    assert isinstance(asked, ForwardBackwardDone) and asked.logprobs == answer.logprobs
    assert outputs == DatumOutputs(entropy=outputs.entropy) and len(outputs.entropy or b"") == 4 * 6


def test_outputs_have_the_same_bits_in_any_company_and_in_chunks(driver: Driver) -> None:
    spec = OutputSpec(entropy=True, logsumexp=True, top_k=3, logits=True)
    names = [driver.trained(seed, OTHERS[seed]) for seed in range(3)]
    data = [random_data(seed, (5 + seed, 17)) for seed in range(3)]
    alone = [nameless(outputs_of(driver, name, each, spec)[0]) for name, each in zip(names, data, strict=True)]
    for order in permutations(range(3)):
        units = [driver.forward_backward(names[i], data[i], backward=False) for i in order]
        answers = driver.done(*(msgspec.structs.replace(unit, outputs=spec) for unit in units))
        assert [nameless(answer) for answer in answers] == [alone[i] for i in order]
    chunks = driver.chunks(names[0], [data[0][0]], [data[0][1]])
    parts = driver.done(*(msgspec.structs.replace(unit, backward=False, outputs=spec) for unit in chunks))
    wholes = [outputs_of(driver, names[0], [datum], spec)[1] for datum in data[0]]
    assert [part.outputs for part in parts if isinstance(part, ForwardBackwardDone)] == wholes


def test_training_lowers_the_loss(driver: Driver) -> None:
    name = driver.adapter(lora=OTHERS[1])
    data = [datum([1, 2, 3, 4, 5, 6, 7, 8])]
    losses = []
    for _ in range(15):
        done, _ = driver.done(
            driver.forward_backward(name, data), driver.optim_step(name, AdamParams(learning_rate=0.02))
        )
        assert isinstance(done, ForwardBackwardDone)
        losses.append(done.loss)
    assert losses[-1] < 0.8 * losses[0]


def test_every_built_in_loss_runs(driver: Driver) -> None:
    name = driver.trained()
    tokens = [3, 1, 4, 1, 5]
    for loss, signature in BUILTIN_LOSSES.items():
        inputs = {key: [-1.0, 0.5, 2.0, -0.5] for key in signature.required}
        (done,) = driver.done(driver.forward_backward(name, [datum(tokens, **inputs)], LossSpec(name=loss)))
        assert isinstance(done, ForwardBackwardDone)
        assert math.isfinite(done.loss)
        step = driver.done(driver.optim_step(name))[0]
        assert isinstance(step, OptimStepDone)
        assert step.grad_norm > 0


@pytest.mark.parametrize("loss", BUILTIN_LOSSES)
def test_a_datum_without_an_optional_input_has_its_default(driver: Driver, loss: str) -> None:
    name = driver.trained()
    signature, spec = BUILTIN_LOSSES[loss], LossSpec(name=loss)
    inputs = {key: [-1.0, 0.5, 2.0, -0.5] for key in signature.required}
    given = {key: [default] * 4 for key, default in signature.optional.items()}
    tokens = [3, 1, 4, 1, 5]
    weighted = datum([7, 8, 9, 10, 11], **inputs, **{key: [0.5, 2.0, 0.0, 1.0] for key in signature.optional})
    answers = []
    for data in ([weighted, datum(tokens, **inputs)], [weighted, datum(tokens, **inputs, **given)]):
        done, _ = driver.done(driver.forward_backward(name, data, spec), driver.forward_backward(name, data, spec))
        assert isinstance(done, ForwardBackwardDone)
        step = driver.done(driver.optim_step(name, AdamParams(learning_rate=0.0)))[0]
        assert isinstance(step, OptimStepDone)
        answers.append((done.loss, done.metrics, done.logprobs, step.gradient_digest))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("loss", [name for name, each in BUILTIN_LOSSES.items() if "logprobs" in each.required])
def test_a_masked_token_may_have_any_logprob(driver: Driver, loss: str) -> None:
    name = driver.trained()
    signature, spec = BUILTIN_LOSSES[loss], LossSpec(name=loss)
    answers = []
    for filler in (0.0, -99999.0):
        inputs = {key: [0.0, 0.0, 1.0, 1.0] for key in (*signature.required, *signature.optional)}
        inputs["logprobs"] = [filler, filler, -1.0, -2.0]
        (done,) = driver.done(driver.forward_backward(name, [datum([3, 1, 4, 1, 5], **inputs)], spec))
        assert isinstance(done, ForwardBackwardDone)
        step = driver.done(driver.optim_step(name, AdamParams(learning_rate=0.0)))[0]
        assert isinstance(step, OptimStepDone)
        answers.append((done.loss, done.metrics, step.gradient_digest))
    assert answers[0] == answers[1]


def test_policy_losses_are_their_formulas(driver: Driver) -> None:
    """Recomputed from the logprobs the executor itself reports; neighbours that come before add nothing to it."""
    name = driver.trained()
    tokens, advantages, weights = [3, 1, 4, 1, 5], [1.0, -2.0, 0.5, -0.25], [1.0, 0.5, 2.0, 1.0]
    (plain,) = driver.done(driver.forward_backward(name, [datum(tokens)], backward=False))
    assert isinstance(plain, ForwardBackwardDone)
    now = read_floats(plain.logprobs[0])
    old = read_floats(floats([x + shift for x, shift in zip(now, [0.5, -0.5, -0.1, 0.1], strict=True)]))
    ratios = [math.exp(a - b) for a, b in zip(now, old, strict=True)]
    mask = [1.0, 0.0, 1.0, 1.0]
    rows = list(zip(ratios, advantages, weights, strict=True))
    moved = list(zip(now, old, advantages, weights, strict=True))
    sequence_ratio = math.prod(r for r, m in zip(ratios, mask, strict=True) if m) ** (1 / sum(mask))
    bounded = min(max(sequence_ratio, 1 - 3e-4), 1 + 4e-4)
    answered = [(a, w) for a, w, m in zip(advantages, weights, mask, strict=True) if m]
    expected = {
        "importance_sampling": -sum(w * r * a for r, a, w in rows),
        "ppo": -sum(w * min(r * a, min(max(r, 0.8), 1.2) * a) for r, a, w in rows),
        "cispo": -sum(w * min(math.exp(p - q), 4.0) * p * a for p, q, a, w in moved),
        "dro": -sum(w * (p * a - 0.05 / 2 * (p - q) ** 2) for p, q, a, w in moved),
        "gspo": -sum(w * min(sequence_ratio * a, bounded * a) for a, w in answered),
    }
    for loss, value in expected.items():
        inputs = {"logprobs": old, "advantages": advantages, "weights": weights}
        unweighted = {"logprobs": [0.0, 0.0], "advantages": [9.0, 9.0], "weights": [0.0, 0.0]}
        data = [datum([7, 8, 9], **unweighted), datum(tokens, **inputs)]
        if loss == "gspo":
            unanswered = unweighted | {"weights": [1.0, 1.0], "sequence_ratio_mask": [0.0, 0.0]}
            unweighted["sequence_ratio_mask"], inputs["sequence_ratio_mask"] = [1.0, 1.0], mask
            data = [datum([7, 8, 9], **each) for each in (unanswered, unweighted)] + [datum(tokens, **inputs)]
        (done,) = driver.done(driver.forward_backward(name, data, LossSpec(name=loss)))
        assert isinstance(done, ForwardBackwardDone)
        assert done.loss == pytest.approx(value, rel=10 * CLOSE)


def test_forward_leaves_no_gradient(driver: Driver) -> None:
    name = driver.adapter()
    before = driver.digest(name)
    data = random_data(1, (6,))
    forward, both = driver.adapter(5), driver.adapter(5)
    (a,) = driver.done(driver.forward_backward(forward, data, backward=False))
    (b,) = driver.done(driver.forward_backward(both, data))
    assert nameless(a) == nameless(b)
    driver.done(driver.forward_backward(name, data, backward=False))
    assert driver.digest(name) == before
    assert driver.refused(driver.optim_step(name)).code == "no-gradients"


def test_requests_accumulate_until_the_step(driver: Driver) -> None:
    """Twice the same gradient has twice the norm, and the step clears it."""
    once, twice = driver.trained(), driver.trained()
    data = random_data(3, (9,))
    driver.done(driver.forward_backward(once, data))
    driver.done(driver.forward_backward(twice, data), driver.forward_backward(twice, data))
    a, b = driver.done(driver.optim_step(once), driver.optim_step(twice))
    assert isinstance(a, OptimStepDone)
    assert isinstance(b, OptimStepDone)
    assert b.grad_norm == pytest.approx(2 * a.grad_norm, rel=CLOSE)
    assert driver.refused(driver.optim_step(once)).code == "no-gradients"


# ---------------------------------------------------------------------------------------------- chunks


def test_chunks_are_one_request(driver: Driver) -> None:
    """Their losses add to the whole request's, and so do their gradients."""
    whole, cut = driver.trained(), driver.trained()
    data = random_data(6, (9, 4, 12))
    (all_at_once,) = driver.done(driver.forward_backward(whole, data))
    parts = driver.done(*driver.chunks(cut, data[:1], data[1:2], data[2:]))
    assert isinstance(all_at_once, ForwardBackwardDone)
    losses = [part.loss for part in parts if isinstance(part, ForwardBackwardDone)]
    assert sum(losses) == pytest.approx(all_at_once.loss, rel=CLOSE)
    a, b = driver.done(driver.optim_step(whole), driver.optim_step(cut))
    assert isinstance(a, OptimStepDone)
    assert isinstance(b, OptimStepDone)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=CLOSE)


def test_chunks_may_come_in_different_batches(driver: Driver) -> None:
    together, apart, company = driver.trained(), driver.trained(), driver.trained(1, OTHERS[1])
    data = random_data(6, (9, 4, 12))
    driver.done(*driver.chunks(together, data[:2], data[2:]))
    for chunk in driver.chunks(apart, data[:2], data[2:]):
        driver.done(driver.forward_backward(company, random_data(8, (13,))), chunk)
    driver.done(driver.optim_step(together), driver.optim_step(apart))
    assert driver.digest(together) == driver.digest(apart)


@pytest.mark.parametrize("first", [False, True])
def test_chunks_of_a_forward_and_of_a_forward_backward_may_share_batches(driver: Driver, first: bool) -> None:
    """Whichever comes first, and whichever is still open when the batch ends."""
    mixed, apart, company = driver.trained(), driver.trained(), driver.trained(1, OTHERS[1])
    data = random_data(6, (9, 4, 12))
    forward = [msgspec.structs.replace(u, backward=False) for u in driver.chunks(mixed, data[:1], data[1:2], data[2:])]
    gradients = driver.chunks(mixed, data[:2], data[2:])
    units = [*gradients, *forward] if first else [*forward, *gradients]
    others = driver.forward_backward(company, random_data(8, (13,)))
    answers = [*driver.done(units[0], others, units[1]), *driver.done(*units[2:])]
    assert all(isinstance(answer, ForwardBackwardDone) for answer in answers)
    driver.done(*driver.chunks(apart, data[:2], data[2:]))
    driver.done(driver.optim_step(mixed), driver.optim_step(apart))
    assert driver.digest(mixed) == driver.digest(apart)


def test_gradients_count_only_after_the_last_chunk(driver: Driver) -> None:
    name = driver.trained()
    first, last = driver.chunks(name, random_data(1, (5,)), random_data(2, (5,)))
    driver.done(first)
    assert driver.refused(driver.optim_step(name)).code == "no-gradients"
    driver.done(last)
    driver.done(driver.optim_step(name))


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_failed_chunk_leaves_nothing_of_its_request(driver: Driver, broken: int) -> None:
    """Neither before nor after the failure; an earlier request's gradient stays as it was."""
    name, reference = driver.trained(), driver.trained()
    earlier = random_data(1, (7,))
    driver.done(driver.forward_backward(name, earlier), driver.forward_backward(reference, earlier))
    parts = [random_data(seed, (5,)) for seed in (2, 3, 4)]
    parts[broken] = [datum([1, driver.info.vocab_size, 2])]
    answers = driver.run(*driver.chunks(name, *parts))
    assert [isinstance(answer, UnitFailed) for answer in answers] == [i >= broken for i in range(3)]
    assert all(answer.category == "user" for answer in answers if isinstance(answer, UnitFailed))
    driver.done(driver.optim_step(name), driver.optim_step(reference))
    assert driver.digest(name) == driver.digest(reference)


def test_a_failed_request_is_no_gradient(driver: Driver) -> None:
    name = driver.adapter()
    before = driver.digest(name)
    driver.refused(driver.forward_backward(name, [datum([1, 2, -1])]))
    assert driver.refused(driver.optim_step(name)).code == "no-gradients"
    assert driver.digest(name) == before


# ------------------------------------------------------------------------------------------ bad requests


def bad_data(driver: Driver) -> list[tuple[str, list[Datum], LossSpec]]:
    vocab, longest = driver.info.vocab_size, driver.info.max_length
    good, one = LossSpec(), [1.0, 1.0]
    policy = LossSpec(name="importance_sampling")
    return [
        ("no data", [], good),
        ("no tokens", [Datum(b"", b"", {})], good),
        ("half a token", [Datum(b"\1\0", b"\1\0", {})], good),
        ("token too large", [datum([1, vocab, 2])], good),
        ("negative token", [datum([-1, 1, 2])], good),
        ("target too large", [Datum(ints([1, 2]), ints([1, vocab]), {})], good),
        ("negative target", [Datum(ints([1, 2]), ints([1, -(2**31)]), {})], good),
        ("fewer targets", [Datum(ints([1, 2]), ints([1]), {})], good),
        ("too long", [datum([1] * (longest + 2))], good),
        ("fewer weights", [datum([1, 2, 3], weights=[1.0])], good),
        ("NaN weight", [datum([1, 2, 3], weights=[1.0, math.nan])], good),
        ("infinite weight", [datum([1, 2, 3], weights=[math.inf, 1.0])], good),
        ("unknown input", [datum([1, 2, 3], whites=one)], good),
        ("unknown loss", [datum([1, 2, 3])], LossSpec(name="no_such_loss")),
        ("unknown setting", [datum([1, 2, 3])], LossSpec(config={"epsilon": 1.0})),
        ("missing input", [datum([1, 2, 3], logprobs=one)], policy),
        ("infinite ratio", [datum([1, 2, 3], logprobs=[-1e30, -1e30], advantages=one)], policy),
        ("NaN advantage", [datum([1, 2, 3], logprobs=one, advantages=[math.nan, 1.0])], policy),
    ]


def test_bad_data_is_the_callers_mistake(driver: Driver) -> None:
    """And leaves the adapter, its accumulated gradient included, as it was."""
    name, reference = driver.trained(), driver.trained()
    data = random_data(1, (7,))
    driver.done(driver.forward_backward(name, data), driver.forward_backward(reference, data))
    for label, bad, loss in bad_data(driver):
        answer = driver.run(driver.forward_backward(name, bad, loss))[0]
        assert isinstance(answer, UnitFailed), label
        assert answer.category == "user", (label, answer)
    driver.done(driver.optim_step(name), driver.optim_step(reference))
    assert driver.digest(name) == driver.digest(reference)


def test_a_datum_that_fails_takes_its_whole_request(driver: Driver) -> None:
    name = driver.adapter()
    driver.refused(driver.forward_backward(name, [*random_data(1, (7,)), datum([1, 2, -5])]))
    assert driver.refused(driver.optim_step(name)).code == "no-gradients"


# --------------------------------------------------------------------------------------------- optim_step


def test_a_step_changes_the_state_and_counts(driver: Driver) -> None:
    name = driver.adapter()
    before = driver.digest(name)
    for step in (1, 2):
        _, done = driver.done(driver.forward_backward(name, random_data(step, (6,))), driver.optim_step(name))
        assert isinstance(done, OptimStepDone)
        assert done.step == step
        assert done.state_digest == driver.digest(name) != before
        assert driver.executor.snapshot(name).step == step


def test_a_step_says_what_it_applied_and_what_it_came_to(driver: Driver) -> None:
    """The gradient's digest is of the gradient alone, before clipping; the weights' is of the weights alone."""
    data, other = random_data(1, (9,)), random_data(2, (9,))

    def step(train: list[Datum], name: str, **adam: float) -> OptimStepDone:
        _, done = driver.done(driver.forward_backward(name, train), driver.optim_step(name, AdamParams(**adam)))
        assert isinstance(done, OptimStepDone)
        assert done.gradient_digest is not None and done.weights_digest is not None
        return done

    plain = step(data, driver.trained())
    clipped = step(data, driver.trained(), grad_clip_norm=plain.grad_norm / 4)
    still = step(data, driver.trained(), learning_rate=0.0)
    assert plain.gradient_digest == clipped.gradient_digest == still.gradient_digest
    assert plain.gradient_digest != step(other, driver.trained()).gradient_digest
    digests = {plain.weights_digest, clipped.weights_digest, still.weights_digest}
    assert len(digests) == 3
    name = driver.trained()
    first, second = step(data, name, learning_rate=0.0), step(data, name, learning_rate=0.0)
    assert first.weights_digest == second.weights_digest == still.weights_digest
    assert first.state_digest != second.state_digest, "the moments and the step count moved"


def test_clipping_is_by_the_whole_norm(driver: Driver) -> None:
    """A bound above the norm changes nothing, one below it the step; the norm is reported before clipping."""
    data = random_data(1, (9,))
    norms = []
    states = []
    for clip in (0.0, 1e9):
        name = driver.trained()
        _, done = driver.done(
            driver.forward_backward(name, data), driver.optim_step(name, AdamParams(grad_clip_norm=clip))
        )
        assert isinstance(done, OptimStepDone)
        norms.append(done.grad_norm)
        states.append(done.state_digest)
    assert norms[0] == norms[1] > 0
    assert states[0] == states[1]
    name = driver.trained()
    adam = AdamParams(grad_clip_norm=norms[0] / 4)
    _, done = driver.done(driver.forward_backward(name, data), driver.optim_step(name, adam))
    assert isinstance(done, OptimStepDone)
    assert done.grad_norm == norms[0]
    assert done.state_digest != states[0]


def test_a_step_of_zero_length_keeps_the_model(driver: Driver) -> None:
    name = driver.trained()
    data = random_data(1, (9,))
    first, _, second = driver.done(
        driver.forward_backward(name, data),
        driver.optim_step(name, AdamParams(learning_rate=0.0)),
        driver.forward_backward(name, data),
    )
    assert nameless(first) == nameless(second)


# --------------------------------------------------------------------------------------- snapshot, load


def test_a_loaded_adapter_continues_bit_for_bit(driver: Driver) -> None:
    original = driver.trained()
    state = driver.executor.snapshot(original)
    assert state.step == 2
    copy = driver.name()
    report = driver.executor.load(copy, state, True)
    assert (report.step, report.state_digest) == (2, state.digest)
    assert driver.executor.snapshot(copy) == state
    for step in range(2):
        data = random_data(50 + step, (8, 3))
        first, second = (
            driver.done(driver.forward_backward(name, data), driver.optim_step(name)) for name in (original, copy)
        )
        assert list(map(nameless, first)) == list(map(nameless, second))
    assert driver.digest(original) == driver.digest(copy)


def test_loading_weights_alone_starts_the_optimizer_anew(driver: Driver) -> None:
    original = driver.trained()
    state = driver.executor.snapshot(original)
    bare = msgspec.structs.replace(state, optimizer=None)
    first, second = driver.name(), driver.name()
    reports = [driver.executor.load(first, state, False), driver.executor.load(second, bare, False)]
    assert reports[0] == reports[1]
    assert reports[0].step == 0
    assert reports[0].state_digest != state.digest
    data = random_data(1, (6,))
    forwards = [driver.forward_backward(name, data) for name in (original, first, second)]
    a, b, c = map(nameless, driver.done(*forwards))
    assert a == b == c
    steps = driver.done(driver.optim_step(first), driver.optim_step(second))
    assert nameless(steps[0]) == nameless(steps[1])
    assert isinstance(steps[0], OptimStepDone)
    assert steps[0].step == 1
    with pytest.raises(UserError):
        driver.executor.load(first, bare, True)


def test_a_snapshot_has_no_gradients_and_is_a_copy(driver: Driver) -> None:
    name = driver.trained()
    before = driver.executor.snapshot(name)
    driver.done(driver.forward_backward(name, random_data(1, (6,))))
    assert driver.executor.snapshot(name) == before
    driver.executor.load(name, before, True)
    assert driver.refused(driver.optim_step(name)).code == "no-gradients"


def test_load_takes_the_place_of_another_shape(driver: Driver) -> None:
    state = driver.executor.snapshot(driver.trained(1, OTHERS[1]))
    name = driver.trained(0, OTHERS[0])
    report = driver.executor.load(name, state, True)
    assert report.state_digest == state.digest
    assert driver.executor.snapshot(name).lora == OTHERS[1]


def test_damaged_states_are_refused(driver: Driver) -> None:
    """And leave the adapter they would have replaced."""
    name = driver.trained()
    state = driver.executor.snapshot(name)
    assert state.optimizer is not None
    for damage in (
        {"weights": state.weights[:-8]},
        {"weights": b""},
        {"optimizer": b"garbage"},
        {"lora": LoraConfig(rank=5, targets=state.lora.targets)},
    ):
        with pytest.raises(TinkerbellError):
            driver.executor.load(name, msgspec.structs.replace(state, **damage), True)
    assert driver.digest(name) == state.digest
    driver.done(driver.forward_backward(name, random_data(1, (6,))), driver.optim_step(name))


# ------------------------------------------------------------------------------------------------ sample


def sampled(driver: Driver, name: str | None, prompt: list[int], **params: object) -> SampleDone:
    (done,) = driver.done(driver.sample(name, prompt, **params))  # type: ignore[arg-type]
    assert isinstance(done, SampleDone)
    return done


def test_a_sample_has_the_length_asked_for(driver: Driver) -> None:
    done = sampled(driver, driver.trained(), [1, 2, 3], max_tokens=7, num_samples=3)
    assert len(done.sequences) == 3
    for sequence in done.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == 4 * 7
        assert sequence.stop_reason == "length"
        assert all(0 <= token < driver.info.vocab_size for token in read_ints(sequence.tokens))
    assert done.prompt_logprobs is None


def test_sample_logprobs_are_the_models_own(driver: Driver) -> None:
    """At temperature 1 without cuts, whatever the settings; the same as a forward's on the same tokens."""
    name = driver.trained()
    prompt = [9, 8, 7]
    for params in ({}, {"temperature": 0.3}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.2}):
        done = sampled(driver, name, prompt, max_tokens=6, prompt_logprobs=True, **params)
        tokens = prompt + read_ints(done.sequences[0].tokens)
        (forward,) = driver.done(driver.forward_backward(name, [datum(tokens)], backward=False))
        assert isinstance(forward, ForwardBackwardDone)
        assert done.prompt_logprobs is not None
        found = read_floats(done.prompt_logprobs) + read_floats(done.sequences[0].logprobs)
        assert found == pytest.approx(read_floats(forward.logprobs[0]), abs=CLOSE)


def logprobs_of(driver: Driver, name: str | None, tokens: list[int]) -> list[list[float]]:
    """[N][V] of what follows each token, asked for token by token of the vocabulary."""
    size = driver.info.vocab_size
    found = sampled(driver, name, [*tokens, 0], max_tokens=1, prompt_targets=[list(range(size))] * (len(tokens) + 1))
    assert found.prompt_scores is not None and found.prompt_scores.target_logprobs is not None
    flat = read_floats(found.prompt_scores.target_logprobs)
    assert all(map(math.isnan, flat[:size]))
    return [flat[size * n : size * (n + 1)] for n in range(1, len(tokens) + 1)]


def likeliest_of(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]


def test_targets_anywhere_in_the_vocabulary_have_the_logprobs_of_a_distribution(driver: Driver) -> None:
    name, prompt = driver.trained(), [9, 8, 7]
    rows = logprobs_of(driver, name, prompt)
    assert [math.fsum(map(math.exp, row)) for row in rows] == pytest.approx([1.0] * 3, abs=CLOSE)
    bare = sampled(driver, name, prompt, max_tokens=1, prompt_logprobs=True)
    assert bare.prompt_logprobs is not None and bare.prompt_scores is None
    # A prompt of another length may round otherwise. With the same one the bits are the same: what else is asked for
    # changes nothing, and a target has the logprob that the prompt's own token has.
    assert read_floats(bare.prompt_logprobs) == pytest.approx([rows[0][8], rows[1][7]], abs=CLOSE)
    more = sampled(driver, name, prompt, max_tokens=1, prompt_logprobs=True, prompt_targets=[[0], [8], [7]])
    assert more.prompt_logprobs == bare.prompt_logprobs
    assert more.prompt_scores is not None and more.prompt_scores.target_logprobs is not None
    assert more.prompt_scores.target_logprobs[4:] == bare.prompt_logprobs


def test_likeliest_tokens_of_prompt_and_samples(driver: Driver) -> None:
    name, prompt = driver.trained(), [9, 8, 7]
    for settings in ({}, {"temperature": 0.0}, {"top_k": 1, "temperature": 0.3}):
        done = sampled(
            driver, name, prompt, max_tokens=5, num_samples=2, top_logprobs=4, prompt_top_logprobs=3, **settings
        )
        bare = sampled(driver, name, prompt, max_tokens=5, num_samples=2, **settings)
        for sequence, alone in zip(done.sequences, bare.sequences, strict=True):
            assert sequence.top_tokens is not None and sequence.top_logprobs is not None
            assert msgspec.structs.replace(sequence, top_tokens=None, top_logprobs=None) == alone
            tokens = read_ints(sequence.tokens)
            rows = logprobs_of(driver, name, (prompt + tokens)[:-1])[len(prompt) - 1 :]
            tops = read_ints(sequence.top_tokens)
            assert tops == [v for row in rows for v in likeliest_of(row, 4)]
            expected = [row[v] for row in rows for v in likeliest_of(row, 4)]
            assert read_floats(sequence.top_logprobs) == pytest.approx(expected, abs=CLOSE)
            for t, token in enumerate(tokens):
                if token in tops[4 * t : 4 * t + 4]:
                    place = 4 * t + tops[4 * t : 4 * t + 4].index(token)
                    assert read_floats(sequence.top_logprobs)[place] == read_floats(sequence.logprobs)[t]
        assert done.prompt_logprobs is None and done.prompt_scores is not None
        assert done.prompt_scores.target_logprobs is None
        assert done.prompt_scores.top_tokens is not None and done.prompt_scores.top_logprobs is not None
        rows = logprobs_of(driver, name, prompt[:-1])
        assert read_ints(done.prompt_scores.top_tokens) == [v for row in rows for v in likeliest_of(row, 3)]
        expected = [row[v] for row in rows for v in likeliest_of(row, 3)]
        assert read_floats(done.prompt_scores.top_logprobs) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_at_the_positions_of_a_prompt_have_its_distributions(driver: Driver, temperature: float) -> None:
    name, prompt, requests = driver.trained(), [9, 8, 7], 40
    rows = logprobs_of(driver, name, prompt[:-1])
    counts = [[0] * driver.info.vocab_size for _ in rows]
    for seed in range(requests):
        # Neither changes a draw: what cuts samples off, and how many there are.
        cut = {"top_k": 1 + seed % 3, "num_samples": 1 + seed % 2}
        done = sampled(driver, name, prompt, seed=seed, max_tokens=1, prompt_draws=64, temperature=temperature, **cut)
        scores = done.prompt_scores
        assert scores is not None and scores.drawn_tokens is not None and scores.drawn_logprobs is not None
        drawn, logprobs = read_ints(scores.drawn_tokens), read_floats(scores.drawn_logprobs)
        assert len(drawn) == len(logprobs) == 64 * len(rows)
        for i, (token, logprob) in enumerate(zip(drawn, logprobs, strict=True)):
            assert logprob == pytest.approx(rows[i // 64][token], abs=CLOSE)
            counts[i // 64][token] += 1
    for row, found in zip(rows, counts, strict=True):
        weights = [math.exp(logprob / temperature) for logprob in row]
        expected = [64 * requests * weight / sum(weights) for weight in weights]
        chi_squared = sum((n - e) ** 2 / e for n, e in zip(found, expected, strict=True))
        degrees = len(row) - 1
        # Six standard deviations of a chi-squared distribution above its mean.
        assert chi_squared < degrees + 6 * math.sqrt(2 * degrees)


def test_draws_depend_on_the_seed_alone(driver: Driver) -> None:
    name, prompt = driver.trained(), list(range(3, 20))
    asked = {"max_tokens": 1, "prompt_draws": 5}
    alone = sampled(driver, name, prompt, seed=7, **asked)
    others = [driver.sample(driver.trained(n, OTHERS[n]), [*prompt, n], n, **asked) for n in (1, 2)]
    again = driver.done(*others, driver.sample(name, prompt, 7, **asked))[-1]
    other = sampled(driver, name, prompt, seed=8, **asked)
    assert isinstance(again, SampleDone) and alone.prompt_scores == again.prompt_scores != other.prompt_scores
    for temperature in (0.0, 1e-300, 1e-9):
        greedy = sampled(driver, name, prompt, temperature=temperature, prompt_top_logprobs=2, **asked)
        assert greedy.prompt_scores is not None
        tops, drawn = greedy.prompt_scores.top_tokens, greedy.prompt_scores.drawn_tokens
        assert tops is not None and drawn is not None and len(tops) == 8 * (len(prompt) - 1)
        assert read_ints(drawn) == [token for token in read_ints(tops)[::2] for _ in range(5)]


def test_targets_may_be_missing(driver: Driver) -> None:
    name, prompt = driver.trained(), [9, 8, 7]
    rows = logprobs_of(driver, name, prompt[:-1])
    done = sampled(driver, name, prompt, max_tokens=1, prompt_targets=[[5, 6], [-1, 3], [-1, -1]])
    assert done.prompt_scores is not None and done.prompt_scores.target_logprobs is not None
    expected = [math.nan, math.nan, math.nan, rows[0][3], math.nan, math.nan]
    assert read_floats(done.prompt_scores.target_logprobs) == pytest.approx(expected, abs=CLOSE, nan_ok=True)
    assert (done.prompt_scores.top_tokens, done.prompt_scores.top_logprobs) == (None, None)


def test_a_prompt_of_a_single_token_has_nothing_to_score(driver: Driver) -> None:
    done = sampled(driver, None, [4], max_tokens=1, prompt_top_logprobs=2, prompt_draws=2, prompt_targets=[[1, 2]])
    scores = done.prompt_scores
    assert scores is not None and scores.target_logprobs is not None
    assert (scores.top_tokens, scores.top_logprobs) == (b"", b"")
    assert (scores.drawn_tokens, scores.drawn_logprobs) == (b"", b"")
    assert all(map(math.isnan, read_floats(scores.target_logprobs))) and len(scores.target_logprobs) == 8


def test_distributions_have_the_same_bits_in_company(driver: Driver) -> None:
    asked = {"max_tokens": 4, "top_logprobs": 3, "prompt_top_logprobs": 2, "num_samples": 2}
    names = [driver.trained(), driver.trained(1, OTHERS[1]), driver.trained(2, OTHERS[2]), None]
    units = [
        driver.sample(name, list(range(3, 7 + n)), n, [[n, -1, 9]] * (4 + n), **asked) for n, name in enumerate(names)
    ]
    together = driver.done(*units)
    assert [nameless(answer) for answer in together] == [nameless(driver.done(unit)[0]) for unit in units]


def test_distributions_that_cannot_be_asked_for_fail_alone(driver: Driver) -> None:
    size = driver.info.vocab_size
    good = driver.sample(None, [1, 2], max_tokens=2)
    bad = [
        driver.sample(None, [1, 2], prompt_targets=[[1], [size]]),
        driver.sample(None, [1, 2], prompt_targets=[[1], [-2]]),
        driver.sample(None, [1, 2], prompt_targets=[[1, 2, 3]]),
        driver.sample(None, [1, 2], prompt_targets=[]),
    ]
    for unit in bad:
        assert driver.refused(unit, good).code == "invalid-request"


def test_prompt_logprobs_of_a_single_token_are_empty(driver: Driver) -> None:
    assert sampled(driver, None, [4], max_tokens=1, prompt_logprobs=True).prompt_logprobs == b""


def test_the_seed_makes_the_sample_alone_and_in_company(driver: Driver) -> None:
    name, other = driver.trained(), driver.trained(1, OTHERS[1])
    settings = {"max_tokens": 9, "num_samples": 3, "temperature": 0.9}
    alone = sampled(driver, name, [1, 2], seed=5, **settings)
    again = sampled(driver, name, [1, 2], seed=5, **settings)
    different = sampled(driver, name, [1, 2], seed=6, **settings)
    assert nameless(alone) == nameless(again)
    assert alone.sequences != different.sequences
    assert alone.sequences[0] != alone.sequences[1]
    company = [
        driver.sample(other, [3] * 20, seed=5, max_tokens=4),
        driver.sample(name, [1, 2], seed=5, **settings),
        driver.sample(None, [1, 2], seed=9, max_tokens=30, num_samples=2),
        driver.sample(name, [1, 2], seed=7, max_tokens=2),
    ]
    generator = random.Random(0)
    for _ in range(3):
        answers = dict(zip((unit.request for unit in company), driver.done(*company), strict=True))
        mine = next(unit for unit in company if unit.seed == 5 and unit.params.num_samples == 3)
        assert nameless(answers[mine.request]) == nameless(alone)
        generator.shuffle(company)


def test_fewer_samples_are_a_prefix_of_more(driver: Driver) -> None:
    name = driver.trained()
    few = sampled(driver, name, [1, 2], seed=3, max_tokens=5, num_samples=2)
    more = sampled(driver, name, [1, 2], seed=3, max_tokens=5, num_samples=4)
    assert [s.tokens for s in more.sequences[:2]] == [s.tokens for s in few.sequences]


def test_greedy_takes_the_likeliest_token(driver: Driver) -> None:
    name = driver.trained()
    greedy = sampled(driver, name, [1, 2, 3], seed=1, temperature=0.0, max_tokens=1)
    same = sampled(driver, name, [1, 2, 3], seed=2, temperature=0.0, max_tokens=1)
    assert greedy.sequences == same.sequences
    data = [Datum(ints([1, 2, 3]), ints([0, 0, target]), {}) for target in range(driver.info.vocab_size)]
    (forward,) = driver.done(driver.forward_backward(name, data, backward=False))
    assert isinstance(forward, ForwardBackwardDone)
    last = [read_floats(raw)[-1] for raw in forward.logprobs]
    assert read_ints(greedy.sequences[0].tokens)[0] == last.index(max(last))


def test_a_range_of_samples_is_that_part_of_all(driver: Driver) -> None:
    name = driver.trained()
    unit = driver.sample(name, [1, 2], seed=3, max_tokens=5, num_samples=5, temperature=0.9)
    (whole,) = driver.done(unit)
    parts = [
        driver.done(msgspec.structs.replace(unit, start=start, stop=stop))[0].sequences
        for start, stop in ((0, 2), (2, 3), (3, None))
    ]
    assert [sequence for part in parts for sequence in part] == whole.sequences


def test_stop_tokens_end_a_sample_and_stay_once(driver: Driver) -> None:
    name = driver.trained()
    free = read_ints(sampled(driver, name, [1, 2], seed=4, max_tokens=12).sequences[0].tokens)
    stop = free[5]
    length = free.index(stop) + 1
    done = sampled(driver, name, [1, 2], seed=4, max_tokens=12, stop_tokens=(stop,))
    assert read_ints(done.sequences[0].tokens) == free[:length]
    assert done.sequences[0].stop_reason == "stop"
    exact = sampled(driver, name, [1, 2], seed=4, max_tokens=length, stop_tokens=(stop,))
    assert exact.sequences == done.sequences
    short = sampled(driver, name, [1, 2], seed=4, max_tokens=length - 1, stop_tokens=(stop,))
    assert (len(short.sequences[0].tokens), short.sequences[0].stop_reason) == (4 * (length - 1), "length")


def test_without_stop_tokens_the_models_end_counts(driver: Driver) -> None:
    """top_k of the whole vocabulary at a high temperature meets the end token sooner or later."""
    (eos, *_) = driver.info.eos_tokens
    settings = {"seed": 1, "max_tokens": 300, "num_samples": 6, "temperature": 50.0}
    free = sampled(driver, None, [1, 2], **settings)
    stopped = sampled(driver, None, [1, 2], stop_tokens=None, **settings)
    assert any(eos in read_ints(sequence.tokens) for sequence in free.sequences)
    for a, b in zip(free.sequences, stopped.sequences, strict=True):
        tokens = read_ints(a.tokens)
        assert read_ints(b.tokens) == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
        assert b.stop_reason == ("stop" if eos in tokens else "length")


def test_the_models_length_bounds_a_sample(driver: Driver) -> None:
    longest = driver.info.max_length
    done = sampled(driver, None, [1] * (longest - 3), max_tokens=50)
    assert len(done.sequences[0].tokens) == 4 * 3
    assert done.sequences[0].stop_reason == "length"
    driver.refused(driver.sample(None, [1] * (longest + 1)))


def test_a_sequence_that_fills_the_context_is_scored(driver: Driver) -> None:
    """With the numbers of the same tokens in training; the token that is sampled besides is one."""
    name = driver.trained()
    tokens = [1 + i % 50 for i in range(driver.info.max_length)]
    done = sampled(driver, name, tokens, max_tokens=1, prompt_logprobs=True)
    assert len(done.sequences[0].tokens) == 4 and done.prompt_logprobs is not None
    (trained,) = driver.done(driver.forward_backward(name, [datum(tokens)], backward=False))
    assert isinstance(trained, ForwardBackwardDone)
    assert read_floats(done.prompt_logprobs) == pytest.approx(read_floats(trained.logprobs[0]), abs=1e-3)


def test_bad_prompts_fail_alone(driver: Driver) -> None:
    name = driver.trained()
    (alone,) = driver.done(driver.sample(name, [1, 2], seed=2, max_tokens=4))
    for prompt in ([], [1, -1], [driver.info.vocab_size]):
        failed, company = driver.run(driver.sample(name, prompt), driver.sample(name, [1, 2], seed=2, max_tokens=4))
        assert isinstance(failed, UnitFailed)
        assert failed.category == "user"
        assert nameless(company) == nameless(alone)


def test_sampling_leaves_the_adapter_as_it_was(driver: Driver) -> None:
    name, reference = driver.trained(), driver.trained()
    data = random_data(1, (6,))
    driver.done(driver.forward_backward(name, data), driver.forward_backward(reference, data))
    before = driver.digest(name)
    sampled(driver, name, [1, 2, 3], max_tokens=5, prompt_logprobs=True)
    assert driver.digest(name) == before
    driver.done(driver.optim_step(name), driver.optim_step(reference))
    assert driver.digest(name) == driver.digest(reference)


def test_a_sample_sees_the_weights_of_its_place(driver: Driver) -> None:
    """Between two steps in one batch it sees the first step's weights."""
    name, reference = driver.adapter(), driver.adapter()
    adam = AdamParams(learning_rate=0.05)
    data = [random_data(seed, (9,)) for seed in (1, 2)]
    (_, _, inside, *_) = driver.done(
        driver.forward_backward(name, data[0]), driver.optim_step(name, adam),
        driver.sample(name, [1, 2], max_tokens=4, prompt_logprobs=True),
        driver.forward_backward(name, data[1]), driver.optim_step(name, adam),
    )  # fmt: skip
    driver.done(driver.forward_backward(reference, data[0]), driver.optim_step(reference, adam))
    assert nameless(inside) == nameless(sampled(driver, reference, [1, 2], max_tokens=4, prompt_logprobs=True))


def test_random_work_gives_the_same_bits_in_any_batching(driver: Driver) -> None:
    """Thirty random units of three adapters, in batches of one and in random batches."""
    generator = random.Random(1)
    work: list[tuple[int, str, int]] = []
    for number in range(30):
        kind = generator.choice(["forward_backward", "forward_backward", "optim_step", "sample"])
        work.append((generator.randrange(3), kind, number))

    def carry_out(cut: random.Random | None) -> tuple[dict[int, list[UnitResult]], list[str]]:
        names = [driver.adapter(seed, OTHERS[seed]) for seed in range(3)]
        answers: dict[int, list[UnitResult]] = {0: [], 1: [], 2: []}
        position = 0
        while position < len(work):
            taken = work[position : position + (cut.randint(2, 9) if cut else 1)]
            position += len(taken)
            units = []
            for who, kind, number in taken:
                if kind == "forward_backward":
                    units.append(driver.forward_backward(names[who], random_data(number, (3 + number, 5))))
                elif kind == "optim_step":
                    units.append(driver.optim_step(names[who], ADAM))
                else:
                    units.append(driver.sample(names[who], [number, 1], seed=number, max_tokens=5))
            for (who, _, _), answer in zip(taken, driver.run(*units), strict=True):
                answers[who].append(nameless(answer))
        return answers, [driver.digest(name) for name in names]

    assert carry_out(None) == carry_out(generator)
