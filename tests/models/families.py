"""All families by kind, those left out with the reason, and the tenth of them that `make test` runs."""

from __future__ import annotations

from .makers import Family
from .own import OWN
from .senses import AUDIO, MULTIMODAL, SERIES, VISION
from .text import DECODERS, ENCODERS, EXPERTS, RECURRENT, TRANSLATORS

KINDS: dict[str, dict[str, Family]] = {
    "encoder": ENCODERS,
    "decoder": DECODERS,
    "encoder and decoder": TRANSLATORS,
    "mixture of experts": EXPERTS,
    "state space and recurrent": RECURRENT,
    "vision": VISION,
    "audio": AUDIO,
    "text and images": MULTIMODAL,
    "time series": SERIES,
    "our own": OWN,
}
FAMILIES: dict[str, Family] = {name: family for kind in KINDS.values() for name, family in kind.items()}
# Tried and left out, for eager or `aot_eager` does not do them with one right answer: `family` -> why.
OUT: dict[str, str] = {
    "longt5": "Dynamo fails whatever the backend: a mask keeps a batch of one, and a concatenation refuses it",
    "nystromformer": "Dynamo fails whatever the backend: a mask that eager drops does not fit the landmarks",
    "paligemma": "by aot_eager too its loss is not eager's",
    "phimoe": "its routing draws random numbers in training",
}
# Tried and not right here, `aot_eager` not compared: `family` -> what is past what is allowed.
OPEN: dict[str, str] = {
    "mobilevit": "running means and weights of batch norm by up to 1.25 times, on images of 64",
}
# The first of each kind and every tenth after it.
TENTH = [name for kind in KINDS.values() for name in list(kind)[::10]]
