"""How models are named on a command line."""

import sys
from pathlib import Path

from .run_folder import BASELINE, SELECTED


def titled(given: str) -> tuple[str, str]:
    """Title and folder or id of "TITLE=MODEL"; without a title a model is called by its path, which may contain "="."""
    title, equals, name = given.partition("=")
    if not equals or Path(given).exists():
        return given, given
    return title, name


def model_of(name: str) -> str:
    """Folder or Hub id of one model. Of the folder of a run, or of one of its methods, it is the student that was
    adapted, which is said; not one of a checkpoint."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return name
    if not (students := students_of(folder)):
        return name
    chosen = min(students, key=lambda student: (student.parent.name == BASELINE, student))
    selected = chosen.with_name(SELECTED)
    other = f" The weights that were selected are {selected}." if selected.is_dir() else ""
    print(f"{name} is the folder of a run: its student {chosen} is taken.{other}", file=sys.stderr)
    return str(chosen)


def students_of(folder: Path) -> list[Path]:
    """Folders of the students in the folder of a run, or the one in that of a method: of a method that has not ended
    it is the student of its newest checkpoint."""
    if (folder / "student" / "config.json").is_file():
        return [folder / "student"]
    found = [path.parent for path in folder.glob("[!.]*/student/config.json")]  # hidden ones are being written
    whole = [student for student in found if not student.parent.name.startswith("checkpoint-")]
    # Of an encoder that is frozen or adapted a checkpoint has only what is trained.
    saved = [student for student in found if student not in whole and any(student.glob("model*.safetensors*"))]
    return sorted(whole) or sorted(saved, key=lambda one: (len(one.parent.name), one.parent.name))[-1:]


def called(name: str) -> str:
    """What people call the model in a folder or repository: the run and its method, or the name of the repository."""
    parts = Path(name).absolute().parts if Path(name).exists() else tuple(name.split("/"))
    return f"{parts[-3]}, {parts[-2]}" if parts[-1] == "student" and len(parts) > 3 else parts[-1]
