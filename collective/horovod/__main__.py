"""Run a script, or with `-m` a module, in which `import horovod` means this package."""

import runpy
import sys
from pathlib import Path

from . import install


def main() -> None:
    """Run it as `python script.py` or `python -m module` would."""
    arguments = sys.argv[1:]
    is_module = arguments[:1] == ["-m"]
    if len(arguments) < 1 + is_module or arguments[0] in ("-h", "--help"):
        raise SystemExit(
            "usage: python -m collective.horovod script.py [arguments]\n"
            "       python -m collective.horovod -m module [arguments]"
        )
    install()
    sys.argv[:] = arguments[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


main()
