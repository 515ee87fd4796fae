"""Image diffusion: what the analysis finds, D = c_skip z + c_out F through each block's own layers, refusals."""

import pytest
import torch
from networks import WIDTH, Block
from small_dit import inputs, intervals_of, network_of, small_dit
from torch import nn

from dbconvert.anatomy import Picture
from dbconvert.errors import UsageError
from dbconvert.graph.analysis import analyse
from dbconvert.plan import NoiseRule
from dbconvert.tasks.image_diffusion import ImageDiffusion, picture_in_words
from dbconvert.tasks.registry import accepting, choose_task
from tests.acceptance import diffusers_rows

SIGMA = torch.tensor([0.3, 7.0])


class Plain(nn.Module):
    """Not conditioned by AdaLN: the time is added to the tokens, as in many small denoisers."""

    def __init__(self, *, timed=True):
        super().__init__()
        self.patch, self.back = nn.Conv2d(3, WIDTH, 4, 4), nn.ConvTranspose2d(WIDTH, 3, 4, 4)
        self.time = nn.Linear(1, WIDTH) if timed else None
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, t=None):
        x = self.patch(x)
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)
        if self.time is not None:
            x = x + self.time(t[:, None])[:, None]
        for block in self.blocks:
            x = block(x)
        return self.back(x.transpose(1, 2).view(shape))


def picture(size=2):
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# -- what the analysis finds --------------------------------------------------------------------------------------


def test_image_time_and_class_are_found():
    anatomy = analyse(small_dit(), inputs())
    assert anatomy.picture == Picture("images", (), 1, ("time",), ("label",), 11)
    assert [task.name for task in accepting(anatomy)] == ["image_diffusion"]
    told = picture_in_words(anatomy, ImageDiffusion.decide(anatomy))
    assert told.startswith("the noisy image enters as images, the time is time, the class is label, of 11 rows;")


@pytest.mark.skipif(not diffusers_rows.ROWS, reason="diffusers is not installed")
@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("dit", Picture("hidden_states", (0,), 8, ("timestep",), ("class_labels",), 11)),
        ("pixart", Picture("hidden_states", (0,), 8, ("timestep",), (), 0)),
    ],
)
def test_transformers_of_diffusers(row, found):
    """Both predict a variance too: the first half of the channels counts."""
    model, given = diffusers_rows.ROWS[row].build()
    anatomy = analyse(model, given)
    assert anatomy.picture == found and choose_task(anatomy, None) is ImageDiffusion
    assert ImageDiffusion.decide(anatomy).width == 4


def test_networks_that_are_no_denoisers_are_left_alone():
    untimed = analyse(Plain(timed=False), {"x": picture()})
    assert untimed.picture is not None and accepting(untimed) == []
    assert choose_task(untimed, "image_diffusion") is ImageDiffusion  # when asked for by name


class Twice(nn.Module):
    """A second thing with one number an example."""

    def __init__(self, *, looked_up):
        super().__init__()
        self.net = small_dit()
        self.table = nn.Embedding(1000, 16) if looked_up else None

    def forward(self, images, time, label):
        if self.table is None:
            return self.net(images, time, label.long()) * label[:, None, None, None].sigmoid()
        return self.net(images, time.float(), label) + self.table(time).mean(-1)[:, None, None, None]


@pytest.mark.parametrize(
    ("looked_up", "kind", "reason"), [(True, torch.long, "time, label; only a class"), (False, torch.float, "time")]
)
def test_what_cannot_be_told_apart_is_refused(looked_up, kind, reason):
    given = inputs()
    given = {**given, "time": torch.tensor([1, 2])} if looked_up else {**given, "label": given["label"].to(kind)}
    anatomy = analyse(Twice(looked_up=looked_up), given)
    if looked_up:
        with pytest.raises(UsageError, match=reason):
            choose_task(anatomy, "image_diffusion")
    else:
        assert anatomy.picture.labels == ("label",)  # looked up, and used otherwise too


# -- one block ----------------------------------------------------------------------------------------------------


def by_hand(model, layers, z, sigma, label, sigma_data=0.5):
    """D of some layers, from the formulas of EDM's table 1 and the network's own parts."""
    s, d = sigma[:, None, None, None], sigma_data
    root = (s**2 + d**2).sqrt()
    x = model.patches(z / root)
    n, _, rows, columns = x.shape
    x = x.flatten(2).transpose(1, 2) + model.positions
    condition = model.time(sigma.log() / 4) + model.classes(label)
    for i in layers:
        x = model.layers[i](x, condition)
    shift, scale = model.modulation(condition).chunk(2, -1)
    x = model.head(model.norm(x) * (1 + scale[:, None]) + shift[:, None])
    x = x.view(n, rows, columns, model.channels, model.patch, model.patch).permute(0, 3, 1, 4, 2, 5)
    return d**2 / root**2 * z + s * d / root * x.reshape(z.shape)


