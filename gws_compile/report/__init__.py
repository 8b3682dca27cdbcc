"""Seeing: what was rewritten and what was not, as records, tables, metrics, histograms and a page."""
