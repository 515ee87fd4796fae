"""Hand-written networks in the styles that people use, beside those of tests/networks.py: tiny and random."""

import torch
from networks import DEPTH, HEADS, LENGTH, VOCABULARY, WIDTH, Attention, Block, DropPath, LayerScale
from torch import nn
from torch.nn import functional as F


class InlineBlock(nn.Module):
    """minGPT turned inside out: parameters of its own, and norm, attention and MLP written as functions."""

    def __init__(self):
        super().__init__()
        self.g1, self.b1 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.g2, self.b2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.qkv = nn.Parameter(0.1 * torch.randn(3 * WIDTH, WIDTH))
        self.out = nn.Parameter(0.1 * torch.randn(WIDTH, WIDTH))
        self.up = nn.Parameter(0.1 * torch.randn(4 * WIDTH, WIDTH))
        self.down = nn.Parameter(0.1 * torch.randn(WIDTH, 4 * WIDTH))

    def forward(self, x):
        n, t, c = x.shape
        y = F.layer_norm(x, (c,), self.g1, self.b1)
        q, k, v = F.linear(y, self.qkv).view(n, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, c)
        x = x + F.linear(y, self.out)
        y = F.layer_norm(x, (c,), self.g2, self.b2)
        return x + F.linear(F.gelu(F.linear(y, self.up)), self.down)


class MultiheadBlock(nn.Module):
    """torch's own attention as tutorials call it: with a mask made in the layer, and weights that nobody reads."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        y, future = self.norm1(x), torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(y, y, y, attn_mask=future)[0]
        return x + self.mlp(self.norm2(x))


class EncoderLM(nn.Module):
    """A language model of torch's own encoder, which tells its layers that the mask is causal."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=True)
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])), mask=mask))


class PreNorm(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x):
        return self.inner(self.norm(x))


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))


