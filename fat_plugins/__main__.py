"""``python -m fat_plugins``."""

from fat_plugins.cli import main

if __name__ == "__main__":
    main()
