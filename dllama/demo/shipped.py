"""The adapter that ships with the demo, and what it is compared with: an ordinary LoRA."""

from pathlib import Path

from dllama.lora import LoraAdapter
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, CloudAdapter, EdgeAdapter
from dllama.privatelora.shape import AdapterShape

FOLDER = Path(__file__).parent / "adapter"
CLOUD_PATH, EDGE_PATH = FOLDER / CLOUD_FILE, FOLDER / EDGE_FILE


def as_lora(cloud: CloudAdapter, edge: EdgeAdapter) -> LoraAdapter:
    """Both halves as one LoRA of rank r_c2d that computes the same, ``(B·M)·A``; AdapterError where they are no pair.

    For the owner of both halves: the product tells M.
    """
    edge.check_pair(cloud)
    places = {place: (cloud.a(*place), cloud.b(*place) @ edge.m(*place)) for place in cloud.shape.places()}
    return LoraAdapter(places, alpha=float(cloud.shape.r_c2d), name=edge.name)


def lora_parameters(shape: AdapterShape) -> int:
    """What a LoRA of rank r_c2d would train at the places of an adapter: ``r·(inputs + outputs)`` at each."""
    return sum(shape.r_c2d * (shape.a(target)[1] + shape.b(target)[0]) for _, target in shape.places())
