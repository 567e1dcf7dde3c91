"""The protocol: pyfuse3 requests in, engine calls out."""
