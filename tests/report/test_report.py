"""Tables, README block and HTML page from a small made-up run folder."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import sparse_pathways as sp
from sparse_pathways.report import figures, results, speed, tables
from sparse_pathways.report.page import write_page

LANGUAGES = ("en", "fr", "it", "nl")
LAYERS = [
    f"rnnt.transcriber.transformer.emformer_layers.{i}.{part}"
    for i in range(4)
    for part in ("attention.emb_to_query", "attention.emb_to_key_value", "attention.out_proj", "pos_ff.1", "pos_ff.4")
]


def made_up_model(name, kind, wer, density=1.0, share=1.0):
    spread = {"p10": 20.0, "median": 24.0, "p90": 31.0}
    pruned = kind != "dense"
    overlap = [[1.0 if a == b else share for b in LANGUAGES] for a in LANGUAGES]
    forms = ("masked", "packed") if pruned else ("dense", "dense prepacked")
    return {
        "name": name,
        "kind": kind,
        "languages": {
            language: {"wer": wer + 0.01 * i, "errors": 9, "words": 800, "deletions": 3, "utterances": 150}
            for i, language in enumerate(LANGUAGES)
        },
        "wer": wer + 0.015,
        "density": dict.fromkeys(LANGUAGES, density),
        "layer_density": {layer: dict.fromkeys(LANGUAGES, density) for layer in LAYERS} if pruned else {},
        "overlap": overlap if pruned else [],
        "layer_overlap": {layer: 0.5 + 0.02 * i for i, layer in enumerate(LAYERS)} if pruned else {},
        "bytes": 15_400_000 if not pruned else 8_600_000,
        "agreement": 0.995 if pruned else None,
        "latency": {
            form: {key: value * factor for key, value in spread.items()}
            for form, factor in zip(forms, (1.0, 0.75), strict=True)
        },
        "profile": {
            "operator": "sparse_pathways::bcsr_linear",
            "calls": 586,
            "share": 0.18,
            "top": [["sparse_pathways::bcsr_linear", 586, 37.1], ["aten::gelu", 112, 18.7]],
        }
        if pruned
        else None,
    }


@pytest.fixture
def run(tmp_path):
    """Run folder with results.json, and logs of a dense and a pruning run."""
    content = {
        "origin": {
            "created": "2026-01-02T03:04:05+00:00",
            "commit": "0123456789ab",
            "env": {"cpu": "A CPU", "cpu_backend": "avx2", "torch": "2.14.1", "package": "0.1.0"},
        },
        "corpus": {
            "path": "runs/data",
            "split": "test",
            "utterances": dict.fromkeys(LANGUAGES, 150),
            "seconds": 1300.0,
        },
        "models": [
            made_up_model("dense", "dense", 0.07),
            made_up_model("lap70", "shared", 0.12, 0.3),
            made_up_model("dynamic70", "pathways", 0.09, 0.3, share=0.62),
        ],
        "transcripts": [
            {"language": "fr", "reference": "bonjour <monde>", "texts": {"dense": "bon jour", "lap70": ""}}
        ],
        "latency": {"pinned": "one thread, pinned to core 1", "utterances": 24, "repeats": 3},
        "speed": [
            results.Speed(
                layer=layer,
                outputs=1024 if "pos_ff.1" in layer else 256,
                inputs=1024 if "pos_ff.4" in layer else 256,
                density=0.3,
                rows=rows,
                linear_us=20.0 * rows,
                prepacked_us=18.0 * rows,
                packed_us=9.0 * rows,
                backend="avx2",
            )
            for layer in LAYERS
            for rows in (1, 4, 16)
        ],
    }
    results.write_results(tmp_path / "results.json", content)
    for name, top in (("dense", 0.0), ("dynamic70", 0.7)):
        (tmp_path / name).mkdir()
        lines = []
        for step in range(0, 2000, 20):
            lines.append({"step": step, "loss": 3 * math.exp(-step / 400) + 0.1, "sparsity": top * min(1, step / 1000)})
            if step % 500 == 480:
                lines.append({"step": step, "wer": dict.fromkeys(LANGUAGES, 0.5 * math.exp(-step / 500))})
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_page_stands_alone_and_holds_every_picture(run):
    page = write_page(run, results.read_results(run / "results.json"), run / "report.html").read_text()
    pictures = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img") == 6
    for picture in pictures:
        root = ElementTree.fromstring(base64.b64decode(picture))
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
    assert page.count("<figcaption>") == 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "sparse_pathways::bcsr_linear ran 586 times and took 18.0 %" in page
    assert "dynamic70" in page and "<td>bonjour &lt;monde&gt;</td>" in page and "<td>bon jour</td>" in page


def test_page_without_logs_and_times(run):
    content = results.read_results(run / "results.json")
    content["models"], content["speed"] = [made_up_model("dense", "dense", 0.07)], []
    content["models"][0]["latency"] = {}
    for log in run.glob("*/log.jsonl"):
        log.unlink()
    page = write_page(run, content, run / "report.html").read_text()
    assert page.count("<img") == 1  # the word error rates are all there is


def test_page_and_events_of_runs_that_are_not_evaluated_yet(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(sp.FormatError, match=r"holds no log\.jsonl and no results\.json"):
        write_page(tmp_path / "empty", None, tmp_path / "page.html")
    masks = {
        "rnnt.layer.0": {"density": {"en": 0.25, "fr": 0.5}, "overlap": 0.5, "union": 0.6, "core": 0.1, "dead_rows": 0},
        "total": {"density": {"en": 0.3, "fr": 0.3}, "overlap": 0.75, "union": 0.4, "core": 0.2, "dead_rows": 0.125},
    }
    event = {"pathway": "en", "density": 0.3, "blocks": 100, "pruned": 3, "regrown": 6, "iou": 0.8}
    lines = [
        {"step": 20, "loss": 2.5, "sparsity": 0.7, "overlap": 0.75, "union": 0.4, "explored": 0.45},
        {"step": 20, "event": event},
        {"masks": masks},
    ]
    folder = tmp_path / "one" / "pruned"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_page(folder, None, tmp_path / "page.html").read_text()
    for wanted in ("Masks of pruned", "25.0 % to 50.0 %", "12.5 %", "0.75"):
        assert wanted in text
    assert "<h2>Results</h2>" not in text
    assert figures._exchanged(event) == pytest.approx(20)
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sparse_pathways.report.tensorboard import write_events

    write_events(results.read_logs(tmp_path / "one"), tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events" / "pruned")).Reload()
    assert events.Scalars("event/iou")[0].value == pytest.approx(0.8) and events.Scalars("loss")[0].step == 20
    assert {"loss", "sparsity", "overlap", "union", "explored", "event/regrown"} <= set(events.Tags()["scalars"])
    with pytest.raises(ValueError, match=r"there is no log\.jsonl"):
        write_events({}, tmp_path / "events")


def test_result_table_shows_each_model_once(run):
    table = tables.result_table(results.read_results(run / "results.json"))
    assert [len(row) for row in table] == [len(table[0])] * 4
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    assert rows["dense"]["WER en"] == "7.0 %" and rows["dense"]["agreement"] == ""
    assert rows["dense"]["ms per s audio"] == "18.0"  # the faster of the two dense forms
    assert rows["dynamic70"]["sparsity"] == "70 %" and rows["dynamic70"]["masks"] == "per language"
    assert rows["dynamic70"]["agreement"] == "99.5 %"


def test_text_table_is_aligned():
    lines = tables.as_text([["model", "size"], ["a", "1.5 MB"], ["longer", "10.0 MB"]]).splitlines()
    assert lines == ["model      size", "---------------", "a        1.5 MB", "longer  10.0 MB"]


def test_readme_block_is_replaced_and_nothing_else(run):
    content = results.read_results(run / "results.json")
    readme = run / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    tables.update_readme(readme, content)
    once = readme.read_text()
    tables.update_readme(readme, content)
    assert readme.read_text() == once
    assert once.startswith("before\n<!-- results:begin -->\n| model |") and once.endswith(
        "<!-- results:end -->\nafter\n"
    )
    assert "old" not in once and "| dynamic70 | per language | 70 % |" in once


@pytest.mark.parametrize(
    "text",
    [
        "no marks",
        "<!-- results:end -->\n<!-- results:begin -->",
        "<!-- results:begin -->\n" * 2 + "<!-- results:end -->",
    ],
    ids=["none", "swapped", "twice"],
)
def test_readme_without_marks_is_left_alone(run, text):
    readme = run / "README.md"
    readme.write_text(text)
    with pytest.raises(sp.FormatError, match="results:begin"):
        tables.update_readme(readme, results.read_results(run / "results.json"))
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ('{"version": 1}', "not the results"),
        ('{"version": 99, "models": [{}]}', "not the results"),
        ("[]", "not the results"),
    ],
    ids=["missing", "cut_off", "no_models", "other_version", "a_list"],
)
def test_bad_results_are_refused(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(sp.FormatError, match=message):
        results.read_results(path)


def test_bad_log_names_the_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(sp.FormatError, match="line 2"):
        results.read_log(path)


def test_a_last_line_that_is_being_written_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert results.read_log(path) == [{"step": 1, "loss": 2.0}]


def test_pictures_are_reproducible(run):
    models = results.read_results(run / "results.json")["models"]
    assert figures.to_svg(figures.overlaps(models)) == figures.to_svg(figures.overlaps(models))


@pytest.fixture
def packed_model(rng):
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32, bias=False))
    sp.sparsify_(model)
    for layer in sp.sparse_layers(model).values():
        layer.set_mask_(sp.topk_mask(sp.block_scores(layer.weight), 0.75))
    return sp.pack_(model)


def test_layer_speed_times_every_layer(packed_model):
    speeds = speed.layer_speed(packed_model, [1, 3], rounds=2, target_s=1e-5)
    assert [(s["layer"], s["outputs"], s["inputs"], s["rows"]) for s in speeds] == [
        ("0", 96, 64, 1),
        ("0", 96, 64, 3),
        ("2", 32, 96, 1),
        ("2", 32, 96, 3),
    ]
    assert all(s["density"] == 0.25 and s["packed_us"] > 0 and s["linear_us"] > 0 and s["backend"] for s in speeds)


def test_layer_speed_refuses_a_wrong_product(packed_model):
    layer = packed_model[0]
    layer.forward = lambda x: sp.sparse_linear(x, layer.packed, layer.bias) + 1e-3
    with pytest.raises(ArithmeticError, match="layer 0"):
        speed.layer_speed(packed_model, [4], rounds=1, target_s=1e-5)


def test_layer_speed_wants_packed_layers():
    with pytest.raises(ValueError, match="sparse layers"):
        speed.layer_speed(torch.nn.Linear(8, 8), [1])


@pytest.mark.skipif(not speed.can_prepack(), reason="this torch was built without oneDNN")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_prepacked_linear_equals_linear(bias):
    linear = torch.nn.Linear(48, 40, bias=bias)
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        torch.testing.assert_close(speed.PrepackedLinear(linear, 5)(x), linear(x))
