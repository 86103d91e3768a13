"""Published replay methods as settings of one strategy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["REPLAY_METHODS"]

_ER: dict[str, Any] = {
    "ce_new_weight": 1.0,
    "ce_mean": "joint",
    "first_experience": "replay",
    "replay_per_class": None,
    "instance_new": 0.0,
    "instance_mem": 0.0,
    "ope_new": 0.0,
    "ope_seen": 0.0,
    "apf": False,
}

REPLAY_METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "onpro": MappingProxyType({}),
        "er": MappingProxyType(_ER),
        "er_ace": MappingProxyType({**_ER, "ce_mean": "separate", "ce_new_mask": "batch"}),
        "der_pp": MappingProxyType(
            {**_ER, "ce_mean": "separate", "ce_mem_weight": 0.0, "logit_weight": 0.1, "logit_ce_weight": 0.5}
        ),
        "scr": MappingProxyType(
            {
                **_ER,
                "ce_mean": "separate",
                "ce_new_weight": 0.0,
                "ce_mem_weight": 0.0,
                "contrast": 1.0,
                "projection": "mlp",
            }
        ),
    }
)
"""What makes :class:`OnProStrategy` another method: its keyword arguments, by the name of the method.

``OnProStrategy(capacity=200, **REPLAY_METHODS["er"])`` is experience replay; with ``capacity=0`` it is plain
fine-tuning. SCR trains no classifier: predict by ``NMC(memory="replay")``. The two weights of DER++ are those that its
authors chose for CIFAR-10 with 200 images.

Sources: A. Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", arXiv 1902.10486 (``er``); L. Caccia et
al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", ICLR 2022 (``er_ace``); P.
Buzzega et al., "Dark Experience for General Continual Learning", NeurIPS 2020 (``der_pp``); Z. Mai et al., "Supervised
Contrastive Replay", CVPR Workshops 2021 (``scr``).
"""
