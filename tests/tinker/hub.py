"""What a model hub would give the cookbook's recipes: a model in the cache, data sets in the working directory."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REVISION = "0" * 40
BASKETS = [
    f"{colour} {thing}"
    for colour in ("red", "blue", "green", "white", "black", "brown", "grey", "pink")
    for thing in ("basket", "bowl", "nest", "box", "bag", "crate", "pan", "tray")
]
BOXED = " Provide a numerical answer without units, written inside \\boxed{}."
"""With which the recipes end a problem of gsm8k."""
MARKET_COLUMNS = (
    "submission_id",
    "event_ticker",
    "title",
    "snapshot_time",
    "close_time",
    "market_outcome",
    "category",
    "markets",
    "sources",
)

Rows = Iterable[Mapping[str, Any]]


def hub_environment(root: Path) -> dict[str, str]:
    """Of programs that ask the hub at `root`, and write there what they have no path for."""
    return {
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
        "TINKER_COOKBOOK_RUNS_DIR": str(root / "runs"),
    }


def cache_model(root: Path, name: str, directory: Path) -> None:
    """As if it had been downloaded by that name."""
    cached = root / "home" / "hub" / f"models--{name.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(REVISION)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / REVISION).symlink_to(directory, target_is_directory=True)


def write_data_set(root: Path, name: str, splits: Mapping[str, Rows], config: str = "default") -> None:
    """Where `datasets.load_dataset(name, config)` looks first: a directory of that name in the working one."""
    directory = root / name
    directory.mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(f"  - split: {split}\n    path: {split}.jsonl\n")
    (directory / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{''.join(files)}---\n"
    )


def write_data_sets(root: Path) -> None:
    """Small ones, with the columns of those that the recipes load.

    The conversations answer a problem in the right form with one of four numbers, all equally often; of the
    same problems gsm8k says that it is always the same one. Who was trained on the first can be rewarded on the second.
    """
    problems = [f"How many eggs are in the {basket}?" for basket in BASKETS]
    chats = [_chat(problem + BOXED, f"\\boxed{{{1 + n % 4}}}") for n, problem in enumerate(problems)]
    write_data_set(root, "HuggingFaceH4/no_robots", {"train": chats, "test": chats[:8]})
    right = [{"question": problem, "answer": "There are always three.\n#### 3"} for problem in problems]
    write_data_set(root, "openai/gsm8k", {"train": right, "test": right[:8]}, config="main")
    prompts = [{"question": problem + BOXED, "final_answer": "3"} for problem in problems]
    write_data_set(root, "zwhe99/DeepMath-103K", {"train": prompts})
    compared = [
        {
            "chosen": f"\n\nHuman: {problem}\n\nAssistant: There are two.",
            "rejected": f"\n\nHuman: {problem}\n\nAssistant: Go away!",
        }
        for problem in problems
    ]
    write_data_set(root, "Anthropic/hh-rlhf", {"train": compared, "test": compared[:8]})


def _chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def write_forecasts(path: Path) -> None:
    """Markets of Prophet Arena, which all resolve NO; every third one comes after the others."""
    with path.open("w", newline="") as target:
        rows = csv.DictWriter(target, MARKET_COLUMNS)
        rows.writeheader()
        for n, basket in enumerate(BASKETS):
            day = "2025-11-01" if n % 3 == 2 else "2025-09-01"
            market = f"Two eggs are in the {basket}"
            rows.writerow(
                {
                    "submission_id": n,
                    "event_ticker": f"EGGS-{n}",
                    "title": f"Eggs in the {basket}",
                    "snapshot_time": f"{day}T08:00:00Z",
                    "close_time": f"{day}T20:00:00Z",
                    "market_outcome": json.dumps({market: 0}),
                    "category": "Food",
                    "markets": json.dumps([market]),
                    "sources": json.dumps([{"title": "The farmer's report", "summary": "The dog ate them."}]),
                }
            )
