"""
Prepare text for the trainer: local files, or a dataset of the Hugging Face Hub. Writes train.bin,
val.bin and what their ids mean into --out_dir.

    python data/prepare.py --source=book.txt --out_dir=data/book --tokenizer=chars
    python data/prepare.py --source=corpus --out_dir=data/corpus --tokenizer=bpe --vocab_size=4096
    python data/prepare.py --source='a.csv,b/*.jsonl.gz' --out_dir=data/ab --tokenizer=gpt2
    python data/prepare.py --dataset=HuggingFaceFW/fineweb-edu --subset=sample-10BT \\
        --out_dir=data/fineweb --tokenizer=gpt2

A .txt or .md file is a document, and so is each line of .jsonl, each element of a .json array and
each row of .csv and .parquet. All may end in .gz. Then python train.py --dataset=book trains on
data/book.

Bins that are there already, nanoGPT's for instance, are not written again. Without --source and
--dataset the program notes what their ids mean:

    python data/prepare.py --out_dir=data/mine --tokenizer=gpt2

An interrupted run that is started again goes on where it was. Until it is done local files need
disk room of two to five times the size of their text, and a dataset of the Hub of 2.6 times or
more.
"""

import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from configurator import UserError, check_least, configure, run

from data import pipeline
from data.documents import check_counts, estimate_text_bytes, find_files
from data.hub import Rows, check_rows, load_from_hub
from data.record_bins import record_bins
from data.vocabulary import known_spec, write_tokenizer
from runtime.dataset import SPLITS
from runtime.lock import locked
from runtime.record import read_record
from runtime.workers import default_workers, worker_pool

LARGE = 1e9  # bytes of text, from which on nanoGPT's share goes to val
SHORT = 1025  # tokens; fewer do not hold a window of the usual block_size
BINS_PER_TEXT = {'gpt2': 0.5, 'chars': 2}  # bytes: a token takes 2 and GPT-2's stands for 4 to 5
CUTS = {'gpt2': 'at spaces', 'bpe': 'at spaces', 'chars': 'anywhere'}


@dataclass
class PrepareConfig:
    source: str = ''  # local files, folders and globs, separated by commas: .txt, .md, .jsonl,
                      # .ndjson, .json, .csv, .parquet, each also with .gz
    dataset: str = ''  # in place of them a dataset's name on the Hub, for instance
                       # HuggingFaceFW/fineweb-edu
    subset: str = ''  # configuration of the dataset, for instance sample-10BT
    split: str = 'train'  # split of the dataset, which is divided into train.bin and val.bin
    text_key: str = 'text'  # key or column that holds the text
    out_dir: str = ''  # folder for train.bin and val.bin; it must be given, except for OpenWebText,
                       # which goes to data/openwebtext
    tokenizer: str = ''  # chars, gpt2, bpe (byte pairs learned from the text), the path of a
                         # tokenizer.json of byte-level BPE, or a folder of bins, whose vocabulary
                         # is taken; for bins that are there also unknown
    vocab_size: int = 0  # ids of bpe, 257 or more, or of unknown
    val_share: float = 0.0  # share of the text for val.bin; 0: 0.1, and from 1 GB of text on
                            # nanoGPT's 0.0005
    skip_bad: bool = False  # leave records without text out, even if they are more than 1 in 100
    workers: int = 0  # processes; 0: one for each core, at most 12. The bins do not depend on it
    part_documents: int = 10_000  # documents of a part at most; a worker that is interrupted has to
                                  # do these again

    def __post_init__(self):
        check_least(self, workers=0, part_documents=1, vocab_size=0)
        if self.workers > 1000:
            raise ValueError(f'workers={self.workers} must be at most 1000')
        if self.vocab_size > 2 ** 24:
            raise ValueError(f'vocab_size={self.vocab_size} must be at most {2 ** 24}')
        # data/openwebtext/prepare.py has that dataset where none is given
        of_the_hub = self.dataset not in ('', 'openwebtext')
        if self.source and (self.subset or of_the_hub or self.split != 'train'):
            raise ValueError(f'source={self.source} takes the place of dataset, subset and split: '
                             'leave those out')
        if not (self.source or self.dataset or self.out_dir):
            raise ValueError('source is needed: --source=book.txt --out_dir=data/book '
                             '--tokenizer=chars, for instance')
        if not self.out_dir and (self.source or of_the_hub):
            raise ValueError('out_dir is needed: give a folder, for instance --out_dir=data/mine')
        self.out_dir = self.out_dir or str(HERE / 'openwebtext')
        if not 0 <= self.val_share < 1:
            raise ValueError(f'val_share={self.val_share} must be above 0 and below 1, or 0 for '
                             'the usual share')
        self.check_tokenizer()

    def check_tokenizer(self):
        name, is_record = self.tokenizer, not (self.source or self.dataset)
        if not name:
            raise ValueError('tokenizer is needed: chars (each character is a token), gpt2, bpe '
                             '(byte pairs learned from the text, with --vocab_size=4096 for '
                             'instance), or the path of a tokenizer.json')
        if name == 'bpe' and self.vocab_size < 257 and not is_record:
            raise ValueError(f'vocab_size={self.vocab_size} must be at least 257 for '
                             'tokenizer=bpe: give --vocab_size=4096, for instance')
        if name == 'unknown' and (self.vocab_size < 1 or not is_record):
            raise ValueError('tokenizer=unknown is for bins that are there already, without '
                             '--source and --dataset but with --vocab_size')
        if name not in ('bpe', 'unknown') and self.vocab_size:
            raise ValueError(f'vocab_size={self.vocab_size} is for tokenizer=bpe: leave it out, '
                             'since the tokenizer has a size of its own')


