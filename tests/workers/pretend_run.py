"""A script of the suite on a GPU that is not there; at the end it says what it counted.

Usage: pretend_run.py FLAGS, with the script's path in SCRIPT
"""

import atexit
import os
import runpy
import sys

from tests import pretend_gpu

pretend_gpu.install()
pretend_gpu.do_not_compile()
# One write, since the lines of two processes mix otherwise.
atexit.register(lambda: sys.stderr.write(f"counted {dict(pretend_gpu.COUNTS)}\n"))
sys.argv[0] = os.environ["SCRIPT"]
runpy.run_path(os.environ["SCRIPT"], run_name="__main__")
