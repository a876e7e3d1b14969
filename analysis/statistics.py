"""
Differences between models over seeds, with intervals, and times to an event that some runs never
reach. A difference whose interval includes 0 is not said to be one.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit
from scipy.stats import CensoredData, ecdf, logrank

from evaluate import wilson


@dataclass
class Estimate:
    """A number with its 95 % interval, over n runs or pairs of runs."""
    value: float
    low: float  # nan where there is no interval
    high: float
    n: int

    def sign(self):
        """1 or -1 where the interval is above or below 0, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def text(self, form='{:.2f}'):
        value, low, high = map(form.format, (self.value, self.low, self.high))
        spread = f'{low} to {high}' if math.isfinite(self.low) else 'interval unknown'
        return f'{value} ({spread})'


def mean(values):
    """The mean of values with the interval of Student's t. Of a single value it is unknown."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    margin = math.nan
    if n > 1:
        margin = float(stdtrit(n - 1, 0.975)) * values.std(ddof=1) / math.sqrt(n)
    return Estimate(float(values.mean()), values.mean() - margin, values.mean() + margin, n)


def share(events):
    """The share of events, true or false, with Wilson's interval."""
    value, (low, high) = wilson(sum(map(bool, events)), len(events))
    return Estimate(value, low, high, len(events))


def paired(a, b):
    """The mean of a - b over pairs, such as runs of one seed, with the interval of Student's t."""
    return mean(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))


def paired_shares(a, b):
    """The share of events a less that of b, true or false over the same pairs. The interval is
    that of Agresti and Min 2005, "Simple improved confidence intervals for comparing matched
    proportions"."""
    n = len(a)
    only_a, only_b = (sum(x and not y for x, y in pairs) for pairs in (zip(a, b), zip(b, a)))
    centre = (only_a - only_b) / (n + 2)
    spread = (only_a + only_b + 1) - (only_a - only_b) ** 2 / (n + 2)
    margin = 1.959964 * math.sqrt(spread) / (n + 2)
    return Estimate((only_a - only_b) / n, max(-1.0, centre - margin), min(1.0, centre + margin), n)


def least_squares(columns, y, within=0.0):
    """The Estimates of the slopes of y (n,) on columns (n, k), beside an intercept, with the
    interval of Student's t; the intercept; and the standard deviation of what they leave. Where y
    is known to +- within (n,), an interval has room for the worst that y may be. Raises ValueError
    where n is not above k + 1, or a column is a sum of others."""
    X = np.column_stack([np.ones(len(y)), columns])
    n, k = X.shape
    if n <= k or np.linalg.matrix_rank(X) < k:
        raise ValueError(f'{n} runs do not tell {k} numbers')
    found, *_ = np.linalg.lstsq(X, y, rcond=None)
    left = math.sqrt(((y - X @ found) ** 2).sum() / (n - k))
    margins = stdtrit(n - k, 0.975) * left * np.sqrt(np.diag(np.linalg.inv(X.T @ X)))
    margins += np.abs(np.linalg.pinv(X)) @ np.broadcast_to(within, n)
    slopes = [Estimate(b, b - margin, b + margin, n) for b, margin in zip(found, margins)]
    return slopes[1:], float(found[0]), left


@dataclass
class Survival:
    """Times to an event, after Kaplan and Meier 1958. Runs without it count up to their end."""
    times: np.ndarray  # at which the event occurred
    remaining: np.ndarray  # the share of runs without it after each of times
    median: float  # nan where fewer than half reach it
    low: float  # of the median's 95 % interval; nan where it is open
    high: float
    events: int
    n: int


def censored(times, ends):
    """scipy's data of times, None for a run that has none by its end."""
    return CensoredData(uncensored=[t for t in times if t is not None],
                        right=[end for t, end in zip(times, ends) if t is None])


def survival(times, ends):
    """The Survival of times to an event, None for a run that has not reached it by its end."""
    curve = ecdf(censored(times, ends)).sf
    with warnings.catch_warnings():  # where all or none remain there is no interval, which is fine
        warnings.simplefilter('ignore', RuntimeWarning)
        band = curve.confidence_interval(method='log-log')

    def crossing(values):
        below = np.flatnonzero(np.nan_to_num(values, nan=1.0) <= 0.5)
        return float(curve.quantiles[below[0]]) if len(below) else math.nan
    return Survival(curve.quantiles, curve.probabilities, crossing(curve.probabilities),
                    crossing(band.low.probabilities), crossing(band.high.probabilities),
                    sum(t is not None for t in times), len(times))


def logrank_p(a, a_ends, b, b_ends):
    """The probability that two groups of runs with one distribution differ as much in their times
    to an event (Mantel 1966). 1 where all times are one, nan where no run reaches the event."""
    if all(t is None for t in [*a, *b]):
        return math.nan
    if len({*a, *b}) == 1:
        return 1.0
    return float(logrank(censored(a, a_ends), censored(b, b_ends)).pvalue)
