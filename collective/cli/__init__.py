"""The command `collective`: it starts jobs (`collective run`), shows how they are (`collective top`), and calls the
package's tools (`collective info`).

Nothing else in the package imports it. docs/running.md describes it.
"""

__all__: list[str] = []
