"""The HF executor: one frozen Hugging Face causal language model, many LoRA adapters in its memory."""
