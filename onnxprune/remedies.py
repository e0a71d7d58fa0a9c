"""What would free frozen channels: one sentence for every kind of reason."""

from __future__ import annotations

from onnxprune.positions import Kind, Seed

REMEDIES = {
    Kind.INPUT: "nothing here: who calls the model feeds this axis; export it with a narrower input",
    Kind.OUTPUT: "nothing here: who calls the model reads this axis; export it without this output, or a narrower one",
    Kind.ONE: "nothing: there is only one channel",
    Kind.DYNAMIC: "export the model with this size fixed",
    Kind.CHOSEN: "choose the layer with --only, or leave it out of --exclude",
    Kind.UNKNOWN: "a row for {op} in the table of rules (CONTRIBUTING.md says how), or an export without it",
    Kind.REFUSED: "an export in which other operators do what {op} does here",
    Kind.UNSEEN: "inputs on which the model runs through {op}: give real ones with --data",
    Kind.UNCLAIMED: "nothing where it holds positions (of an image, of tokens), as most do; else a row of {op} for it",
    Kind.MIXED: "nothing that is exact: every value that {op} gives needs all channels of this axis",
    Kind.NORMALISED: "nothing that is exact; with --approximate {op} goes by the channels that are left",
    Kind.SUMMED: "before {op} an activation that maps zero to zero (Relu, not Sigmoid), or stored weights on one side"
    " (quantised ones read with one stored zero point)",
    Kind.POLE: "a small number added before {op}, so that nothing is divided by zero",
    Kind.PRODUCT: "nothing while the other factor is cut; --exclude the layers of that group to cut this one instead",
    Kind.TOGETHER: "numbers of channels and of groups that divide one another, where a shuffle mixes what layers part",
    Kind.SAMPLED: "--no-samplers cuts the stream itself, for all its readers alike",
    Kind.STATED: "an export in which the size is a constant, or follows from Shape; simplifying the model may do",
}


def remedy(seed: Seed) -> str:
    """What would free what the seed froze; a row that refuses may say so itself, behind a semicolon."""
    said = seed.reason.partition("; ")[2] if seed.kind is Kind.REFUSED else ""
    return said or REMEDIES[seed.kind].format(op=seed.op)
