"""The cast onto a table of levels that are trained: its arithmetic, its operators, and Inductor's form of them."""
