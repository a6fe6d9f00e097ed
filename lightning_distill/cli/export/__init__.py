"""The command that writes a trained student for use elsewhere."""

from lightning_distill.cli.export.command import run_export

__all__ = ["run_export"]
