"""Publish a finished run: one commit or nothing, the same again when repeated, and no secrets in it."""

import json
import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..config import RunConfig, dump_config, load_config
from ..errors import PushFailed, causes
from ..evaluation.figures import save_curves
from ..evaluation.run_folder import MethodFolder, read_method
from ..masking import holds_secret, mask_known
from ..storage import share_weights, write_json
from .card import (
    CardFacts,
    ask,
    check_start,
    domain_facts,
    domains_of,
    gather_facts,
    method_folder,
    own_license,
    placeless,
    refuse,
    refuse_started,
    render_card,
    render_results,
    save_facts,
)

logger = logging.getLogger(__name__)

RESULTS = ".eval_results"  # where the Hub looks for scores
WAITS = (1, 2, 4, 8, 16)  # seconds before the tries after the first one
LONGEST_WAIT = 300  # a server that asks for more is asked again by a person
AGAIN = {404, 408, 409, 412, 429, 500, 502, 503, 504}  # 404: a repository just made is not everywhere yet
# Errors of the network and of the Hub; RuntimeError is what huggingface_hub makes of a failed upload of one file.
FAILURES = (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError)


def push_run(
    run_folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    given: Mapping[str, Any] | None = None,
    api: HfApi | None = None,
) -> str:
    """Render the card of a finished run and publish its student with everything that belongs to it.

    Args:
        run_folder, repo_id, given: see `gather_facts`.
        private: of a repository that is made now.
        create_pr: offer the files as a pull request.
        api: client; default: the environment's endpoint and the saved token.

    Returns:
        URL of the commit or of the pull request.

    Raises:
        ValueError: for missing facts, files or a token in a file; nothing was sent.
        PushFailed: if the Hub refuses, or cannot be reached after several tries.
    """
    again = push_command(run_folder, repo_id, private, create_pr, given)
    lacks: list[str] = []  # all are told at once
    ask(lacks, _check_token, api)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        ask(lacks, stage_run, run_folder, repo_id, folder, given)
        refuse(lacks)
        return push_folder(folder, repo_id, private=private, create_pr=create_pr, api=api, again=again)


def stage_run(run_folder: Path, repo_id: str, folder: Path, given: Mapping[str, Any] | None = None) -> None:
    """Write what will be published into `folder`, which must not exist yet.

    That is student/ (weights, config, image processor, model code), README.md, facts.json, panel.png, curve.png,
    resolved_config.yaml, metrics.json and, of a test that is a data set of the Hub, .eval_results/. No path of this
    machine is in them.

    Raises:
        ValueError: as `push_run`.
    """
    source = method_folder(run_folder)
    lacks: list[str] = []
    ask(lacks, _check_repo_id, repo_id)
    facts = ask(lacks, gather_facts, source, repo_id, given)
    if (source / "resolved_config.yaml").is_file():
        cfg = load_config(source / "resolved_config.yaml", record=True)
        panel = source.parent / ("panel.png" if cfg.push_to_hub.picture == "images" else "predictions.png")
        if not panel.is_file():
            lacks.append(f"{panel} is missing: a card needs one picture of results.")
        ask(lacks, _losses, source)
    refuse(lacks)
    shutil.copytree(source / "student", folder)
    share_weights(folder)
    shutil.copy(panel, folder / "panel.png")
    config = _published_config(cfg, facts.domains)
    (folder / "resolved_config.yaml").write_text(config, encoding="utf-8")
    write_json(folder / "metrics.json", _published_metrics(source / "metrics.json", facts))
    _draw_curve(source, folder / "curve.png")
    save_facts(facts, folder / "facts.json")
    render_card(facts).save(folder / "README.md")
    if results := render_results(facts):
        (folder / RESULTS).mkdir()
        name = f"{facts.domains['test']['name'].rpartition('/')[2]}.yaml"
        (folder / RESULTS / name).write_text(results, encoding="utf-8")
    refuse_secrets(folder)


def _published_config(cfg: RunConfig, domains: Mapping[str, Mapping[str, str]]) -> str:
    """The config of a run without secrets, and with names where it has places; `domains` of the card's facts."""
    tree = placeless(yaml.safe_load(dump_config(cfg)))
    tree["output_dir"] = Path(cfg.output_dir).name
    for role, facts in domains.items():
        domain = tree[role]
        domain |= {key: Path(domain[key]).name for key in ("label_path", "valid_mask")}
        domain["path"] = facts["id"] or facts["name"]
    return mask_known(yaml.safe_dump(tree, sort_keys=True, allow_unicode=True))


