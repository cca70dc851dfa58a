"""Makes the ONNX files that `onnx_in.py` reads, each by the package that users' files come from.

    python benchmarks/onnx_files.py FOLDER --source torch            # timm and torchvision, both exporters of PyTorch
    python benchmarks/onnx_files.py FOLDER --source keras            # needs tensorflow and tf2onnx
    python benchmarks/onnx_files.py FOLDER --source ultralytics      # needs ultralytics
    python benchmarks/onnx_files.py FOLDER --source rapidocr --wheels DIR   # where rapidocr's wheels are unpacked
    python benchmarks/onnx_files.py FOLDER --source refused          # what nobody can prune

Every source may have an environment of its own. All weights but rapidocr's are random. Beside a file of PyTorch's lies
a .json with the groups that are found in the module that it was made from.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 10


@dataclass(frozen=True)
class Exported:
    """A net of timm, or of torchvision (`tv:`), as one file: the exporter, the opset, and what is unusual about it."""

    net: str
    exporter: str
    opset: int
    size: int = 128
    variant: str = ""

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        parts = [self.net.replace("tv:", "tv-"), self.exporter, f"opset{self.opset}", self.variant]
        return "-".join(part for part in parts if part)


def _listed() -> list[Exported]:
    """Every file of PyTorch's, by net."""
    old, new = "torchscript", "dynamo"
    return [
        Exported("resnet18", old, 11),
        Exported("resnet50", new, 18),
        Exported("resnet18", old, 17, variant="batch1"),
        Exported("resnet18", old, 16, variant="external"),
        Exported("resnet18", old, 13, variant="fp16"),
        Exported("resnet18", old, 14, variant="batchnorm"),
        Exported("resnet18", old, 12, variant="listed"),
        Exported("resnet18", old, 15, variant="constants"),
        Exported("resnet18", old, 17, variant="uint8"),
        Exported("resnet18", new, 18, variant="uint8-nhwc"),
        Exported("mobilenetv2_100", old, 13),
        Exported("mobilenetv2_100", new, 21, variant="fp16"),
        Exported("mobilenetv3_small_100", old, 14),
        Exported("mobilenetv3_large_100", new, 18, variant="open"),
        Exported("efficientnet_b0", old, 11),
        Exported("efficientnet_b0", new, 20, variant="batch1"),
        Exported("tf_efficientnet_lite0", old, 12, variant="open"),
        Exported("convnext_atto", old, 17),
        Exported("convnext_atto", new, 19, variant="external"),
        Exported("vit_tiny_patch16_224", old, 11, 224),
        Exported("vit_tiny_patch16_224", new, 18, 224),
        Exported("vit_tiny_patch16_224", new, 23, 224),
        Exported("vit_tiny_patch16_224", old, 17, 224, "fp16"),
        Exported("deit_tiny_distilled_patch16_224", old, 14, 224),
        Exported("tv:swin_t", old, 17, 224),
        Exported("swin_tiny_patch4_window7_224", new, 20, 224),
        Exported("densenet121", old, 11),
        Exported("tv:densenet121", new, 22),
        Exported("tv:shufflenet_v2_x1_0", old, 13),
        Exported("tv:shufflenet_v2_x1_0", new, 23),
        Exported("regnety_002", old, 16),
        Exported("tv:vgg11_bn", old, 12, 224, "batchnorm"),
        Exported("tv:squeezenet1_1", new, 18, variant="open"),
        Exported("tv:googlenet", old, 17),
        Exported("ghostnet_050", old, 15),
        Exported("repvgg_a0", new, 18, variant="batch1"),
        Exported("resmlp_12_224", old, 17, 224),
        Exported("tv:segmentation.lraspp_mobilenet_v3_large", old, 17, variant="open"),
        Exported("tv:segmentation.fcn_resnet50", new, 18, 64),
    ]


