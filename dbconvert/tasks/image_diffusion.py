"""Image diffusion: y is the image itself, x its class; z is the image with noise, and enters where the image does.

D = c_skip z + c_out F(c_in z, c_noise, class) with EDM's preconditioning (Karras et al. 2022, eq. 7): every block runs
its own layers on the stem's view of c_in z, and the readout after them. The loss is w(sigma) |D - y|^2, mean over
pixels. The network's own time argument is given c_noise; where its layers bring no conditioning of their own, they get
the injected one too. Networks that predict epsilon, v or a flow get the scalings and the time of their own schedule.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from dbconvert.anatomy import Anatomy, Picture
from dbconvert.diffusion.intervals import Intervals
from dbconvert.diffusion.preconditioning import Preconditioning
from dbconvert.errors import UsageError
from dbconvert.plan import Context, Rule, Table, Target
from dbconvert.recipe import Weight, Z
from dbconvert.tasks.base import Corruption, Headline, Inputs, Passage, Task, along, conditioning

PICTURE_AXES = 3
CLEAN = 0.01
"""Noise of an image that counts as none, as a share of sigma_data."""


class ImageDiffusion(Task):
    """Networks that map an image, and maybe a time and a class, to an image of the same shape.

    It adds no parameters. Labels are images [N, C, H, W], or [N, S, C] where the network takes them as a sequence, of
    which each has one loss.
    """

    name: ClassVar[str] = "image_diffusion"
    rule: ClassVar[Rule] = "edm"
    tables: ClassVar[tuple[Table, ...]] = ("none",)
    denoiser: ClassVar[bool] = True
    generative: ClassVar[bool] = True
    weight: ClassVar[Weight] = "edm"
    contexts: ClassVar[tuple[Context, ...]] = ("raw", "features", "estimate")
    zs: ClassVar[tuple[Z, ...]] = ("noised", "on-policy", "mixed")
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline("Frechet distance", "frechet", "frechet"),
        Headline("weighted loss", "loss", "loss"),
    )

    # -- deciding -----------------------------------------------------------------------------------------

    @staticmethod
    def refusal(anatomy: Anatomy) -> str | None:
        picture = anatomy.picture
        if picture is None:
            return "its output is not an image of the shape of one of its inputs"
        if len(picture.labels) > 1:
            return f"several inputs are looked up in tables: {', '.join(picture.labels)}; only a class can be"
        if len(picture.times) > 1:
            times = ", ".join(picture.times)
            return f"several inputs could be the time: {times}; a model.py around it can hold all but one fixed"
        if not picture.times and any(not layer.branches for layer in anatomy.layers):
            return "no input tells the noise level, and its layers are conditioned by something else already"
        return None

    @staticmethod
    def on_request(anatomy: Anatomy) -> bool:
        """Without a time it may as well restore or segment images."""
        return anatomy.picture is None or not anatomy.picture.times

    @staticmethod
    def decide(anatomy: Anatomy) -> Target:
        assert anatomy.picture is not None
        shape = image_shape(anatomy)
        channels = shape[0] if len(shape) == PICTURE_AXES else shape[-1]
        return Target(anatomy.picture.classes, channels, "image", table="none")

    @property
    def picture(self) -> Picture:
        assert self.anatomy.picture is not None
        return self.anatomy.picture

    @property
    def image_shape(self) -> tuple[int, ...]:
        """C, H, W, or S, C."""
        return image_shape(self.anatomy)

    # -- parameters ---------------------------------------------------------------------------------------

    def register(self, model: nn.Module, *, blocks: int, width: int, seed: int) -> None:
        """Only takes away: layers that are all conditioned by the network itself read no embedded level."""
        added = conditioning(model)
        if not len(added.get_submodule("modulation")._modules):
            added.get_submodule("embedder")._modules.clear()

    def block_of(self, key: str) -> int | None:
        return None

    # -- a batch ------------------------------------------------------------------------------------------

    @property
    def read(self) -> tuple[str, ...]:
        told = {*self.picture.times, *self.picture.labels}
        return tuple(given.name for given in self.anatomy.inputs if given.name not in told)

    def dropped(self, inputs: Inputs, share: float) -> Inputs:
        """The class of so large a share of the examples, drawn by chance, becomes the table's last row: none."""
        names = self.picture.labels if share else ()
        for name in names:
            labels = inputs[name]
            none = (torch.rand(labels.shape) < share).to(labels.device, non_blocking=True)
            inputs = {**inputs, name: labels.masked_fill(none, self.target.classes - 1)}
        return inputs

    def arranged(self, inputs: Inputs, labels: Tensor) -> tuple[Inputs, Tensor]:
        """The image is what is told; it stays among the inputs for its shape, and `passage` puts z in its place.

        Raises:
            UsageError: it is not of the shape that the network was analysed with; a sequence may have another length.
        """
        images, wanted = inputs[self.picture.argument], self.image_shape
        fixed = 0 if len(wanted) == PICTURE_AXES else 1
        if images.dim() != len(wanted) + 1 or tuple(images.shape[1 + fixed :]) != wanted[fixed:]:
            raise UsageError(
                f"the images are {spelled(images.shape[1:])}, and the network takes {spelled(wanted)}",
                hint="data.image.size resizes them, data.image.mode=RGB reads grey ones as colour",
            )
        return {**inputs, **dict.fromkeys(self.picture.labels, labels)}, images

    # -- a forward pass -----------------------------------------------------------------------------------

    def handover(self, intervals: Intervals, block: int) -> float:
        """A block denoises all through its interval, in as many evaluations as one likes."""
        return intervals.owned(block)[0]

    def target_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return tuple(inputs[self.picture.argument].shape)

    def clean(self, model: nn.Module, labels: Tensor) -> Tensor:
        return labels

    def passage(self, model: nn.Module, block: int, inputs: Inputs, corruption: Corruption) -> Passage:
        z, prediction = corruption.z, self.target.prediction
        by = prediction.scalings(along(corruption.sigma, z), corruption.scaling)
        fed = {**inputs, self.picture.argument: by.into * z}
        fed.update(dict.fromkeys(self.picture.times, prediction.time(corruption.sigma)))

        def denoised(output: Tensor) -> Tensor:
            return by.skip * z + by.out * output[:, : z.shape[1]]

        return Passage(fed, corruption.condition, result=denoised)

    def stem_passage(
        self, model: nn.Module, block: int, expected: Tensor, inputs: Inputs, scaling: Preconditioning
    ) -> Passage:
        sigma = torch.full((len(expected),), CLEAN * scaling.sigma_data, device=expected.device)
        return self.passage(model, block, inputs, Corruption(expected, sigma, sigma, scaling))

    def plain_passage(self, inputs: Inputs) -> Passage:
        images = inputs[self.picture.argument]
        return Passage({**inputs, **dict.fromkeys(self.picture.times, images.new_zeros(len(images)))})

    def denoised(self, model: nn.Module, output: Tensor) -> Tensor:
        return output

    # -- figures ------------------------------------------------------------------------------------------

    def stand_in(self, inputs: Inputs) -> Tensor:
        return inputs[self.picture.argument]

    def losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean squares over pixels, [N]."""
        return (output[:, : labels.shape[1]] - labels).float().square().flatten(1).mean(1)

    def counted(self, labels: Tensor) -> Tensor:
        return torch.ones(len(labels), device=labels.device)

    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        raise self.without("right answers")

    def probabilities(self, output: Tensor) -> Tensor:
        raise self.without("classes to tell")


def image_shape(anatomy: Anatomy) -> tuple[int, ...]:
    """C, H, W, or S, C."""
    assert anatomy.picture is not None
    name = anatomy.picture.argument
    return next(given.shape[1:] for given in anatomy.inputs if given.name == name)


def picture_in_words(anatomy: Anatomy, target: Target) -> str:
    """What the network takes as what, and what it is taken to predict."""
    if target.placement != "image" or anatomy.picture is None:
        return ""
    picture, predicted = anatomy.picture, target.prediction.kind
    time = f"the time is {picture.times[0]}" if picture.times else "no input is the time"
    label = f"the class is {picture.labels[0]}, of {picture.classes} rows" if picture.labels else "none is the class"
    schedule = "" if predicted == "edm" else f" by {target.prediction.times.in_words(predicted)}"
    return f"the noisy image enters as {picture.argument}, {time}, {label}; the network predicts {predicted}{schedule}"


def spelled(shape: tuple[int, ...]) -> str:
    if len(shape) < PICTURE_AXES:
        return f"sequences of {' x '.join(map(str, shape))} numbers"
    return f"{shape[0]} channels of {' x '.join(map(str, shape[1:]))} pixels"
