"""The card says what the files of the run say, in full or not at all."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_run
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

from t2sda_hf.config import dump_config, load_config
from t2sda_hf.hub.card import gather_facts, licence_of, load_facts, placeless, record_run, render_card, save_facts
from t2sda_hf.hub.push import push_run, stage_run

SHIPPED = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob("*/facts.json"))


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture(scope="module")
def staged(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged") / "repository"
    stage_run(finished_run, "me/streets", folder)
    return folder


def test_facts_are_those_of_the_files(finished_run: Path) -> None:
    facts = gather_facts(finished_run, "me/streets")
    student = json.loads((finished_run / "t2sda" / "metrics.json").read_text())["student"]
    baseline = json.loads((finished_run / "source_only" / "metrics.json").read_text())["student"]
    assert (facts.student["iou"], facts.student["miou"]) == (student["iou"], student["miou"])
    assert facts.source_only["iou"] == baseline["iou"] != facts.student["iou"]
    assert (facts.method, facts.steps, facts.seed, facts.num_processes, facts.num_images) == ("t2sda", 40, 0, 2, 3)
    assert (facts.image_size, facts.window) == ((48, 96), None)
    threads = f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')} "
    command = "t2sda train --config run.yaml --seed 0 --num_processes 2"
    assert facts.command in (command, threads + command)
    # The encoder's, head's and projector's numbers without the memory of batch norms.
    from t2sda_hf.models import T2SDAForSemanticSegmentation

    model = T2SDAForSemanticSegmentation.from_pretrained(finished_run / "t2sda" / "student")
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_facts_come_back_from_their_file_and_give_the_same_card(finished_run: Path, tmp_path: Path) -> None:
    facts = gather_facts(finished_run, "me/streets")
    save_facts(facts, tmp_path / "facts.json")
    assert load_facts(tmp_path / "facts.json") == facts
    assert str(render_card(load_facts(tmp_path / "facts.json"))) == str(render_card(facts))


def test_metadata_is_what_the_hub_reads(staged: Path) -> None:
    card = ModelCard.load(staged / "README.md")
    metrics = json.loads((staged / "metrics.json").read_text())["student"]
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    expected = {f"IoU ({name})": round(value, 2) for name, value in metrics["iou"].items() if value is not None}
    assert found == expected | {"mIoU": round(metrics["miou"], 2)}
    kinds = {result.metric_name: result.metric_type for result in card.data.eval_results}
    assert kinds.pop("mIoU") == "mean_iou"
    assert set(kinds.values()) == {"iou"}  # the score of one class is no mean
    assert "arxiv:2305.13752" in card.data.tags
    assert card.data.datasets is None  # drawn ones are not on the Hub
    assert not (staged / ".eval_results").exists()
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0",
        "transformers",
        "image-segmentation",
    )


def test_data_sets_of_the_hub_are_named_to_it(run: Path, tmp_path: Path) -> None:
    config = run / "t2sda" / "resolved_config.yaml"
    words = ["--test.path=they/city", "--test.split=test", "--target.path=they/city", "--source.path=we/game"]
    config.write_text(dump_config(load_config(config, words)), encoding="utf-8")
    terms = {"terms": dict.fromkeys(("source", "target", "test"), "research use")}
    stage_run(run, "me/streets", tmp_path / "out", terms)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["they/city", "we/game"]
    assert {result.dataset_type for result in card.data.eval_results} == {"they/city"}
    assert "[they/city](https://huggingface.co/datasets/they/city), test" in card.text
    entries = parse_eval_result_entries(yaml.safe_load((tmp_path / "out" / ".eval_results" / "city.yaml").read_text()))
    miou = json.loads((run / "t2sda" / "metrics.json").read_text())["student"]["miou"]
    assert [(entry.dataset_id, entry.value) for entry in entries] == [("they/city", round(miou, 2))]
    assert "3 images of the split test" in str(entries[0].notes)


def test_what_is_of_the_hub_is_known_from_the_run_wherever_one_stands(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run found data/game on its disk, but it is not here, and they/city on the Hub, but here is such a folder."""
    config = run / "t2sda" / "resolved_config.yaml"
    words = ["--source.path=data/game", "--target.path=they/city", "--test.path=they/city", "--test.split=test"]
    config.write_text(dump_config(load_config(config, words)), encoding="utf-8")
    on_hub = {"source": False, "target": True, "target_labelled": False, "test": True}
    (run / "data.json").write_text(json.dumps({"on_hub": on_hub}), encoding="utf-8")
    (tmp_path / "they" / "city").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    terms = {"terms": dict.fromkeys(("source", "target", "test"), "research use")}
    stage_run(run, "me/streets", tmp_path / "out", terms)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["they/city"]
    assert "data/game" not in card.text
    paths = yaml.safe_load((tmp_path / "out" / "resolved_config.yaml").read_text())
    assert [paths[role]["path"] for role in ("source", "target", "test")] == ["game", "they/city", "they/city"]


