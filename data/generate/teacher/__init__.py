"""Conversations by a teacher: any model behind an OpenAI-compatible URL, held to the suite's checks."""

from qat.data.generate.teacher.run import Brief, TeacherReport, generate_with_teacher, quotas
from qat.data.generate.teacher.settings import Teacher, load_teacher

__all__ = ["Brief", "Teacher", "TeacherReport", "generate_with_teacher", "load_teacher", "quotas"]
