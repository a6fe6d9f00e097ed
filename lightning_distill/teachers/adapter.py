"""A student's own base as its teacher: one copy of the weights for both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_distill.adapters import has_adapter
from lightning_distill.modes import inference
from lightning_distill.outputs import Outputs
from lightning_distill.sharding import inside
from lightning_distill.taps import Taps
from lightning_distill.tasks import Task
from lightning_distill.teachers.teacher import Teacher


class AdapterOffTeacher(Teacher):
    """The base network under the student's PEFT adapter, run with the adapter off, in eval mode and without gradients.

    It teaches a student what it knew before (against forgetting), or what it knows under conditions that the student
    does not see (a longer context, a better prompt). It costs a forward pass and no memory for weights. Afterwards
    modes, adapters and ``requires_grad`` are what they were.

    Args:
        student: The ``peft.PeftModel`` that is also passed as ``student``; by default the module tells it, which is how
            it is named in YAML. ``modules_to_save`` are off as well: the originals speak, which for a new
            classification head are random.

    Raises:
        TypeError: If ``student`` has no adapter; from the module, if it was not given here.
        ValueError: If something of the base is trained too, so that it would not stay what it is; or if it is given
            here and the module's is another.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> student = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> teacher = AdapterOffTeacher()  # KD(student, teacher, ...)
    """

    def __init__(self, student: nn.Module | None = None) -> None:
        super().__init__()
        self._names: tuple[str, ...] = ()
        if student is not None:
            self.attach(student)

    def attach(self, student: nn.Module) -> None:
        """Take the base of ``student``."""
        known = self.__dict__.get("_network")
        if known is not None and known is not student:
            raise ValueError("This AdapterOffTeacher is of another student; make a new one, without arguments.")
        _check_student(student)
        object.__setattr__(self, "_network", student)  # it is the student's, and registered there

    @property
    def network(self) -> Any:
        """The student that it belongs to, with its adapter.

        Raises:
            ValueError: If it belongs to none yet.
        """
        if "_network" not in self.__dict__:
            raise ValueError(
                "This AdapterOffTeacher belongs to no student yet: pass it to a module, as `KD(student, "
                "AdapterOffTeacher())`, or name the student: `AdapterOffTeacher(student)`."
            )
        return self.__dict__["_network"]

    def forward(self, batch: Any, task: Task) -> Outputs:
        """What the base says about ``batch``, without a graph."""
        network = self.network
        base = network.get_base_model()
        taps = Taps(base, self._names)  # for this pass only: the student's passes go through the same modules
        try:
            with inference(network), _adapter_off(network), taps.recording() as features:
                outputs = inside(network, lambda: task.run(base, batch))
            outputs.features.update(features)
        finally:
            taps.remove()
        return outputs

    def tap(self, names: Iterable[str]) -> None:
        """Keep the activations of these submodules of the base in ``Outputs.features``; replaces earlier taps."""
        taps = Taps(self.network.get_base_model(), names)  # refuses unknown names
        taps.remove()
        self._names = taps.names


def _check_student(student: nn.Module) -> None:
    if not has_adapter(student):
        raise TypeError(
            f"`student` must be a network under an adapter, `peft.get_peft_model(base, config)`, got "
            f"{type(student).__name__}."
        )
    network: Any = student
    biases = {getattr(config, "bias", "none") for config in network.peft_config.values()} - {"none"}
    if biases:
        raise ValueError(
            f"The adapter trains the base's biases (bias={biases.pop()!r}), so with the adapter off the base "
            "is not what it was. Use `bias='none'`, or another network as teacher."
        )
    with _adapter_off(network):
        trained = [name for name, value in network.get_base_model().named_parameters() if value.requires_grad]
    if trained:
        raise ValueError(
            f"The base is trained too ({trained[0]} and {len(trained) - 1} more require gradients), so it would "
            "not stay what it is. Freeze them: `requires_grad_(False)`, or list the layers in `modules_to_save`."
        )


@contextmanager
def _adapter_off(network: Any) -> Iterator[None]:
    if network.active_peft_config.is_prompt_learning:  # the base itself never sees the prompt
        yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    # Not `network.disable_adapter()`, which reports on every layer first: for 224 of them that takes longer than this.
    network.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        network.base_model.enable_adapter_layers()
        for parameter, requires_grad in trained:  # peft makes all of the active adapter trainable again
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
