"""Tiny random networks that give every position a label, in all layouts of the stream, and some that do not."""

import networks
import torch
import transformers
from cascades import blockwise
from language import loud
from networks import DEPTH, VOCABULARY, WIDTH, Block
from torch import nn

from dbconvert.tasks.token_classification import TokenClassification

CLASSES = 5
LABELS = 3
"""Of a position of `several`."""


class Near(nn.Module):
    """[N, C, S] -> the same, by a convolution of kernel 3 to both sides."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x))


class Tagger(nn.Module):
    """Scores of every position of token sequences [N, S, classes].

    Args:
        layout: axes of the stream between stem and head: examples, positions, channels.
        extra: a token of no position stands before the others.
        labels: of a position; the scores are [N, S, labels, classes] where it is more than one.
    """

    def __init__(self, layer=Block, layout=(0, 1, 2), classes=CLASSES, extra=False, labels=1):
        super().__init__()
        self.layout, self.extra, self.labels = layout, extra, labels
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, labels * classes)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = torch.cat([x[:, :1] * 0.5, x], 1) if self.extra else x
        x = x.permute(self.layout)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x.permute(self.layout))  # every layout here is its own inverse
        scores = self.head(x[:, 1:] if self.extra else x)
        return scores.view(*ids.shape, self.labels, -1) if self.labels > 1 else scores


class Vectors(nn.Module):
    """The same of vectors [N, S, 8], without a table of tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def of_transformers(kind, config, **more):
    fields = {**networks.TEXT, "num_labels": CLASSES, **more}
    return getattr(transformers, f"{kind}ForTokenClassification")(config(**fields)), {"input_ids": networks.tokens()}


ROWS = {
    "tagger": lambda: (Tagger(), {"ids": networks.tokens()}),
    "channels_first": lambda: (Tagger(Near, (0, 2, 1)), {"ids": networks.tokens()}),
    "several": lambda: (Tagger(labels=LABELS), {"ids": networks.tokens()}),
    "vectors": lambda: (Vectors(), {"x": networks.features()}),
    "hf_bert": lambda: of_transformers("Bert", transformers.BertConfig),
    "hf_roberta": lambda: of_transformers("Roberta", transformers.RobertaConfig, pad_token_id=1),
    "hf_llama": lambda: of_transformers("Llama", transformers.LlamaConfig, num_key_value_heads=2, use_cache=False),
}


def build(name):
    torch.manual_seed(0)
    model, inputs = ROWS[name]()
    return model.eval(), inputs


def tagger(name="tagger", context="raw", blocks=3):
    """(network in blocks with random conditioning, its noise intervals)."""
    model, inputs = loud(build(name))
    return blockwise(model, inputs, TokenClassification, blocks, context=context)
