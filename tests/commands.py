"""Running the installed command as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("dbconvert"))


def dbconvert(*arguments, code=0, env=None, cwd=None):
    """Runs dbconvert and returns the finished process; fails the test on another exit code."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
        cwd=cwd,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback (most recent call last)" not in done.stderr or code
    return done


def as_json(*arguments, code=0, env=None, cwd=None):
    return json.loads(dbconvert(*arguments, code=code, env=env, cwd=cwd).stdout)


def python(*arguments, code=0, env=None):
    """Runs a Python script; fails the test on another exit code."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
