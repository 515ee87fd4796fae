"""Features of pictures, of any network, by which two sets of pictures are compared; the moments of data are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbconvert.checkpoint import INDEX_SUFFIX, load_tensors, read_metadata, save_tensors
from dbconvert.data.content import tensors_digest
from dbconvert.data.images import normalise
from dbconvert.data_options import ImageOptions
from dbconvert.diffusion.frechet import Gatherer, Moments
from dbconvert.engine.assemble import CHECKPOINT
from dbconvert.engine.inception import INCEPTION, open_inception
from dbconvert.engine.load import Loaded, load
from dbconvert.engine.runs import RUN
from dbconvert.errors import DBConvertError, UsageError
from dbconvert.schema import identity
from dbconvert.sources.model_file import ModelFile
from dbconvert.sources.picture_readers import open_picture_reader
from dbconvert.sources.resolve import HUB_ID, open_source

SEED = 0
"""Of a network that its Python file builds with random weights."""


@dataclass(frozen=True)
class FeatureNetwork:
    """Maps pictures [N, C, H, W] in [0, 1] to features [N, d].

    Args:
        name: what the user called it.
        fingerprint: equal for equal weights, code and treatment of pictures.
        module: the network; its device is where it runs.
        run: normalised pictures to what leaves it, [N, d], tokens [N, T, d] or maps [N, d, H, W].
        image: how its pictures are normalised.
        channels, size: that it takes; None where it takes any.
    """

    name: str
    fingerprint: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]
    image: ImageOptions | None = None
    channels: int | None = None
    size: int | None = None

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features on the CPU; grey pictures are given to a network of colours as three equal channels.

        Raises:
            DBConvertError: the network does not run on them, or gives no features an example.
        """
        ready = normalise(self.fitted(pictures), self.image)
        first = next(self.module.parameters(), None)
        try:
            found = pooled(self.run(ready if first is None else ready.to(first.device)))
        except RuntimeError as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise DBConvertError(
                f"{self.name} does not run on pictures {list(ready.shape[1:])}",
                why=reason,
                hint="give features of a network that takes such pictures",
            ) from error
        if found.dim() != 2 or len(found) != len(pictures) or not found.is_floating_point():
            raise DBConvertError(
                f"{self.name} gives {list(found.shape)} for {len(pictures)} pictures, and not one vector each",
                hint="pool them in the model.py: [N, C, H, W] -> [N, d]",
            )
        return found.float().cpu()

    def fitted(self, pictures: Tensor) -> Tensor:
        if self.channels not in (None, pictures.shape[1]):
            if pictures.shape[1] != 1:
                raise UsageError(f"{self.name} takes {self.channels} channels, and pictures have {pictures.shape[1]}")
            pictures = pictures.expand(-1, self.channels or 1, -1, -1)
        if self.size is not None and pictures.shape[-2:] != (self.size, self.size):
            pictures = F.interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True)
        return pictures


def pooled(found: Tensor) -> Tensor:
    """The mean over tokens or pixels, where there are several."""
    if found.dim() == 3:
        return found.mean(1)
    return found.mean((2, 3)) if found.dim() == 4 else found


# -- which network ----------------------------------------------------------------------------------------------


def open_features(location: str, device: torch.device | None = None) -> FeatureNetwork:
    """A network to compare pictures by.

    Args:
        location: a run or a checkpoint of ours, of which features are what enters its head; `model.py[:name]`, whose
            output they are, given pictures in [0, 1], with weights of its own making; a Transformers folder or hub id,
            the mean of what leaves its last layer; or `inception`, the features of FID.

    Raises:
        UsageError: it is none of these, or takes no pictures.
        DBConvertError: it cannot be opened.
    """
    path = Path(location).expanduser()
    if location == INCEPTION:
        network = of_module(location, open_inception(), size=None, channels=3)
    elif (path / RUN).is_file() or is_checkpoint(path):
        network = of_loaded(location, load(path))
    elif path.is_dir() or (HUB_ID.match(location) and not path.exists()):
        reader = open_picture_reader(location)
        image = ImageOptions(mean=reader.mean, std=reader.std)
        network = of_module(location, reader.model, reader, image, len(reader.mean), reader.size)
    else:
        network = of_file(location)
    network.module.eval().requires_grad_(False)
    if device is not None:
        network.module.to(device)
    return network


def is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return (
            any((path / name).is_file() for name in (CHECKPOINT, CHECKPOINT + INDEX_SUFFIX))
            and not (path / "config.json").is_file()
        )
    return path.is_file() and path.suffix in (".safetensors", ".json")


def of_module(
    name: str,
    module: nn.Module,
    run: Callable[[Tensor], Tensor] | None = None,
    image: ImageOptions | None = None,
    channels: int | None = None,
    size: int | None = None,
    code: str = "",
) -> FeatureNetwork:
    """Args: code: what tells the code of the module, where that is not ours or a library's."""
    parts = [tensors_digest(module.state_dict()), type(module).__name__, image, channels, size, code]
    return FeatureNetwork(name, identity(parts), module, run or module, image, channels, size)


def of_file(location: str) -> FeatureNetwork:
    source = open_source(location)
    assert isinstance(source, ModelFile)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        module = source.build()
    return of_module(location, module, code=source.ref.sha256)


def of_loaded(location: str, loaded: Loaded) -> FeatureNetwork:
    """What enters the head of a trained network at its last evaluation."""
    plan = loaded.network.plan
    given, head = plan.anatomy.inputs[0], plan.anatomy.head
    if head is None or len(given.shape) != 4 or loaded.network.task.generative:
        raise UsageError(
            f"{location} has no features of pictures", hint="give a network that was trained to classify pictures"
        )
    module = loaded.network.model.get_submodule(head.module)

    def run(pictures: Tensor) -> Tensor:
        entered: list[Tensor] = []
        with module.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0])):
            loaded.predict({given.name: pictures})
        return entered[-1]

    _, channels, size, _ = given.shape
    code = identity([plan.source.sha256, loaded.noise, [loaded.layers and len(loaded.layers)]])
    return of_module(location, loaded.network, run, loaded.data.image, channels, size, code)


# -- moments ----------------------------------------------------------------------------------------------------


def moments_of(network: FeatureNetwork, batches: Iterable[Tensor]) -> Moments:
    """Of the features of pictures in [0, 1], which come in batches.

    Raises:
        UsageError: there are fewer than two.
        DBConvertError: features are not finite.
    """
    gatherer = Gatherer()
    for pictures in batches:
        features = network(pictures)
        if not features.isfinite().all():
            raise DBConvertError(f"{network.name} gives features that are not finite")
        gatherer.add(features)
    if gatherer.count < 2:
        raise UsageError(f"{gatherer.count} pictures have no spread", hint="compare more of them")
    return gatherer.moments()


def kept_moments(network: FeatureNetwork, content: str, folder: Path, batches: Iterable[Tensor]) -> Moments:
    """The same, from the cache where it holds them.

    Args:
        content: what tells the pictures from others, see `content_digest`.
    """
    path = folder / f"{identity([network.fingerprint, content])[:32]}.moments.safetensors"
    if path.is_file():
        try:
            tensors, count = load_tensors(path), int(read_metadata(path)["count"])
            return Moments(tensors["mean"], tensors["covariance"], count)
        except (DBConvertError, KeyError, ValueError):
            path.unlink(missing_ok=True)  # damaged: it is made again
    found = moments_of(network, batches)
    tensors = {"mean": found.mean, "covariance": found.covariance}
    save_tensors(path, tensors, {"count": str(found.count)}, flush=False)
    return found
