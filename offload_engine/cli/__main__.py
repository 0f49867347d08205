"""`python -m offload_engine.cli` is `dmoe`."""

from offload_engine.cli import main

main()