def test_no_file_that_is_published_holds_a_place_on_this_machine(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "secret"
    for name in ("game/images", "game/labels", "town/images", "encoder"):
        (home / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    words = [f"--source.path={home}/game/images", f"--source.label_path={home}/game/labels", "--test.name=my town"]
    words += [f"--target.path={home}/town/images", "--test.path=~/town", f"--model.pretrained={home}/encoder"]
    words += [f"--output_dir={home}/outputs/x", f"--push_to_hub.note=see {home}/notes.txt"]
    for method in ("source_only", "t2sda"):
        config = run / method / "resolved_config.yaml"
        config.write_text(dump_config(load_config(config, words)), encoding="utf-8")
    for method, role in (("t2sda", "student"), ("source_only", "student")):
        metrics = json.loads((run / method / "metrics.json").read_text())
        metrics[role] |= {"domain": f"{home}/town (validation)", "unreadable": [f"row 0 ({home}/town/a.png)"]}
        (run / method / "metrics.json").write_text(json.dumps(metrics))
    record = json.loads((run / "run.json").read_text())
    record["command"] = (
        f"OMP_NUM_THREADS=1 t2sda train --config {home}/a.yaml '--source={{path: {home}/game}}' --seed 1"
    )
    (run / "run.json").write_text(json.dumps(record))
    given = {"terms": dict.fromkeys(("source", "target", "test"), "own"), "start": "an encoder"}
    stage_run(run, "me/streets", tmp_path / "out", given)
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        for place in (home, run, Path.cwd()):
            assert str(place).encode() not in file.read_bytes(), file
    published = load_config(tmp_path / "out" / "resolved_config.yaml")  # it is a config still
    assert (published.source.path, published.source.label_path) == ("game", "labels")
    assert (published.target.path, published.test.path, published.output_dir) == ("town", "my town", "x")
    facts = load_facts(tmp_path / "out" / "facts.json")
    assert facts.command == "OMP_NUM_THREADS=1 t2sda train --config a.yaml '--source={path: game}' --seed 1"
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "learned from labels of **game** and images of town without labels" in text
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())["student"]
    assert (scores["domain"], scores["unreadable"]) == ("my town (validation)", 1)


def test_a_card_says_where_the_code_is_and_what_the_run_doubts(run: Path) -> None:
    text = str(render_card(gather_facts(run, "me/streets")))
    assert "is installed from a checkout of its repository" in text
    assert "](https://arxiv.org/abs/2305.13752)" in text
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"notes": ["The gain is within the noise."]}))
    text = str(render_card(gather_facts(run, "me/streets", {"code": "https://example.com/t2sda_hf"})))
    assert 'pip install "t2sda_hf @ git+https://example.com/t2sda_hf"' in text
    assert text.index("The gain is within the noise.") < text.index("### What was not measured")


