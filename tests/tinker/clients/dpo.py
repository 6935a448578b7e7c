"""The cookbook's DPO trainer on sixteen pairs, its reports in the directory that is named."""

import json
import os
import sys
from pathlib import Path

from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

model, renderer, out = os.environ["MODEL"], "qwen3_instruct", Path(sys.argv[1])
pairs = out / "pairs.jsonl"
with pairs.open("w") as file:
    for i in range(16):
        comparison = {
            "prompt_conversation": [{"role": "user", "content": f"Count to {i}."}],
            "completion_A": [{"role": "assistant", "content": " ".join(map(str, range(1, i + 1)))}],
            "completion_B": [{"role": "assistant", "content": "No."}],
        }
        file.write(json.dumps({"comparison": comparison, "label": "A"}) + "\n")
common = ChatDatasetBuilderCommonConfig(
    model_name_for_tokenizer=model, renderer_name=renderer, max_length=256, batch_size=4
)
comparisons = ComparisonBuilderFromJsonl(train_path=str(pairs))
train_dpo.main(
    train_dpo.Config(
        log_path=str(out / "log"),
        model_name=model,
        recipe_name="dpo",
        renderer_name=renderer,
        lora_rank=16,
        learning_rate=1e-4,
        dpo_beta=0.1,
        dataset_builder=DPODatasetBuilderFromComparisons(common_config=common, comparison_builder=comparisons),
        save_every=0,
        eval_every=0,
        infrequent_eval_every=0,
        max_steps=4,
    )
)