def make_torch(folder: Path, only: str) -> None:
    """All files of PyTorch's exporters that are not there yet, with the groups of their modules beside them."""
    import torch

    for each in _listed():
        path = folder / f"{each.name}.onnx"
        if path.exists() or only not in each.name:
            continue
        torch.manual_seed(0)
        net = _with_drawn_norms(_make_net(each))
        example = torch.randn(2, 3, each.size, each.size)
        path.with_suffix(".json").write_text(json.dumps({"groups": _groups_of(net, example[:1])}))
        _export(each, net, example, path)
        print(path.name, flush=True)


def _make_net(each: Exported) -> Any:
    import timm
    import torchvision

    if not each.net.startswith("tv:"):
        sized = {"img_size": each.size} if "vit" in each.net else {}
        return timm.create_model(each.net, num_classes=CLASSES, exportable=True, **sized).eval()
    module = torchvision.models
    *rooms, name = each.net.removeprefix("tv:").split(".")
    for room in rooms:
        module = getattr(module, room)
    plain = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    backbone = {"weights_backbone": None} if rooms else {}
    return getattr(module, name)(weights=None, num_classes=CLASSES, **plain, **backbone).eval()


def _with_drawn_norms(net: Any) -> Any:
    """Running statistics and scales that are not 0 and 1, so that what a reader leaves out shows."""
    import torch

    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(0, 0.1)
    return net


def _groups_of(net: Any, example: Any) -> list[list[Any]]:
    """Kind and units of every group of the module, sorted."""
    from pxcompress.graph import find_groups
    from pxcompress.models.loading import classifier_names

    groups = find_groups(net, example, classifier_names(net, example)).groups
    return sorted([group.kind, group.units] for group in groups)


def _export(each: Exported, net: Any, example: Any, path: Path) -> None:
    """Write the file, then change it to its variant."""
    import torch

    net, example = _as_called(each, net, example)
    fixed = each.variant == "batch1"
    inputs = example[:1] if fixed else example
    if each.variant == "fp16":
        net, inputs = net.half(), inputs.half()
    axes = {0: "N", **({2: "H", 3: "W"} if each.variant == "open" else {})}
    options: dict[str, Any] = {"input_names": ["image"], "output_names": ["scores"], "opset_version": each.opset}
    if each.exporter == "torchscript":
        mode = torch.onnx.TrainingMode.PRESERVE if each.variant == "batchnorm" else torch.onnx.TrainingMode.EVAL
        open_axes = {} if fixed else {"image": axes, "scores": axes if "seg" in each.net else {0: "N"}}
        options |= {"dynamo": False, "training": mode, "dynamic_axes": open_axes}
        options |= {"do_constant_folding": each.variant != "batchnorm"}
        options |= {"keep_initializers_as_inputs": each.variant == "listed"}
    else:
        dims = {axis: torch.export.Dim.AUTO if axis else torch.export.Dim("N") for axis in axes}
        options |= {
            "dynamo": True,
            "dynamic_shapes": None if fixed else (dims,),
            "external_data": False,
            "verbose": False,
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (inputs,), path, **options)
    {"external": _external_, "constants": _constants_}.get(each.variant, lambda path: None)(path)


def _as_called(each: Exported, net: Any, example: Any) -> tuple[Any, Any]:
    """The net and its input as the file has them: pixels from 0 to 255 where the variant says so."""
    import torch

    class Pixels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Any) -> Any:
            x = x.permute(0, 3, 1, 2) if "nhwc" in each.variant else x
            return self.net((x.float() / 255 - 0.45) / 0.225)

    class First(Pixels):
        def forward(self, x: Any) -> Any:
            return self.net(x)["out"]

    if each.variant.startswith("uint8"):
        pixels = torch.randint(256, example.shape, dtype=torch.uint8)
        return Pixels().eval(), pixels.permute(0, 2, 3, 1).contiguous() if "nhwc" in each.variant else pixels
    return (First().eval() if "segmentation" in each.net else net), example


def _external_(path: Path) -> None:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.weights", size_threshold=1024)