def _published_metrics(path: Path, facts: CardFacts) -> dict[str, Any]:
    """The scores of a run, with the names of its domains; of unreadable files only how many there were."""
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for which, result in metrics.items():
        domain = facts.labelled if which.endswith("_source") else facts.domains["test"]
        more = ", seen in training" if str(result.get("domain")).endswith(", seen in training") else ""
        result["domain"] = f"{domain['name']} ({domain['split']}){more}"
        result["unreadable"] = len(result.get("unreadable") or ())
    return placeless(metrics)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    create_pr: bool = False,
    api: HfApi | None = None,
    again: str = "",
    space_sdk: str | None = None,
) -> str:
    """Publish a folder in one commit. Files that the repository has already are not sent again.

    Tried again with growing waits, or those that the server asks for, after 429, 5xx and lost connections; not where
    there is no connection to begin with.

    Returns, raises: as `push_run`.
    """
    refuse_secrets(folder)
    api = api or HfApi()
    again = again or f"hf upload {repo_id} {folder}" + (f" --repo-type {repo_type}" if repo_type != "model" else "")
    if api.token is None and get_token() is None:
        raise PushFailed(f"no token of the Hub was found: run `hf auth login`, or set HF_TOKEN. Then: {again}")
    title = f"Model of t2sda_hf, content {content_hash(folder)}"
    waits = iter(WAITS)
    while True:
        try:
            return _push_once(api, folder, repo_id, repo_type, private, create_pr, title, space_sdk)
        except FAILURES as error:
            wait = _wait_before_next(error, waits)
            reason = _in_words(error, repo_id)
            if wait is None:
                raise PushFailed(
                    f"{reason} Nothing is lost: the files are where they were. Push again with: {again}"
                ) from error
            logger.warning("%s Next try in %g s.", reason, wait)
            time.sleep(wait)


def push_after_training(cfg: RunConfig) -> str | None:
    """Publish the run if its config asks for that. For the main process, after everything is written; never raises.

    Returns:
        A line for the user, None if nothing was asked for.
    """
    push = cfg.push_to_hub
    if not push.repo_id:
        return None
    try:
        url = push_run(Path(cfg.output_dir) / cfg.method, push.repo_id, private=push.private, create_pr=push.create_pr)
    except (ValueError, PushFailed, *FAILURES) as error:
        command = push_command(Path(cfg.output_dir), push.repo_id, push.private, push.create_pr, None)
        line = f"The training is complete, but was not published: {error}"
        return line if command in line else f"{line} Push it with: {command}"
    return f"Published: {url}"


def check_push(cfg: RunConfig) -> None:
    """Find before the training what would stop the push after it; asks nothing over the network.

    Raises:
        ValueError: for a repository name that the Hub does not allow, no token, or facts that only the user knows.
    """
    push = cfg.push_to_hub
    if not push.repo_id:
        return
    refuse_started(cfg)
    lacks: list[str] = []  # all are told at once
    ask(lacks, _check_repo_id, push.repo_id)
    ask(lacks, _check_token, None)
    for role in domains_of(cfg):
        ask(lacks, domain_facts, cfg, role, push.terms)
    ask(lacks, check_start, cfg, push.start)
    if not push.license and not own_license(cfg):
        lacks.append("push_to_hub.license must say under which licence the weights come, for example apache-2.0.")
    if not cfg.supervised and cfg.baseline == "none" and not push.source_only:
        lacks.append(
            "the model card compares with a source-only run: set baseline: source_only, or push_to_hub.source_only to "
            "the folder of one."
        )
    refuse(lacks)


def push_command(
    run_folder: Path, repo_id: str, private: bool, create_pr: bool, given: Mapping[str, Any] | None
) -> str:
    """The one command that pushes this run again."""
    words = ["t2sda", "push", str(run_folder), repo_id]
    words += ["--private"] * private + ["--create-pr"] * create_pr
    for name, value in (given or {}).items():
        if name == "terms":
            words += ["--terms", *(f"{role}={text}" for role, text in value.items())] if value else []
        elif name in ("license", "source_only"):
            words += [f"--{name}", str(value)] if value else []
        elif value:
            words += ["--fact", f"{name}={value}"]
    return shlex.join(words)


