"""Hashed updates against the whole ones."""

import pytest
import torch

from elsa_pl.functional.updates import hashed_update


def test_against_a_loop() -> None:
    before, after = {"w": torch.zeros(2, 3)}, {"w": torch.arange(6.0).view(2, 3)}
    whole = hashed_update(before, after, width=5)
    ones = torch.stack(
        [
            hashed_update(before, {"w": after["w"] * (torch.arange(6).view(2, 3) == index)}, width=5)
            for index in range(6)
        ]
    )
    assert (ones.abs().sum(1) == torch.arange(6.0)).all(), "each element goes to one bucket, with a sign"
    torch.testing.assert_close(whole, ones.sum(0))


@pytest.mark.parametrize("cosine", [-1.0, 0.0, 0.5, 1.0])
def test_cosines_are_kept(cosine: float) -> None:
    draws = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, 50_000, generator=draws)
    second = cosine * first + (1 - cosine**2) ** 0.5 * other
    zero = {"a": torch.zeros(20_000), "b": torch.zeros(30_000)}

    def parts(vector: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"b": vector[20_000:], "a": vector[:20_000]}

    hashed = [hashed_update(zero, parts(vector)) for vector in (first, second)]
    assert torch.cosine_similarity(hashed[0], hashed[1], dim=0).item() == pytest.approx(cosine, abs=0.07)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="'b'"):
        hashed_update({"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match="width"):
        hashed_update({}, {}, width=0)
