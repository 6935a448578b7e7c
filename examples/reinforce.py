"""Reinforcement learning: reward short answers, and nothing else, until they are short."""

from statistics import fmean, pstdev

from tinkerbell.sdk import Client, chat_tokens, policy

QUESTIONS = ["Name a colour.", "Name a bird.", "Name a fruit.", "Name a city."]


def reward(answer: str) -> float:
    """1 for one word, falling evenly to 0 for thirteen; 0 for none."""
    words = len(answer.split())
    return max(0.0, 1 - (words - 1) / 12) if words else 0.0


client = Client()
tokenizer = client.tokenizer()
adapter = client.add_lora(rank=8, alpha=16, targets="all-linear", seed=1, name="brief")
system = {"role": "system", "content": "Answer."}
prompts = [chat_tokens(tokenizer, [system, {"role": "user", "content": question}]) for question in QUESTIONS]

for step in range(16):
    prompt = prompts[step % len(prompts)]
    samples = adapter.sample(prompt, num_samples=16, max_tokens=16, temperature=1.0).result().sequences
    rewards = [reward(tokenizer.decode(sample.tokens, skip_special_tokens=True)) for sample in samples]
    # Compared with the group's mean: what is better than its siblings becomes likelier.
    mean, spread = fmean(rewards), pstdev(rewards)
    batch = [
        policy(prompt, sample.tokens, sample.logprobs, (value - mean) / (spread + 1e-4))
        for sample, value in zip(samples, rewards, strict=True)
    ]
    # The sampler's logprobs travel with the data: the server weighs each token by how much the policy has moved since.
    adapter.forward_backward(batch, loss="importance_sampling")
    adapter.optim_step(learning_rate=6e-4).result()
    print(f"step {step}  reward {mean:.2f}  {tokenizer.decode(samples[0].tokens, skip_special_tokens=True)!r}")