def main(**defaults):
    config, _ = configure(sys.argv[1:], PrepareConfig, **defaults)
    try:
        with locked(config.out_dir):
            if config.source or config.dataset:
                prepare(config)
            else:
                record_bins(config)
    except BrokenProcessPool:
        raise UserError('a worker was ended from outside, perhaps for want of memory: start again, '
                        'perhaps with fewer --workers, which goes on from here') from None
    except OSError as e:
        reason = e.strerror or e
        raise UserError(f'out_dir={config.out_dir} cannot be written ({reason}): mend that and '
                        'start again, which goes on from here') from None


def prepare(config):
    """Write train.bin and val.bin into config.out_dir. Raises UserError, and OSError where that
    folder cannot be written."""
    out_dir = Path(config.out_dir)
    work = out_dir / 'parts'
    workers = config.workers or default_workers()
    if not work.exists():
        pipeline.check_unused(out_dir)
    spec, bins_per_text = known_spec(config.tokenizer), BINS_PER_TEXT.get(config.tokenizer, 1)
    if config.source:
        identity = files = find_files(config.source, out_dir)
        pipeline.check_space(out_dir, estimate_text_bytes(files) * (1 + 2 * bins_per_text))
    else:
        dataset = load_from_hub(config, workers, bins_per_text)
        identity = [config.dataset, dataset._fingerprint]
        pipeline.check_space(out_dir, dataset.data.nbytes * 2 * bins_per_text)
    identity = [config.text_key, config.part_documents, config.tokenizer, spec, config.vocab_size,
                config.val_share, *identity]
    if not pipeline.open_work(work, identity):
        with worker_pool(workers) as pool:
            if config.source:
                cut = CUTS.get(config.tokenizer, 'nowhere')
                documents, counts = pipeline.copy_texts(pool, files, work, config.text_key, cut)
                check_counts(counts, config.skip_bad)
            else:
                documents = Rows(dataset)
                check_rows(dataset, config.dataset, config.skip_bad)
            parts, tokenizer = make_parts(pool, config, documents, work)
        pipeline.join_parts(parts, out_dir, tokenizer)
    pipeline.close_work(work)
    tell_sizes(out_dir)


def make_parts(pool, config, documents, work):
    """Split and tokenize the documents. Returns the files of the parts of each split, and the
    tokenizer."""
    n_bytes = documents.count_bytes()
    print(f'documents  {len(documents):,}, {n_bytes:,} bytes')
    order = pipeline.shuffle(documents, work)
    val_share = config.val_share or (0.1 if n_bytes < LARGE else 0.0005)
    cut = pipeline.find_cut(documents, order, val_share)
    write_tokenizer(work / 'tokenizer', config, pool, documents, order, cut)
    tokenizer = pipeline.tokenizer_at(work / 'tokenizer')
    print(f'tokenizer  {tokenizer.name}')
    return pipeline.tokenize(pool, documents, order, cut, work, config.part_documents), tokenizer


def tell_sizes(out_dir):
    """Print how many tokens the bins have."""
    _, dtype = read_record(out_dir)
    n_tokens = {split: (out_dir / f'{split}.bin').stat().st_size // dtype.itemsize
                for split in SPLITS}
    print('tokens     ' + ', '.join(f'{n:,} in {split}.bin' for split, n in n_tokens.items()))
    for split, n in n_tokens.items():
        if n < SHORT:
            print(f'note: {split}.bin has {n:,} tokens: a block_size must be below that')


if __name__ == '__main__':
    run(main)
