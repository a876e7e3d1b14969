"""The Figure of every picture, in one style: figures.mplstyle beside this file."""

from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure as Figure  # not pyplot, which would look for a screen

style.use(Path(__file__).with_name('figures.mplstyle'))
