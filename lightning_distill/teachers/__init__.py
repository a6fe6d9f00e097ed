"""Whatever a student can learn from."""

from lightning_distill.teachers.build import TeacherLike, build_teacher, load_network
from lightning_distill.teachers.frozen import FrozenTeacher, FunctionTeacher
from lightning_distill.teachers.teacher import Teacher

__all__ = ["FrozenTeacher", "FunctionTeacher", "Teacher", "TeacherLike", "build_teacher", "load_network"]
