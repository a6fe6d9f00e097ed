"""The command line: ``lightning-distill fit | validate | test | predict | cache | compare | search``."""

from lightning_distill.cli.main import main

__all__ = ["main"]
