"""Which layer of the teacher teaches which layer of the student."""

from lightning_distill.layer_maps.choices import (
    all_map,
    cka_map,
    importance_map,
    last_map,
    monotone_map,
    nearest_map,
    uniform_map,
)
from lightning_distill.layer_maps.layer_map import LayerMap, explicit_map
from lightning_distill.layer_maps.measure import KeepBy, LayerMeasurements, choose_layers, measure_layers
from lightning_distill.layer_maps.pairs import MapName, named_pairs
from lightning_distill.layer_maps.scores import (
    cka_similarity,
    fitted_cost,
    gradient_importance,
    knowledge_density,
    taylor_importance,
)
from lightning_distill.layer_maps.shorten import Shortening, architecture_plan, build_student, find_stack

__all__ = [
    "KeepBy",
    "LayerMap",
    "LayerMeasurements",
    "MapName",
    "Shortening",
    "all_map",
    "architecture_plan",
    "build_student",
    "choose_layers",
    "cka_map",
    "cka_similarity",
    "explicit_map",
    "find_stack",
    "fitted_cost",
    "gradient_importance",
    "importance_map",
    "knowledge_density",
    "last_map",
    "measure_layers",
    "monotone_map",
    "named_pairs",
    "nearest_map",
    "taylor_importance",
    "uniform_map",
]
