"""Run a script where timm can be imported: python run_with_timm.py script.py"""

import runpy
import sys

import torchvision_shim  # noqa: F401

runpy.run_path(sys.argv[1])
