"""
The way into an analysis that is started as a file: python analysis/report.py.

Python then looks for modules in analysis/ first, so it finds this file in place of the project's
configurator.py. This file puts the project's folder in the place of analysis/, and gives its own
place to the module that was meant. `python -m analysis.report` never comes here.
"""

import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
del sys.modules[__name__]
importlib.import_module(__name__)
