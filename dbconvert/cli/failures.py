"""What the command line says when a command fails."""

from __future__ import annotations

from pathlib import Path

from dbconvert.errors import DBConvertError


def complain(error: DBConvertError) -> None:
    from dbconvert.cli import render

    render.show_error(error)


def unexpected(error: Exception) -> DBConvertError:
    """A failure that nobody foresaw: still one message."""
    place = f"{Path(error.__traceback__.tb_frame.f_code.co_filename).name}" if error.__traceback__ else ""
    return DBConvertError(
        f"unexpected {type(error).__name__}: {error}",
        where=place,
        hint="run again with --debug and report the traceback",
    )
