"""Found as `horovod` where sys.path was inherited, but not the finder: gives its place to what the finder finds."""

import importlib
import sys

from collective.horovod import install

del sys.modules["horovod"]  # this module
install()
importlib.import_module("horovod")