def test_all_that_a_push_lacks_is_told_at_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2sda_hf.hub.push.get_token", lambda: None)
    config = run / "t2sda" / "resolved_config.yaml"
    config.write_text(
        dump_config(load_config(config, ['--push_to_hub.license=""', "--source.path=a", "--target.path=b"])),
        encoding="utf-8",
    )
    for name in ("run.json", "panel.png", "t2sda/scalars.jsonl", "source_only/metrics.json"):
        (run / name).unlink()
    with pytest.raises(ValueError, match="no owner") as raised:
        push_run(run, "streets")
    lacks = ("hf auth login", "--license", "--terms source", "--terms target", "--fact command", "no source-only run")
    for lack in (*lacks, "panel.png is missing", "needs the curve"):
        assert lack in str(raised.value), lack


def test_every_class_stands_in_the_table_beside_source_only(staged: Path, finished_run: Path) -> None:
    text = (staged / "README.md").read_text(encoding="utf-8")
    facts = gather_facts(finished_run, "me/streets")
    for name in facts.classes[:-1]:
        old, new = facts.source_only["iou"][name], facts.student["iou"][name]
        assert f"| {name} | {old:.2f} | {new:.2f} | {new - old:+.2f} |" in text
    assert f"| {facts.classes[-1]} | - | - | - |" in text  # neither labelled nor predicted
    for part in ("cc-by-4.0", facts.commit, facts.hardware, facts.command, "What was not measured", "seed 0"):
        assert part in text


def test_no_link_of_the_card_is_broken(staged: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (staged / "README.md").read_text(encoding="utf-8"))
    assert set(links) >= {"panel.png", "curve.png", "resolved_config.yaml", "metrics.json"}
    for link in links:
        assert link.startswith("http") or (staged / link).is_file(), link
    with Image.open(staged / "curve.png") as curve:
        assert min(curve.size) > 200


def test_code_blocks_of_the_card_are_python(staged: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (staged / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")
        assert '"me/streets"' in block


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("run.json", "does not say command, commit, hardware, software"),
        ("t2sda/resolved_config.yaml", "resolved_config.yaml is missing"),
        ("t2sda/scalars.jsonl", "needs the curve"),
        ("t2sda/student/preprocessor_config.json", "preprocessor_config.json is missing"),
        ("t2sda/student/model.safetensors", "holds no weights"),
        ("source_only/metrics.json", "no source-only run"),
        ("panel.png", "panel.png is missing"),
    ],
)
def test_a_missing_fact_stops_the_card(run: Path, tmp_path: Path, file: str, message: str) -> None:
    (run / file).unlink()
    with pytest.raises(ValueError, match=message):
        stage_run(run, "me/streets", tmp_path / "out")


def test_images_that_must_not_be_passed_on_are_not(run: Path, tmp_path: Path) -> None:
    config = run / "t2sda" / "resolved_config.yaml"
    config.write_text(dump_config(load_config(config, ["--push_to_hub.picture=predictions"])), encoding="utf-8")
    with pytest.raises(ValueError, match=r"predictions\.png is missing"):
        stage_run(run, "me/streets", tmp_path / "none")
    Image.new("RGB", (40, 20), "black").save(run / "predictions.png")
    stage_run(run, "me/streets", tmp_path / "out")
    assert (tmp_path / "out" / "panel.png").read_bytes() == (run / "predictions.png").read_bytes()


