"""What the settings of a backend consist of: those of a weight, rules by name, schedules, learned widths."""
