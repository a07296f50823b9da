"""Without a compiler there are no kernels to test; `test_scaffold` holds that they are there where one is."""

from implicit_attention.causal import cpu

collect_ignore_glob = ["test_*.py"] if cpu.problem() else []
