"""A teacher that follows the latest weights of another, running training."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed, nn

from lightning_distill.outputs import Outputs
from lightning_distill.tasks import Task
from lightning_distill.teachers.build import load_network
from lightning_distill.teachers.frozen import FrozenTeacher

LATEST = "latest.json"


@dataclass(frozen=True)
class Version:
    """A state of the followed weights.

    Attributes:
        file: Where they are.
        stamp: Differs between versions.
        step: Optimizer steps of the writer, ``-1`` if nobody says.
        finished: Whether the writer will write no more.
    """

    file: str
    stamp: str
    step: int = -1
    finished: bool = False


class FollowedTeacher(FrozenTeacher):
    """A network whose weights are read again whenever another training has published newer ones.

    The writer may be :class:`~lightning_distill.callbacks.PublishStudent` (give its folder), or anything else that
    replaces a file with weights as a whole (a Lightning checkpoint of one of our modules, a ``.safetensors`` file). A
    file that cannot be read, because it is being written, is tried again at the next look.

    It looks at the first batch, where it waits for a first version, and then at every ``check_every``-th training one.
    All processes of a DDP run take the same version, the one that the first process finds; they must see the same
    folder. A resumed run starts with what is newest then: what it learnt from whom is not repeatable.

    Args:
        path: The folder, or the file.
        network: Built as when the weights were saved; frozen in place.
        check_every: Training batches between two looks, at least 1.
        max_age: Training batches that may be taught by one version; then the student waits for a newer one, until the
            writer says that it has finished (``PublishStudent`` does). A multiple of ``check_every`` is meant. Default:
            it never waits.
        timeout: Longest wait, seconds.

    Raises:
        ValueError: If an argument is outside its range.
        TimeoutError: In training, if there is no (newer) version in time.

    Example:
        >>> from lightning_distill.networks import ResNet1d
        >>> teacher = FollowedTeacher("runs/teacher/published", ResNet1d(), check_every=20)  # KD(student, teacher)
    """

    def __init__(
        self,
        path: str,
        network: nn.Module,
        check_every: int = 10,
        max_age: int | None = None,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(network)
        if not check_every >= 1:
            raise ValueError(f"`check_every` must be at least 1, got {check_every}.")
        if max_age is not None and not max_age >= 1:
            raise ValueError(f"`max_age` must be at least 1, got {max_age}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` must be positive, got {timeout} seconds.")
        self.path = Path(path)
        self.check_every = check_every
        self.max_age = max_age
        self.timeout = timeout
        self.version: Version | None = None
        self._batches = 0
        self._age = 0

    def forward(self, batch: Any, task: Task) -> Outputs | None:  # type: ignore[override]
        """What the latest version says about ``batch``; ``None`` outside training if there is none so far."""
        if self.version is None:
            self._follow(wait=self.training)
            if self.version is None:
                return None
        elif self.training:
            too_old = self.max_age is not None and self._age >= self.max_age and not self.version.finished
            if too_old or self._batches % self.check_every == 0:
                self._follow(wait=too_old)
        if self.training:
            self._batches += 1
            self._age += 1
        return super().forward(batch, task)

    def rehearse(self, batch: Any, task: Task) -> Outputs:
        """What the network says with the weights that it has."""
        return super().forward(batch, task)

    def _follow(self, *, wait: bool) -> None:
        """Take the newest version; with ``wait``, wait until there is one that is new."""
        deadline = time.monotonic() + self.timeout
        while True:
            # The first process decides for all: what is newest, and whether the time is over.
            found, late = _from_first((newest(self.path), time.monotonic() > deadline))
            problem = self._take(found)
            if problem is None or not wait:
                return
            if late:
                raise TimeoutError(self._too_late(problem))
            time.sleep(min(0.2, self.timeout / 10))

    def _take(self, found: Version | None) -> str | None:
        """Take ``found`` if it is another version; otherwise say why not."""
        if found is None:
            return "there is nothing to read"
        if self.version is not None and found.stamp == self.version.stamp:
            self.version = found  # it may have become the last one
            return None if found.finished else "the newest version stayed the same"
        try:
            load_network(self.network, found.file)
            problem = None
        except ValueError:  # a whole file, but of another network: waiting would not help
            raise
        except Exception as error:  # half a file raises whatever its format's reader does
            problem = f"{found.file} cannot be read ({error})"
        problem = _any(problem)
        if problem is None:
            self.version, self._age = found, 0
        return problem

    def _too_late(self, problem: str) -> str:
        what = "no weights" if self.version is None else f"no newer weights than those of step {self.version.step}"
        return (
            f"FollowedTeacher found {what} in {str(self.path)!r} after {self.timeout:g} seconds: {problem}. Start the "
            "training that publishes them, fix `path`, or raise `timeout`."
        )


def newest(path: Path) -> Version | None:
    """The newest version at ``path``, a file or a folder; ``None`` if there is none."""
    try:
        if path.is_file():
            return Version(str(path), _stamp(path))
        if (latest := path / LATEST).is_file():
            said = json.loads(latest.read_text())
            file = path / said["file"]
            return Version(str(file), _stamp(file), int(said["step"]), bool(said["finished"]))
        files = published(path)
        return Version(str(files[-1]), _stamp(files[-1])) if files else None
    except (OSError, ValueError, KeyError):  # replaced or removed while we looked
        return None


def published(folder: Path) -> list[Path]:
    """Files with weights in ``folder``, oldest first."""
    files = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.name}-{stat.st_mtime_ns}-{stat.st_size}-{stat.st_ino}"


def _from_first(value: Any) -> Any:
    """``value`` of the first process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def _any(problem: str | None) -> str | None:
    """A problem, if any process has one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return problem
    problems: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)
