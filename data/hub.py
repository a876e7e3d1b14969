"""Datasets of the Hugging Face Hub. Their texts are taken as they are, as nanoGPT takes them."""

import glob
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError

import numpy as np

from data.documents import Counts, check_counts, to_utf8
from data.pipeline import check_space

OPENWEBTEXT_DOCUMENTS, OPENWEBTEXT_BYTES = 8_013_769, 40e9
CACHE_PER_TEXT = 1.6  # bytes: the download and the Arrow files that datasets makes of it


def load_from_hub(config, workers, bins_per_text):
    """The column of texts as a datasets.Dataset, whose files are memory-mapped. Raises
    UserError."""
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # no line for each of its retries
    name, key = config.dataset, config.text_key
    try:
        dataset = load_revision(config, workers, bins_per_text, None)
    except UserError:
        raise
    except Exception as e:  # datasets and what it downloads with raise dozens of kinds
        raise UserError(f'dataset={name} cannot be had from the Hugging Face Hub '
                        f'({type(e).__name__}: {str(e)[:300]}): check the name, --subset, --split, '
                        'the network and the room in its cache, or give --source') from None
    if key not in dataset.column_names:
        raise UserError(f'dataset={name} has no column {key!r} but '
                        f'{", ".join(dataset.column_names)}: set --text_key')
    kind = getattr(dataset.features[key], 'dtype', 'another type')
    if kind not in ('string', 'large_string'):
        raise UserError(f'dataset={name} has no text but {kind} in column {key!r}: set --text_key')
    if name == 'openwebtext' and len(dataset) != OPENWEBTEXT_DOCUMENTS:
        print(f'note: this OpenWebText has {len(dataset):,} documents and not '
              f'{OPENWEBTEXT_DOCUMENTS:,}, as nanoGPT had')
    return dataset.select_columns([key])


def load_revision(config, workers, bins_per_text, revision):
    """Download a dataset at a revision. datasets no longer runs the script that OpenWebText is on
    the Hub, so where that is what it finds it takes the Hub's conversion to Parquet."""
    import datasets
    name, subset = config.dataset, config.subset or None
    try:
        builder = datasets.load_dataset_builder(name, subset, revision=revision)
        known = OPENWEBTEXT_BYTES if name == 'openwebtext' else 0
        text_bytes = builder.info.dataset_size or known
        # what a download that has begun still needs is unknown
        begun = glob.glob(f'{builder.cache_dir}*')
        # datasets itself checks the room of a cache that is on another disk
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        is_here = cache.exists() and cache.stat().st_dev == os.stat(config.out_dir).st_dev
        needed = 2 * bins_per_text + (CACHE_PER_TEXT if is_here and not begun else 0)
        check_space(Path(config.out_dir), text_bytes * needed)
        return datasets.load_dataset(name, subset, split=config.split, revision=revision,
                                     num_proc=workers)
    except RuntimeError as e:
        if revision or 'script' not in str(e):
            raise
    return load_revision(config, workers, bins_per_text, 'refs/convert/parquet')


def check_rows(dataset, name, skip_bad):
    """Count the rows without text. Raises UserError as check_counts does."""
    import pyarrow.compute
    column = dataset.data.column(0)
    first = pyarrow.compute.index(pyarrow.compute.is_null(column), True).as_py()
    check_counts(Counts(len(dataset), column.null_count, f'row {first + 1} of {name}'), skip_bad)


@dataclass
class Rows:
    """Documents in a dataset of the Hub, which has one column."""
    dataset: object  # a datasets.Dataset, opened anew for each part: mapped pages do not add up

    def __len__(self):
        return len(self.dataset)

    def sizes(self, numbers):
        """The bytes of the documents with the numbers."""
        import pyarrow.compute
        sizes = pyarrow.compute.binary_length(self.dataset.data.column(0)).fill_null(0).to_numpy()
        return sizes.astype(np.int64)[numbers]

    def count_bytes(self):
        return int(self.sizes(slice(None)).sum())

    def read_bytes(self, number, start, end):
        return to_utf8(self.dataset[int(number)][self.dataset.column_names[0]])[start:end]

    def read(self, spans):
        """Yield each (number, start, end) of spans as a list of its text, which is empty where the
        row has none. start and end are bytes, end None is the document's end."""
        for i in range(0, len(spans), 100):
            some = spans[i:i + 100]
            rows = self.dataset[[int(number) for number, _, _ in some]]
            for (_, start, end), text in zip(some, rows[self.dataset.column_names[0]]):
                yield [] if text is None else [to_utf8(text)[start:end].decode()]
