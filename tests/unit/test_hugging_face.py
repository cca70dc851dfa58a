"""Models of Hugging Face's, saved with random weights: loaded, their heads and neurons found, one line for bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_plan, randomised
from torch import Tensor, nn

from pxcompress.demo.notes import TOKENIZER
from pxcompress.errors import ModelError
from pxcompress.graph import find_groups, prune, removal_error
from pxcompress.models.adapter import named_outputs
from pxcompress.models.inputs import blank_inputs
from pxcompress.models.loading import Architecture, classifier_names, load_model, make_plain
from pxcompress.models.outputs import difference, leaves
from pxcompress.models.transformers_folder import save_slim
from pxcompress.recipe import Recipe
from pxcompress.tasks.agreement import Agreement
from pxcompress.tasks.box_layouts import layout_of
from pxcompress.tasks.choice import as_judged
from pxcompress.tasks.detection import Detection
from pxcompress.tasks.neighbours import Neighbours
from pxcompress.types import Plan
from pxcompress.workload import load_workload

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": TOKENIZER.vocabulary, "max_position_embeddings": 40, "num_labels": 3}
BODY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 24}
IMAGE = {**BODY, "image_size": 16, "patch_size": 8}
SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [2, 2, 2, 4],
    "decoder_hidden_size": 16,
    "num_labels": 5,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
QUERIES = {"num_queries": 6, "num_labels": 3, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
FFN = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
DETR = {**QUERIES, **FFN, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
RT_DETR = {
    **QUERIES,
    **FFN,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [16, 16, 16],
    "decoder_n_points": 2,
    "num_denoising": 0,
    "eval_size": None,
}
YOLOS = {**BODY, "image_size": [64, 64], "num_detection_tokens": 6, "num_labels": 3}


def detr() -> Any:
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    return transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=backbone, **DETR))


def rt_detr() -> Any:
    backbone = transformers.RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(backbone_config=backbone, **RT_DETR))


def yolos() -> Any:
    return transformers.YolosForObjectDetection(transformers.YolosConfig(**YOLOS))


DETECTORS: Mapping[str, tuple[Callable[[], Any], str, int]] = {
    "detr": (detr, "detr", 3),
    "rt-detr": (rt_detr, "rt-detr", 2),
    "yolos": (yolos, "detr", 1),
}
"""Model, layout of its boxes, and groups of heads."""
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**TEXT, **BODY}),
    "two-layers": ("BertForSequenceClassification", "BertConfig", {**TEXT, **BODY, "num_hidden_layers": 2}),
    "sentences": ("BertModel", "BertConfig", {**TEXT, **BODY}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {**TEXT, **DISTIL}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**TEXT, **BODY}),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", IMAGE),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**IMAGE, "projection_dim": 8}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", IMAGE),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of them, texts with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=__import__("tokenizers").Tokenizer.from_str(TOKENIZER.content), pad_token="[PAD]"
    )
    for name, (kind, config, options) in MODELS.items():
        torch.manual_seed(0)
        net = getattr(transformers, kind)(getattr(transformers, config)(**options))
        for parameter in net.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
        net.save_pretrained(root / name)
        if "vocab_size" in options:
            tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_neurons_go(name: str, saved: Path) -> None:
    """Found and proved by removal; and the configuration alone builds the same module again."""
    loaded = load_model(f"hf:{saved / name}", classes=None, pretrained=True, classifier=False)
    example = blank_inputs(loaded.preprocessing)
    structure = find_groups(loaded.model, example, classifier_names(loaded.model, example))
    assert {"head", "neuron"} <= {group.kind for group in structure.groups}
    architecture = Architecture.from_json(loaded.architecture.to_json())
    again = make_plain(architecture.build(), loaded.preprocessing).eval()
    again.load_state_dict(loaded.model.state_dict())
    with torch.no_grad():
        assert difference(leaves(again(example)), leaves(loaded.model(example))) < 1e-6


@pytest.mark.parametrize(
    "name", ["yolos", *(pytest.param(name, marks=pytest.mark.slow) for name in ("detr", "rt-detr"))]
)
def test_detectors_lose_heads_and_channels_and_keep_their_raw_outputs(name: str, tmp_path: Path) -> None:
    make, layout, heads = DETECTORS[name]
    torch.manual_seed(0)
    net = randomised(make()).eval()
    net.save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}", classes=3, pretrained=True, classifier=False, input_size=64)
    example = torch.randn(2, 3, 64, 64)
    outputs = named_outputs(loaded.model, example)
    assert layout_of(outputs).name == layout
    with torch.no_grad():
        torch.testing.assert_close(outputs["pred_boxes"], net(pixel_values=example).pred_boxes, atol=1e-4, rtol=1e-4)
    if name == "detr":
        mask = torch.ones(2, 64, 64, dtype=torch.int64)
        mask[:, :, 32:] = 0
        with torch.no_grad():
            padded, expected = (each(pixel_values=example, pixel_mask=mask) for each in (loaded.model, net))
        torch.testing.assert_close(padded["pred_boxes"], expected.pred_boxes, atol=1e-4, rtol=1e-4)
        assert difference(padded["pred_boxes"], outputs["pred_boxes"].detach()) > 1e-3
    view = as_judged(loaded.model, example[:1], Detection())
    groups = find_groups(view, example[:1], classifier_names(view, example[:1])).groups
    assert sum(group.kind == "head" for group in groups) == heads
    pruned = prune(view, groups, random_plan(groups, 0))
    assert sum(map(Tensor.numel, pruned.model.parameters())) < 0.9 * sum(map(Tensor.numel, view.parameters()))
    assert removal_error(pruned, example[:1]) < 1e-4


def test_sentences_are_means_over_their_tokens(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "sentences", tmp_path / "it"))
    plain = load_model(f"hf:{folder}", classes=None, pretrained=True, classifier=False)
    write(folder / "modules.json", [{"type": "st.Transformer"}, {"type": "st.Pooling", "path": "1_Pooling"}])
    (folder / "1_Pooling").mkdir()
    write(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    pooled = load_model(f"hf:{folder}", classes=None, pretrained=True, classifier=False)
    write(folder / "modules.json", [{"type": "sentence_transformers.models.Normalize"}])
    unit = load_model(f"hf:{folder}", classes=None, pretrained=True, classifier=False)
    tokens = plain.preprocessing.tokenizer.encode([("rain",), ("a longer one about soup",)])[0].float()
    with torch.no_grad():
        values = [each.model.outputs_(tokens) for each in (plain, pooled, unit)]
    assert torch.equal(values[0], values[1])
    torch.testing.assert_close(nn.functional.normalize(values[0]), values[2])
    hidden = plain.model.net(input_ids=tokens[:1, 0, :3].long()).last_hidden_state
    torch.testing.assert_close(values[0][:1], hidden.mean(1), atol=1e-5, rtol=1e-5)
    write(folder / "modules.json", [{"type": "st.Pooling", "path": "1_Pooling"}])
    write(folder / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    with pytest.raises(ModelError, match="pools by cls_token; expected the mean"):
        load_model(f"hf:{folder}", classes=None, pretrained=True, classifier=False)


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def test_folders_that_cannot_be_taken_are_named(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "bert", tmp_path / "it"))
    config = json.loads((folder / "config.json").read_text())

    def told() -> str:
        with pytest.raises(ModelError) as error:
            load_model(f"hf:{folder}", classes=None, pretrained=True)
        assert "\n" not in str(error.value)
        return str(error.value)

    write(folder / "config.json", {**config, "model_type": "mine", "auto_map": {"AutoModel": "mine.Net"}})
    assert "needs code of its own ('mine')" in told()
    write(folder / "config.json", {**config, "model_type": "mine"})
    assert "which transformers does not know" in told()
    write(folder / "config.json", {**config, "num_hidden_layers": 2})
    assert "lack 16 tensors of BertForSequenceClassification" in told()
    write(folder / "config.json", config)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    assert "has no tokenizer; expected tokenizer.json" in told()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "expected model.safetensors" in told()
    with pytest.raises(ModelError, match="has 3 classes, the data has 5"):
        load_model(f"hf:{saved / 'bert'}", classes=5, pretrained=True)
    with pytest.raises(ModelError, match="no classifier, only features"):
        load_model(f"hf:{saved / 'dinov2'}", classes=None, pretrained=True)


def test_from_pretrained_loads_what_a_configuration_can_say(saved: Path, tmp_path: Path) -> None:
    """Layers of 6 and 10 neurons in one configuration of 10; not where a head is gone."""
    loaded = load_model(f"hf:{saved / 'two-layers'}", classes=None, pretrained=True)
    example = blank_inputs(loaded.preprocessing)
    groups = find_groups(loaded.model, example, classifier_names(loaded.model, example), prove=False).groups
    heads, first, _, second, *_ = groups
    assert (heads.kind, first.units, second.units) == ("head", 24, 24)
    neurons = {first.name: tuple(range(18)), second.name: tuple(range(14))}
    pruned = prune(loaded.model, groups, Plan(neurons, "", "", 0, 0, 0))
    assert "every layer with 10 neurons" in save_slim(pruned.model, pruned.dense, tmp_path)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "transformers").eval()
    assert net.config.intermediate_size == 10
    inputs = {name: torch.randint(1, 2, (2, 5)) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(net(**inputs).logits, pruned.model.net(**inputs).logits, atol=1e-5, rtol=1e-4)
    pruned = prune(loaded.model, groups, Plan({heads.name: (0,)}, "", "", 0, 0, 0))
    assert "from_pretrained does not" in save_slim(pruned.model, pruned.dense, tmp_path)


def test_encoders_are_judged_by_neighbours_unless_another_task_is_given(saved: Path, tmp_path: Path) -> None:
    """The task that a user names stays, although its data has no targets either."""
    (tmp_path / "texts.txt").write_text("\n".join(f"rain on hill {number}" for number in range(40)))
    recipe = Recipe(f"hf:{saved / 'sentences'}", 0.5, data=str(tmp_path / "texts.txt"))
    assert isinstance(load_workload(recipe).task, Neighbours)
    assert isinstance(load_workload(recipe.but(task="agreement")).task, Agreement)
