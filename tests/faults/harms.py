"""Ways in which a file goes bad: each changes one file, or says that it cannot."""

from collections.abc import Callable
from pathlib import Path
from random import Random

Harm = Callable[[Random, Path, Path | None], bool]
"""Takes the file and one of the same name from another folder, which is None where a file that is gone or whole but
another is no harm; returns whether it did anything."""


def flip(random: Random, file: Path, other: Path | None) -> bool:
    """Change one to three random bytes, of a long file also near its ends, where headers and directories are."""
    del other
    content = bytearray(file.read_bytes())
    if not content:
        return False
    for _ in range(random.randint(1, 3)):
        low, high = random.choice(
            [(0, len(content)), (0, min(len(content), 64)), (max(len(content) - 64, 0), len(content))]
        )
        content[random.randrange(low, high)] ^= 1 << random.randrange(8)
    return _write(file, bytes(content))


def truncate(random: Random, file: Path, other: Path | None) -> bool:
    del other
    content = file.read_bytes()
    return bool(content) and _write(file, content[: random.randrange(len(content))])


def empty(random: Random, file: Path, other: Path | None) -> bool:
    """Leave no byte, or zeros alone, as some file systems do after a loss of power."""
    del other
    return _write(file, bytes(file.stat().st_size if random.random() < 0.5 else 0))


def grow(random: Random, file: Path, other: Path | None) -> bool:
    """Append zeros, random bytes or the file itself; twice the rows of a packed text are a packed text."""
    content = file.read_bytes()
    more = [bytes(512), random.randbytes(random.randint(1, 64)), *([content] if other is not None else [])]
    return _write(file, content + random.choice(more))


def swap(random: Random, file: Path, other: Path | None) -> bool:
    """Put the file of the same name from another folder in its place, or one of another name from the same folder."""
    if other is None:
        return False
    candidates = [path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file]
    if other.is_file():  # more likely than one of the others
        candidates += [other] * (1 + len(candidates))
    return bool(candidates) and _write(file, random.choice(candidates).read_bytes())


def lose(random: Random, file: Path, other: Path | None) -> bool:
    """Remove the file."""
    del random
    if other is not None:
        file.unlink()
    return other is not None


def _write(file: Path, content: bytes) -> bool:
    if content == file.read_bytes():
        return False
    file.write_bytes(content)
    return True
