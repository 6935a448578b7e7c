"""Draws from a vocabulary that comes in blocks have its distribution, however it is cut."""

import math

import pytest
import torch

from tests.support.rounding import CLOSE
from tinkerbell.executors.hf.prompt_draws import Draws

ROWS, DRAWS, VOCAB = 1500, 8, 100


@pytest.mark.parametrize("temperature", [1.0, 0.3, 100.0])
@pytest.mark.parametrize("width", [7, 10, 64, 100])
def test_blocks_do_not_show_in_the_distribution(width: int, temperature: float) -> None:
    logits = 3 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    # Whole blocks of tokens that cannot be, the first one among them.
    logits[0, :20], logits[0, 70:80] = -torch.inf, -torch.inf
    draws = Draws(ROWS, range(DRAWS), temperature, 5, logits)
    # Chunks of rows, as a pass has them.
    for start, stop in ((0, 1000), (1000, ROWS)):
        for first in range(0, VOCAB, width):
            draws.take(slice(start, stop), first, logits[:, first : first + width].expand(stop - start, -1).clone())
        draws.finish(slice(start, stop), torch.logsumexp(logits, 1, keepdim=True))
    probabilities = torch.softmax(logits[0].double() / temperature, 0)
    counts = torch.bincount(draws.tokens.flatten(), minlength=VOCAB)
    assert counts[probabilities == 0].sum() == 0
    expected = ROWS * DRAWS * probabilities
    often = expected >= 5
    chi_squared = float(((counts - expected) ** 2 / expected)[often].sum())
    rest = float(expected[~often].sum())
    assert abs(float(counts[~often].sum()) - rest) < 6 * math.sqrt(rest + 1)
    degrees = int(often.sum())
    assert chi_squared < degrees + 6 * math.sqrt(2 * degrees)
    # Two draws of a row know nothing of each other.
    both = (draws.tokens[:, 0] == draws.tokens[:, 1]).double().mean()
    assert float(both) == pytest.approx(float((probabilities**2).sum()), abs=6 / math.sqrt(ROWS) / 2)
    assert torch.allclose(draws.logprobs, torch.log_softmax(logits, 1)[0][draws.tokens], atol=CLOSE, rtol=0)
