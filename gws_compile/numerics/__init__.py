"""The arithmetic: formats, noise, casts, blocks, widths, written once over a few primitives."""
