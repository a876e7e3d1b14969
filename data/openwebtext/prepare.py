"""
Prepare OpenWebText in GPT-2's byte pairs: writes train.bin and val.bin (uint16), as nanoGPT has
them, and meta.json, what their ids mean, beside this program.

    python data/openwebtext/prepare.py

It is data/prepare.py with other defaults, and takes its keys. OpenWebText gives 9,035,582,198 and
4,434,897 tokens (18 GB). It needs the network and, until it is done, about 105 GB of disk. An
interrupted run that is started again goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run

from data import prepare


def main():
    prepare.main(dataset='openwebtext', tokenizer='gpt2')


if __name__ == '__main__':
    run(main)
