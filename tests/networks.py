"""Tiny random networks: each builds in milliseconds and returns (model, inputs by name)."""

import torch
import transformers
from torch import nn
from torch.nn import functional as F

WIDTH, DEPTH, HEADS, VOCABULARY, LENGTH = 32, 4, 4, 61, 12


def tokens():
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def images(channels=3, size=16):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))


class Block(nn.Module):
    def __init__(self, causal=False, dropout=0.1):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(WIDTH, HEADS, causal)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)  # called twice in forward: never a gate site

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    def __init__(self, depth=DEPTH, classes=5, pool="token"):
        super().__init__()
        self.pool = pool
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.pool == "token" else x.mean(1))


class GPT(nn.Module):
    def __init__(self, block=lambda: Block(causal=True)):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.h = nn.ModuleList(block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """nn.TransformerEncoder between a linear stem and a pooled head, in either layout."""

    def __init__(self, norm_first, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.1, norm_first=norm_first, batch_first=batch_first
        )
        self.batch_first = batch_first
        self.stem = nn.Linear(8, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


class Net(nn.Module):
    """A linear stem, layers of one kind, a pooled head."""

    def __init__(self, layer, depth=DEPTH):
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Patches(Net):
    """No positions are added: the convolution's result becomes the stream by views alone."""

    def __init__(self):
        super().__init__(Block)
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class AllDepths(Net):
    """The readout uses the stream after every layer."""

    def forward(self, x):
        streams = [self.stem(x)]
        for layer in self.layers:
            streams.append(layer(streams[-1]))
        return self.head(sum(streams[1:]).mean(1))


class InPlace(nn.Module):
    """Runs forward, but writes over what the backward pass of its norm needs."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x += self.linear(self.norm(x))
        return x


class PreNormMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        return x + self.mlp(x)


class DropPath(nn.Module):
    """Stochastic depth: each example's branch is dropped or scaled up."""

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(0.8)
        return x * kept / 0.8


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x):
        return x * self.gamma


class Scaled(nn.Module):
    """timm's style: one drop path for both branches, layer scales, an RMS norm written by hand."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = RMS(), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.scale1, self.scale2, self.drop = LayerScale(), LayerScale(), DropPath()

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.drop(self.scale1(self.attention(y, y, y)[0]))
        return x + self.drop(self.scale2(self.mlp(self.norm2(x))))


class RMS(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class MixerLayer(nn.Module):
    """The first branch works along the tokens: its gate has to act on another axis than its last weight."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(LENGTH, 24), nn.GELU(), nn.Linear(24, LENGTH))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).mT
        return x + self.channels(self.norm2(x))


class ConvPair(nn.Module):
    """Two convolutional branches: BatchNorm before, and ConvNeXt's order with an inner norm and an inline scale."""

    def __init__(self):
        super().__init__()
        self.batch_norm, self.conv = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x):
        x = x + self.conv(F.relu(self.batch_norm(x)))
        y = self.out(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class PostActivation(nn.Module):
    """ResNet's basic block: an activation on the stream after the addition."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y += x
        return self.relu(y)


class ConvNet(nn.Module):
    """`stem`: a container of the same class as the layers' own, which changes the shape and is no stage."""

    def __init__(self, layer, stem=False):
        super().__init__()
        first = nn.Conv2d(3, WIDTH, 4, 4)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(WIDTH), nn.ReLU()) if stem else first
        self.layers = nn.Sequential(*[layer() for _ in range(DEPTH)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class NotResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x):
        return self.body(x)


class Multiplicative(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x * (1 + self.linear(self.norm(x)))


class Widening(nn.Module):
    """Each layer doubles the width: residual in form, but the dimensions change."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8 * 2**i), nn.Linear(8 * 2**i, 16 * 2**i)) for i in range(3)
        )
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, x], -1) + layer(x)
        return self.head(x.mean(1))


class ConvLayer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.silu(self.norm(x)))


class UNetStage(nn.Module):
    def __init__(self, before, after, scale):
        super().__init__()
        self.layers = nn.Sequential(ConvLayer(before), ConvLayer(before))
        self.resize = nn.Conv2d(before, after, 2, 2) if scale < 1 else nn.ConvTranspose2d(before, after, 2, 2)

    def forward(self, x):
        return self.resize(self.layers(x))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([UNetStage(8, 16, 0.5), UNetStage(16, 32, 0.5)])
        self.up = nn.ModuleList([UNetStage(32, 16, 2), UNetStage(16, 8, 2)])
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        kept = []
        for stage in self.down:
            kept.append(x)
            x = stage(x)
        for stage in self.up:
            x = stage(x) + kept.pop()
        return self.out(x)


class FlatUNet(nn.Module):
    """Three residual layers side by side, with changes of shape between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.high = nn.Conv2d(3, 8, 3, padding=1), ConvLayer(8)
        self.shrink, self.low = nn.Conv2d(8, 16, 2, 2), ConvLayer(16)
        self.grow, self.end, self.out = nn.ConvTranspose2d(16, 8, 2, 2), ConvLayer(8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        kept = self.high(self.stem(x))
        return self.out(self.end(self.grow(self.low(self.shrink(kept))) + kept))


class Interrupted(nn.Module):
    """Residual layers with something else on the stream between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()
        self.stem, self.between, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.second(self.between(self.first(self.stem(x)))).mean(1))


class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(F.layer_norm(x, (WIDTH,), self.weight, self.bias))


class EarlyExit(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return x if x.abs().mean() > 1e9 else self.block(x)


class SideProduct(nn.Module):
    """The first layer makes something that the later ones need."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.linear = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x, extra=None):
        extra = self.first(x) if extra is None else extra
        return x + self.linear(self.norm(x) + extra), extra


class SideProducts(Net):
    def __init__(self):
        super().__init__(SideProduct)

    def forward(self, x):
        x, extra = self.stem(x), None
        for layer in self.layers:
            x, extra = layer(x, extra)
        return self.head(x.mean(1))


class TwoStacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.left, self.right = (
            nn.ModuleList(Block() for _ in range(3)),
            nn.ModuleList(Block() for _ in range(3)),
        )
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x):
        a = b = self.stem(x)
        for layer in self.left:
            a = layer(a)
        for layer in self.right:
            b = layer(b)
        return self.head(torch.cat([a, b], -1).mean(1))


class Hidden(nn.Module):
    """Slice assignment hides a second branch from the sum."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.other = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x):
        out = x + self.linear(self.norm(x))
        out[:, 1:] = self.other(x[:, 1:])
        return out


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.block = kind, Block()

    def forward(self, x):
        y = self.block(x)
        return {"dict": {"hidden": y, "size": y.mean()}, "tuple": (y, None), "list": [y, y.mean()]}[self.kind]


class Unpacking(Net):
    def __init__(self, kind):
        super().__init__(lambda: Returns(kind))
        self.key = "hidden" if kind == "dict" else 0

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)[self.key]
        return self.head(x.mean(1))


def features():
    return torch.randn(2, LENGTH, 8, generator=torch.Generator().manual_seed(0))


TEXT = dict(  # noqa: C408
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
    intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(  # noqa: C408
    hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=64, image_size=16,
    patch_size=4, num_labels=5, hidden_dropout_prob=0.1,
)  # fmt: skip


def vit_config():
    return transformers.ViTConfig(**VISION, architectures=["ViTForImageClassification"])


def convnext_config():
    return transformers.ConvNextConfig(
        hidden_sizes=[WIDTH], depths=[DEPTH], num_stages=1, patch_size=2, num_labels=5,
        architectures=["ConvNextForImageClassification"],
    )  # fmt: skip


def gpt2_config():
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS, n_positions=64, use_cache=False,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip


def llama_config():
    return transformers.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False, architectures=["LlamaForCausalLM"])


def opt_config():
    """Its second branch is added in a flattened form, [N T, d]."""
    return transformers.OPTConfig(**TEXT, ffn_dim=64, word_embed_proj_dim=WIDTH, use_cache=False)


def bert_config():
    return transformers.BertConfig(**TEXT, architectures=["BertForMaskedLM"])


def whole_sequential():
    """No class of its own: the layers are children of the network itself, numbered like stem and head."""
    layers = [PreNormMLP() for _ in range(DEPTH)]
    return nn.Sequential(nn.Linear(8, WIDTH), *layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))


ACCEPTED = {
    "vit": lambda: (ViT(), {"x": images()}),
    "vit_mean": lambda: (ViT(pool="mean"), {"x": images()}),
    "gpt": lambda: (GPT(), {"ids": tokens()}),
    "encoder_pre": lambda: (Encoder(True, True), {"x": features()}),
    "encoder_pre_seq_first": lambda: (Encoder(True, False), {"x": features()}),
    "encoder_post": lambda: (Encoder(False, True), {"x": features()}),
    "encoder_post_seq_first": lambda: (Encoder(False, False), {"x": features()}),
    "patches": lambda: (Patches(), {"x": images()}),
    "scaled": lambda: (Net(Scaled), {"x": features()}),
    "mixer": lambda: (Net(MixerLayer), {"x": features()}),
    "conv": lambda: (ConvNet(ConvPair), {"x": images()}),
    "conv_post": lambda: (ConvNet(PostActivation), {"x": images()}),
    "conv_stem": lambda: (ConvNet(PostActivation, stem=True), {"x": images()}),
    "functional_norm": lambda: (Net(FunctionalNorm), {"x": features()}),
    "sequential": lambda: (whole_sequential(), {"input": features()}),
    "returns_tuple": lambda: (Unpacking("tuple"), {"x": features()}),
    "returns_list": lambda: (Unpacking("list"), {"x": features()}),
    "returns_dict": lambda: (Unpacking("dict"), {"x": features()}),
    "hf_vit": lambda: (transformers.ViTForImageClassification(vit_config()), {"pixel_values": images()}),
    "hf_convnext": lambda: (transformers.ConvNextForImageClassification(convnext_config()), {"pixel_values": images()}),
    "hf_gpt2": lambda: (transformers.GPT2LMHeadModel(gpt2_config()), {"input_ids": tokens()}),
    "hf_opt": lambda: (transformers.OPTForCausalLM(opt_config()), {"input_ids": tokens()}),
    "hf_llama": lambda: (transformers.LlamaForCausalLM(llama_config()), {"input_ids": tokens()}),
    "hf_bert": lambda: (transformers.BertForMaskedLM(bert_config()), {"input_ids": tokens()}),
}
"""Networks that the analysis accepts."""

POST_NORM = ("encoder_post", "encoder_post_seq_first", "hf_bert", "conv_post", "conv_stem")
ONE_BRANCH = ("functional_norm", "conv_post", "conv_stem", "sequential", "hf_convnext")

REFUSED = {
    "not_residual": (lambda: (Net(NotResidual), {"x": features()}), "not-residual", "layers.0"),
    "multiplicative": (lambda: (Net(Multiplicative), {"x": features()}), "not-residual", "mul"),
    "widening": (lambda: (Widening(), {"x": features()}), "dimensions", "layers.0"),
    "unet": (lambda: (UNet(), {"x": images()}), "dimensions", "down.0"),
    "flat_unet": (lambda: (FlatUNet(), {"x": images()}), "dimensions", "shrink"),
    "interrupted": (lambda: (Interrupted(), {"x": features()}), "no-stack", "between"),
    "early_exit": (lambda: (Net(EarlyExit), {"x": features()}), "control-flow", "bool"),
    "in_place": (lambda: (Net(InPlace), {"x": features()}), "backward", "backward pass"),
    "side_product": (lambda: (SideProducts(), {"x": features()}), "layer-made-input", "layers.0"),
    "two_stacks": (lambda: (TwoStacks(), {"x": features()}), "several-stacks", "left, right"),
    "no_stack": (
        lambda: (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"input": features()}),
        "no-stack",
        "Sequential",
    ),
    "compiled": (
        lambda: (torch.compile(Net(Block), backend="eager"), {"x": features()}),
        "compiled",
        "OptimizedModule",
    ),
    "hidden_branch": (lambda: (Net(Hidden), {"x": features()}), None, ""),
}
"""Networks that it refuses: (build, kind of the refusal, what the named node contains)."""


def build(name):
    torch.manual_seed(0)
    model, inputs = ACCEPTED[name]()
    return model.eval(), inputs


class Torchs(nn.Module):
    """A language model of torch's own encoder, which tells its layers that the mask is causal."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True, norm_first=True)
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])), mask=mask))
