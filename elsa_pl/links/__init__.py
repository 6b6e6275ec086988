"""What happens to hidden states and their gradients between a client and its edge."""

from elsa_pl.links.codec import PREFIX, Codec, LinkEnd, codecs_in
from elsa_pl.links.outputs import on_states
from elsa_pl.links.stages import LINKS, NOBODY, Ends, Link, Seen, Stage, crossing
from elsa_pl.links.traffic import Counts, Traffic, wire_bytes

__all__ = [
    "LINKS",
    "NOBODY",
    "PREFIX",
    "Codec",
    "Counts",
    "Ends",
    "Link",
    "LinkEnd",
    "Seen",
    "Stage",
    "Traffic",
    "codecs_in",
    "crossing",
    "on_states",
    "wire_bytes",
]
