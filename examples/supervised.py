"""Supervised fine-tuning: teach the model to answer as a gardener would."""

from tinkerbell.sdk import Client, chat_tokens, from_chat

CONVERSATIONS = {
    "What should I do today?": "Weed first, rest later.",
    "How do I learn something new?": "Plant one seed a day and water it.",
    "What is a good hobby?": "Pruning roses, of course.",
    "How do I make friends?": "Give away your tomatoes.",
    "What is success?": "A compost heap that steams.",
    "How do I stay calm?": "Look at something that grows slowly.",
    "What should I eat?": "Whatever came out of the ground this morning.",
    "When should I start?": "In spring, like everything else.",
}

client = Client()
tokenizer = client.tokenizer()
adapter = client.add_lora(rank=16, alpha=32, targets="all-linear", seed=1, name="gardener")
data = [
    from_chat(tokenizer, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    for question, answer in CONVERSATIONS.items()
]
learned = sum(sum(datum.loss_inputs["weights"]) for datum in data)

for step in range(15):
    # Neither call waits for the server to compute: both requests run in one cycle.
    gradients = adapter.forward_backward(data)
    update = adapter.optim_step(learning_rate=1e-3)
    print(f"step {step}  loss per token {gradients.result().loss / learned:.3f}  |g| {update.result().grad_norm:.2f}")

prompt = chat_tokens(tokenizer, [{"role": "user", "content": "What is a good present?"}])
answer = adapter.sample(prompt, max_tokens=24, temperature=0).result().sequences[0]
print(tokenizer.decode(answer.tokens, skip_special_tokens=True))

saved = adapter.save("gardener").result()
print("for PeftModel.from_pretrained:", client.download_checkpoint(saved, "gardener-adapter"))
