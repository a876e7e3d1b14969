"""Corpora. It is a package, so that no installed package named data is found first."""
