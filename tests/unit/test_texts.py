"""Texts: from tables to token ids, padding that counts nowhere, and files by name."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command import Px, one_line
from torch import Tensor, nn

from pxcompress.data import load_splits, open_images, open_source
from pxcompress.data.tables import read_words
from pxcompress.demo.nets import NoteReader
from pxcompress.demo.notes import CLASSES, TOKENIZER, TOPICS, find_planted, note
from pxcompress.deploy import predict_text
from pxcompress.deploy.feeds import Sizes, get_sample_shape
from pxcompress.deploy.float_nodes import find_masking, write_finite
from pxcompress.deploy.qdq import read_feeds
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import DataError, InputError, ModelError
from pxcompress.explain.heatmaps import Method, heatmaps
from pxcompress.graph import find_groups
from pxcompress.layout.rows import input_layouts
from pxcompress.models.adapter import Adapter, with_packed_inputs
from pxcompress.models.inputs import preprocessing_of
from pxcompress.models.loading import load_model, make_plain
from pxcompress.models.signature import MASK, Signature, inputs_from_json
from pxcompress.models.tokens import IDS, KINDS, Tokenizer
from pxcompress.passes.collect import collect
from pxcompress.passes.matching import moment_changes
from pxcompress.passes.moments import collect_moments
from pxcompress.planning.dead_paths import _draw_inputs
from pxcompress.repair.objective import named_predictions
from pxcompress.run_folder.calibration import read_calibration
from pxcompress.scorers import SCORERS
from pxcompress.types import Input, Preprocessing

READER = "pxcompress.demo.nets:note_reader"
TINY = "notes:train=160,select=40,held_out=80"
TEXTS = ("rain on the hill", "soup", "a train and a ticket for two", "the client")


@pytest.fixture(scope="module")
def reader() -> nn.Module:
    """The net for notes with random weights, as every stage takes it."""
    torch.manual_seed(0)
    net = NoteReader(width=16, depth=1, heads=2).eval()
    return make_plain(net, preprocessing_of(net)).eval()


def encoded(*texts: str) -> Tensor:
    return TOKENIZER.encode([(text,) for text in texts])[0].float()


def test_texts_are_filled_up_to_the_longest_and_two_have_kinds() -> None:
    tokenizer = Tokenizer(TOKENIZER.content, (IDS, MASK, KINDS), longest=9, vocabulary=TOKENIZER.vocabulary)
    packed, cut = tokenizer.encode([("rain",), ("rain", "snow sun"), ("rain " * 20,)])
    assert (packed.shape, cut) == ((3, 3, 9), 1)
    assert packed[:, 1].sum(1).tolist() == [3, 6, 9]
    assert packed[1, 2, :6].tolist() == [0, 0, 0, 1, 1, 1]
    assert packed[0, 0, 3:].tolist() == [0] * 6  # [PAD]
    assert [each.high for each in tokenizer.inputs] == [TOKENIZER.vocabulary - 1, 1, 1]


def test_inputs_survive_their_record() -> None:
    inputs = (
        Input(IDS, (None,), torch.int64, 0, 99),
        Input("image", (3, 4), torch.float32),
        Input(1, (2,), torch.bool),
    )
    assert inputs_from_json(Signature(inputs).to_json()) == (*inputs[:2], Input(1, (2,), torch.bool, -np.inf, np.inf))
    with pytest.raises(ValueError, match="no type of numbers"):
        inputs_from_json('[{"name": "a", "shape": [1], "dtype": "load"}]')


def test_what_a_text_gets_does_not_depend_on_the_others(reader: nn.Module) -> None:
    together = reader(encoded(*TEXTS))
    alone = torch.cat([reader(encoded(text)) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_padding_counts_in_no_statistic(reader: nn.Module) -> None:
    """Moments, activations and matched moments of a padded batch are those of the texts one by one."""
    labels = torch.zeros(len(TEXTS), dtype=torch.int64)
    together = [(encoded(*TEXTS), labels)]
    alone = [(encoded(text), labels[:1]) for text in TEXTS]
    groups = find_groups(reader, encoded(TEXTS[0]), ("head",)).groups
    assert {group.kind for group in groups} == {"head", "neuron"}
    for statistic in (lambda a, m: a.abs().mean(2), lambda a, m: a.amax(2)):
        results, expected = (collect(reader, groups, batches, statistic) for batches in (together, alone))
        for name, value in expected.items():
            torch.testing.assert_close(results[name], value, atol=1e-6, rtol=1e-5)
    layouts = input_layouts(reader, groups)
    results, expected = (collect_moments(reader, layouts, batches) for batches in (together, alone))
    for name, value in expected.items():
        assert results[name].whole.count == value.whole.count
        torch.testing.assert_close(results[name].whole.second, value.whole.second, atol=1e-6, rtol=1e-5)
    rows = {name: torch.arange(index.numel()) for name, index in layouts.items()}
    torch.manual_seed(1)
    other = NoteReader(width=16, depth=1, heads=2).eval()
    other = make_plain(other, preprocessing_of(other)).eval()
    expected_changes = moment_changes(reader, other, rows, "in", [(encoded(*[TEXTS[0]] * 4), labels)])
    filled = torch.nn.functional.pad(encoded(*[TEXTS[0]] * 4), (0, 7))
    longer = encoded(*[TEXTS[0]] * 4, " ".join(["a"] * 20))[:4]
    for packed in (filled, longer):
        changes = moment_changes(reader, other, rows, "in", [(packed, labels)])
        for name, change in expected_changes.items():
            torch.testing.assert_close(changes[name], change)


@pytest.mark.parametrize("text", ["lrp-residual:ridge=0.1", "taylor", "magnitude", "activation", "lrp"])
def test_scores_do_not_see_padding(reader: nn.Module, text: str) -> None:
    labels = torch.zeros(len(TEXTS), dtype=torch.int64)
    groups = find_groups(reader, encoded(TEXTS[0]), ("head",)).groups
    scorer = SCORERS.build(text)
    together = scorer(reader, groups, [(encoded(*TEXTS), labels)])
    alone = scorer(reader, groups, [(encoded(each), labels[:1]) for each in TEXTS])
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=1e-5 * float(value.abs().max()), rtol=1e-3)


def test_relevance_of_tokens_adds_up_and_padding_has_none(reader: nn.Module) -> None:
    """Without biases and with norms as scales the relevance at the tokens is the logit that it started from."""
    inputs = encoded(*TEXTS)
    targets = reader(inputs).argmax(1)
    maps = heatmaps(reader, inputs, targets, Method(composite="epsilon"))
    assert maps.shape == inputs[:, 0].shape
    assert maps[inputs[:, 1] == 0].abs().max() == 0
    assert maps[inputs[:, 1] == 1].abs().min() > 0


def test_dead_units_are_looked_for_on_texts_without_padding(reader: nn.Module) -> None:
    example = encoded(TEXTS[0])
    drawn = _draw_inputs(reader, example)
    assert drawn.shape == (4, *example.shape[1:])
    assert torch.equal(drawn[:, 1], example[:, 1].expand(4, -1))
    assert len(drawn[:, 0].unique(dim=0)) == 4


class TokenNet(nn.Module):
    """A value for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up, self.head = nn.Embedding(TOKENIZER.vocabulary, 8), nn.Linear(8, 3)
        self.tokenizer = TOKENIZER

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.look_up(input_ids))


