"""Checkpoints: save, then go on in a new adapter with the weights, the optimizer's moments and the step count."""

from tinkerbell.sdk import Client, from_text

client = Client()
tokenizer = client.tokenizer()
lines = {"The first letter is": " Alpha.", "The second letter is": " Beta.", "The third letter is": " Gamma."}
data = [from_text(tokenizer, prompt, completion) for prompt, completion in lines.items()]

first = client.add_lora(rank=8, alpha=16, seed=1, name="first")
for _ in range(5):
    first.forward_backward(data)
    first.optim_step(learning_rate=1e-3)
saved = first.save("five-steps").result()
print(f"saved {saved.checkpoint_id} after step {saved.step}")

# Another program, another day: client.checkpoints() lists what there is.
second = client.add_lora(checkpoint=saved, name="second")
for _ in range(5):
    for adapter in (first, second):
        adapter.forward_backward(data)
    steps = [adapter.optim_step(learning_rate=1e-3) for adapter in (first, second)]
    one, other = client.gather(*steps)
    print(f"step {one.step}: {one.state_digest[:16]} {other.state_digest[:16]}")
    assert one.state_digest == other.state_digest, "the copy must go on exactly as the original does"

# Back to where it was, in place.
print("back at step", first.load(saved).result().step)
