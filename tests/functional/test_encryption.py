"""Sealed tensors and their gradients: what comes out is what went in, or an error."""

import pytest
import torch

from elsa_pl.functional.encryption import OVERHEAD, derive_key, seal, unseal

KEY, OTHER = derive_key("a secret", "test"), derive_key("a secret", "another test")


@pytest.mark.parametrize("shape", [(1,), (3, 5, 8), (2, 0, 4), ()])
@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "readable"])
def test_there_and_back(shape: tuple[int, ...], key: bytes | None) -> None:
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    message = seal(states, key)
    assert message.shape == (1 + len(shape) + states.numel() + OVERHEAD,)
    got = unseal(message, key)
    assert torch.equal(got, states)
    weights = torch.randn(shape)
    (gradient,) = torch.autograd.grad((got * weights).sum(), states)
    assert torch.equal(gradient, weights)


def test_bits_that_are_no_numbers_arrive() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (100,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    got = unseal(seal(bits.view(torch.float32), KEY), KEY)
    assert torch.equal(got.view(torch.int32), bits)


def test_the_gradient_crosses_sealed() -> None:
    states = torch.ones(4, 8, requires_grad=True)
    message = seal(states, KEY)
    crossed: list[torch.Tensor] = []
    message.register_hook(crossed.append)
    unseal(message, KEY).sum().backward()
    (sealed,) = crossed
    assert sealed.shape == message.shape
    assert not (sealed == 1).any()
    with pytest.raises(ValueError, match="of this pass"):
        unseal(sealed, KEY)


def test_the_same_states_never_look_the_same() -> None:
    states = torch.zeros(64)
    first, second = (seal(states, KEY).view(torch.int32)[2:] for _ in range(2))
    assert (first == second).float().mean() < 0.1


def test_without_the_key_nothing_is_read() -> None:
    message = seal(torch.ones(5, 6), KEY)
    assert not torch.equal(unseal(message, None), torch.ones(5, 6))
    with pytest.raises(ValueError, match="the same secret"):
        unseal(message, OTHER)


@pytest.mark.parametrize("place", [1, 4, 20, -1])
def test_a_changed_message_is_refused(place: int) -> None:
    message = seal(torch.ones(5, 6), KEY)
    bits = message.view(torch.int32).clone()
    bits[place] ^= 1
    with pytest.raises(ValueError, match="changed on its way"):
        unseal(bits.view(torch.float32), KEY)


def test_a_message_opens_in_its_own_pass_only() -> None:
    message = seal(torch.ones(5, 6), KEY, b"pass 1")
    assert torch.equal(unseal(message, KEY, b"pass 1"), torch.ones(5, 6))
    for context in (b"pass 2", b""):
        with pytest.raises(ValueError, match="of this pass"):
            unseal(message, KEY, context)


def test_a_message_is_no_gradient_of_itself() -> None:
    states = torch.ones(2, 3, requires_grad=True)
    message = seal(states, KEY)
    with pytest.raises(ValueError, match="of this pass"):
        message.backward(message.detach())
    received = message.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(unseal(received, KEY).sum(), received)
    with pytest.raises(ValueError, match="of this pass"):
        unseal(gradient, KEY)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_what_is_too_short_is_no_message(size: int) -> None:
    with pytest.raises(ValueError, match="changed on its way"):
        unseal(torch.zeros(size), KEY)


def test_what_cannot_be_sealed() -> None:
    with pytest.raises(ValueError, match="float32"):
        seal(torch.ones(2, dtype=torch.float64), KEY)
