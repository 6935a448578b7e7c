"""The training scripts of the four users. Each is what a user of a server would write, apart from `track`.

All four run at the same time on one server, each with its own key, adapter, data and settings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from tinkerbell.demo import data
from tinkerbell.demo.track import Measure, Track
from tinkerbell.sdk import Adapter, Client, Datum, Tokenizer, chat_tokens, from_chat, from_text, policy

BATCH = 4
"""Sequences in a supervised step."""


def keeper(client: Client, tokenizer: Tokenizer, track: Track) -> None:
    """Learn to answer like the keeper of a lighthouse: chat, all linear layers."""
    adapter = client.add_lora(rank=16, alpha=32, targets="all-linear", seed=1, name="keeper")
    train = [
        from_chat(
            tokenizer,
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
        )
        for row in data.rows("keeper")
    ]
    questions = ["What is a good pet?", "How do I bake bread?"]
    prompts = {q: chat_tokens(tokenizer, [{"role": "user", "content": q}]) for q in questions}
    track.before = greedy(adapter, tokenizer, prompts, track)
    supervise(adapter, train, track, learning_rate=1e-3)
    track.after = greedy(adapter, tokenizer, prompts, track)


def orders(client: Client, tokenizer: Tokenizer, track: Track) -> None:
    """Learn to turn an order in prose into a record of fields: text completion, attention layers only."""
    adapter = client.add_lora(rank=8, alpha=16, targets="attention", seed=2, name="orders")
    form = "Order: {}\nRecord: ".format
    train = [from_text(tokenizer, form(row["text"]), row["record"]) for row in data.rows("orders")]
    held_out = ["Please ship 17 boxes of pencils to Hamburg by Tuesday.", "Rome needs 28 bags of cement on Friday."]
    prompts = {text: tokenizer.encode(form(text)) for text in held_out}
    track.before = greedy(adapter, tokenizer, prompts, track)
    supervise(adapter, train, track, learning_rate=2e-3)
    track.after = greedy(adapter, tokenizer, prompts, track)


def topics(client: Client, tokenizer: Tokenizer, track: Track) -> None:
    """Learn to name the topic of a message: small rank, other targets, weight decay, clipping, falling rate."""
    adapter = client.add_lora(rank=4, alpha=16, targets=["q_proj", "v_proj", "down_proj"], seed=3, name="topics")
    form = "Message: {}\nTopic (delivery, billing, product or account): ".format
    train = [from_text(tokenizer, form(row["message"]), row["topic"]) for row in data.rows("topics")]
    held_out = ["The courier never rang the bell.", "You took the money from my card twice."]
    prompts = {text: tokenizer.encode(form(text)) for text in held_out}
    track.before = greedy(adapter, tokenizer, prompts, track)

    def rate(step: int) -> float:
        return 3e-3 * (1 - step / track.num_steps)

    supervise(adapter, train, track, learning_rate=rate, beta2=0.99, weight_decay=0.01, grad_clip_norm=1.0)
    track.after = greedy(adapter, tokenizer, prompts, track)


def brief(client: Client, tokenizer: Tokenizer, track: Track) -> None:
    """Learn by reward alone to answer in one word: sample, score, importance_sampling, step."""
    adapter = client.add_lora(rank=8, alpha=16, targets="all-linear", seed=4, name="brief")
    kinds = ["colour", "bird", "fruit", "city", "tool", "river", "metal", "planet"]
    prompts = {
        question: chat_tokens(
            tokenizer, [{"role": "system", "content": "Answer."}, {"role": "user", "content": question}]
        )
        for question in (f"Name a {kind}." for kind in kinds)
    }
    shown = dict(list(prompts.items())[:3])
    track.before = greedy(adapter, tokenizer, shown, track)
    for step in range(track.num_steps):
        prompt = list(prompts.values())[step % len(prompts)]
        sampling = adapter.sample(prompt, num_samples=16, max_tokens=16, temperature=1.0, seed=step)
        samples = sampling.result().sequences
        rewards = [brevity(tokenizer.decode(sample.tokens, skip_special_tokens=True)) for sample in samples]
        mean, spread = fmean(rewards), pstdev(rewards)
        # Compared with the group's mean: what is better than its siblings becomes likelier.
        batch = [
            policy(prompt, sample.tokens, sample.logprobs, (reward - mean) / (spread + 1e-4))
            for sample, reward in zip(samples, rewards, strict=True)
        ]
        gradients = adapter.forward_backward(batch, loss="importance_sampling")
        update = adapter.optim_step(learning_rate=6e-4)
        client.gather(gradients, update)
        track.billed(sampling, gradients, update)
        track.step(mean)
    track.after = greedy(adapter, tokenizer, shown, track)


def brevity(answer: str) -> float:
    """1 for one word, falling evenly to 0 for thirteen; 0 for none."""
    words = len(answer.split())
    return max(0.0, 1 - (words - 1) / 12) if words else 0.0


def supervise(
    adapter: Adapter,
    train: Sequence[Datum],
    track: Track,
    *,
    learning_rate: float | Callable[[int], float],
    **adam: float,
) -> None:
    """Go through the data again and again, one optimizer step for each few sequences."""
    for step in range(track.num_steps):
        batch = [train[(step * BATCH + n) % len(train)] for n in range(BATCH)]
        rate = learning_rate if isinstance(learning_rate, float) else learning_rate(step)
        # Both are on their way before the first is answered, and so run in one cycle of the server.
        gradients = adapter.forward_backward(batch)
        update = adapter.optim_step(learning_rate=rate, **adam)
        learned = sum(sum(datum.loss_inputs["weights"]) for datum in batch)
        loss = gradients.result().loss / learned
        update.result()
        track.billed(gradients, update)
        track.step(loss)


def greedy(
    adapter: Adapter, tokenizer: Tokenizer, prompts: Mapping[str, Sequence[int]], track: Track
) -> list[tuple[str, str]]:
    """The likeliest continuation of each prompt."""
    futures = [adapter.sample(prompt, max_tokens=32, temperature=0) for prompt in prompts.values()]
    texts = []
    for text, future in zip(prompts, futures, strict=True):
        (sequence,) = future.result().sequences
        texts.append((text, tokenizer.decode(sequence.tokens, skip_special_tokens=True).strip()))
    track.billed(*futures)
    return texts


@dataclass(frozen=True, slots=True)
class User:
    """One of the four."""

    name: str
    script: Callable[[Client, Tokenizer, Track], None]
    task: str
    lora: str
    measure: Measure
    steps: int


USERS = (
    User("keeper", keeper, "chat in a persona", "r 16, all linear", "loss", 20),
    User("orders", orders, "text to record", "r 8, attention", "loss", 20),
    User("topics", topics, "topic, own AdamW settings", "r 4, q v down", "loss", 20),
    User("brief", brief, "RL: answer in one word", "r 8, all linear", "reward", 16),
)
