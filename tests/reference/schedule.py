"""Learning rate and moving average as written in DAFormer's recipe (method 2.1 and 4.1)."""


def learning_rate(step: int, base: float, max_steps: int, warmup_steps: int, warmup_ratio: float) -> float:
    """mmcv's order: the decayed rate first, then the warm-up as a share of it."""
    decayed = base * (1 - step / max_steps)
    if step >= warmup_steps:
        return decayed
    return decayed * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))


def teacher_after(students: list[float], momentum: float) -> float:
    """One weight of the teacher at the start of iteration len(students): it=0 copies, later ones average.

    students[it] is the student's weight at the start of iteration it.
    """
    teacher = students[0]
    for it in range(1, len(students)):
        a = min(1 - 1 / (it + 1), momentum)
        teacher = a * teacher + (1 - a) * students[it]
    return teacher
