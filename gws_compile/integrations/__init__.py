"""What serves other packages' trainers; each module imports its package, which this package does not depend on."""
