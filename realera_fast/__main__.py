"""``python -m realera_fast``: the command line, without the installed script."""

from realera_fast.cli import main

if __name__ == "__main__":
    main()
