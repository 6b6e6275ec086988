"""What a training step costs in each part of a cut model: FLOPs, bytes on the links, memory of the client.

A cut cannot be chosen by trying all of them on every device. These are counts of what a step must do, from the shape
of the model alone: the matrix products of a block, what autograd keeps of it, and the tensors that cross a cut. In
LoRA training the frozen weights need no gradients, so the backward pass of a block costs about as much as its forward
pass, and not twice as much as in full training; and it ends at the lowest adapter, so the first block is cheaper.
`benchmarks/cuts.py` compares the counts with measured steps.

Left out, since they are small beside matrix products: normalisation, activation functions, softmax, the embedding
lookup, and the optimizer, whose work grows with the adapters and not with the tokens.

Shapes, as in the formulas: B batch, T tokens of a text, D hidden width, F width of the MLP, H heads, K heads of keys
and values, E width of a head, V vocabulary, C classes, R LoRA rank, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from elsa_pl.functional.pooling import TokenPooling, places

BYTES_PER_NUMBER: Final = 4
"""Single precision."""
MESSAGES_PER_STEP: Final = 6
"""Forward to the edge and back, backward to the edge and back, and the edge's optimizer step with its answer."""
BYTES_PER_TRAINED: Final = 4 * BYTES_PER_NUMBER
"""A trained number, its gradient and two moments of Adam."""

_GATED: Final = ("gemma", "gemma2", "gemma3_text", "modernbert")
"""Families whose MLP has a gate (three matrices instead of two) and an activation that does not tell."""


class Plan(NamedTuple):
    """Blocks of front, middle and tail, as in `elsa_pl.partition.SplitPlan`; the last part with any has the head."""

    front: int
    middle: int
    tail: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a Transformer that its costs depend on; `shape_of` reads them from a config."""

    num_layers: int
    """Blocks, L."""

    hidden_size: int
    """Width of the hidden states, D."""

    intermediate_size: int
    """Width of the MLP, F."""

    num_heads: int
    """Heads of the queries, H."""

    num_kv_heads: int
    """Heads of the keys and values, K; fewer than H in grouped-query attention."""

    head_size: int
    """Width of a head, E."""

    vocab_size: int
    """Tokens that are embedded, V."""

    num_positions: int = 0
    """Positions that are embedded; 0 where positions are rotated or biased."""

    gated_mlp: bool = False
    """The MLP has three matrices (gate, up, down) instead of two."""

    num_experts: int = 1
    """MLPs of a block, which all take memory."""

    num_active_experts: int = 1
    """MLPs that compute for one token."""

    num_classes: int | None = None
    """Of the classification head, C; None for a language model's head over the vocabulary."""

    tied_head: bool = False
    """The language model's head is the embedding matrix, so that a client holds it once."""


class BlockCosts(NamedTuple):
    """One block, per token where it computes."""

    forward_flops: float
    """Forward pass of a token."""

    backward_flops: float
    """Backward pass of a token: gradients of the block's input and of its adapters."""

    first_backward_flops: float
    """The same for the model's first block, whose input needs no gradient."""

    parameter_bytes: float
    """Frozen weights."""

    trained_bytes: float
    """Adapters with gradients and optimizer state."""

    activation_bytes: float
    """What autograd keeps of a token until the backward pass."""

    first_activation_bytes: float
    """The same for the model's first block."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every step of a run does, whatever the cut."""

    shape: ModelShape
    """Of the uncut model."""

    batch_size: int
    """Texts of a step, B."""

    num_tokens: int
    """Tokens of a text after padding, T."""

    lora_rank: int = 8
    """Rank of the adapters, R."""

    adapters_per_block: int = 2
    """Layers of a block with an adapter, taken as D x D; the usual choice is query and value."""

    uplink_bytes_per_token: float | None = None
    """Of a token on the way from front to middle, and of its gradient on the way back; None: plain hidden states."""

    downlink_bytes_per_token: float | None = None
    """The same from middle to tail."""

    pooling: TokenPooling = TokenPooling()  # noqa: RUF009  # frozen
    """What becomes of the tokens at the two cuts."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_tokens", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """One step of one client under one plan."""

    front_flops: float
    """Forward and backward passes of the front."""

    middle_flops: float
    """Forward and backward passes of the middle, on the edge."""

    tail_flops: float
    """Forward and backward passes of the tail, with its head."""

    up_bytes: float
    """From client to edge: hidden states and mask on the uplink, gradients on the downlink."""

    down_bytes: float
    """From edge to client: hidden states on the downlink, gradients on the uplink."""

    parameter_bytes: float
    """Memory of the client: weights of front and tail, with gradients and optimizer state of what is trained."""

    activation_bytes: float
    """Memory of the client: what autograd keeps of front and tail, while the edge computes as well."""

    link_bytes: float
    """Memory of the client: the plain hidden states that it sends and gets, with their gradients."""

    num_messages: int = MESSAGES_PER_STEP
    """One after the other; labels, and the loss that answers them, are not counted in bytes."""

    @property
    def client_flops(self) -> float:
        """What the client's device computes."""
        return self.front_flops + self.tail_flops

    @property
    def client_bytes(self) -> float:
        """Memory that the client's device needs."""
        return self.parameter_bytes + self.activation_bytes + self.link_bytes