@torch.no_grad()
def test_every_block_denoises_with_its_own_layers():
    original, given = small_dit(), inputs()
    network = network_of(small_dit(), given)
    z = torch.randn(2, 1, 8, 8)
    for block in range(3):
        found = network.denoise(block, given, z, SIGMA)
        assert torch.allclose(found, by_hand(original, [block], z, SIGMA, given["label"]), atol=1e-5)
    baseline = network.untold(given, z, SIGMA, range(3))
    assert torch.allclose(baseline, by_hand(original, range(3), z, SIGMA, given["label"]), atol=1e-5)


@torch.no_grad()
def test_the_clean_image_never_enters():
    given = inputs()
    network, z = network_of(small_dit(), given), torch.randn(2, 1, 8, 8)
    other = {**given, "images": torch.full_like(given["images"], 9.0)}
    for block in (0, None):
        run = network.untold if block is None else network.denoise
        args = (z, SIGMA, range(3)) if block is None else (z, SIGMA)
        lead = () if block is None else (block,)
        assert torch.equal(run(*lead, given, *args), run(*lead, other, *args))


def test_losses_are_means_over_pixels_and_only_own_layers_learn():
    given = inputs()
    network = network_of(small_dit(), given)
    fed, images = network.task.arranged(given, given["label"])
    eps = network.task.draw(fed)
    losses = network(1, fed, images, SIGMA, eps)
    z = images + SIGMA[:, None, None, None] * eps
    by_pixel = (network.denoise(1, fed, z, SIGMA) - images) ** 2
    assert torch.allclose(losses, by_pixel.mean((1, 2, 3)), atol=1e-6)
    losses.sum().backward()
    moved = {name for name, p in network.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".")[1] for name in moved if name.startswith("layers.")} == {"1"}
    assert {"head.weight", "patches.weight", "classes.weight", "time.mlp.0.weight"} <= moved


def test_nothing_is_injected_twice():
    """A conditioned network gets no embedder and no modulation; another gets both, and its time as well."""
    given = inputs()
    assert not list(network_of(small_dit(), given).conditioning.parameters())
    torch.manual_seed(0)
    network = network_of(Plain(), {"x": picture(), "t": torch.rand(2)}, blocks=2)
    assert {"embedder", "modulation"} <= set(dict(network.conditioning.named_children()))
    with torch.no_grad():
        for parameter in network.conditioning.modulation.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    z, fed = picture(), {"x": picture()}
    low, high = (network.denoise(0, fed, z, torch.full((2,), s)) for s in (0.5, 0.501))
    network.model.time.weight.data.zero_()
    still = [network.denoise(0, fed, z, torch.full((2,), s)) for s in (0.5, 0.501)]
    assert low.shape == (2, 3, 16, 16) and not torch.equal(low, high) and not torch.equal(still[0], still[1])


@pytest.mark.skipif(not diffusers_rows.ROWS, reason="diffusers is not installed")
@torch.no_grad()
def test_a_predicted_variance_is_left_out():
    model, given = diffusers_rows.ROWS["dit"].build()
    given = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    z = torch.randn(2, 4, 8, 8)
    s = SIGMA[:, None, None, None]
    root = (s**2 + 0.25).sqrt()
    out = model(z / root, SIGMA.log() / 4, given["class_labels"]).sample[:, :4]
    network = network_of(model, given, blocks=1)
    found = network.denoise(0, given, z, SIGMA)
    assert torch.allclose(found, 0.25 / root**2 * z + s * 0.5 / root * out, atol=1e-5)


# -- batches ------------------------------------------------------------------------------------------------------


def test_classes_are_dropped_to_the_last_row():
    task = network_of(small_dit(), inputs()).task
    given = {"images": torch.zeros(4000, 1, 8, 8), "label": torch.arange(4000) % 10}
    torch.manual_seed(0)
    dropped = task.dropped(given, 0.1)["label"]
    gone = dropped == 10
    assert 0.08 < gone.float().mean() < 0.12 and torch.equal(dropped[~gone], given["label"][~gone])
    assert task.dropped(given, 0.0) is given


def test_images_of_another_shape_are_refused():
    task = network_of(small_dit(), inputs()).task
    for shape in ((2, 1, 16, 16), (2, 3, 8, 8)):
        with pytest.raises(UsageError, match=r"the network takes 1 channels of 8 x 8 pixels"):
            task.arranged({"images": torch.zeros(shape)}, torch.tensor([1, 2]))


def test_noise_that_needs_a_table_is_refused(tmp_path):
    from dbconvert.engine.noise import refuse_misfit

    for rule in (NoiseRule(rule="auto"), NoiseRule(rule="mask"), NoiseRule(rule="edm", per="position")):
        with pytest.raises(UsageError, match="image_diffusion"):
            refuse_misfit(rule, ImageDiffusion)
    assert intervals_of(network_of(small_dit(), inputs())).boundaries[-1] == 80.0
