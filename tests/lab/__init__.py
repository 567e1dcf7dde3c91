"""The lab: whole machines with persistent memory, whose power can be cut. See README.md."""