def test_fine_tuning_does_not_follow_padding() -> None:
    net = make_plain(TokenNet(), preprocessing_of(TokenNet()))
    inputs = encoded(*TEXTS)
    (values,) = named_predictions(net, inputs).values()
    assert values.shape == (len(TEXTS), inputs.shape[2], 3)
    assert torch.equal(values.any(2), inputs[:, 1] > 0)


def test_calibration_feeds_texts_by_name_and_bench_knows_their_length(tmp_path: Path) -> None:
    path = _masked_file(tmp_path / "texts.onnx")
    (feed,) = read_feeds(path, [(encoded(*TEXTS), torch.zeros(len(TEXTS)))])
    assert {name: (value.dtype, value.shape) for name, value in feed.items()} == {
        IDS: (np.int64, (4, 9)),
        MASK: (np.int64, (4, 9)),
    }
    session = open_session(path, "cpu")
    assert [get_sample_shape(session, port, Sizes()) for port in session.inputs] == [(7,), (7,)]
    inputs, _ = read_calibration(session, "", None)[0]  # random ones
    assert inputs.shape == (16, 2, 7)
    assert bool((inputs[:, 1] == 1).all())
    assert 0 <= inputs[:, 0].min() < inputs[:, 0].max() < TOKENIZER.vocabulary


