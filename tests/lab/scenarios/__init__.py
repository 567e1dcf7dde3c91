"""Each module is a scenario: ``run(lab)`` on the host, and functions that it calls in the guest."""
