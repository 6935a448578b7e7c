"""Many runs at once: three learning rates side by side, with asyncio. The server fuses their passes."""

import asyncio

from tinkerbell.sdk import AsyncClient, Datum, from_text

LINES = {
    "Red and blue make": " purple.",
    "Blue and yellow make": " green.",
    "Red and yellow make": " orange.",
    "Black and white make": " grey.",
}


async def run(client: AsyncClient, data: list[Datum], learning_rate: float) -> None:
    adapter = await client.add_lora(rank=8, alpha=16, targets="attention", seed=1)
    learned = sum(sum(datum.loss_inputs["weights"]) for datum in data)
    for step in range(10):
        gradients = await adapter.forward_backward(data)  # accepted ...
        update = await adapter.optim_step(learning_rate=learning_rate)
        result = await gradients  # ... and answered
        await update
        print(f"rate {learning_rate:g}  step {step}  loss per token {result.loss / learned:.3f}")


async def main() -> None:
    async with AsyncClient() as client:
        tokenizer = await client.tokenizer()
        data = [from_text(tokenizer, prompt, completion) for prompt, completion in LINES.items()]
        async with asyncio.TaskGroup() as runs:
            for learning_rate in (3e-4, 1e-3, 3e-3):
                runs.create_task(run(client, data, learning_rate))


asyncio.run(main())
