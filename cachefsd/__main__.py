"""``python -m cachefsd`` is the command ``cachefsd``."""

from cachefsd.cli.main import main

if __name__ == "__main__":
    main()