def refuse_secrets(folder: Path) -> None:
    """Raise ValueError naming the first file that holds something in the form of a secret, or one of yours."""
    own = (get_token() or "").encode()
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if holds_secret(content) or (len(own) >= 8 and own in content):
            raise ValueError(
                f"{path.relative_to(folder)} holds what looks like an access token, so nothing was sent. Remove it, "
                "and revoke the token if it is one."
            )


def content_hash(folder: Path) -> str:
    """Twelve hexadecimal digits of names and contents, the same for equal folders."""
    total = sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(folder).as_posix()}\0".encode() + sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def _losses(run: Path) -> MethodFolder:
    """The folder of a method; ValueError if it holds no curve of the training."""
    method = read_method(run)
    if not method.losses:
        raise ValueError(
            f"{run / 'scalars.jsonl'} is missing, or holds no losses because train.log_every is longer than the run: a "
            "card needs the curve of its training."
        )
    return method


def _draw_curve(run: Path, path: Path) -> None:
    """The losses of a method's folder over its steps, and the mIoU on the test domain where it was measured."""
    method = _losses(run)
    scores = {f"{kind} mIoU": method.miou[kind] for kind in ("student", "teacher") if kind in method.miou}
    save_curves(path, method.losses, "loss", right=scores, right_label="mIoU in %")


def _push_once(
    api: HfApi,
    folder: Path,
    repo_id: str,
    repo_type: str,
    private: bool,
    create_pr: bool,
    title: str,
    space_sdk: str | None,
) -> str:
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk)
    if create_pr:  # one that was opened by a try whose answer got lost
        for discussion in api.get_repo_discussions(repo_id, repo_type=repo_type, discussion_type="pull_request"):
            if discussion.title == title and discussion.status == "open":
                return str(discussion.url)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    info = api.create_commit(
        repo_id,
        [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
        commit_message=title,
        repo_type=repo_type,
        create_pr=create_pr,
    )
    return str(info.pr_url or info.commit_url)


def _wait_before_next(error: BaseException, waits: Iterator[int]) -> float | None:
    """Seconds until the next try; None if another one is of no use."""
    response = _response(error)
    damaged = response is not None and response.status_code == 400 and isinstance(error, RuntimeError)  # one file
    if response is not None and response.status_code not in AGAIN and not damaged:
        return None
    if response is not None and response.status_code == 404 and response.url.path == "/api/repos/create":
        return None  # nobody of that name
    if response is None and (not _is_network(error) or _is_offline(error)):
        return None
    wait = next(waits, None)
    if wait is None:
        return None
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    wait = max(wait, int(asked)) if asked.isdigit() else wait
    return wait if wait <= LONGEST_WAIT else None


def _response(error: BaseException) -> httpx2.Response | None:
    """The Hub's answer, also where huggingface_hub wraps the error of one file's upload."""
    return next((one.response for one in causes(error) if isinstance(one, HfHubHTTPError)), None)


def _is_network(error: BaseException) -> bool:
    return any(isinstance(one, httpx2.TransportError | ConnectionError | TimeoutError) for one in causes(error))


def _is_offline(error: BaseException) -> bool:
    return any(isinstance(one, httpx2.ConnectError | OfflineModeIsEnabled) for one in causes(error))


def _in_words(error: BaseException, repo_id: str) -> str:
    """One sentence without a trace, an address or a token."""
    response = _response(error)
    if response is None:
        if any(isinstance(one, OfflineModeIsEnabled) for one in causes(error)):
            return "HF_HUB_OFFLINE is set, so the Hub was not asked: unset it."
        if _is_network(error):
            return f"The Hub cannot be reached ({type(error).__name__}): check the connection and HF_ENDPOINT."
        return f"The push failed: {(str(error).splitlines() or [type(error).__name__])[0].rstrip('.')}."
    answers = {
        400: "The Hub does not take the files (400), which happens when a file changed or was damaged on its way.",
        401: "The Hub does not know the token (401): run `hf auth login`, or set HF_TOKEN to a valid one.",
        403: f"The token has no right to write to {repo_id} (403): give it the role 'write', or use another name.",
        404: f"The Hub has no place for {repo_id} (404): the user or organisation must exist.",
        429: "The Hub takes no more requests for now (429).",
    }
    return answers.get(response.status_code, f"The Hub answered with an error ({response.status_code}).")


def _check_token(api: HfApi | None) -> None:
    if (api or HfApi()).token is None and get_token() is None:
        raise ValueError("no token of the Hub was found: run `hf auth login`, or set HF_TOKEN.")


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a name of the Hub: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} has no owner: write it as user/{repo_id}.")
