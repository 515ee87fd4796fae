"""How like the data the images are that a network draws: the Frechet distance of features of both."""

from __future__ import annotations

import torch

from dbconvert.data.batches import Data, in_order
from dbconvert.data.content import content_digest
from dbconvert.data.latents import Latents
from dbconvert.data.token_cache import cache_folder
from dbconvert.data_options import DataOptions
from dbconvert.diffusion.frechet import Moments, frechet_distance
from dbconvert.engine.decode import opened_vae, pictures
from dbconvert.engine.features import FeatureNetwork, kept_moments, moments_of, open_features
from dbconvert.engine.generated import OF_IMAGES, OF_TEXT, refuse_strangers
from dbconvert.engine.load import Loaded
from dbconvert.engine.metrics import Metrics
from dbconvert.engine.sample import Sampling, draw, drawing_task, labels_of
from dbconvert.errors import UsageError
from dbconvert.events import Note, Reporter, Stage, silent
from dbconvert.recipe import SampleOptions

FOLDER = "features"


def likeness(
    loaded: Loaded,
    examples: Data,
    data: DataOptions,
    options: SampleOptions,
    seed: int,
    device: torch.device,
    report: Reporter = silent,
) -> Metrics:
    """`frechet` of `options.samples` images against all examples, none without. Classes are drawn in turn.

    The data's moments are kept in the cache. Distances are comparable within one feature network, one part of the data
    and one number of samples only.

    Raises:
        UsageError: what is asked for makes no sense, or there is no such feature network.
        DBConvertError: it cannot be opened, or does not take these pictures.
    """
    refuse_strangers(options, OF_IMAGES, OF_TEXT)
    if not options.samples:
        return {}
    if options.features is None:
        raise UsageError(
            "by which features are samples and data compared?",
            hint="add eval.features=NETWORK: a run, a checkpoint, a model.py, a Transformers folder, or inception",
        )
    task = drawing_task(loaded, "the network")
    labels = labels_of(task, None, options.samples, loaded.label_dropout, options.guidance)
    sampling = Sampling(
        steps=options.steps or Sampling().steps, guidance=options.guidance, batch=options.batch, seed=seed
    )
    vae = opened_vae(data, "the network", task.target.width)
    report(Stage("reading the feature network"))
    network = open_features(options.features, device)
    report(Stage("features of the data"))
    seen = examples.pictures if isinstance(examples, Latents) else examples
    real_pictures = (batch[task.picture.argument].clamp(0, 1) for batch in in_order(seen, options.batch))
    real = kept_moments(network, content_digest(seen), cache_folder(data) / FOLDER, real_pictures)
    drawn = draw(
        loaded.network,
        loaded.intervals,
        options.samples,
        labels,
        sampling,
        layers=loaded.layers,
        device=device,
        report=report,
    )
    report(Stage("features of the samples"))
    made = moments_of(network, pictures(drawn, data, vae, options.batch))
    return {"frechet": compared(made, real, network, report)}


def compared(made: Moments, real: Moments, network: FeatureNetwork, report: Reporter) -> float:
    """The distance; few pictures are told."""
    for what, moments in (("samples", made), ("pictures of the data", real)):
        if moments.deficient:
            few = f"{moments.count} {what} are too few for {len(moments.mean)} features of {network.name}"
            report(Note(f"{few}: their covariance has no full rank, and the distance is too large", warning=True))
    return frechet_distance(made, real)
