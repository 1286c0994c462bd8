"""Every fault at every request of a download, in one process that is also the Hub: test_bad_models.py starts it."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from server import TOKEN, Repository, serve

FAULTS = ("401", "403", "404", "409", "429", "500", "503", "drop", "slow")


def main(student: Path, home: Path) -> None:
    with serve() as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        import torch  # read when it is imported: the settings above

        from t2sda_hf.evaluation.inference import load_model

        hub.repositories["me/streets"] = Repository()
        tree = {path.name: path.read_bytes() for path in student.iterdir() if path.is_file()}
        hub.repositories["me/streets"].commit("main", tree)
        expected = load_model(str(student))[0].state_dict()
        slept: list[float] = []
        time.sleep = slept.append

        def load() -> str:
            """What is wrong, in words; "" if the model is the right one."""
            try:
                found = load_model("me/streets")[0].state_dict()
            except ValueError as error:
                return str(error)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            return ""

        assert load() == ""
        requests = len(hub.requests)
        said: dict[str, str] = {}
        for fault in FAULTS:
            for number in range(requests):
                shutil.rmtree(home / "hub")
                hub.faults = {len(hub.requests) + number: fault}
                if message := load():
                    hub.faults = {}
                    said[f"{fault} at {number}"] = message
                    assert load() == "", f"{fault} at {number} spoilt the next download"
        print(json.dumps({"requests": requests, "said": said, "asked": hub.requests[:requests], "slept": slept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