class NestedPairs(nn.Module):
    """The style of lucidrains' vit-pytorch: a list of pairs, the additions in the loop around them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(
            nn.ModuleList([PreNorm(Attention(WIDTH, HEADS, False)), PreNorm(mlp())]) for _ in range(DEPTH)
        )

    def forward(self, x):
        x = self.stem(x)
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        return self.head(x.mean(1))


class DeferredBlock(nn.Module):
    """flash-attn's style: a layer returns what is still to be added, and the next one adds it."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(WIDTH, HEADS, True), mlp()

    def forward(self, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        hidden = self.attention(self.norm1(residual))
        residual = hidden + residual
        return self.mlp(self.norm2(residual)), residual


class Deferred(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(DeferredBlock() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        hidden, residual = self.tokens(ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.head(self.norm(hidden + residual))


class Huginn(nn.Module):
    """A prelude, a core that runs again and again with the prelude's result mixed in, and a coda."""

    def __init__(self, rounds=4):
        super().__init__()
        self.rounds = rounds
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.prelude, self.coda = Block(causal=True), Block(causal=True)
        self.adapter = nn.Linear(2 * WIDTH, WIDTH)
        self.core = nn.ModuleList(Block(causal=True) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids):
        given = self.prelude(self.tokens(ids))
        x = torch.zeros_like(given)
        for _ in range(self.rounds):
            x = self.adapter(torch.cat([x, given], -1))
            for layer in self.core:
                x = layer(x)
        return self.head(self.norm(self.coda(x)))


class SkipBlock(nn.Module):
    def __init__(self, skip):
        super().__init__()
        self.block, self.skip = Block(), nn.Linear(2 * WIDTH, WIDTH) if skip else None

    def forward(self, x, kept=None):
        return self.block(x if self.skip is None else self.skip(torch.cat([x, kept], -1)))


class Shortcut(nn.Module):
    """A branch that leaves the stream early and comes back late: x3 = x2 + f(x2) + g(x1)."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention, self.middle, self.last, self.late = Attention(WIDTH, HEADS, False), mlp(), mlp(), mlp()

    def forward(self, x):
        y = self.norms[0](x)
        late = self.late(y)
        x = x + self.middle(y)
        x = x + self.attention(self.norms[1](x))
        return x + self.last(self.norms[2](x)) + late


class Join(nn.Module):
    """A sum of branch and stream, both scaled and shifted by vectors."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.shift = nn.Parameter(0.1 * torch.randn(WIDTH))
        self.branch_scale, self.branch_shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, branch, stream):
        return (branch + self.branch_shift) * self.branch_scale + (stream + self.shift) * self.scale


class ScaledAndShifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.join1, self.join2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Join(), Join()
        self.attention, self.mlp = Attention(WIDTH, HEADS, False), mlp()

    def forward(self, x):
        x = self.join1(self.attention(self.norm1(x)), x)
        return self.join2(self.mlp(self.norm2(x)), x)


class UViT(nn.Module):
    """Long skips: the last layers read what the first ones handed on."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.first = nn.ModuleList(SkipBlock(skip=False) for _ in range(3))
        self.middle = SkipBlock(skip=False)
        self.last = nn.ModuleList(SkipBlock(skip=True) for _ in range(3))

    def forward(self, x):
        x, kept = self.stem(x), []
        for layer in self.first:
            x = layer(x)
            kept.append(x)
        x = self.middle(x)
        for layer in self.last:
            x = layer(x, kept.pop())
        return self.head(x)


# -- kinds of branches ------------------------------------------------------------------------------------------


class RMSBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(WIDTH), mlp()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp()

    def forward(self, x):
        return self.norm(x + self.mlp(x))


class Prompted(nn.Module):
    """Deep prompts: every layer puts vectors of its own before the stream, and cuts them off behind its additions."""

    def __init__(self):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(2, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(WIDTH, HEADS, False), mlp()

    def forward(self, x):
        x = torch.cat([self.prompts.expand(len(x), -1, -1), x], 1)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.narrow(1, 2, x.shape[1] - 2)


class Apart(nn.Module):
    """Two streams that meet in attention, each with an MLP of its own; AdaLN."""

    def __init__(self):
        super().__init__()
        self.norm, self.adaln = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3 * WIDTH)
        self.attention, self.mlp, self.mlp_text = Attention(WIDTH, HEADS, False), mlp(), mlp()

    def forward(self, image, text, told):
        shift, scale, gate = self.adaln(told)[:, None].chunk(3, -1)
        both = self.attention(self.norm(torch.cat([image, text], 1)) * (1 + scale) + shift)
        seen, read = both.split([image.shape[1], text.shape[1]], 1)
        image, text = image + gate * seen, text + gate * read
        return image + gate * self.mlp(self.norm(image)), text + gate * self.mlp_text(self.norm(text))


class Together(nn.Module):
    """The same two streams under other names, added to as one; they come back in another order."""

    def __init__(self):
        super().__init__()
        self.norm, self.adaln = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3 * WIDTH)
        self.attention = Attention(WIDTH, HEADS, False)

    def forward(self, told, words, pixels):
        shift, scale, gate = self.adaln(told)[:, None].chunk(3, -1)
        both = torch.cat([words, pixels], dim=1)
        both = both + gate * self.attention(self.norm(both) * (1 + scale) + shift)
        words, pixels = both.split([words.shape[1], pixels.shape[1]], dim=1)
        return {"pixels": pixels, "words": words}


class TwoKinds(nn.Module):
    """Layers of two streams in two lists, one after the other.

    Args:
        between: the lists, streams stay as they are, are `joined` into one, or one of them is `glued`: changed.
    """

    def __init__(self, between=""):
        super().__init__()
        self.image, self.text, self.time = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH), nn.Linear(1, WIDTH)
        self.apart = nn.ModuleList(Apart() for _ in range(2))
        self.together = nn.ModuleList((Joined if between == "joined" else Together)() for _ in range(DEPTH - 2))
        self.head = nn.Linear(WIDTH, 8)
        self.between = between

    def forward(self, x, text, time):
        image, text, told = self.image(x), self.text(text), F.silu(self.time(time[:, None] * 0.5))
        for layer in self.apart:
            image, text = layer(image, text, told)
        text = text.tanh() if self.between == "glued" else text
        if self.between == "joined":
            both = torch.cat([text, image], 1)
            for layer in self.together:
                both = layer(both, told)
            return self.head(both[:, text.shape[1] :])
        for layer in self.together:
            out = layer(told, words=text, pixels=image)
            image, text = out["pixels"], out["words"]
        return self.head(image)


class Joined(Together):
    def forward(self, both, told):
        shift, scale, gate = self.adaln(told)[:, None].chunk(3, -1)
        return both + gate * self.attention(self.norm(both) * (1 + scale) + shift)


def pairs():
    """A picture as a sequence, a text, a time."""
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, LENGTH, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    return {"x": x, "text": text, "time": torch.tensor([0.2, 0.8])}


class NormAtEnd(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(WIDTH), mlp()

    def forward(self, x):
        return x + self.norm(self.mlp(x))


class Sandwich(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after, self.mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), mlp()

    def forward(self, x):
        return x + self.after(self.mlp(self.before(x)))


class Parallel(nn.Module):
    """GPT-J: one norm, two branches, one sum."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(WIDTH, HEADS, True), mlp()

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y) + self.mlp(y)


class NoNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = mlp()

    def forward(self, x):
        return x + self.mlp(x)


class Wrapped(nn.Module):
    """A branch behind modules through which a factor for each channel passes."""

    def __init__(self, *behind):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp()
        self.behind = nn.ModuleList(make() for make in behind)

    def forward(self, x):
        y = self.mlp(self.norm(x))
        for module in self.behind:
            y = module(y)
        return x + y


class Summed(nn.Module):
    """The stream and its branch, put together by `join`."""

    def __init__(self, join):
        super().__init__()
        self.norm, self.mlp, self.join = nn.LayerNorm(WIDTH), mlp(), join

    def forward(self, x):
        return self.join(x, self.mlp(self.norm(x)))


class Convolution(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.conv = norm(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.silu(self.norm(x)))


class CausalConvolution(nn.Module):
    """As in WaveNet: [N, C, T], padded on the left, gated, without a norm."""

    def __init__(self, dilation):
        super().__init__()
        self.dilation = dilation
        self.conv, self.out = nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=dilation), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        content, gate = self.conv(F.pad(x, (self.dilation, 0))).chunk(2, 1)
        return x + self.out(content.tanh() * gate.sigmoid())


class CausalConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, WIDTH), nn.Conv1d(WIDTH, 9, 1)
        self.layers = nn.ModuleList(CausalConvolution(1 + i % 2) for i in range(6))

    def forward(self, ids):
        x = self.tokens(ids).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).transpose(1, 2)


