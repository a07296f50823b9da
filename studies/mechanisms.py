"""What should solve each task and what should not, by how the arms work.

In one implicit layer rows look at columns that are made from outputs: a column holds its own token and what its row has
looked up. Under a causal mask that makes two lookups in a row, but rows still ask with their own token alone.
"""

_RECALL = """A value stands right behind its key; when the key comes again, its row has to find the value. So a
value's column has to hold the token before it. *Should solve it:* keys of the token before, the shortest way, or a
convolution on keys that learns to be that; a GRU before the layer,
whose state hands the token on; two lookups in a row, as two layers and an implicit layer make them. *Should not:*
one ordinary layer, whose columns hold their own token alone; a state of fixed size, once it has more pairs to hold
than room: Gated DeltaNet has room for all of them here, a GRU of this width mostly not."""

_BYTES = """Text repeats itself, so that looking up what followed the last such word should help, as in recall.
*Should do best:* arms that make two lookups in a row, the more so the fewer blocks there are, and those that see
neighbouring bytes at once: convolutions and the GRU. (The text is the library of the Python that ran. One in eight
strings of 64 held-out bytes stands in the files to learn from, too.)"""

_DIGITS = "*Should solve it:* every arm; more lookups should help little, since each pixel sees all others at once."

MECHANISMS = {
    "recall-64": _RECALL,
    "recall-128": _RECALL,
    "recall-256": _RECALL,
    "gaps": """A value stands 1 to 7 tokens behind its key, with fillers between. So a value's column has to hold
the key before it, which has to be found by content. *Should solve it:* two lookups in a row, as two layers, a
looped one and an implicit layer make them; a convolution that reaches all distances, 8 taps; a GRU before the
layer, which carries a key to its value. *Should not:* one ordinary layer, and shorter convolutions, which bind the
near pairs only.""",
    "gaps-keys": """A value stands behind a key of two tokens that other keys share, with fillers between. So a
value's column has to hold both tokens of its key, and so has the row that asks. *Should solve it:* two layers or a
looped one, sooner behind a convolution, which tells each row the token before; an implicit layer behind one; a
9-tap convolution of the inputs; a GRU before the layer. *Should not:* one implicit layer alone: its rows ask with
their own token, and half a key fits several pairs.""",
    "khop-48": """k hops are k lookups, each from where the one before has ended, and up to 8 are asked for.
*Should solve it:* a layer that is applied 8 times; values that read outputs, since a row can take over what an
earlier row has found, one hop further. *Should not:* one or two ordinary layers, and queries that read outputs,
which make two lookups.""",
    "parity": """Each bit flips a state. *Should solve it:* what carries a state from token to token and can flip
it: a GRU, alone or before attention, Gated DeltaNet with negative eigenvalues, values that read outputs. *Should
not:* attention of a fixed depth, at lengths it was not trained at ([Hahn 2020](https://arxiv.org/abs/1906.06755));
queries that read outputs keep no state either.""",
    "words-s3": """Each token permutes three things, and the order of tokens matters. *Should solve it:* a GRU,
alone or before attention; in principle values that read outputs. *Should not:* attention, as in parity; one layer
of Gated DeltaNet, which reflects once a token, where a rotation takes two reflections ([Siems et al.
2025](https://arxiv.org/abs/2502.10297)).""",
    "bytes-1": _BYTES,
    "bytes-2": _BYTES,
    "bytes-4": _BYTES,
    "bytes-8": _BYTES,
    "digits-1": _DIGITS,
    "digits-2": _DIGITS,
    "pixels": """Hidden pixels follow from the visible ones. *Should help:* repeated lookups, since a row that has
guessed its pixel can look for others that fit; a looped layer and an implicit one make them.""",
    "masked-bytes": "As for pixels: a row that has guessed its byte can look for others that fit.",
}