def test_what_hides_positions_stays_in_floating_point(tmp_path: Path) -> None:
    """A mask of minus infinity would take all of an integer's range."""
    path = _masked_file(tmp_path / "texts.onnx")
    assert find_masking(onnx.load(path).graph) == ["where", "add", "softmax"]
    finite = onnx.load(write_finite(path, tmp_path / "finite.onnx"))
    assert [onnx.numpy_helper.to_array(each).tolist() for each in finite.graph.initializer] == [0.0, -100.0]
    assert find_masking(finite.graph) == []
    assert write_finite(tmp_path / "finite.onnx", tmp_path / "again.onnx") == tmp_path / "finite.onnx"


def _masked_file(path: Path) -> Path:
    """A softmax over token ids as scores, where those that do not count are hidden; as pxcompress writes texts."""
    helper, numbers = onnx.helper, onnx.TensorProto
    constants = [
        onnx.numpy_helper.from_array(np.float32(value), name) for name, value in (("zero", 0), ("low", -np.inf))
    ]
    nodes = [
        helper.make_node("Cast", [MASK], ["counts"], "counts", to=numbers.BOOL),
        helper.make_node("Where", ["counts", "zero", "low"], ["hidden"], "where"),
        helper.make_node("Cast", [IDS], ["scores"], "scores", to=numbers.FLOAT),
        helper.make_node("Add", ["scores", "hidden"], ["sum"], "add"),
        helper.make_node("Softmax", ["sum"], ["shares"], "softmax"),
        helper.make_node("Mul", ["shares", "scores"], ["logits"], "mul"),
    ]
    ports = [helper.make_tensor_value_info(name, numbers.INT64, ["n", "length"]) for name in (IDS, MASK)]
    outputs = [helper.make_tensor_value_info("logits", numbers.FLOAT, ["n", "length"])]
    graph = helper.make_graph(nodes, "texts", ports, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    inputs = Signature(TOKENIZER.inputs).to_json()
    helper.set_model_props(model, {"inputs": inputs, "input_size": "[2, 7]"})
    onnx.save(model, path)
    return path


def test_evidence_of_notes_is_where_topics_are() -> None:
    for index in range(60):
        text, evidence = note("train", index)
        words = np.array(text.split())
        topics = CLASSES[index % len(CLASSES)].split("+")
        assert set(words[evidence]) <= {word for topic in topics for word in TOPICS[topic]}
        assert all(any(word in TOPICS[topic] for word in words[evidence]) for topic in topics)
        ids = TOKENIZER.encode([(text,)])[0][0, 0]
        assert len(find_planted(f"notes/train/{index}")) == len(ids) == len(words) + 2
        assert TOKENIZER.words(ids.tolist())[1:-1] == list(words)


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_tables_of_texts(tmp_path: Path) -> None:
    rows = [f"rain and soup {number},{10 if number % 2 else 9}" for number in range(40)]
    source = open_source(write(tmp_path / "notes.csv", "text,label", *rows))
    assert (source.layout, source.classes, source.outputs) == ("classes", ("9", "10"), 2)
    words = read_words(str(tmp_path / "notes.csv"), "label")
    samples = source.held_out
    assert [source.classes[label] for label in samples.labels] == [words[name] for name in samples.ids]
    pairs = [json.dumps({"sentence1": "rain", "sentence2": f"sun {number}", "score": 0.5}) for number in range(40)]
    source = open_source(write(tmp_path / "pairs.jsonl", *pairs))
    assert (source.layout, source.classes) == ("numbers", ("score",))
    assert source.train.read.values[0] == ("rain", "sun 0")
    labelled = [f'"wind, rain",{"a;b" if number % 2 else "b"}' for number in range(40)]
    assert open_source(write(tmp_path / "many.csv", "text,labels", *labelled)).layout == "labels"
    source = open_source(write(tmp_path / "lines.txt", *(f"rain {number}" for number in range(40)), "", "sun"))
    assert source.layout == "unlabelled"
    assert {"line 1", "line 42"} <= {*source.train.ids, *source.select.ids, *source.held_out.ids}
    preprocessing = Preprocessing((2, 8), inputs=TOKENIZER.inputs, tokenizer=TOKENIZER)
    splits = load_splits(source, preprocessing)
    assert splits.example.shape == (1, 2, 4)


def test_the_example_is_a_text_of_middle_length(tmp_path: Path) -> None:
    """Costs and times are those of such a one, whichever comes first."""
    source = open_source(
        write(tmp_path / "lines.txt", *(f"{number} " + "rain " * (1 + number % 7) for number in range(70)))
    )
    preprocessing = Preprocessing((2, 12), inputs=TOKENIZER.inputs, tokenizer=TOKENIZER)
    for seed in range(3):
        splits = load_splits(source, preprocessing, seed=seed)
        inputs, _ = next(iter(splits.score))
        lengths = inputs[:, 1].sum(1).sort().values
        assert splits.example.shape[2] == lengths[len(lengths) // 2]


def test_texts_are_no_images_to_label(tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("text\nrain\nsnow\n")
    with pytest.raises(DataError, match="hold texts; images are expected here"):
        open_images(str(tmp_path / "new.csv"))


def test_two_texts_that_are_equal_are_said(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "lines.txt", *["rain"] * 3, *(f"sun {place}" for place in range(60))))
    splits = load_splits(source, Preprocessing((2, 8), inputs=TOKENIZER.inputs, tokenizer=TOKENIZER))
    assert any("copies of others" in text for text in splits.notes)


@pytest.mark.parametrize(
    ("name", "lines", "told"),
    [
        ("a.csv", ["text,label", "rain,a", ",b"], "row 2: column 'text' is empty"),
        ("a.csv", ["text,label", "rain,a", "sun,"], "row 2: column 'label' is empty"),
        ("a.csv", ["text,label", "rain,a", "sun,a"], "only one class"),
        ("a.csv", ["text,score", "rain,much"], "no finite number"),
        ("a.jsonl", ['{"text": "rain", "label": "a"}', '{"text": 3, "label": "b"}'], "row 2: column 'text' holds 3"),
        ("a.jsonl", ['{"text": null, "label": "a"}'], "row 1: column 'text' is empty"),
        ("a.txt", ["", "  "], "is empty; expected one text a line"),
    ],
)
def test_bad_tables_are_named(name: str, lines: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        open_source(write(tmp_path / name, *lines))


def test_texts_and_models_that_do_not_fit(tmp_path: Path, reader: nn.Module) -> None:
    texts = open_source(write(tmp_path / "lines.txt", *(f"rain {number}" for number in range(40))))
    with pytest.raises(DataError, match="the data are texts, the model takes inputs of shape 3x8x8"):
        load_splits(texts, Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(DataError, match="the model takes inputs of shape 2x8, the data are images"):
        load_splits(open_source("digits"), Preprocessing((2, 8), inputs=TOKENIZER.inputs, tokenizer=TOKENIZER))
    small = Tokenizer(TOKENIZER.content, vocabulary=20)
    with pytest.raises(DataError, match=r"has the token \d+, the model knows 20 \(0 to 19\)"):
        load_splits(texts, Preprocessing((2, 8), inputs=small.inputs, tokenizer=small))
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        Tokenizer("{}").encode([("rain",)])
    with pytest.raises(ModelError, match="the model takes texts, not images of 32 pixels"):
        load_model(READER, classes=6, input_size=32)
    with pytest.raises(InputError, match="integrated-gradients goes from zero to an input"):
        SCORERS.build("integrated-gradients")(reader, (), [(encoded("rain"), torch.zeros(1))])


@pytest.mark.slow
def test_notes_go_the_whole_way(tmp_path: Path, px: Px, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(net=lambda num_classes: NoteReader(num_classes, 16, 1, 2)))  # type: ignore[arg-type]
    monkeypatch.setattr("pxcompress.demo.baseline.SCHEDULES", {"texts": _short()})
    run = px("run", "--model", "mine:net", "--data", TINY, "--ratio", 0.5, "--out", out, "--json")
    assert run.code == 0, run.err
    session = ort.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert [port.shape for port in session.get_inputs()] == [["batch", "length"]] * 2
    spec = importlib.util.spec_from_file_location("predict", out / "predict.py")
    assert spec is not None
    assert Path(predict_text.__file__).read_bytes() == (out / "predict.py").read_bytes()
    monkeypatch.setattr(sys, "argv", ["predict.py", "rain and a ticket", "--model", str(out / "model.onnx")])
    monkeypatch.setattr(predict_text, "__file__", str(out / "predict.py"))
    predict_text.main()
    shown = px("explain", out, "--json")
    assert shown.code == 0, shown.err
    assert one_line(px("certify", out / "model.onnx", "--data", "digits")).count("\n") == 0


def _short() -> object:
    from pxcompress.demo.baseline import Schedule

    return Schedule(steps=2, epochs=1, learning_rate=1e-3)


def test_a_view_of_a_view_keeps_its_inputs(reader: nn.Module) -> None:
    assert isinstance(reader, Adapter)
    again = with_packed_inputs(reader, reader.signature_.inputs, (2, 5))
    torch.testing.assert_close(again(encoded(*TEXTS)), reader(encoded(*TEXTS)))
