"""Found as `horovod` by processes that inherit sys.path but not the finder: gives way to what the finder finds."""

import importlib
import sys

from collective.horovod import install

del sys.modules["horovod"]  # this module
install()
importlib.import_module("horovod")
