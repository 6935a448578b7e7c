"""What of a checkpoint is handed out to whom."""

import json

from tinkerbell.api import archive

BASE = "base_model_name_or_path"


def test_a_directory_of_the_server_is_named_by_its_path_on_its_machine_only() -> None:
    content = json.dumps({BASE: "/srv/models/Example-1B", "r": 8}).encode()
    assert archive.shown(archive.CONFIG, content, here=True) == content
    assert json.loads(archive.shown(archive.CONFIG, content, here=False)) == {BASE: "Example-1B", "r": 8}
    assert archive.shown("adapter_model.safetensors", content, here=False) == content


def test_a_hub_id_stays_for_everybody() -> None:
    for config in ({BASE: "org/Example-1B"}, {}, {BASE: None}, []):
        content = json.dumps(config).encode()
        assert archive.shown(archive.CONFIG, content, here=False) == content