def _constants_(path: Path) -> None:
    """Weights as Constant nodes in place of initializers."""
    proto = onnx.load(path)
    nodes = [helper.make_node("Constant", [], [each.name], value=each) for each in proto.graph.initializer]
    rest = list(proto.graph.node)
    del proto.graph.initializer[:]
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])
    onnx.save(proto, path)


def make_keras(folder: Path, only: str) -> None:
    """Keras' nets as tf2onnx writes them: images with their channels last."""
    import keras
    import tensorflow as tf
    import tf2onnx

    nets = {"MobileNetV2": 13, "EfficientNetB0": 15, "ResNet50V2": 17, "MobileNetV3Small": 18, "DenseNet121": 13}
    for name, opset in nets.items():
        path = folder / f"keras-{name}-opset{opset}.onnx"
        if path.exists() or only not in path.name:
            continue
        keras.utils.set_random_seed(0)
        net = getattr(keras.applications, name)(weights=None, classes=CLASSES, input_shape=(128, 128, 3))
        signature = [tf.TensorSpec((None, 128, 128, 3), tf.float32, name="image")]
        function = tf.function(lambda image, net=net: net(image, training=False), input_signature=signature)
        tf2onnx.convert.from_function(function, signature, opset=opset, output_path=str(path))
        print(path.name, flush=True)


def make_ultralytics(folder: Path, only: str) -> None:
    """YOLO nets with random weights as Ultralytics exports them."""
    from ultralytics import YOLO

    for name in ("yolov8n", "yolo11n", "yolov8n-seg", "yolo11n-cls"):
        path = folder / f"{name}.onnx"
        if path.exists() or only not in path.name:
            continue
        size = 128 if name.endswith("cls") else 320
        made = YOLO(f"{name}.yaml").export(
            format="onnx", imgsz=size, simplify=False, dynamic=name == "yolo11n", opset=17
        )
        shutil.move(made, path)
        print(path.name, flush=True)


def copy_rapidocr(folder: Path, wheels: Path) -> None:
    """The detectors, recognisers and direction classifiers of rapidocr, as they lie in its wheels."""
    for source in sorted(wheels.rglob("*.onnx")):
        kind = next((kind for kind in ("det", "rec", "cls") if kind in source.stem), "")
        version = next((version for version in ("v6", "v5", "v4", "v2.0") if version in source.stem), "")
        if kind:
            shutil.copyfile(source, folder / f"rapidocr-{version}-{kind}.onnx")


def make_refused(folder: Path) -> None:
    """Files that nobody can prune, and that have to be refused by name."""

    def graph(*nodes: Any, **weights: Any) -> Any:
        port = helper.make_tensor_value_info
        return helper.make_model(
            helper.make_graph(
                list(nodes),
                "graph",
                [port("x", TensorProto.FLOAT, ["n", 4])],
                [port("y", TensorProto.FLOAT, ["n", 4])],
                [numpy_helper.from_array(value, name) for name, value in weights.items()],
            ),
            opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
            ir_version=8,
        )

    one, zero = np.ones((), np.float32), np.zeros((), np.uint8)
    made: Mapping[str, Any] = {
        "refused-quantised": graph(
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
            scale=one,
            zero=zero,
        ),
        "refused-optimised": graph(
            helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft"), w=np.eye(4, dtype=np.float32)
        ),
    }
    for name, proto in made.items():
        onnx.save(proto, folder / f"{name}.onnx")


SOURCES: Mapping[str, Callable[[Path, str], None]] = {
    "torch": make_torch,
    "keras": make_keras,
    "ultralytics": make_ultralytics,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", choices=[*SOURCES, "rapidocr", "refused"], required=True)
    parser.add_argument("--wheels", type=Path, help="where rapidocr's wheels are unpacked")
    parser.add_argument("--only", default="", help="a part of the names of the files to make")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.source == "rapidocr":
        copy_rapidocr(folder, args.wheels)
    elif args.source == "refused":
        make_refused(folder)
    else:
        SOURCES[args.source](folder, args.only)


if __name__ == "__main__":
    main()