def test_a_missing_fact_can_be_given(run: Path) -> None:
    (run / "run.json").unlink()
    given = {"command": "make demo", "commit": "abc", "hardware": "a laptop", "software": "Python"}
    assert gather_facts(run, "me/streets", given).hardware == "a laptop"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("license: cc-by-4.0", "license: ''", "licence of the weights is not known.*--license"),
        ("path: streets-target", "path: photos/mine", "target domain 'photos/mine'.*--terms target="),
    ],
)
def test_licences_are_not_guessed(run: Path, key: str, value: str, message: str) -> None:
    config = run / "t2sda" / "resolved_config.yaml"
    text = config.read_text(encoding="utf-8")
    assert key in text
    text = text.replace("pretrained: null", "pretrained: nvidia/mit-b0")
    config.write_text(text.replace(key, value), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        gather_facts(run, "me/streets")
    given = {"license": "mit", "terms": {"target": "mine", "test": "mine"}}
    assert gather_facts(run, "me/streets", given).license == "mit"


def test_an_encoder_from_a_folder_is_named_by_somebody(run: Path) -> None:
    config = run / "t2sda" / "resolved_config.yaml"
    text = config.read_text(encoding="utf-8")
    assert "  pretrained: null" in text
    config.write_text(text.replace("  pretrained: null", "  pretrained: models/mine"), encoding="utf-8")
    hub = gather_facts(run, "me/streets", {"license": "mit"})
    assert (hub.base_model, render_card(hub).data.base_model) == ("models/mine", "models/mine")  # as a name of the Hub
    config.write_text(text.replace("  pretrained: null", f"  pretrained: {run}"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"what are the weights in .*--fact start="):
        gather_facts(run, "me/streets")
    facts = gather_facts(run, "me/streets", {"start": "weights of a talk", "note": "Chosen by looking at them."})
    text = str(render_card(facts))
    assert facts.base_model == ""
    assert "base_model" not in text
    assert "the encoder starts from weights of a talk" in text
    assert "Chosen by looking at them." in text
    assert str(run) not in text


def test_a_baseline_that_is_no_source_only_run_is_refused(run: Path) -> None:
    assert gather_facts(run, "me/streets", {"source_only": run}).source_only == gather_facts(run, "me/x").source_only
    with pytest.raises(ValueError, match="no source-only run"):
        gather_facts(run, "me/streets", {"source_only": run / "t2sda"})


def test_a_run_that_goes_on_keeps_its_command_and_adds_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit, words in (("a" * 40, "--seed 1"), ("a" * 40, "--resume auto"), ("b" * 40, "")):
        monkeypatch.setattr("t2sda_hf.hub.card._commit", lambda commit=commit: commit)
        record_run(tmp_path, f"t2sda train {words}")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"].endswith("t2sda train --seed 1")
    assert record["commit"] == f"{'a' * 40}, went on with {'b' * 40}"


def test_generalisation_has_a_card_without_a_target(tmp_path: Path) -> None:
    words = ("--method=generalization", '--target.path=""', "--translate.engine=style", "--drw.apply_to=none")
    folder = write_run(tmp_path / "run", "--rcs.enabled=false", *words)
    facts = gather_facts(folder, "me/streets")
    text = str(render_card(facts))
    assert set(facts.domains) == {"source", "test"}
    assert "without a target" in text
    assert "| class | source only | this model |" in text
    assert "No image of streets-target was seen" in text


def test_a_baseline_of_another_test_is_refused(run: Path) -> None:
    metrics = json.loads((run / "source_only" / "metrics.json").read_text())
    metrics["student"]["num_images"] = 2
    (run / "source_only" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="num_images 2, this run has 3"):
        gather_facts(run, "me/streets")


def test_a_source_only_run_has_a_card_of_one_column(finished_run: Path) -> None:
    facts = gather_facts(finished_run / "source_only", "me/lower-bound")
    text = str(render_card(facts))
    assert facts.teacher is None
    assert f"| road | {facts.student['iou']['road']:.2f} |\n" in text
    assert "No image of streets-target was seen in training" in text


def test_the_card_of_an_upper_bound_says_that_it_saw_the_labels(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "--method=target_only")
    facts = gather_facts(folder / "target_only", "me/upper-bound")
    text = str(render_card(facts))
    assert facts.domains.keys() == {"target", "test"}
    assert "learned from labels of **streets-target**" in text
    assert "It was trained on labels of the target: it is an upper bound to compare with, not an adapted model." in text
    assert "Labels of the target domain were read in training, and nothing else." in text
    assert "source" not in text.partition("## Load it")[0].replace("resolved", "")


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        gather_facts(tmp_path, "me/streets")


def test_facts_of_another_form_are_refused(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text('{"miou": 99}')
    with pytest.raises(ValueError, match=r"missing \['base_model'.*unknown \['miou'\]"):
        load_facts(tmp_path / "facts.json")


def test_a_token_on_the_command_line_does_not_reach_the_card(tmp_path: Path) -> None:
    token = "hf_" + "A" * 34
    record_run(tmp_path, f"t2sda train --note {token}")
    assert token not in (tmp_path / "run.json").read_text()


def test_places_on_a_disk_do_not_reach_the_card(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", f"--target.path={tmp_path}/secret/photos.parquet")
    given = {"terms": {"target": "own photographs"}}
    assert gather_facts(folder, "me/streets", given).domains["target"]["name"] == "photos"


def test_only_places_are_cut() -> None:
    long = "a/b " * 2000
    told = {"note": f"~5 % better than A/B, see /data/me/x.txt. {long}", "terms": {"source": "~2/3 of them are CC0"}}
    tree = {"classes": ["car /truck", "~other/thing"], "source": {"label_map": {"x": "/car"}, "path": "/data/a b/c"}}
    kept = {"classes": ["car /truck", "~other/thing"], "source": {"label_map": {"x": "/car"}, "path": "c"}}
    assert placeless({**tree, "note": told["note"]}) == {**kept, "note": told["note"].replace("/data/me/", "")}
    assert placeless(long) == long
    assert placeless(["~/a b/c", "../a b/c", "~5 % of A/B"]) == ["c", "c", "~5 % of A/B"]


def test_a_path_with_blanks_is_cut_in_the_command(run: Path) -> None:
    words = "t2sda train '--source.path=/data/a b/c' --target.path '/data/d e/f' '--push_to_hub.note=~5 % of A/B'"
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"command": words}))
    given = {"terms": dict.fromkeys(("source", "target", "test"), "own"), "start": "an encoder"}
    expected = "t2sda train --source.path=c --target.path f '--push_to_hub.note=~5 % of A/B'"
    assert gather_facts(run / "t2sda", "me/streets", given).command == expected


def test_cards_of_shipped_models_are_renderings_of_their_facts() -> None:
    assert {folder.name for folder in SHIPPED} == {"demo", "camvid"}
    for folder in SHIPPED:
        facts = load_facts(folder / "facts.json")
        assert (folder / "README.md").read_text(encoding="utf-8") == str(render_card(facts))
        scores = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["student"]
        assert facts.student["iou"] == scores["iou"]
        assert facts.num_images == scores["num_images"]
        for name in ("panel.png", "curve.png", "resolved_config.yaml"):
            assert (folder / name).is_file()


def test_names_and_notes_are_text_in_a_card_and_no_markup(finished_run: Path) -> None:
    facts = gather_facts(finished_run, "me/x")
    names = ("<script>alert(1)</script>", "# big", "a|b", "*bold* [x](javascript:y)", *facts.classes[4:])
    renamed = dict(zip(facts.classes, names, strict=True))

    def scores(given: dict[str, Any]) -> dict[str, Any]:
        return given | {"iou": {renamed[name]: value for name, value in given["iou"].items()}}

    domains = {role: domain | {"name": "<b>mine</b>", "terms": "a\n## b | c"} for role, domain in facts.domains.items()}
    given = {"classes": names, "student": scores(facts.student), "source_only": scores(facts.source_only)}
    given |= {"domains": domains, "note": "# Heading\n\n<img src=x onerror=y>\n## Another, with `code`"}
    text = str(render_card(replace(facts, **given)).text)
    assert not re.search(r"<(script|img|b)\b", text)
    assert "\n\\# Heading &lt;img src=x onerror=y&gt; ## Another, with `code`\n" in text
    assert r"| a\|b |" in text
    assert r"\*bold\* \[x\](javascript:y)" in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [line for line in str(render_card(facts).text).splitlines() if line.startswith("#")]


@pytest.mark.parametrize(
    ("pretrained", "words"),
    [
        ("facebook/dinov2-large", "Apache-2.0"),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 licence"),
        ("nvidia/mit-b5", "research and evaluation only"),
        ("facebook/convnextv2-large-22k-384", ""),  # not known here
    ],
)
def test_the_licence_that_an_encoder_brings_is_said(pretrained: str, words: str) -> None:
    assert words in licence_of(pretrained)
    assert bool(licence_of(pretrained)) == bool(words)
