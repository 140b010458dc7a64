"""Output files appear whole or not at all: written under a temporary name in their folder, renamed when everything is right."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import OutputError, UsageError, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


# What to give in place of what is no path, by what it is for.
INSTEAD = {
    "model": "give a file; quantcli.torch.convert takes modules",
    "data": "give a file or a folder; numpy.savez writes arrays to one",
}


def path_of(given: Any, what: str) -> Path:
    """Return a path that was given as such, or as text.

    Args:
        given: What was given.
        what: What it is for, in errors.

    Raises:
        UsageError: If it is no path.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise UsageError(f"the {what} is {kind_of(given)}, not a path", INSTEAD.get(what, "give a path"))
    return Path(given)


def path_or_none(given: Any, what: str) -> Path | None:
    """Return a path, or None where none was given; raises as `path_of` does."""
    return None if given is None else path_of(given, what)


@dataclass
class Staged:
    """Files that wait under temporary names."""

    waiting: list[tuple[Path, Path]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    def write(self, path: Path, data: bytes) -> Path:
        """Write ``data`` for ``path`` and return the temporary file, which has the same suffix and folder.

        Raises:
            OutputError: If the folder cannot be written to.
        """
        temporary: str | None = None
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
            self.waiting.append((Path(temporary), path))
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            Path(temporary).chmod(0o666 & ~current_umask())
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror or error})", "choose another -o") from error
        return Path(temporary)

    def together(self, path: Path, files: Mapping[str, Iterable[bytes]]) -> Path:
        """Write files that name each other, under their names in a folder of their own, for the folder of ``path``.

        Args:
            path: One of them, as it will be.
            files: What each is made of, by name.

        Returns:
            That one, as it is now.

        Raises:
            OutputError: If the folder cannot be written to.
        """
        try:
            folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}."))
            self.folders.append(folder)
            for name, parts in files.items():
                with (folder / name).open("wb") as stream:
                    for part in parts:
                        stream.write(part)
                self.waiting.append((folder / name, path.with_name(name)))
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror or error})", "choose another -o") from error
        return folder / path.name

    def publish(self) -> None:
        """Give every file its name; where one cannot take it, all that were there before come back.

        Raises:
            OutputError: If a file cannot take its name.
        """
        backups: dict[Path, Path] = {}
        placed: list[Path] = []
        name = self.waiting[0][1] if self.waiting else Path()
        try:
            for temporary, name in self.waiting:
                if name.exists():
                    backups[name] = temporary.with_name(temporary.name + ".older")
                    os.link(name, backups[name])  # a second name costs no space
                placed.append(name)
                temporary.replace(name)
        except BaseException as error:
            for path in placed:
                if path in backups:
                    os.replace(backups[path], path)  # noqa: PTH105
                else:
                    path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                reason = error.strerror or error
                raise OutputError(f"{name} cannot be written ({reason})", "choose another -o") from error
            raise
        finally:
            for backup in backups.values():
                backup.unlink(missing_ok=True)


@contextlib.contextmanager
def staged() -> Iterator[Staged]:
    """Give a place to write to; on leaving without an error the files take their names, else they vanish.

    Raises:
        OutputError: If a file cannot take its name.
    """
    files = Staged()
    try:
        yield files
        files.publish()
    finally:
        for temporary, _ in files.waiting:
            temporary.unlink(missing_ok=True)
        for folder in files.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_output(output: Path, *inputs: Path | None) -> None:
    """Check, before any work is done, that an output may take its name.

    Raises:
        UsageError: If it is one of the inputs, a file of an input folder, or a folder.
        OutputError: If its folder is missing or cannot be written to.
    """
    for source in inputs:
        if source is not None and output.resolve() == Path(source).resolve():
            raise UsageError(
                f"the output {output} is also an input", "choose another -o: an input is never overwritten"
            )
        if (
            source is not None
            and output.exists()
            and Path(source).is_dir()
            and output.resolve().is_relative_to(Path(source).resolve())
        ):
            raise UsageError(
                f"the output {output} is a file of the data {source}",
                "choose another -o: an input is never overwritten",
            )
    if output.is_dir():
        raise UsageError(f"the output {output} is a folder", "name a file")
    if output.exists() and not output.is_file():
        raise UsageError(f"the output {output} is a device or a pipe, which a file would replace", "name a file")
    if not output.parent.is_dir():
        raise OutputError(f"{output} cannot be written (there is no folder {output.parent})", "make the folder first")
    if not os.access(output.parent, os.W_OK):
        raise OutputError(f"{output} cannot be written (no permission in {output.parent})", "choose another -o")


def current_umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
