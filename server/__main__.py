"""``python -m server``: the ``darkroom`` command where no script is installed (containers)."""

from server.cli import main

if __name__ == "__main__":
    main()
