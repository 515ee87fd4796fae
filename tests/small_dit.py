"""A small DiT for the digits, as a model.py and as a converted network."""

import importlib.util
from pathlib import Path

import torch

from dbconvert.engine.convert import converted
from dbconvert.engine.decide import decide
from dbconvert.engine.network import BlockwiseNetwork
from dbconvert.engine.opening import Example, Opened
from dbconvert.graph.analysis import analyse
from dbconvert.plan import NoiseRule, cut
from dbconvert.recipe import SplitOptions
from dbconvert.sources.resolve import open_source
from dbconvert.tasks.image_diffusion import ImageDiffusion

EXAMPLE = Path(__file__).parents[1] / "examples" / "dit.py"
SMALL = "def build_model():\n    return DiT(size=8, patch=4, channels=1, classes=10, depth=3, width=16, heads=2)\n"


def write_model(folder, build=SMALL):
    folder.mkdir(exist_ok=True)
    text = EXAMPLE.read_text()
    (folder / "model.py").write_text(text[: text.index("def build_model")] + build)
    return folder / "model.py"


def example():
    spec = importlib.util.spec_from_file_location("dit_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_dit(**options):
    """Random weights everywhere: as built, its gates and head are zero."""
    torch.manual_seed(0)
    model = example().DiT(
        **{"size": 8, "patch": 4, "channels": 1, "classes": 10, "depth": 3, "width": 16, "heads": 2, **options}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def inputs(channels=1):
    return {"images": torch.randn(2, channels, 8, 8), "time": torch.rand(2), "label": torch.tensor([3, 7])}


def network_of(model, given, blocks=3, options=SplitOptions(), file=EXAMPLE):
    """The network converted in memory."""
    anatomy = analyse(model, given)
    opened = Opened(open_source(str(file)), model, given, None, 0, anatomy, Example(model, anatomy))
    plan, _ = decide(opened, options, NoiseRule(), ImageDiffusion, cut(anatomy.depth, blocks=blocks))
    task = ImageDiffusion(anatomy, plan.target, plan.noise)
    run = converted(model, plan, task)
    return BlockwiseNetwork(model, run, task, plan, tuple(range(blocks)), "shared").eval()


def intervals_of(network):
    return network.plan.preview.intervals()
