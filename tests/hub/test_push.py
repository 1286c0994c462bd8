"""Pushing to a Hub on this machine, healthy and with a fault at every request."""

import logging
import shlex
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from server import READ_ONLY, TOKEN, Hub, content
from tiny import tiny_config

from t2sda_hf.cli import main, parser_of
from t2sda_hf.commands.push import CARD_FILES
from t2sda_hf.config import load_config
from t2sda_hf.hub.push import PushFailed, check_push, push_after_training, push_folder, push_run, stage_run

# huggingface_hub 2.4 sends LFS files by a keyword that its HTTP library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REQUESTS = 6  # create, validate, preupload, LFS batch, LFS upload, commit
FOR_GOOD = ("401", "403")
PASSING = ("404", "409", "429", "500", "503", "drop", "drop after", "slow")


@pytest.fixture(scope="module")
def staged(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged") / "repository"
    stage_run(finished_run, "me/streets", folder)
    return folder


def test_a_run_is_published_in_one_commit(hub: Hub, api: HfApi, finished_run: Path, waits: list[float]) -> None:
    url = push_run(finished_run, "me/streets", api=api)
    files = hub.files("me/streets")
    assert url.startswith(hub.url)
    assert len(hub.requests) == REQUESTS
    assert len(hub.repositories["me/streets"].commits) == 2  # the empty one, and ours
    student = content(finished_run / "t2sda" / "student")
    assert {name: files[name] for name in student} == student
    assert files.keys() - student.keys() == {
        "README.md",
        "facts.json",
        "panel.png",
        "curve.png",
        "resolved_config.yaml",
        "metrics.json",
    }
    assert waits == []


def test_pushing_again_changes_nothing(hub: Hub, api: HfApi, staged: Path) -> None:
    urls = [push_folder(staged, "me/streets", api=api) for _ in range(3)]
    assert len(set(urls)) == 1
    assert len(hub.repositories["me/streets"].commits) == 2


def test_a_pull_request_leaves_the_main_branch_alone_and_is_opened_once(hub: Hub, api: HfApi, staged: Path) -> None:
    urls = [push_folder(staged, "me/streets", create_pr=True, api=api) for _ in range(2)]
    assert urls[0] == urls[1] == f"{hub.url}/me/streets/discussions/1"
    assert hub.files("me/streets") == {}
    assert hub.files("me/streets", "refs/pr/1") == content(staged)


@pytest.mark.parametrize("fault", [*PASSING, "damaged", *FOR_GOOD])
def test_a_fault_at_any_request_loses_nothing(
    hub: Hub, api: HfApi, staged: Path, waits: list[float], fault: str
) -> None:
    for number in range(REQUESTS) if fault != "damaged" else [4]:
        hub.repositories.clear()
        hub.blobs.clear()
        hub.faults = {len(hub.requests) + number: fault}
        if fault in FOR_GOOD or (fault, number) == ("404", 0):  # 404 to the first: there is nobody of that name
            with pytest.raises(PushFailed, match=f"{fault}.*Push again with: hf upload me/streets"):
                push_folder(staged, "me/streets", api=api)
            assert waits == []
            push_folder(staged, "me/streets", api=api)
        else:
            push_folder(staged, "me/streets", api=api)
        assert hub.files("me/streets") == content(staged)
        # Once, also when it was the answer to the commit that got lost.
        assert len(hub.repositories["me/streets"].commits) == 2


def test_a_lost_answer_does_not_open_a_second_pull_request(
    hub: Hub, api: HfApi, staged: Path, waits: list[float]
) -> None:
    hub.faults = {REQUESTS: "drop after"}  # one request more than without a pull request: the list of them
    push_folder(staged, "me/streets", create_pr=True, api=api)
    assert list(hub.repositories["me/streets"].titles) == ["refs/pr/1"]
    assert hub.files("me/streets", "refs/pr/1") == content(staged)


def test_waits_grow_and_end(hub: Hub, api: HfApi, staged: Path, waits: list[float]) -> None:
    hub.faults = dict.fromkeys(range(100), "503")
    with pytest.raises(PushFailed, match=r"answered with an error \(503\).*Push again with"):
        push_folder(staged, "me/streets", api=api)
    assert waits == [1, 2, 4, 8, 16]


def test_the_hub_says_how_long_to_wait(hub: Hub, api: HfApi, staged: Path, waits: list[float]) -> None:
    hub.faults, hub.retry_after = {0: "429"}, 37
    push_folder(staged, "me/streets", api=api)
    assert waits == [37]
    hub.faults, hub.retry_after = {len(hub.requests): "429"}, 3600
    with pytest.raises(PushFailed, match="takes no more requests"):
        push_folder(staged, "me/streets", api=api)
    assert waits == [37]


def test_wrong_rights_are_one_sentence_with_the_cure(hub: Hub, staged: Path, waits: list[float]) -> None:
    for token, owner, cure in (
        ("hf_" + "w" * 30, "me", "hf auth login"),
        (READ_ONLY, "me", "role 'write'"),
        (TOKEN, "stranger", "must exist"),
    ):
        with pytest.raises(PushFailed, match=cure) as raised:
            push_folder(staged, f"{owner}/streets", api=HfApi(endpoint=hub.url, token=token))
        assert token not in str(raised.value)
        assert "\n" not in str(raised.value)
    assert (hub.repositories, waits) == ({}, [])


def test_without_a_connection_the_reason_is_named_at_once(
    staged: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PushFailed, match=r"cannot be reached.*check the connection"):
        push_folder(staged, "me/streets", api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushFailed, match=r"HF_HUB_OFFLINE is set.*unset it"):
        push_folder(staged, "me/streets", api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
    assert waits == []


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors"])
def test_a_file_with_a_token_is_not_sent(hub: Hub, api: HfApi, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\0\xff" + b"hf_" + b"Q" * 34 + b"\0")
    with pytest.raises(ValueError, match=f"{name} holds what looks like an access token") as raised:
        push_folder(tmp_path, "me/streets", api=api)
    assert "QQQ" not in str(raised.value)
    assert hub.requests == []


def test_your_own_token_is_not_sent_whatever_its_form(
    hub: Hub, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "company-token-17")
    (tmp_path / "config.yaml").write_text("note: company-token-17")
    with pytest.raises(ValueError, match=r"config.yaml holds"):
        push_folder(tmp_path, "me/streets", api=api)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["streets", "me/a b", "a/b/c", "me/"])
def test_impossible_names_are_refused_before_anything_is_read(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Hub|owner"):
        push_run(tmp_path, repo_id)


def test_the_command_that_is_named_is_the_one_that_was_given(
    hub: Hub, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    monkeypatch.setattr("t2sda_hf.hub.push.HfApi", lambda: HfApi(endpoint=hub.url))
    words = ["push", str(finished_run), "me/streets", "--private", "--create-pr", "--license", "mit"]
    words += ["--terms", "source=own photos", "--fact", "hardware=a laptop"]
    assert main(words) == 2
    command = capsys.readouterr().err.strip().partition("Push again with: ")[2]
    program, name, *again = shlex.split(command)
    assert (program, name) == ("t2sda", "push")
    assert parser_of("push").read(again) == parser_of("push").read(words[1:])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main([name, *again]) == 0
    assert b"a laptop" in hub.files("me/streets", "refs/pr/1")["README.md"]


def test_the_command_writes_instead_of_sending(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, card = tmp_path / "all", tmp_path / "card"
    assert main(["push", str(finished_run), "me/streets", "--output", str(out)]) == 0
    assert main(["push", str(finished_run), "me/streets", "--card", str(card)]) == 0
    assert (out / "model.safetensors").is_file()
    assert sorted(content(card)) == sorted(CARD_FILES)
    assert (out / "README.md").read_bytes() == (card / "README.md").read_bytes()
    assert main(["push", str(finished_run), "me/streets", "--output", str(out)]) == 2
    assert main(["push", str(finished_run), "me/streets", "--terms", "elsewhere=x", "--card", str(card)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("name", CARD_FILES)
def test_a_card_replaces_nothing_but_a_card(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Not the run's own record either, which has files of the same names."""
    card = tmp_path / "card"
    card.mkdir()
    (card / name).write_text("{}", encoding="utf-8")
    assert main(["push", str(finished_run), "me/streets", "--card", str(card)]) == 2
    assert f"{card / name} exists, and {card} is no card of a run" in capsys.readouterr().err
    assert content(card) == {name: b"{}"}


def test_a_name_that_the_hub_does_not_take_is_said_before_a_card_is_made(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(finished_run), "me/my streets", "--output", str(tmp_path / "all")]) == 2
    assert "'me/my streets' is not a name of the Hub" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


def test_a_failed_push_does_not_fail_the_training(
    hub: Hub, finished_run: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cfg = load_config(str(finished_run / "t2sda" / "resolved_config.yaml"))
    assert push_after_training(cfg) is None
    cfg = load_config(str(finished_run / "t2sda" / "resolved_config.yaml"), ["--push_to_hub.repo_id", "me/streets"])
    monkeypatch.setattr("t2sda_hf.hub.push.HfApi", lambda: HfApi(endpoint=hub.url, token=TOKEN))
    hub.faults = dict.fromkeys(range(100), "500")
    before = content(finished_run)
    line = push_after_training(cfg)
    assert "The training is complete, but was not published" in line
    assert f"t2sda push {finished_run}/t2sda me/streets" in line
    assert content(finished_run) == before
    hub.faults = {}
    assert push_after_training(cfg).startswith(f"Published: {hub.url}/me/streets")
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--push_to_hub.repo_id=streets"], "has no owner"),
        (["--push_to_hub.license="], "push_to_hub.license"),
        (["--target.path=photos"], "terms.*target"),
        (["--model.pretrained=encoders/of/mine"], "what are the weights in 'encoders/of/mine'.*push_to_hub.start"),
        (["--baseline=none"], "source-only run"),
    ],
)
def test_what_a_push_lacks_is_said_before_the_training(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = ["--source.path=streets-source", "--target.path=streets-target", "--test.path=streets-target"]
    good += ["--baseline=source_only", "--push_to_hub.repo_id=me/streets", "--push_to_hub.license=mit"]
    good += ["--model.pretrained=nvidia/mit-b0"]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_push(tiny_config(*good))
    with pytest.raises(ValueError, match=message):
        check_push(tiny_config(*good, *overrides))


def test_a_push_without_a_token_is_said_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2sda_hf.hub.push.get_token", lambda: None)
    check_push(tiny_config())
    with pytest.raises(ValueError, match="hf auth login"):
        check_push(tiny_config("--push_to_hub.repo_id=me/streets"))


def test_terms_of_unknown_domains_are_refused() -> None:
    with pytest.raises(ValueError, match=r"push_to_hub.terms.*elsewhere"):
        tiny_config("--push_to_hub.terms={elsewhere: mine}")


def test_training_asks_before_it_starts_whether_it_could_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = ["train", "--config", "demo", "--output_dir", str(tmp_path / "out"), "--push_to_hub.repo_id", "streets"]
    assert main(words) == 2
    assert "has no owner: write it as user/streets" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