def shape_of(config: Any, *, causal_lm: bool = False) -> ModelShape:
    """Read the shape of a model from its transformers config.

    Approximations: a SiLU activation stands for a gated MLP, as do the families in `_GATED`, and all others count as
    plain; attention over a window counts as attention over the whole text; embeddings are taken to be as wide as the
    hidden states; experts that all tokens share are not counted.

    Args:
        config: ``model.config`` of any family that `elsa_pl.partition` can cut.
        causal_lm: the head predicts tokens; otherwise it is a classifier of ``config.num_labels`` classes.

    Example:
        >>> from transformers import BertConfig
        >>> shape_of(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)).head_size
        32
    """
    text = config.get_text_config()
    width, heads = int(text.hidden_size), int(text.num_attention_heads)
    kv_heads = int(_first(text, ["num_key_value_heads", "num_kv_heads"], heads))
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    activation = str(_first(text, ["hidden_act", "hidden_activation", "activation_function"], ""))
    experts = int(_first(text, ["num_local_experts", "num_experts"], 1))
    mlp_names = ["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"]
    if experts > 1:
        mlp_names.insert(0, "moe_intermediate_size")
    return ModelShape(
        num_layers=int(text.num_hidden_layers),
        hidden_size=width,
        intermediate_size=int(_first(text, mlp_names, 4 * width)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=int(_first(text, ["head_dim"], width // heads)),
        vocab_size=int(text.vocab_size),
        num_positions=_num_positions(text),
        gated_mlp=text.model_type in _GATED or activation in ("silu", "swish", "swiglu"),
        num_experts=experts,
        num_active_experts=int(_first(text, ["num_experts_per_tok"], 1)) if experts > 1 else 1,
        num_classes=None if causal_lm else int(config.num_labels),
        tied_head=bool(getattr(config, "tie_word_embeddings", False)),
    )


def block_costs(shape: ModelShape, num_tokens: int, lora_rank: int = 8, adapters_per_block: int = 2) -> BlockCosts:
    """Count one block of a model in LoRA training with frozen weights and eager attention.

    Forward, per token: queries and output 4 D H E, keys and values 4 D K E, scores and their products with the values
    4 T H E, MLP 4 D F (6 D F with a gate), adapters 4 R D each. Backward: each frozen matrix once (the input's
    gradient), the attention products twice (both factors are activations), the adapters twice. The first block needs
    no gradient of its input, so none passes through queries, keys and values, and scores need that of one factor.

    Kept for the backward pass, per token: input D (for the adapters), queries, keys and values 3 H E, attention H T,
    the inputs of two norms 2 D with their statistics, the input of the activation function F (3 F with a gate),
    between the factors of each adapter R. The first block does not keep the queries.

    Args:
        shape: of the model.
        num_tokens: T, of a padded text.
        lora_rank: R.
        adapters_per_block: layers with an adapter, each taken as D x D.

    Example:
        >>> minilm = ModelShape(num_layers=6, hidden_size=384, intermediate_size=1536, num_heads=12, num_kv_heads=12,
        ...                     head_size=32, vocab_size=30522)
        >>> costs = block_costs(minilm, num_tokens=64)
        >>> costs.forward_flops, costs.activation_bytes
        (3661824, 18512)
    """
    width, attended = shape.hidden_size, shape.num_heads * shape.head_size
    shared = shape.num_kv_heads * shape.head_size
    matrices = 3 if shape.gated_mlp else 2
    mlp = matrices * width * shape.intermediate_size
    entering = width * (attended + 2 * shared)
    leaving = attended * width
    attention = 4 * num_tokens * attended
    adapters = adapters_per_block * lora_rank * 2 * width
    frozen = 2 * (entering + leaving + mlp * shape.num_active_experts)
    statistics = 4
    activation_width = shape.intermediate_size * (3 if shape.gated_mlp else 1) * shape.num_active_experts
    kept = (
        3 * width
        + 3 * attended
        + shape.num_heads * num_tokens
        + activation_width
        + adapters_per_block * lora_rank
        + statistics
    )
    biases_and_norms = 9 * width + shape.intermediate_size
    weights = entering + leaving + mlp * shape.num_experts + biases_and_norms
    return BlockCosts(
        forward_flops=frozen + attention + 2 * adapters,
        backward_flops=frozen + 2 * attention + 4 * adapters,
        first_backward_flops=frozen - 2 * entering + 1.5 * attention + 3 * adapters,
        parameter_bytes=weights * BYTES_PER_NUMBER,
        trained_bytes=adapters * BYTES_PER_TRAINED,
        activation_bytes=kept * BYTES_PER_NUMBER,
        first_activation_bytes=(kept - attended) * BYTES_PER_NUMBER,
    )


def step_costs(workload: Workload, plan: Sequence[int]) -> StepCosts:
    """Count one training step under a plan.

    Args:
        workload: what every step does.
        plan: blocks of front, middle and tail; see `elsa_pl.partition.SplitPlan` for those without a tail or a middle.

    Raises:
        ValueError: the plan does not fit the model.

    Example:
        >>> minilm = ModelShape(num_layers=6, hidden_size=384, intermediate_size=1536, num_heads=12, num_kv_heads=12,
        ...                     head_size=32, vocab_size=30522, num_classes=6)
        >>> costs = step_costs(Workload(shape=minilm, batch_size=16, num_tokens=64), (1, 4, 1))
        >>> round(costs.middle_flops / costs.client_flops, 2), round(costs.up_bytes / 1e6, 2)
        (2.13, 3.15)
    """
    shape = workload.shape
    front, middle, tail = plan
    whole = (shape.num_layers, 0, 0)
    if sum(plan) != shape.num_layers or tail < 0 or (min(front, middle) < 1 and tuple(plan) != whole):
        raise ValueError(
            f"expected front and middle of at least 1 block, or all in the front, {shape.num_layers} in all; got"
            f" {tuple(plan)}: correct the plan"
        )
    num_entering = int(places(workload.num_tokens, workload.pooling.uplink)[0].max()) + 1
    num_leaving = int(places(num_entering, workload.pooling.downlink)[0].max()) + 1
    lengths = (workload.num_tokens, num_entering, num_leaving)
    block, _, last = costs = [
        block_costs(shape, length, workload.lora_rank, workload.adapters_per_block) for length in lengths
    ]
    tokens, entering, leaving = (workload.batch_size * length for length in lengths)
    in_front, in_middle, in_tail = (part.forward_flops + part.backward_flops for part in costs)
    head_flops, head_frozen, head_trained, head_kept = _head(workload)
    hidden_bytes = shape.hidden_size * BYTES_PER_NUMBER
    uplink = hidden_bytes if workload.uplink_bytes_per_token is None else workload.uplink_bytes_per_token
    downlink = hidden_bytes if workload.downlink_bytes_per_token is None else workload.downlink_bytes_per_token
    embeddings = (shape.vocab_size + shape.num_positions) * hidden_bytes
    crossing, returning = entering * (middle > 0), leaving * (tail > 0)  # tokens on the links
    own_head = middle == 0 or tail > 0
    return StepCosts(
        front_flops=tokens * (front * in_front - block.backward_flops + block.first_backward_flops),
        middle_flops=entering * middle * in_middle + head_flops * (not own_head),
        tail_flops=leaving * tail * in_tail + head_flops * own_head,
        up_bytes=crossing * (uplink + 1) + returning * downlink,  # a byte of the mask
        down_bytes=crossing * uplink + returning * downlink,
        parameter_bytes=embeddings
        + (front + tail) * (block.parameter_bytes + block.trained_bytes)
        + (head_frozen + head_trained) * own_head,
        activation_bytes=tokens * ((front - 1) * block.activation_bytes + block.first_activation_bytes)
        + leaving * tail * last.activation_bytes
        + head_kept * own_head,
        link_bytes=2.0 * (crossing + returning) * hidden_bytes,
        num_messages=MESSAGES_PER_STEP if middle else 0,
    )


def _head(workload: Workload) -> tuple[float, float, float, float]:
    """FLOPs, bytes of frozen weights, of trained ones, and what autograd keeps, of what follows the last block.

    A classifier has a layer D x D (a pooler, or the first of two layers) and C outputs for each text; a language model
    has V outputs for each token, of which autograd keeps the logits and their log-softmax.
    """
    shape = workload.shape
    if shape.num_classes is None:
        outputs = shape.hidden_size * shape.vocab_size
        tokens = workload.batch_size * workload.num_tokens
        frozen = 0 if shape.tied_head else outputs * BYTES_PER_NUMBER
        return 4.0 * outputs * tokens, frozen, 0.0, 2.0 * shape.vocab_size * tokens * BYTES_PER_NUMBER
    pooler = shape.hidden_size * (shape.hidden_size + 1)
    classifier = (shape.hidden_size + 1) * shape.num_classes
    flops = workload.batch_size * (4.0 * pooler + 6.0 * classifier)
    kept = workload.batch_size * (shape.hidden_size + shape.num_classes) * BYTES_PER_NUMBER
    return flops, pooler * BYTES_PER_NUMBER, classifier * BYTES_PER_TRAINED, kept


def _first(config: Any, names: Sequence[str], otherwise: Any) -> Any:
    """The first of these attributes that is set: families name the same number in many ways."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), otherwise)


def _num_positions(config: Any) -> int:
    """Positions with an embedding: none where a family rotates or biases instead."""
    rotates = any(
        getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rotary_dim", "alibi")
    )
    biased = getattr(config, "position_biased_input", True) is False
    if rotates or biased or config.model_type in ("bloom", "mpt", "modernbert"):
        return 0
    return int(_first(config, ["max_position_embeddings"], 0))
