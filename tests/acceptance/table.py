"""The acceptance table: every family with its expected outcome."""

import networks
from networks import features, tokens

from tests.acceptance import diffusers_rows, transformers_rows, written
from tests.acceptance.rows import Row


def known(name):
    branches = 1 if name in networks.ONE_BRANCH else 2
    post, batch = name in networks.POST_NORM, int(name.endswith("seq_first"))
    return Row(networks.ACCEPTED[name], width=networks.WIDTH, branches=branches, post=post, batch=batch)


WRITTEN = {
    **{name: known(name) for name in networks.ACCEPTED},
    "gpt_inline": Row(lambda: (networks.GPT(written.InlineBlock), {"ids": tokens()}), branches=2),
    "gpt_multihead": Row(lambda: (networks.GPT(written.MultiheadBlock), {"ids": tokens()}), branches=2),
    "gpt_encoder": Row(lambda: (written.EncoderLM(), {"ids": tokens()}), layers=3, branches=2),
    "nested_pairs": Row(lambda: (written.NestedPairs(), {"x": features()}), branches=2),
    "shortcut": Row(lambda: (networks.Net(written.Shortcut), {"x": features()}), width=networks.WIDTH, branches=4),
    "scaled_and_shifted": Row(
        lambda: (networks.Net(written.ScaledAndShifted), {"x": features()}), branches=2, post=True
    ),
    "prompted": Row(lambda: (networks.Net(written.Prompted), {"x": features()}), branches=2),
    "two_kinds": Row(lambda: (written.TwoKinds(), written.pairs()), conditioned=True, streams=2),
    "two_kinds_joined": Row(lambda: (written.TwoKinds("joined"), written.pairs()), conditioned=True, streams=2),
    "two_kinds_glued": Row(
        lambda: (written.TwoKinds("glued"), written.pairs()), verdict="refused", kind="several-stacks", node="together"
    ),
    "deferred": Row(lambda: (written.Deferred(), {"ids": tokens()}), verdict="refused", kind="deferred-residual"),
    "huginn": Row(lambda: (written.Huginn(), {"ids": tokens()}), verdict="looped", layers=2, branches=2),
    "u_vit": Row(lambda: (written.UViT(), {"x": features()}), verdict="restricted", layers=None),
    **{
        name: Row(make, verdict="refused", kind=kind, node=node)
        for name, (make, kind, node) in networks.REFUSED.items()
    },
}
ROWS: dict[str, Row] = {**WRITTEN, **transformers_rows.ROWS, **diffusers_rows.ROWS}

CONVERTED = {name: row for name, row in ROWS.items() if row.verdict != "refused"}
REFUSED = {name: row for name, row in ROWS.items() if row.verdict == "refused"}