BRANCHES = {
    "pre": (RMSBlock, "pre", "norm", "mlp.2"),
    "post": (PostNorm, "spine", "norm", "mlp.2"),
    "end": (NormAtEnd, "end", "norm", "norm"),
    "sandwich": (Sandwich, "pre", "before", "after"),
    "parallel": (Parallel, "pre", "norm", "attention.out mlp.2"),
    "none": (NoNorm, "input", "mlp", "mlp.2"),
    "layer_scale": (lambda: Wrapped(LayerScale), "pre", "norm", "behind.0"),
    "drop_path": (lambda: Wrapped(DropPath), "pre", "norm", "behind.0 mlp.2"),
    "difference": (lambda: Summed(torch.sub), "pre", "norm", "mlp.2"),
    "scaled_addition": (lambda: Summed(lambda x, y: torch.add(x, y, alpha=0.5)), "pre", "norm", "mlp.2"),
    "dropout": (lambda: Wrapped(lambda: nn.Dropout(0.1)), "pre", "norm", "behind.0 mlp.2"),
}
"""Layers on [N, T, C]: (layer, placement, norm site, allowed gate sites)."""

CONVOLUTIONS = {
    "batch_norm": lambda: Convolution(lambda: nn.BatchNorm2d(WIDTH)),
    "group_norm": lambda: Convolution(lambda: nn.GroupNorm(4, WIDTH)),
}
"""Layers on [N, C, H, W], norm before the branch."""


def sequence():
    return torch.randn(2, LENGTH, 8, generator=torch.Generator().manual_seed(0))
